"""Solutions of chapter 15, right and wrong."""

import torch
from torch import Tensor


def remember(buffer: Tensor, x: Tensor, at: Tensor) -> Tensor:
    last = buffer.shape[2] - 1
    for row, first in enumerate(at.tolist()):
        for i in range(x.shape[1]):
            buffer[row, :, min(first + i, last)] = x[row, i]
    return buffer


def at_the_longest(buffer: Tensor, x: Tensor, at: Tensor) -> Tensor:
    return remember(buffer, x, at.amax().expand_as(at))


def backwards(buffer: Tensor, x: Tensor, at: Tensor) -> Tensor:
    return remember(buffer, x.flip(1), at)


def first_row_for_all(buffer: Tensor, x: Tensor, at: Tensor) -> Tensor:
    return remember(buffer, x[:1].expand_as(x), at)


def choose(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, luck: Tensor) -> Tensor:
    ids = []
    for b, row in enumerate(logits):
        if temperature[b] == 0:
            ids.append(int(row.argmax()))
            continue
        x = row / temperature[b]
        order = x.argsort(descending=True)
        keep = order[: int(top_k[b]) or len(row)]
        likely = x[keep].softmax(0).cumsum(0)
        if top_p[b] < 1:
            keep = keep[: int((likely < top_p[b]).sum()) + 1]
        p = torch.zeros_like(x)
        p[keep] = x[keep].softmax(0)
        ids.append(int((p.cumsum(0) > luck[b] * p.sum()).nonzero()[0]))
    return torch.tensor(ids)


def always_greedy(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, luck: Tensor) -> Tensor:
    return logits.argmax(-1)


def first_rows_rules(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, luck: Tensor) -> Tensor:
    return choose(logits, *(x[:1].expand_as(x) for x in (temperature, top_k, top_p)), luck)


def without_top_p(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, luck: Tensor) -> Tensor:
    return choose(logits, temperature, top_k, torch.ones_like(top_p), luck)


def without_top_k(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, luck: Tensor) -> Tensor:
    return choose(logits, temperature, torch.zeros_like(top_k), top_p, luck)


def guess(text: list[int], guesses: int, longest: int) -> list[int]:
    for length in range(min(longest, len(text) - 1), 0, -1):
        places = [i for i in range(len(text) - length) if text[i : i + length] == text[-length:]]
        if places:
            found = text[places[-1] + length :][:guesses]
            return found + text[-1:] * (guesses - len(found))
    return text[-1:] * guesses


def earliest_place(text: list[int], guesses: int, longest: int) -> list[int]:
    for length in range(min(longest, len(text) - 1), 0, -1):
        places = [i for i in range(len(text) - length) if text[i : i + length] == text[-length:]]
        if places:
            found = text[places[0] + length :][:guesses]
            return found + text[-1:] * (guesses - len(found))
    return text[-1:] * guesses


def shortest_first(text: list[int], guesses: int, longest: int) -> list[int]:
    return guess(text, guesses, 1)


def not_filled_up(text: list[int], guesses: int, longest: int) -> list[int]:
    return guess(text, guesses, longest)[: max(len(text) - 2, 1)]


def not_read_again(prompt: list[int], text: list[int]) -> int:
    same = 0
    while same < min(len(prompt) - 1, len(text)) and prompt[same] == text[same]:
        same += 1
    return same


def not_even_the_last(prompt: list[int], text: list[int]) -> int:
    return not_read_again([*prompt, -1], text)


def wherever_alike(prompt: list[int], text: list[int]) -> int:
    return sum(a == b for a, b in zip(prompt[:-1], text, strict=False))


RIGHT = {"15.1": [remember], "15.2": [choose], "15.3": [guess], "15.4": [not_read_again]}
WRONG = {
    "15.1": [(at_the_longest, "result"), (backwards, "result"), (first_row_for_all, "result")],
    "15.2": [
        (always_greedy, "result"), (first_rows_rules, "result"), (without_top_p, "result"), (without_top_k, "result"),
    ],
    "15.3": [(earliest_place, "result"), (shortest_first, "result"), (not_filled_up, "result")],
    "15.4": [(not_even_the_last, "result"), (wherever_alike, "result")],
}  # fmt: skip
