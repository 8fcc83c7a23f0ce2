"""Solutions of chapter 8, right and wrong."""

from collections.abc import Callable

import torch
from torch import Tensor

from glm.latent_attention import LatentAttention


def remembered(
    x: Tensor, down: Tensor, weight: Tensor, eps: float, rotary: int, turn: Callable[[Tensor], Tensor]
) -> Tensor:
    y = x @ down.T
    c, r = y[:, : len(weight)], y[:, len(weight) :]
    c = weight * c / (c.square().mean(-1, keepdim=True) + eps).sqrt()
    return torch.cat((c, turn(r)), dim=-1)


def remembered_unturned(
    x: Tensor, down: Tensor, weight: Tensor, eps: float, rotary: int, turn: Callable[[Tensor], Tensor]
) -> Tensor:
    return remembered(x, down, weight, eps, rotary, lambda v: v)


def remembered_unnormalised(
    x: Tensor, down: Tensor, weight: Tensor, eps: float, rotary: int, turn: Callable[[Tensor], Tensor]
) -> Tensor:
    c, r = (x @ down.T).split((len(weight), rotary), dim=-1)
    return torch.cat((c, turn(r)), dim=-1)


def remembered_without_eps(
    x: Tensor, down: Tensor, weight: Tensor, eps: float, rotary: int, turn: Callable[[Tensor], Tensor]
) -> Tensor:
    return remembered(x, down, weight, 1e-6, rotary, turn)


def shares(scores: Tensor) -> Tensor:
    T, S = scores.shape[-2:]
    return scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf).softmax(-1)


def naive(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> Tensor:
    c, r = cache[:, :rank], cache[:, rank:]
    N = q.shape[-1] - r.shape[-1]
    kv = c @ up.transpose(1, 2)  # [H S N+V]
    k = torch.cat((kv[..., :N], r.expand(len(up), -1, -1)), dim=-1)
    return shares(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5) @ kv[..., N:]


def naive_without_position(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> Tensor:
    return naive(q, cache * (torch.arange(cache.shape[1]) < rank), up, rank)


def naive_from_the_beginning(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> Tensor:
    return naive(q, cache[: q.shape[1]], up, rank)


def absorbed(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    P = cache.shape[1] - rank
    N = q.shape[-1] - P
    moved = torch.cat((q[..., :N] @ up[:, :N], q[..., N:]), dim=-1)  # [H T R+P]
    found = shares(moved @ cache.T / q.shape[-1] ** 0.5) @ cache[:, :rank]
    return found, found @ up[:, N:].transpose(1, 2)


def absorbed_at_another_scale(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return absorbed(q * (q.shape[-1] / cache.shape[1]) ** 0.5, cache, up, rank)


def absorbed_by_the_keys(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    found, result = absorbed(q, cache, up, rank)
    return found, found @ up[:, : result.shape[-1]].transpose(1, 2)


def break_even(mixer: LatentAttention, keys: int) -> int:
    N, P, R, V = mixer.plain, mixer.rotary, mixer.rank, mixer.value
    best = 0
    for T in range(1, keys + 1):
        if T * keys * 2 * (R + P) + T * R * (N + V) < T * keys * (N + P + V) + keys * R * (N + V):
            best = T
    return best


def break_even_by_pairs(mixer: LatentAttention, keys: int) -> int:
    return keys if 2 * (mixer.rank + mixer.rotary) < mixer.plain + mixer.rotary + mixer.value else 0


RIGHT = {"8.1": [remembered], "8.2": [naive], "8.3": [absorbed], "8.4": [break_even]}
WRONG = {
    "8.1": [
        (remembered_unturned, "result"),
        (remembered_unnormalised, "result"),
        (remembered_without_eps, "result"),
    ],
    "8.2": [(naive_without_position, "result"), (naive_from_the_beginning, "result")],
    "8.3": [(absorbed_at_another_scale, "found"), (absorbed_by_the_keys, "result")],
    "8.4": [(break_even_by_pairs, "result")],
}
