"""The loop asks for the next blocks while it computes with this one, and 2^x takes the place of exp."""

import torch
from glm_kernels.dispatch import jit, tl
from torch import Tensor


@jit
def kernel(  # type: ignore[no-untyped-def]
    q, k, v, length, y, S, R, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, M: tl.constexpr
):
    """y of the R heads of one group, in a tile of M rows."""
    b, g = tl.program_id(0), tl.program_id(1)
    c, n, r = tl.arange(0, K), tl.arange(0, N), tl.arange(0, M)
    rows, real = ((b * G + g) * R + r)[:, None] * K + c, (r < R)[:, None]
    x = tl.load(q + rows, mask=real, other=0.0)
    cache = (b * G + g) * S * K
    end = tl.load(length + b)

    m, z, acc = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, K], tl.float32)
    for i in tl.range(0, tl.cdiv(end, N), num_stages=3):
        j = i * N + n
        place, there = cache + j[:, None] * K + c, (j < end)[:, None]
        keys = tl.load(k + place, mask=there, other=0.0)
        values = tl.load(v + place, mask=there, other=0.0)
        s = tl.dot(x, tl.trans(keys), input_precision="ieee") * (K**-0.5 * 1.4426950408889634)  # s log₂e
        s = tl.where((j < end)[None, :], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        keep, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
        z = z * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
        m = top
    tl.store(y + rows, (acc / z[:, None]).to(y.dtype.element_ty), mask=real)


def decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """q [B, H, 1, K], k and v [B, G, S, K], length [B], all contiguous, K a power of two."""
    (B, H, _, K), (G, S) = q.shape, k.shape[1:3]
    y, R = torch.empty_like(q), H // G
    kernel[(B, G)](q, k, v, length, y, S, R, G, K, 64, max(16, 1 << (R - 1).bit_length()))
    return y
