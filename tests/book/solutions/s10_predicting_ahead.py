"""Solutions of chapter 10, right and wrong."""

import torch
from torch import Tensor

import glm


def found(text: list[int], guesses: int, longest: int) -> list[int]:
    ids: list[int] = []
    for length in range(longest, 0, -1):
        starts = [i for i in range(len(text) - length) if text[i : i + length] == text[len(text) - length :]]
        if starts and length < len(text):
            ids = text[starts[-1] + length :][:guesses]
            break
    return ids + [text[-1]] * (guesses - len(ids))


def found_first(text: list[int], guesses: int, longest: int) -> list[int]:
    start = text.index(text[-1]) + 1
    ids = text[start : start + guesses]
    return ids + [text[-1]] * (guesses - len(ids))


def found_shortest(text: list[int], guesses: int, longest: int) -> list[int]:
    return found(text, guesses, 1)


def kept(guesses: list[int], logits: Tensor) -> list[int]:
    tokens: list[int] = []
    for i, choice in enumerate(logits.argmax(-1).tolist()):
        tokens.append(choice)
        if i == len(guesses) or choice != guesses[i]:
            break
    return tokens


def kept_if_right(guesses: list[int], logits: Tensor) -> list[int]:
    return kept(guesses, logits)[:-1]


def kept_wherever_right(guesses: list[int], logits: Tensor) -> list[int]:
    choices = logits.argmax(-1).tolist()
    return [a for a, b in zip(choices, guesses, strict=False) if a == b] + choices[-1:]


def tokens_a_pass(chances: list[float]) -> float:
    mean, reached = 1.0, 1.0
    for p in chances:
        reached *= p
        mean += reached
    return mean


def tokens_of_all_guesses(chances: list[float]) -> float:
    return 1 + sum(chances)


def joined(model: glm.GLM, tokens: Tensor, token_norm: Tensor, stream_norm: Tensor, join: Tensor) -> Tensor:
    assert model.spec.final_norm is not None
    eps = model.spec.final_norm.eps

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    _, states = model(tokens, hidden=True)
    ahead, stream = norm(model.embedding(tokens[:, 1:]), token_norm), norm(states[-1][:, :-1], stream_norm)
    return torch.cat((ahead, stream), dim=-1) @ join.T


def joined_the_other_way(
    model: glm.GLM, tokens: Tensor, token_norm: Tensor, stream_norm: Tensor, join: Tensor
) -> Tensor:
    return joined(model, tokens, token_norm, stream_norm, join.roll(join.shape[0], dims=1))


def joined_with_the_same_token(
    model: glm.GLM, tokens: Tensor, token_norm: Tensor, stream_norm: Tensor, join: Tensor
) -> Tensor:
    late = torch.cat((tokens[:, 1:], tokens[:, -1:]), dim=1)
    return joined(model, late, token_norm, stream_norm, join)


RIGHT = {"10.1": [found], "10.2": [kept], "10.3": [tokens_a_pass], "10.4": [joined]}
WRONG = {
    "10.1": [(found_first, "result"), (found_shortest, "result")],
    "10.2": [(kept_if_right, "result"), (kept_wherever_right, "result")],
    "10.3": [(tokens_of_all_guesses, "result")],
    "10.4": [(joined_the_other_way, "result"), (joined_with_the_same_token, "result")],
}
