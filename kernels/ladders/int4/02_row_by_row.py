"""The matrix is never written out: a program makes the numbers of one row as it multiplies them with one row of x."""

from glm_kernels.dispatch import jit, tl
from torch import Tensor


@jit
def kernel(x, packed, scales, y, D, F, group, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """One element of y."""
    o, n = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros([size], tl.float32)
    for first in range(0, D // 2, size):
        b = first + tl.arange(0, size)
        inside = b < D // 2
        code = tl.load(packed + o * (D // 2) + b, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + o * (D // group) + 2 * b // group, mask=inside, other=0.0).to(tl.float32)
        even = tl.load(x + n * D + 2 * b, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(x + n * D + 2 * b + 1, mask=inside, other=0.0).to(tl.float32)
        acc += (((code & 15) - 8).to(tl.float32) * even + ((code >> 4) - 8).to(tl.float32) * odd) * scale
    tl.store(y + n * F + o, tl.sum(acc).to(y.dtype.element_ty))


def int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [N, D], packed uint8 [F, D / 2], scales [F, groups], all contiguous -> y [N, F]."""
    (N, D), F = x.shape, packed.shape[0]
    y = x.new_empty(N, F)
    kernel[(F, N)](x, packed, scales, y, D, F, D // scales.shape[1], 128)
    return y
