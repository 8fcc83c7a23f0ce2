"""What is right in the exercises of chapter 15, by the engine itself."""

from collections.abc import Iterator

import torch
from torch import Tensor

from docs.check import Case, Exercise
from glm.drafting import PromptLookup
from glm.runtime.sampling import Rules, sampled
from glm.runtime.seats import common
from glm.runtime.slots import append


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def remember_cases() -> Iterator[Case]:
    """One token and several; rows of one length and of many, up to the last place, and past it."""
    for seed, (T, at) in enumerate(((1, [3, 3]), (1, [0, 6, 4]), (3, [2, 0, 4]), (1, [7, 1]))):
        buffer, x = random(len(at), 2, 7, 4, seed=seed), random(len(at), T, 2, 4, seed=seed + 50)
        places = torch.tensor(at)
        after = buffer.clone()
        append(after, x, places)
        yield Case({"buffer": buffer, "x": x, "at": places}, {"result": after})


def choose_cases() -> Iterator[Case]:
    """Greedy and sampled rows side by side, with each rule and with several."""
    rules = (
        [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.0, 3, 0.5)],
        [(1.0, 2, 1.0), (0.7, 5, 1.0), (1.5, 1, 1.0)],
        [(1.0, 0, 0.3), (1.3, 0, 0.8), (0.6, 0, 0.999)],
        [(2.0, 4, 0.7), (1.0, 6, 0.9), (0.8, 3, 0.6)],
    )
    for seed, rows in enumerate(rules * 3):
        B, V = len(rows), 11
        logits = 2 * random(B, V, seed=seed)
        luck = torch.rand(B, 1, generator=torch.Generator().manual_seed(seed + 99), dtype=torch.float64)
        temperature, top_p = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 2))
        top_k = torch.tensor([row[1] for row in rows])
        seen = torch.zeros(B, V, dtype=torch.bool)
        given = Rules(temperature, top_k, top_p, torch.ones(B, dtype=torch.float64), luck, seen)
        ids = sampled(logits, given, torch.zeros(B, dtype=torch.long), sort=True)
        arguments = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "luck": luck[:, 0]}
        yield Case(arguments, {"result": ids})


def guess_cases() -> Iterator[Case]:
    """Found far back and just now, with three ids, two and one; not found; fewer than are wanted."""
    texts = (
        [5], [5, 6], [1, 2, 3, 4, 1, 2, 3], [1, 2, 9, 8, 2, 7, 7, 1, 2], [4, 4, 4, 4], [1, 2, 3, 9, 2, 3, 8, 1, 2, 3],
        [1, 2, 3, 9, 9, 1, 2, 3, 4, 5, 6, 2, 3],
    )  # fmt: skip
    for text in texts:
        for guesses, longest in ((3, 3), (5, 1), (1, 2)):
            found = PromptLookup(guesses, longest).found(list(text))
            yield Case({"text": list(text), "guesses": guesses, "longest": longest}, {"result": found})


def not_read_again_cases() -> Iterator[Case]:
    """Nothing, a part, all of the text, all of the prompt."""
    for prompt, text in (
        ([1, 2, 3], []), ([1, 2, 3, 4], [1, 2, 9, 4]), ([1, 2, 3, 4], [1, 2]), ([1, 2, 3], [1, 2, 3]),
        ([1, 2], [1, 2, 3, 4]), ([1], [1]), ([7, 2, 3], [1, 2, 3]),
    ):  # fmt: skip
        yield Case({"prompt": prompt, "text": text}, {"result": common(prompt, text)})


EXERCISES = [
    Exercise("15.1", "remember", cases=remember_cases),
    Exercise("15.2", "choose", cases=choose_cases),
    Exercise("15.3", "guess", cases=guess_cases),
    Exercise("15.4", "not_read_again", cases=not_read_again_cases),
]
