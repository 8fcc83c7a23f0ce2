"""One program a query walks along the keys, 64 at a time, and keeps a running softmax."""

import torch
from glm_kernels.dispatch import jit, tl
from torch import Tensor


@jit
def kernel(q, k, v, y, T, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """y of one query; the keys of head h are those of group h // (H / G)."""
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, n = tl.arange(0, K), tl.arange(0, N)
    row = ((b * H + h) * T + i) * K + c
    x = tl.load(q + row).to(tl.float32) * K**-0.5
    group = (b * G + h // (H // G)) * T * K

    m, w, a = -float("inf"), 0.0, tl.zeros([K], tl.float32)
    for block in range(tl.cdiv(i + 1, N)):
        j = block * N + n
        place, seen = group + j[:, None] * K + c, j <= i
        keys = tl.load(k + place, mask=seen[:, None], other=0.0).to(tl.float32)
        values = tl.load(v + place, mask=seen[:, None], other=0.0).to(tl.float32)
        s = tl.where(seen, tl.sum(x * keys, 1), -float("inf"))
        top = tl.maximum(m, tl.max(s))
        keep, p = tl.exp(m - top), tl.exp(s - top)
        w = w * keep + tl.sum(p)
        a = a * keep + tl.sum(p[:, None] * values, 0)
        m = top
    tl.store(y + row, (a / w).to(y.dtype.element_ty))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal: q [B, H, T, K], k and v [B, G, T, K], all contiguous, K a power of two from 16 on."""
    (B, H, T, K), G = q.shape, k.shape[1]
    y = torch.empty_like(q)
    kernel[(T, H, B)](q, k, v, y, T, H, G, K, 64)
    return y
