"""Solutions of chapter 14, right and wrong."""

import math

import torch
from torch import Tensor


def carried_softmax(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    T, K = q.shape
    m, w, a = torch.full((T, 1), -math.inf).double(), torch.zeros(T, 1).double(), torch.zeros(T, K).double()
    i = torch.arange(T)[:, None]
    for first in range(0, T, block):
        j = torch.arange(first, min(first + block, T))
        s = (q @ k[j].T / math.sqrt(K)).masked_fill(j > i, -math.inf)
        top = torch.maximum(m, s.amax(1, keepdim=True))
        keep, p = torch.exp(m - top), torch.exp(s - top)
        w, a, m = keep * w + p.sum(1, keepdim=True), keep * a + p @ v[j], top
    return a / w, (m + w.log())[:, 0]


def old_sum_not_moved(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    T, K = q.shape
    m, w, a = torch.full((T, 1), -math.inf).double(), torch.zeros(T, 1).double(), torch.zeros(T, K).double()
    i = torch.arange(T)[:, None]
    for first in range(0, T, block):
        j = torch.arange(first, min(first + block, T))
        s = (q @ k[j].T / math.sqrt(K)).masked_fill(j > i, -math.inf)
        top = torch.maximum(m, s.amax(1, keepdim=True))
        p = torch.exp(s - top)
        w, a, m = w + p.sum(1, keepdim=True), a + p @ v[j], top
    return a / w, (m + w.log())[:, 0]


def without_a_maximum(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    w = torch.exp((q @ k.T / math.sqrt(q.shape[1]) * 4).tril()).tril()
    return w @ v / w.sum(1, keepdim=True), w.sum(1).log()


def lse_of_the_shifted(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    y, lse = carried_softmax(q, k, v, block)
    return y, lse - (q @ k.T / math.sqrt(q.shape[1])).masked_fill(~torch.ones(len(q), len(q)).bool().tril(), -1e9).amax(
        1
    )


def joined(m: Tensor, z: Tensor, a: Tensor) -> Tensor:
    move = torch.exp(m - m.max())
    return move @ a / (move @ z)


def mean_of_the_splits(m: Tensor, z: Tensor, a: Tensor) -> Tensor:
    real = z > 0
    return (a[real] / z[real, None]).mean(0)


def not_moved(m: Tensor, z: Tensor, a: Tensor) -> Tensor:
    return a.sum(0) / z.sum()


def overflows(m: Tensor, z: Tensor, a: Tensor) -> Tensor:
    move = torch.exp(m)
    return move @ a / (move @ z)


def words(codes: Tensor) -> Tensor:
    chunks = codes.unflatten(1, (-1, 4, 32))
    return sum(chunks[:, :, i] << (4 * i) for i in range(4)).transpose(0, 1)  # type: ignore[no-any-return]


def neighbours_together(codes: Tensor) -> Tensor:
    chunks = codes.unflatten(1, (-1, 32, 4))
    return sum(chunks[..., i] << (4 * i) for i in range(4)).transpose(0, 1)  # type: ignore[no-any-return]


def highest_bits_first(codes: Tensor) -> Tensor:
    chunks = codes.unflatten(1, (-1, 4, 32))
    return sum(chunks[:, :, i] << (12 - 4 * i) for i in range(4)).transpose(0, 1)  # type: ignore[no-any-return]


def outputs_first(codes: Tensor) -> Tensor:
    return words(codes).transpose(0, 1)


def blocks_of_keys(first: int, rows: int, columns: int) -> tuple[int, int]:
    whole = (first + 1) // columns
    return whole, -(-(first + rows) // columns) - whole


def all_blocks(first: int, rows: int, columns: int) -> tuple[int, int]:
    return 0, -(-(first + rows) // columns)


def by_the_last_query(first: int, rows: int, columns: int) -> tuple[int, int]:
    return (first + rows) // columns, -(-(first + rows) // columns) - (first + rows) // columns


RIGHT = {"14.1": [carried_softmax], "14.2": [joined], "14.3": [words], "14.4": [blocks_of_keys]}
WRONG = {
    "14.1": [(old_sum_not_moved, "y"), (without_a_maximum, "y"), (lse_of_the_shifted, "lse")],
    "14.2": [(mean_of_the_splits, "result"), (not_moved, "result"), (overflows, "result")],
    "14.3": [(neighbours_together, "result"), (highest_bits_first, "result"), (outputs_first, "result")],
    "14.4": [(all_blocks, "whole"), (by_the_last_query, "whole")],
}
