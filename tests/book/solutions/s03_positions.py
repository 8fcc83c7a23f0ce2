"""Solutions of chapter 3, right and wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import glm
from glm.positions import Interpolation


def learned_places(tables: list[Tensor], positions: Tensor) -> Tensor:
    return torch.stack([table[positions[..., axis]] for axis, table in enumerate(tables)]).sum(0)


def one_table_for_all(tables: list[Tensor], positions: Tensor) -> Tensor:
    return tables[0][positions].sum(-2)


def first_axis_only(tables: list[Tensor], positions: Tensor) -> Tensor:
    return tables[0][positions[..., 0]]


def turn(a: Tensor, b: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs [B, T, heads, w/2] by angles [B, T, w/2]."""
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    return a * cos - b * sin, a * sin + b * cos


def half_rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    w = x.shape[-1] // 2
    return interleaved(x, positions, base, w, w)


def interleaved(x: Tensor, positions: Tensor, base: float, turned: int, w: int) -> Tensor:
    omega = base ** -(torch.arange(0, turned, 2, dtype=torch.float64) / w)
    a, b = turn(x[..., 0:turned:2], x[..., 1:turned:2], positions[..., None] * omega)
    return torch.cat((torch.stack((a, b), -1).flatten(-2), x[..., turned:]), -1)


def whole_head(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return interleaved(x, positions, base, x.shape[-1], x.shape[-1])


def frequencies_of_the_whole_head(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return interleaved(x, positions, base, x.shape[-1] // 2, x.shape[-1])


def turned_back(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return half_rotary(x, -positions, base)


def pairs_of_halves(x: Tensor, positions: Tensor, base: float) -> Tensor:
    w = x.shape[-1] // 2
    omega = base ** -(torch.arange(0, w, 2, dtype=torch.float64) / w)
    a, b = turn(x[..., : w // 2], x[..., w // 2 : w], positions[..., None] * omega)
    return torch.cat((a, b, x[..., w:]), -1)


def rotary_2d(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return by_axes(x, positions, base, torch.float16)


def by_axes(x: Tensor, positions: Tensor, base: float, stored: torch.dtype) -> Tensor:
    parts = []
    for axis, part in enumerate(x.chunk(2, dim=-1)):
        w = part.shape[-1]
        omega = (1 / base ** (torch.arange(0, w, 2, dtype=torch.float32) / w)).to(stored).double()
        a, b = part.chunk(2, dim=-1)
        parts += turn(a, b, positions[..., axis, None] * omega)
    return torch.cat(parts, -1)


def not_rounded(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return by_axes(x, positions, base, torch.float64)


def axes_swapped(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return by_axes(x, positions.flip(-1), base, torch.float16)


def stretched(release: str, width: int, ratio: float) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    if release.startswith("chatglm2"):
        return 10000.0**-exponents / ratio
    return (10000.0 * ratio) ** -exponents


def always_divided(release: str, width: int, ratio: float) -> Tensor:
    return stretched("chatglm2", width, ratio)


def always_a_larger_base(release: str, width: int, ratio: float) -> Tensor:
    return stretched("chatglm3", width, ratio)


def which_field(right: glm.GLM, broken: Callable[[Tensor], Tensor], ids: Tensor) -> str:
    rotary: Any = right.spec.rotary
    changes: list[dict[str, Any]] = [
        {"widths": (right.spec.blocks[0].mixer.head_width,)},
        {"pairing": "halves"},
        {"base": 50 * rotary.base},
        {"scaling": Interpolation(8.0)},
        {"rounding": "float16"},
    ]
    wanted = broken(ids)
    for change in changes:
        model = glm.GLM(replace(right.spec, rotary=replace(rotary, **change)), dtype=right.dtype)
        model.load_state_dict(right.state_dict())
        with torch.inference_mode():
            if torch.equal(model(ids), wanted):
                return f"rotary.{next(iter(change))}"
    raise AssertionError


def a_guess(right: glm.GLM, broken: Callable[[Tensor], Tensor], ids: Tensor) -> str:
    return "rotary.pairing"


RIGHT = {
    "3.1": [learned_places],
    "3.2": [half_rotary],
    "3.3": [rotary_2d],
    "3.4": [stretched],
    "3.5": [which_field],
}
WRONG = {
    "3.1": [(one_table_for_all, "result"), (first_axis_only, "result")],
    "3.2": [
        (whole_head, "result"),
        (frequencies_of_the_whole_head, "result"),
        (turned_back, "result"),
        (pairs_of_halves, "result"),
    ],
    "3.3": [(not_rounded, "result"), (axes_swapped, "result")],
    "3.4": [(always_divided, "result"), (always_a_larger_base, "result")],
    "3.5": [(a_guess, "result")],
}
