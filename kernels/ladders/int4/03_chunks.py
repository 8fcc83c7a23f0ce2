"""A 16-bit word holds four columns that lie 32 apart, so a tile of words is four tiles of numbers with no shuffling."""

from glm_kernels.dispatch import jit, tl
from glm_kernels.packing import words_of
from torch import Tensor


@jit
def kernel(x, words, scales, y, D, F, groups, group, outs: tl.constexpr):  # type: ignore[no-untyped-def]
    """`outs` outputs of one row of x: a tile of words is [outs, 32], one piece of memory."""
    o, n, j = tl.program_id(0) * outs + tl.arange(0, outs), tl.program_id(1), tl.arange(0, 32)
    inside = o < F
    acc = tl.zeros([outs], tl.float32)
    for t in range(0, tl.cdiv(D, 128)):
        w = tl.load(words + (t * F + o[:, None]) * 32 + j[None, :], mask=inside[:, None], other=0).to(tl.int32)
        for i in tl.static_range(4):
            column = t * 128 + i * 32
            scale = tl.load(scales + o * groups + tl.minimum(column, D - 1) // group, mask=inside, other=0.0)
            q = (((w >> (4 * i)) & 15) - 8).to(tl.float32)
            values = tl.load(x + n * D + column + j, mask=column + j < D, other=0.0).to(tl.float32)
            acc += tl.sum(q * values[None, :], 1) * scale.to(tl.float32)
    tl.store(y + n * F + o, acc.to(y.dtype.element_ty), mask=inside)


def int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [N, D], packed uint8 [F, D / 2], scales [F, groups], all contiguous -> y [N, F]."""
    (N, D), F = x.shape, packed.shape[0]
    words, groups, y = words_of(packed, 4), scales.shape[1], x.new_empty(N, F)
    kernel[(-(-F // 32), N)](x, words, scales, y, D, F, groups, D // groups, 32)
    return y
