"""Blocks of 128 queries on eight warps, keys requested three blocks ahead, the longest rows first."""

import torch
from glm_kernels.dispatch import jit, tl
from torch import Tensor


@jit
def kernel(  # type: ignore[no-untyped-def]
    q, k, v, y, T, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """y of a block of M queries of one head."""
    block, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, n = tl.arange(0, K), tl.arange(0, N)
    i = block * M + tl.arange(0, M)
    rows, there = ((b * H + h) * T + i)[:, None] * K + c, (i < T)[:, None]
    x = tl.load(q + rows, mask=there, other=0.0)
    group = (b * G + h // (H // G)) * T * K

    m, w, a = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, K], tl.float32)
    for block_of_keys in range(block * M // N):  # all of these keys are before all of these queries
        j = block_of_keys * N + n
        place = group + j[:, None] * K + c
        keys, values = tl.load(k + place), tl.load(v + place)
        s = tl.dot(x, tl.trans(keys), input_precision="ieee") * (K**-0.5 * 1.4426950408889634)
        top = tl.maximum(m, tl.max(s, 1))
        keep, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
        w = w * keep + tl.sum(p, 1)
        a = tl.dot(p.to(values.dtype), values, a * keep[:, None], input_precision="ieee")
        m = top
    for block_of_keys in range(block * M // N, tl.cdiv(tl.minimum(block * M + M, T), N)):
        j = block_of_keys * N + n
        place = group + j[:, None] * K + c
        keys = tl.load(k + place, mask=(j < T)[:, None], other=0.0)
        values = tl.load(v + place, mask=(j < T)[:, None], other=0.0)
        s = tl.dot(x, tl.trans(keys), input_precision="ieee") * (K**-0.5 * 1.4426950408889634)
        s = tl.where(j[None, :] <= i[:, None], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        keep, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
        w = w * keep + tl.sum(p, 1)
        a = tl.dot(p.to(values.dtype), values, a * keep[:, None], input_precision="ieee")
        m = top
    tl.store(y + rows, (a / w[:, None]).to(y.dtype.element_ty), mask=there)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal: q [B, H, T, K], k and v [B, G, T, K], all contiguous, K a power of two from 16 on."""
    (B, H, T, K), G = q.shape, k.shape[1]
    y = torch.empty_like(q)
    kernel[(-(-T // 128), H, B)](q, k, v, y, T, H, G, K, 128, 64, num_warps=8, num_stages=3)
    return y
