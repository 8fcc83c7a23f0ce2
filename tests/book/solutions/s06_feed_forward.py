"""Solutions of chapter 6, right and wrong."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import glm
from glm.feed_forward import FeedForward
from glm.layout import Causal
from glm.norms import RMSNorm
from glm.positions import Rotary
from glm.residual import Pre


def active(name: str, z: Tensor) -> Tensor:
    if name == "silu":
        return z * z.sigmoid()
    if name == "gelu":
        return z / 2 * (1 + torch.erf(z / math.sqrt(2)))
    if name == "gelu_tanh":
        return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z


def feed_forward(x: Tensor, up: Tensor, down: Tensor, branches: tuple[str, ...]) -> Tensor:
    product = torch.ones((), dtype=x.dtype)
    for name, matrix in zip(branches, up.chunk(len(branches)), strict=True):
        product = product * active(name, x @ matrix.T)
    return product @ down.T


def last_branch_first(x: Tensor, up: Tensor, down: Tensor, branches: tuple[str, ...]) -> Tensor:
    return feed_forward(x, up, down, branches[::-1])


def always_tanh(x: Tensor, up: Tensor, down: Tensor, branches: tuple[str, ...]) -> Tensor:
    return feed_forward(x, up, down, tuple(name.replace("gelu", "gelu_tanh")[:9] for name in branches))


def rows_in_turn(x: Tensor, up: Tensor, down: Tensor, branches: tuple[str, ...]) -> Tensor:
    """Rows of the branches one after another, channel by channel."""
    n = len(branches)
    return feed_forward(x, torch.cat([up[i::n] for i in range(n)]), down, branches)


def gate_first(up: Tensor) -> Tensor:
    return up.roll(len(up) // 2, 0)


def upside_down(up: Tensor) -> Tensor:
    return up.flip(0)


def merged(parts: list[Tensor]) -> Tensor:
    halves = [part.chunk(2) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves])


def one_above_the_other(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


CANDIDATES = [("silu",), ("gelu",), ("gelu_tanh",), ("identity",)]
CANDIDATES += [(a, "identity") for (a,) in CANDIDATES[:3]] + [("identity", a) for (a,) in CANDIDATES[:3]]


def which_branches(f: Callable[[Tensor], Tensor], up: Tensor, down: Tensor) -> tuple[str, ...]:
    return closest(f, up, down, 1e-10)


def closest(f: Callable[[Tensor], Tensor], up: Tensor, down: Tensor, tolerance: float) -> tuple[str, ...]:
    """The first candidate that is as close."""
    n = len(up) // down.shape[1]
    x = torch.linspace(-1, 1, 5 * up.shape[1], dtype=torch.float64).reshape(1, 5, -1)
    for branches in CANDIDATES:
        if len(branches) == n and (f(x) - feed_forward(x, up, down, branches)).abs().max() < tolerance:
            return branches
    raise AssertionError


def with_a_usual_tolerance(f: Callable[[Tensor], Tensor], up: Tensor, down: Tensor) -> tuple[str, ...]:
    return closest(f, up, down, 1e-2)


def the_usual(f: Callable[[Tensor], Tensor], up: Tensor, down: Tensor) -> tuple[str, ...]:
    return ("silu", "identity")


def chatglm2_from_chatglm(spec: glm.Spec, groups: int, inner: int) -> dict[str, Any]:
    old, rotary = spec.blocks[0], spec.rotary
    norm = RMSNorm(old.norm.eps, weight_first=True)
    assert isinstance(rotary, Rotary)
    return {
        "reading": Causal(),
        "rotary": replace(rotary, widths=(old.mixer.head_width // 2,), pairing="interleaved", rounding=None),
        "wiring": Pre(),
        "norm": norm,
        "mixer": replace(old.mixer, groups=groups, out_bias=False),
        "feed_forward": FeedForward(inner, ("silu", "identity"), bias=False),
        "final_norm": norm,
        "tied": False,
    }


def still_blanks(spec: glm.Spec, groups: int, inner: int) -> dict[str, Any]:
    return chatglm2_from_chatglm(spec, groups, inner) | {"reading": spec.reading}


def pairs_of_halves_still(spec: glm.Spec, groups: int, inner: int) -> dict[str, Any]:
    rotary = replace(chatglm2_from_chatglm(spec, groups, inner)["rotary"], pairing="halves")
    return chatglm2_from_chatglm(spec, groups, inner) | {"rotary": rotary}


def still_scaled(spec: glm.Spec, groups: int, inner: int) -> dict[str, Any]:
    return chatglm2_from_chatglm(spec, groups, inner) | {"wiring": spec.blocks[0].wiring}


def no_bias_at_all(spec: glm.Spec, groups: int, inner: int) -> dict[str, Any]:
    right = chatglm2_from_chatglm(spec, groups, inner)
    return right | {"mixer": replace(right["mixer"], qkv_bias=False)}


RIGHT = {
    "6.1": [feed_forward],
    "6.2": [gate_first],
    "6.3": [merged],
    "6.4": [which_branches],
    "6.5": [chatglm2_from_chatglm],
}
WRONG = {
    "6.1": [(last_branch_first, "result"), (always_tanh, "result"), (rows_in_turn, "result")],
    "6.2": [(upside_down, "result")],
    "6.3": [(one_above_the_other, "result")],
    "6.4": [(with_a_usual_tolerance, "result"), (the_usual, "result")],
    "6.5": [
        (still_blanks, "reading"),
        (pairs_of_halves_still, "rotary"),
        (still_scaled, "wiring"),
        (no_bias_at_all, "mixer"),
    ],
}
