"""Weight-only quantisation: from a matrix of numbers to small integers, their scales and zero points, and back.

    W[o, i] ≈ s[o, g] (q[o, i] - z[o, g])        q = round(W / s) + z, kept within its bits

Three ways to choose s and z, from cheap to good:

    nearest   the integers just reach the largest numbers of a group, as in the official ChatGLM files
    search    s (and z) with the least squared error of the group: large numbers may be cut off, if that lets all the
              others be told apart better. Needs nothing but the matrix.
    gptq      the integers that give the least error of the layer's *output* on some text: `gptq.py`
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from glm.grouped import Grouped, dequantize
from glm.packing import pack

__all__ = ["METHODS", "Integers", "dequantize", "quantize"]

SHRINK: Final = tuple(1 - step / 25 for step in range(14))  # 1 to 0.48 of the full range
SHIFTS: Final = (0, -1, 1)  # of the zero point
REFINEMENTS: Final = 2
ELEMENTS: Final = 1 << 19  # worked on at a time: rows are independent, so memory need not grow with the matrix


class Integers(NamedTuple):
    """A quantised matrix as it is stored; `grouped.py` says what each part is."""

    packed: Tensor  # int32 [O, I · bits / 32]
    scales: Tensor  # [O, groups]
    zeros: Tensor | None  # int8 [O, groups]


class Range(NamedTuple):
    """Scales and zero points of rows in groups, [R, groups, 1] each; zero points are 0 where they are not stored."""

    scales: Tensor
    zeros: Tensor


Choose = Callable[[Tensor, Grouped, torch.dtype, Tensor | None], Range]


def quantize(weight: Tensor, form: Grouped, method: str = "search", scale_dtype: torch.dtype | None = None) -> Integers:
    """The weight [O, I] of a linear layer as integers, by a `method` that needs no text.

    `scale_dtype` (None: the weight's) is what the scales are rounded to before any integer is chosen. Groups of zeros
    have scale 0 and are zeros again. Raises ConfigError where the groups do not divide a row. Inverse: `dequantize`.
    """
    dtype = scale_dtype or weight.dtype
    inputs = weight.shape[-1]
    groups = form.groups(inputs)
    parts = []
    for rows in weight.split(max(1, ELEMENTS // max(1, inputs))):
        w = rows.to(torch.promote_types(torch.float32, rows.dtype)).view(len(rows), groups, -1)
        chosen = METHODS[method](w, form, dtype, None)
        q = nearest_integers(w, chosen, form).to(torch.int8)
        parts.append((pack(q.flatten(1), form.bits), chosen.scales[..., 0].to(dtype), chosen.zeros[..., 0]))
    packed, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return Integers(packed, scales, None if form.symmetric else zeros.to(torch.int8))


def bounds(form: Grouped) -> tuple[int, int]:
    """The least and the largest integer."""
    return -(1 << (form.bits - 1)), (1 << (form.bits - 1)) - 1


def nearest_integers(w: Tensor, chosen: Range, form: Grouped) -> Tensor:
    """round(w / s) + z within the bounds; z where s is 0."""
    return (w / chosen.scales).nan_to_num_(0, 0, 0).round_().add_(chosen.zeros).clamp_(*bounds(form))


def as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be read again: rounded to `dtype`."""
    return scales.to(dtype).to(scales.dtype)


def nearest(w: Tensor, form: Grouped, dtype: torch.dtype, importance: Tensor | None = None) -> Range:
    """The scale with which a group's integers just reach its largest numbers, for w [R, groups, group]."""
    return stretched(w, form, dtype, 1.0)


def stretched(w: Tensor, form: Grouped, dtype: torch.dtype, shrink: float, shift: int = 0) -> Range:
    """The range that reaches `shrink` of the largest numbers; 0 is always in it. `shift` moves the zero point."""
    least, most = bounds(form)
    if form.symmetric:
        scales = as_stored(w.abs().amax(-1, keepdim=True) * (shrink / most), dtype)
        return Range(scales, torch.zeros_like(scales))
    low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    scales = as_stored((high - low) * (shrink / (most - least)), dtype)
    zeros = (least - shrink * low / scales).nan_to_num_(0, 0, 0).round_() + shift
    return Range(scales, zeros.clamp_(least, most))


def search(w: Tensor, form: Grouped, dtype: torch.dtype, importance: Tensor | None = None) -> Range:
    """The scale (and zero point) with the least squared error of each group, for w [R, groups, group].

    Tried are ranges that cut off more and more of the largest numbers; the best is then refined: with its integers
    held, the least squares scale is Σ w (q - z) / Σ (q - z)², with that the integers are chosen again. `importance`
    [groups, group] weighs the columns.
    """
    best = nearest(w, form, dtype)
    least = squared_error(w, best, form, importance)
    for candidate in candidates(w, form, dtype):
        best, least = better(w, form, importance, best, least, candidate)
    for _ in range(REFINEMENTS):
        q = nearest_integers(w, best, form).sub_(best.zeros)
        heavy = q if importance is None else q * importance
        scales = (w * heavy).sum(-1, keepdim=True) / (q * heavy).sum(-1, keepdim=True)
        refined = Range(as_stored(scales.nan_to_num_(0, 0, 0).abs_(), dtype), best.zeros)
        best, least = better(w, form, importance, best, least, refined)
    return best


def candidates(w: Tensor, form: Grouped, dtype: torch.dtype) -> Iterator[Range]:
    """Ranges that cut off more and more, around several zero points where there is one."""
    for shrink in SHRINK:
        for shift in SHIFTS if not form.symmetric else (0,):
            yield stretched(w, form, dtype, shrink, shift)


def squared_error(w: Tensor, chosen: Range, form: Grouped, importance: Tensor | None) -> Tensor:
    """Σ_group importance (w - s (q - z))², [R, groups, 1]."""
    error = nearest_integers(w, chosen, form).sub_(chosen.zeros).mul_(chosen.scales).sub_(w).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True)


def better(
    w: Tensor, form: Grouped, importance: Tensor | None, best: Range, least: Tensor, other: Range
) -> tuple[Range, Tensor]:
    """Group by group the range with the smaller error, and that error."""
    error = squared_error(w, other, form, importance)
    wins = error < least
    chosen = Range(*(torch.where(wins, theirs, ours) for theirs, ours in zip(other, best, strict=True)))
    return chosen, torch.where(wins, error, least)


METHODS: Final[dict[str, Choose]] = {"nearest": nearest, "search": search}
