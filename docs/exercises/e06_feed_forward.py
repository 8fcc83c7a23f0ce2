"""Exercises of chapter 6, feed-forward. Replace what raises, then `python -m docs.check 6`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import glm


def feed_forward(x: Tensor, up: Tensor, down: Tensor, branches: tuple[str, ...]) -> Tensor:
    """Exercise 6.1. A product of activated branches, without biases.

    x          [B, T, D]
    up         the matrices of all branches, one above the other in the order of `branches`, [n F, D]
    down       [D, F]
    branches   n names, each "identity", "silu", "gelu" (the exact one) or "gelu_tanh"

    Returns [B, T, D].
    """
    raise NotImplementedError


def gate_first(up: Tensor) -> Tensor:
    """Exercise 6.2. The rows of GLM-130B's dense_h_to_4h, [2 F, D], in the order of ChatGLM2's.

    In ChatGLM2 the half that is activated comes first. Returns [2 F, D].
    """
    raise NotImplementedError


def merged(parts: list[Tensor]) -> Tensor:
    """Exercise 6.3. The matrix of a gated feed-forward, from the parts that several devices have of it.

    parts   in the order of the devices, each [2 F/n, D]: the rows of some channels in the first branch, then the rows
            of the same channels in the second

    Returns [2 F, D], the whole first branch above the whole second one.
    """
    raise NotImplementedError


def which_branches(f: Callable[[Tensor], Tensor], up: Tensor, down: Tensor) -> tuple[str, ...]:
    """Exercise 6.4. The branches of a feed-forward whose weights are known, and which can be called.

    f      [B, T, D] -> [B, T, D], in float64
    up     [n F, D], with one or two branches
    down   [D, F]

    Returns the names of the branches in order, such as ("silu", "identity"); each is "identity", "silu", "gelu" or
    "gelu_tanh", and at most one of two is "identity".
    """
    raise NotImplementedError


def chatglm2_from_chatglm(spec: glm.Spec, groups: int, inner: int) -> dict[str, Any]:
    """Exercise 6.5. What ChatGLM2-6B changed in ChatGLM-6B, done to a small model.

    spec     like ChatGLM-6B's, with other sizes
    groups   how many groups of key heads the new model has
    inner    channels of its feed-forward

    Width, heads and layers stay, ε and the base of the rotation too. Return a dict of the new "reading", "rotary",
    "wiring", "norm", "mixer", "feed_forward" (the last four are those of each block), "final_norm" and "tied".
    """
    raise NotImplementedError
