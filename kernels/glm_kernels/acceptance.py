"""Acceptance: which of the guesses that a row has read were right, and the row moves on behind them.

A row has read its newest token and n guesses of what follows, tokens [T] with T = 1 + n. `ids` [T] is what the model
itself chose behind each of them. As many guesses are right as agree with its choice from the first on, and its choice
behind the last of these is one id more (Leviathan et al. 2023, arXiv:2211.17192):

    kept = 1 + max{ r : id_i = token_(i+1) for all i < r },    0 in a row of length 0, which is idle               (1)

Then newest token = id_(kept-1), and count, place, length and, in steps of their own, positions grow by kept. Without
guesses kept is 1. What is computed is next to nothing: the point is that it takes one launch and not a dozen, and the
host no time at all, so that it may stand in a CUDA graph.

Bytes of B rows with A position axes: 16 B (T + A) and 16 B more, written and read. Flops: none to speak of.

Layout: tokens and ids with the tokens of a row side by side, rows at any stride, as in `seen`; all else contiguous.
"""

import torch
from torch import Tensor

from glm_kernels.dispatch import Target, jit, takes_kernel, tl
from glm_kernels.operators import operator
from glm_kernels.overlap import launched, overlaps, release, tiles_ahead, wait
from glm_kernels.variants import Variant

REJECTED = -2  # in the place of an id that does not count
ROWS = 32  # of one program, a thread each

# ----------------------------------------------------------------------------- reference


def accept_reference(
    ids: Tensor,
    tokens: Tensor,
    length: Tensor,
    at: Tensor,
    count: Tensor,
    positions: Tensor,
    steps: Tensor,
    seen: Tensor,
) -> None:
    """`accept` in plain torch."""
    right = (ids[:, :-1] == tokens[:, 1:]).long().cumprod(1).sum(1)
    kept = torch.where(length > 0, 1 + right, 0)
    newest = ids.gather(1, right[:, None])[:, 0].clamp(min=0)
    tokens[:, 0] = torch.where(kept > 0, newest, tokens[:, 0])
    ids.masked_fill_(torch.arange(ids.shape[1], device=ids.device) >= kept[:, None], REJECTED)
    for number in (length, at, count):
        number.add_(kept)
    positions.add_(kept[:, None] * steps)
    row, i = (ids >= 0).nonzero(as_tuple=True)
    seen[row, ids[row, i]] = True


# ----------------------------------------------------------------------------- kernel


