"""Wiring of the engine: the equations of `glm/residual.py`, with the norm and the sum handed to the sublayer.

A sublayer f is called as f(h, norm=n, residual=r) and gives r + f(n(h)), so that the first of its matrices can take the
norm in and the last one the sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from glm.residual import DeepModule, PreModule, SandwichModule, ScaledModule
from glm.runtime.norms import FusedNorm


class Sublayer(Protocol):
    """r + f(n(h)) for h [B, T, D]."""

    def __call__(self, h: Tensor, *, norm: FusedNorm | None, residual: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        ...


Wire = Callable[[Tensor, Sublayer], Tensor]


def wire(module: nn.Module) -> Wire:
    """How a sublayer is joined to the stream x [B, T, D]: a function of x and f that returns the new stream."""
    if type(module) is PreModule:
        before = FusedNorm(module.before)
        return lambda x, f: f(x, norm=before, residual=x)
    if type(module) is SandwichModule:
        inner, outer = FusedNorm(module.before), FusedNorm(module.after)
        return lambda x, f: x + outer(f(x, norm=inner, residual=None))
    if type(module) is DeepModule:
        after, alpha = FusedNorm(module.after), module.alpha
        return lambda x, f: after(f(x, norm=None, residual=alpha * x))
    if type(module) is ScaledModule:
        return scaled(FusedNorm(module.before), module.alpha)
    return lambda x, f: module(x, partial(f, norm=None, residual=None))  # an equation of its own


def scaled(before: FusedNorm, alpha: float) -> Wire:
    """α n(x) + f(n(x)): the norm is needed by itself."""

    def join(x: Tensor, f: Sublayer) -> Tensor:
        h = before(x)
        return f(h, norm=None, residual=alpha * h)

    return join
