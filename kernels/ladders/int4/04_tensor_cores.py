"""A tile of numbers, exact integers, is the left operand of a tensor core, so more rows cost little more."""

from glm_kernels.dispatch import jit, tl
from glm_kernels.packing import words_of
from torch import Tensor


@jit
def kernel(  # type: ignore[no-untyped-def]
    x, words, scales, y, N, D, F, groups, group, rows: tl.constexpr, outs: tl.constexpr
):  # fmt: skip
    """`outs` outputs of `rows` rows: the tile of numbers is the left operand, and x, on its side, the right one."""
    o, n = tl.program_id(0) * outs + tl.arange(0, outs), tl.program_id(1) * rows + tl.arange(0, rows)
    j, inside, there = tl.arange(0, 32), o < F, n < N
    acc = tl.zeros([outs, rows], tl.float32)
    for t in range(0, tl.cdiv(D, 128)):
        w = tl.load(words + (t * F + o[:, None]) * 32 + j[None, :], mask=inside[:, None], other=0).to(tl.int32)
        for i in tl.static_range(4):
            column = t * 128 + i * 32
            scale = tl.load(scales + o * groups + tl.minimum(column, D - 1) // group, mask=inside, other=0.0)
            q = (((w >> (4 * i)) & 15) - 8).to(x.dtype.element_ty)
            seen = there[:, None] & (column + j < D)[None, :]
            values = tl.load(x + n[:, None] * D + column + j[None, :], mask=seen, other=0.0)
            acc += tl.dot(q, tl.trans(values), input_precision="ieee") * scale.to(tl.float32)[:, None]
    tl.store(y + n[None, :] * F + o[:, None], acc.to(y.dtype.element_ty), mask=inside[:, None] & there[None, :])


def int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [N, D], packed uint8 [F, D / 2], scales [F, groups], all contiguous -> y [N, F]."""
    (N, D), F = x.shape, packed.shape[0]
    words, groups, y = words_of(packed, 4), scales.shape[1], x.new_empty(N, F)
    kernel[(-(-F // 64), -(-N // 16))](x, words, scales, y, N, D, F, groups, D // groups, 16, 64)
    return y
