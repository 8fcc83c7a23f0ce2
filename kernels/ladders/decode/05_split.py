"""The keys are split among programs until every multiprocessor has work, and a second kernel joins what they found."""

import torch
from glm_kernels.dispatch import jit, tl
from torch import Tensor

SPLITS = 16


@jit
def kernel(  # type: ignore[no-untyped-def]
    q, k, v, length, found, S, R, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, M: tl.constexpr, P: tl.constexpr
):
    """The accumulator, the sum and the maximum of one group's rows over one of P equal shares of the keys."""
    b, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, n, r = tl.arange(0, K), tl.arange(0, N), tl.arange(0, M)
    real = (r < R)[:, None]
    x = tl.load(q + ((b * G + g) * R + r)[:, None] * K + c, mask=real, other=0.0)
    cache = (b * G + g) * S * K
    share = tl.cdiv(tl.cdiv(tl.load(length + b), P), N) * N
    begin = split * share
    end = tl.minimum(begin + share, tl.load(length + b))

    m, z, acc = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, K], tl.float32)
    for i in tl.range(0, tl.cdiv(tl.maximum(end - begin, 0), N), num_stages=3):
        j = begin + i * N + n
        place, there = cache + j[:, None] * K + c, (j < end)[:, None]
        keys = tl.load(k + place, mask=there, other=0.0)
        values = tl.load(v + place, mask=there, other=0.0)
        s = tl.dot(x, tl.trans(keys), input_precision="ieee") * (K**-0.5 * 1.4426950408889634)
        s = tl.where((j < end)[None, :], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        keep, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
        z = z * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
        m = top
    place = found + (((b * G + g) * R + r) * P + split) * (K + 2)
    tl.store(place[:, None] + c, acc, mask=real)
    tl.store(place + K, z, mask=r < R)
    tl.store(place + K + 1, m, mask=r < R)


@jit
def join(found, y, K: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """y of one head: what each split found, moved to the maximum of all."""
    row, c = tl.program_id(0), tl.arange(0, K)
    place = found + (row * P + tl.arange(0, P)) * (K + 2)
    m = tl.load(place + K + 1)
    move = tl.exp2(m - tl.max(m))
    z = tl.sum(move * tl.load(place + K))
    acc = tl.sum(move[:, None] * tl.load(place[:, None] + c), 0)
    tl.store(y + row * K + c, (acc / z).to(y.dtype.element_ty))


def decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """q [B, H, 1, K], k and v [B, G, S, K], length [B], all contiguous, K a power of two."""
    (B, H, _, K), (G, S) = q.shape, k.shape[1:3]
    y, R = torch.empty_like(q), H // G
    found = q.new_empty(B * H, SPLITS, K + 2, dtype=torch.float32)
    M = max(16, 1 << (R - 1).bit_length())
    kernel[(B, G, SPLITS)](q, k, v, length, found, S, R, G, K, 64, M, SPLITS)
    join[(B * H,)](found, y, K, SPLITS)
    return y
