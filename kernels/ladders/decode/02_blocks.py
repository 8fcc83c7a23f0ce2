"""A block of 64 keys at a time: wide loads, and one new maximum for all of them."""

import torch
from glm_kernels.dispatch import jit, tl
from torch import Tensor


@jit
def kernel(  # type: ignore[no-untyped-def]
    q, k, v, length, y, S, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr
):
    """y of one head."""
    b, h = tl.program_id(0), tl.program_id(1)
    c, n = tl.arange(0, K), tl.arange(0, N)
    x = tl.load(q + (b * H + h) * K + c).to(tl.float32) * K**-0.5
    cache = (b * G + h // (H // G)) * S * K
    end = tl.load(length + b)

    m, z, acc = -float("inf"), 0.0, tl.zeros([K], tl.float32)
    for i in range(tl.cdiv(end, N)):
        j = i * N + n
        place, there = cache + j[:, None] * K + c, (j < end)[:, None]
        keys = tl.load(k + place, mask=there, other=0.0).to(tl.float32)
        values = tl.load(v + place, mask=there, other=0.0).to(tl.float32)
        s = tl.where(j < end, tl.sum(x * keys, 1), -float("inf"))
        top = tl.maximum(m, tl.max(s))
        keep, p = tl.exp(m - top), tl.exp(s - top)
        z = z * keep + tl.sum(p)
        acc = acc * keep + tl.sum(p[:, None] * values, 0)
        m = top
    tl.store(y + (b * H + h) * K + c, (acc / z).to(y.dtype.element_ty))


def decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """q [B, H, 1, K], k and v [B, G, S, K], length [B], all contiguous, K a power of two."""
    (B, H, _, K), (G, S) = q.shape, k.shape[1:3]
    y = torch.empty_like(q)
    kernel[(B, H)](q, k, v, length, y, S, H, G, K, 64)
    return y
