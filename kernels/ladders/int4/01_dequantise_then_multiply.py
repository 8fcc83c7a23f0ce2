"""A kernel writes the whole matrix out as numbers, and torch multiplies with it."""

from glm_kernels.dispatch import jit, tl
from torch import Tensor


@jit
def kernel(packed, scales, w, D, group, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of the matrix, byte by byte: the even column is in the low nibble."""
    o = tl.program_id(0)
    for first in range(0, D // 2, size):
        b = first + tl.arange(0, size)
        inside = b < D // 2
        code = tl.load(packed + o * (D // 2) + b, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + o * (D // group) + 2 * b // group, mask=inside, other=0.0).to(tl.float32)
        low, high = ((code & 15) - 8).to(tl.float32), ((code >> 4) - 8).to(tl.float32)
        tl.store(w + o * D + 2 * b, (low * scale).to(w.dtype.element_ty), mask=inside)
        tl.store(w + o * D + 2 * b + 1, (high * scale).to(w.dtype.element_ty), mask=inside)


def int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [N, D], packed uint8 [F, D / 2], scales [F, groups], all contiguous -> y [N, F]."""
    F, D = packed.shape[0], x.shape[1]
    w = x.new_empty(F, D)
    kernel[(F,)](packed, scales, w, D, D // scales.shape[1], 128)
    return x @ w.T