@jit
def accept_kernel(  # type: ignore[no-untyped-def]
    ids, tokens, length, at, count, positions, steps, seen, ids_row, tokens_row, seen_row, B, T,
    A: tl.constexpr, rejected: tl.constexpr, rows: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """(1) for some rows, and all that follows from it."""
    if ahead is not None:  # there are no weights to fetch
        release()
        wait()
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    there = row < B
    cached = tl.load(length + row, mask=there, other=0)
    counts = cached > 0
    kept = tl.zeros([rows], tl.int32)
    newest = tl.zeros([rows], tl.int64)
    for i in range(T):
        new = tl.load(ids + row * ids_row + i, mask=there, other=0)
        guess = tl.load(tokens + row * tokens_row + i + 1, mask=there & (i + 1 < T), other=0)
        kept += counts.to(tl.int32)
        newest = tl.where(counts, new, newest)
        tl.store(seen + row * seen_row + new, True, mask=counts & (new >= 0))
        tl.store(ids + row * ids_row + i, tl.where(counts, new, rejected), mask=there)
        counts = counts & (new == guess)

    busy = kept > 0
    tl.store(tokens + row * tokens_row, tl.maximum(newest, 0), mask=busy)
    tl.store(length + row, cached + kept, mask=busy)
    tl.store(at + row, tl.load(at + row, mask=busy) + kept, mask=busy)
    tl.store(count + row, tl.load(count + row, mask=busy) + kept, mask=busy)
    for axis in tl.static_range(A):
        place = row * A + axis
        position, step = tl.load(positions + place, mask=busy), tl.load(steps + place, mask=busy)
        tl.store(positions + place, position + kept * step, mask=busy)


def launch(
    ids: Tensor, tokens: Tensor, length: Tensor, at: Tensor, count: Tensor, positions: Tensor, steps: Tensor,
    seen: Tensor,
) -> None:  # fmt: skip
    """Write to all of them but `steps`, as `accept` says."""
    (B, T), A, ahead = ids.shape, steps.shape[1], tiles_ahead(ids)
    with torch.cuda.device_of(ids):
        accept_kernel[(-(-B // ROWS),)](
            ids, tokens, length, at, count, positions, steps, seen, ids.stride(0), tokens.stride(0), seen.stride(0),
            B, T, A, REJECTED, ROWS, ahead, num_warps=1, **launched(ahead),
        )  # fmt: skip


def variants(target: Target) -> list[Variant]:
    """One or two axes of positions."""
    counts = ("ids_row", "tokens_row", "B", "T")
    types = dict.fromkeys(("ids", "tokens", "count", "positions", "steps"), "*i64")
    types |= dict.fromkeys(("length", "at"), "*i32") | {"seen": "*i1"} | dict.fromkeys((*counts, "seen_row"), "i32")

    def variant(A: int, ahead: int | None = None) -> Variant:
        label, options = f"axes {A}{'' if ahead is None else ' overlap'}", {"num_warps": 1} | launched(ahead)
        values = {"rejected": REJECTED, "rows": ROWS, "A": A, "ahead": ahead}
        return Variant(label, accept_kernel, types, values, options, unaligned=counts)

    return [variant(1), variant(2), *([variant(1, 0)] if overlaps(target) else [])]


# ----------------------------------------------------------------------------- wrapper

WRITTEN = ("ids", "tokens", "length", "at", "count", "positions", "seen")


@operator("accept", mutates_args=WRITTEN)
def accept_op(
    ids: Tensor, tokens: Tensor, length: Tensor, at: Tensor, count: Tensor, positions: Tensor, steps: Tensor,
    seen: Tensor,
) -> None:  # fmt: skip
    """See `accept`."""
    if not takes_kernel(ids):
        accept_reference(ids, tokens, length, at, count, positions, steps, seen)
    elif ids.numel():
        launch(ids, tokens, length, at, count, positions, steps, seen)


@accept_op.register_fake
def _(
    ids: Tensor, tokens: Tensor, length: Tensor, at: Tensor, count: Tensor, positions: Tensor, steps: Tensor,
    seen: Tensor,
) -> None:  # fmt: skip
    return None


def check(ids: Tensor, numbers: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]]) -> None:
    """Raise a ValueError unless every tensor has its dtype and shape, on one device, its last axis side by side."""
    for name, (x, dtype, shape) in numbers.items():
        fits = (x.dtype, x.device) == (dtype, ids.device) and x.shape == shape
        packed = x.stride(-1) == 1 if name in ("ids", "tokens", "seen") else x.is_contiguous()
        if not fits or not (packed or x.numel() <= 1):
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {ids.device}, side by side; "
                f"it is {x.dtype} {list(x.shape)} on {x.device} with strides {x.stride()}"
            )


def accept(
    ids: Tensor,
    tokens: Tensor,
    length: Tensor,
    at: Tensor,
    count: Tensor,
    positions: Tensor,
    steps: Tensor,
    seen: Tensor,
) -> None:
    """Move every row on behind those of its guesses that the model chose itself: equation (1).

    Nothing is returned: all but `steps` is written in place.

    Args:
        ids: [B, T] int64, what was chosen behind each token, -1 where nothing could be. Those behind a guess that was
            wrong, and all of an idle row, become `REJECTED`.
        tokens: [B, T] int64, what was read: the newest token of each row, which becomes the last id kept (0 where that
            is -1), and guesses.
        length: [B] int32, tokens that each row sees; 0 in an idle row, which stays as it is.
        at: [B] int32, the place of its newest token.
        count: [B] int64, new tokens so far.
        positions: [B, A] int64, position ids of the newest token.
        steps: [B, A] int64, how they go on.
        seen: [B, V] bool, which ids a row has had: those kept are added.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that do not fit.
    """
    if ids.ndim != 2 or ids.shape[1] == 0 or steps.ndim != 2 or seen.ndim != 2:
        shapes = ", ".join(str(list(x.shape)) for x in (ids, steps, seen))
        raise ValueError(f"ids must be [B, T], steps [B, A], seen [B, V], T ≥ 1; they are {shapes}")
    (B, T), A, V = ids.shape, steps.shape[1], seen.shape[1]
    long, short = torch.int64, torch.int32
    numbers = {
        "ids": (ids, long, (B, T)), "tokens": (tokens, long, (B, T)), "length": (length, short, (B,)),
        "at": (at, short, (B,)), "count": (count, long, (B,)), "positions": (positions, long, (B, A)),
        "steps": (steps, long, (B, A)), "seen": (seen, torch.bool, (B, V)),
    }  # fmt: skip
    check(ids, numbers)
    accept_op(ids, tokens, length, at, count, positions, steps, seen)
