"""One program a query head walks along the keys one by one and keeps a running softmax."""

import torch
from glm_kernels.dispatch import jit, tl
from torch import Tensor


@jit
def kernel(q, k, v, length, y, S, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """y of one head; the keys of head h are those of group h // (H / G)."""
    b, h = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, K)
    x = tl.load(q + (b * H + h) * K + c).to(tl.float32) * K**-0.5
    cache = (b * G + h // (H // G)) * S * K + c

    m, z, acc = -float("inf"), 0.0, tl.zeros([K], tl.float32)
    for j in range(tl.load(length + b)):
        s = tl.sum(x * tl.load(k + cache + j * K).to(tl.float32))
        top = tl.maximum(m, s)
        keep, p = tl.exp(m - top), tl.exp(s - top)
        z = z * keep + p
        acc = acc * keep + p * tl.load(v + cache + j * K).to(tl.float32)
        m = top
    tl.store(y + (b * H + h) * K + c, (acc / z).to(y.dtype.element_ty))


def decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """q [B, H, 1, K], k and v [B, G, S, K], length [B], all contiguous, K a power of two."""
    (B, H, _, K), (G, S) = q.shape, k.shape[1:3]
    y = torch.empty_like(q)
    kernel[(B, H)](q, k, v, length, y, S, H, G, K)
    return y
