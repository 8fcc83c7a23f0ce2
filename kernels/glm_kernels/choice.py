"""The likeliest token: the id of the largest of V logits, and whether all of them are numbers.

    id = min { i : x_i = max_j x_j },  or -1 where some x_j is not finite                                      (1)

Of disjoint sets J, J' of a row the same holds as of their elements: the larger maximum wins, of two that are equal the
lower id, and -1 against anything. So a row is cut into parts of `BLOCK` logits, one a program; a second kernel joins
the parts of a row. The result does not depend on the order in which programs run.

Bytes of R rows: R V e read, at e bytes a logit, and 16 for each part of BLOCK logits written and read. Flops: a few
comparisons a logit. Memory would be the bound, but one row of 151552 logits in half precision is 0.3 MB, which the
product before has left in the L2 cache: what counts is that many multiprocessors read it, and the two launches.

Layout: logits [..., V], side by side in a row, rows at any one stride. The kernel takes float16, bfloat16 and float32,
the reference takes float64 too. There is no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from glm_kernels.dispatch import Target, jit, takes_kernel, tl, wide
from glm_kernels.operators import operator
from glm_kernels.overlap import launched, overlaps, release, tiles_ahead, wait
from glm_kernels.variants import POINTERS, Variant

BLOCK, WARPS = 2048, 4  # logits of a part: 16 a thread, loaded 16 bytes at once

# ----------------------------------------------------------------------------- reference


def likeliest_reference(logits: Tensor) -> Tensor:
    """`likeliest` in plain torch."""
    x = wide(logits)
    return torch.where(x.isfinite().all(-1), x.argmax(-1), -1)


# ----------------------------------------------------------------------------- kernels


@jit
def likeliest_part_kernel(  # type: ignore[no-untyped-def]
    logits, tops, leaders, row_stride, V, parts, block: tl.constexpr, ahead: tl.constexpr
):
    """(1) of one part of a row: its largest logit to `tops` [R, parts], the id of that to `leaders`."""
    if ahead is not None:  # there are no weights to fetch
        release()
        wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * block + tl.arange(0, block)
    inside = i < V
    x = tl.load(logits + row * row_stride + i, mask=inside, other=-float("inf")).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    top, place = tl.max(tl.where(finite, x, -float("inf")), 0, return_indices=True, return_indices_tie_break_left=True)
    broken = tl.max((inside & ~finite).to(tl.int32), 0)
    tl.store(tops + row * parts + part, top)
    tl.store(leaders + row * parts + part, tl.where(broken > 0, -1, part * block + place))


@jit
def likeliest_join_kernel(tops, leaders, ids, parts, block: tl.constexpr, ahead: tl.constexpr):  # type: ignore[no-untyped-def]
    """(1) of all parts of a row."""
    if ahead is not None:
        release()
        wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, block)
    inside = part < parts
    top = tl.load(tops + row * parts + part, mask=inside, other=-float("inf"))
    leader = tl.load(leaders + row * parts + part, mask=inside, other=2147483647)
    lowest = tl.min(tl.where(top == tl.max(top, 0), leader, 2147483647), 0)
    broken = tl.min(leader, 0) < 0
    tl.store(ids + row, tl.where(broken, -1, lowest).to(tl.int64))


def power(n: int) -> int:
    """The power of two at or above n, 32 at least: a thread each."""
    return max(32, 1 << (n - 1).bit_length())


def launch(logits: Tensor, ids: Tensor, tops: Tensor, leaders: Tensor, block: int = BLOCK) -> None:
    """Fill ids [R] of logits [R, V], rows at any stride, by way of tops float32 and leaders int32 [R, parts]."""
    (R, V), parts, ahead = logits.shape, tops.shape[1], tiles_ahead(logits)
    with torch.cuda.device_of(logits):
        likeliest_part_kernel[(R, parts)](
            logits, tops, leaders, logits.stride(0), V, parts, block, ahead, num_warps=WARPS, **launched(ahead)
        )
        likeliest_join_kernel[(R,)](tops, leaders, ids, parts, power(parts), ahead, num_warps=1, **launched(ahead))


def variants(target: Target) -> list[Variant]:
    """The part in every dtype; the join for vocabularies of up to 65536, 131072 and 262144."""
    part = {"tops": "*fp32", "leaders": "*i32", "row_stride": "i32", "V": "i32", "parts": "i32"}
    join = {"tops": "*fp32", "leaders": "*i32", "ids": "*i64", "parts": "i32"}
    odd = ("parts",)

    def part_of(pointer: str, ahead: int | None = None) -> Variant:
        label, options = f"{pointer[1:]}{'' if ahead is None else ' overlap'}", {"num_warps": WARPS} | launched(ahead)
        values = {"block": BLOCK, "ahead": ahead}
        return Variant(label, likeliest_part_kernel, {"logits": pointer, **part}, values, options, odd)

    def join_of(block: int, ahead: int | None = None) -> Variant:
        label, options = f"{block}{'' if ahead is None else ' overlap'}", {"num_warps": 1} | launched(ahead)
        return Variant(label, likeliest_join_kernel, join, {"block": block, "ahead": ahead}, options, odd)

    found = [*map(part_of, POINTERS.values()), *map(join_of, (32, 64, 128))]
    return [*found, part_of("*bf16", 0), join_of(128, 0)] if overlaps(target) else found


# ----------------------------------------------------------------------------- wrapper


@operator("likeliest")
def likeliest_op(logits: Tensor) -> Tensor:
    """ids [...] of logits [..., V]."""
    if not takes_kernel(logits):
        return likeliest_reference(logits)
    ids = logits.new_empty(logits.shape[:-1], dtype=torch.long)
    if ids.numel():
        rows = logits.reshape(-1, logits.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        shape = rows.shape[0], -(-rows.shape[1] // BLOCK)
        tops, leaders = (logits.new_empty(shape, dtype=dtype) for dtype in (torch.float32, torch.int32))
        launch(rows, ids.view(-1), tops, leaders)
    return ids


@likeliest_op.register_fake
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.long)


def backward(ctx: Any, grad: Tensor) -> None:
    """There is none."""
    raise NotImplementedError("a choice has no gradient")


likeliest_op.register_autograd(backward)


def likeliest(logits: Tensor) -> Tensor:
    """The id of the largest logit of every row; of those that are equal the lowest.

    Args:
        logits: [..., V].

    Returns:
        ids [...], int64; -1 where a logit of the row is not finite.

    Raises:
        ValueError: There is no logit to choose, or they are no floating-point numbers.
    """
    if logits.ndim == 0 or logits.shape[-1] == 0 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits must be floating [..., V], V ≥ 1; they are {logits.dtype} {list(logits.shape)}")
    ids: Tensor = likeliest_op(logits)
    return ids
