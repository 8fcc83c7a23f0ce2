"""Splits: programs that share the columns of a matrix leave their parts, and the last to be done adds them.

Always in the same order, first to last: the result does not depend on which of them is last. Used by the products of
`dense_matmul.py` and `packed_matmul.py`. Parts are float32 [splits, N, height], and with a norm squares
[splits, blocks of outputs, N]: who adds them up is of the same block.
"""

from glm_kernels.dispatch import jit, tl


@jit
def joined(  # type: ignore[no-untyped-def]
    partial, n, there, o, outputs, plane, row, splits, rows: tl.constexpr, outs: tl.constexpr
):  # fmt: skip
    """The sum of what all splits left, first to last."""
    acc = tl.zeros([outs, rows], tl.float32)
    for k in range(splits):
        at = partial + tl.cast(k, tl.int64) * plane + n[None, :] * row + o[:, None]
        acc += tl.load(at, mask=there[None, :] & (o < outputs)[:, None], other=0.0, cache_modifier=".cg")
    return acc


@jit
def joined_squares(squares, n, there, plane, splits, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of the rows' squares."""
    square = tl.zeros([rows], tl.float32)
    for k in range(splits):
        square += tl.load(squares + tl.cast(k, tl.int64) * plane + n, mask=there, other=0.0, cache_modifier=".cg")
    return square


@jit
def join(  # type: ignore[no-untyped-def]
    acc, up, square, partial, squares, counter, n, there, o, outputs, N, height, splits,
    rows: tl.constexpr, outs: tl.constexpr, both: tl.constexpr,
):  # fmt: skip
    """Leave acc [outs, rows], with `both` up, which stands `outputs` further on, and unless squares is None square.

    Returns whether this program is the last of its block, and then the sums over all splits of acc, up and square.
    """
    part = tl.program_id(2)
    plane = tl.cast(N, tl.int64) * height
    at = partial + part.to(tl.int64) * plane + n[None, :] * height + o[:, None]
    tl.store(at, acc, mask=(o < outputs)[:, None] & there[None, :])
    if both:
        tl.store(at + outputs, up, mask=(o < outputs)[:, None] & there[None, :])
    if squares is not None:
        squares += tl.program_id(1).to(tl.int64) * N
        squares_plane = tl.num_programs(1).to(tl.int64) * N
        tl.store(squares + part * squares_plane + n, square, mask=there)
    tl.debug_barrier()
    tally = counter + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    finished = tl.atomic_add(tally, 1) == splits - 1
    if finished:
        tl.store(tally, 0)  # as the next launch wants it
        acc = joined(partial, n, there, o, outputs, plane, height, splits, rows, outs)
        if both:
            up = joined(partial + outputs, n, there, o, outputs, plane, height, splits, rows, outs)
        if squares is not None:
            square = joined_squares(squares, n, there, squares_plane, splits, rows)
    return finished, acc, up, square
