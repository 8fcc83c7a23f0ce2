"""Residual wiring: how a sublayer f, its norm n and the stream x are joined. The equation is the class.

    Pre       x + f(n(x))                                  (Xiong et al. 2020, arXiv:2002.04745)
    Sandwich  x + m(f(n(x)))                               (Ding et al. 2021, arXiv:2105.13290)
    Deep      n(αx + f(x))                                 (DeepNorm, Wang et al. 2022, arXiv:2203.00555)
    Scaled    α n(x) + f(n(x))

`Scaled` is `Deep`'s chain cut one norm earlier: what a DeepNorm block hands to the next is normalised there first,
so h = n(x) is the stream and αh + f(h) its update. The two compute the same, with one norm before the first block
instead of one behind the last. Every published GLM with DeepNorm is written in the cut form.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from glm.norms import Norm

Sublayer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pre:
    """x + f(n(x)): the stream itself is never normalised."""

    def build(self, norm: Norm, width: int) -> nn.Module:
        """A module called with (x [B, T, D], f) that returns the new stream [B, T, D]."""
        return PreModule(norm, width)


@dataclass(frozen=True)
class Sandwich:
    """x + m(f(n(x))): a second norm on what the sublayer adds."""

    def build(self, norm: Norm, width: int) -> nn.Module:
        """A module called with (x [B, T, D], f) that returns the new stream [B, T, D]."""
        return SandwichModule(norm, width)


@dataclass(frozen=True)
class Deep:
    """n(αx + f(x)): DeepNorm as its paper writes it."""

    alpha: float

    def build(self, norm: Norm, width: int) -> nn.Module:
        """A module called with (x [B, T, D], f) that returns the new stream [B, T, D]."""
        return DeepModule(norm, width, self.alpha)


@dataclass(frozen=True)
class Scaled:
    """α n(x) + f(n(x)): the normalised input, α times as heavy, carries on."""

    alpha: float

    def build(self, norm: Norm, width: int) -> nn.Module:
        """A module called with (x [B, T, D], f) that returns the new stream [B, T, D]."""
        return ScaledModule(norm, width, self.alpha)


class PreModule(nn.Module):
    """x + f(n(x))."""

    def __init__(self, norm: Norm, width: int) -> None:
        super().__init__()
        self.before = norm.build(width)

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return x + f(self.before(x))


class SandwichModule(nn.Module):
    """x + m(f(n(x)))."""

    def __init__(self, norm: Norm, width: int) -> None:
        super().__init__()
        self.before = norm.build(width)
        self.after = norm.build(width)

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        added: Tensor = self.after(f(self.before(x)))
        return x + added


class DeepModule(nn.Module):
    """n(αx + f(x))."""

    def __init__(self, norm: Norm, width: int, alpha: float) -> None:
        super().__init__()
        self.after = norm.build(width)
        self.alpha = alpha

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y: Tensor = self.after(self.alpha * x + f(x))
        return y


class ScaledModule(nn.Module):
    """α n(x) + f(n(x))."""

    def __init__(self, norm: Norm, width: int, alpha: float) -> None:
        super().__init__()
        self.before = norm.build(width)
        self.alpha = alpha

    def forward(self, x: Tensor, f: Sublayer) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h: Tensor = self.before(x)
        return self.alpha * h + f(h)


Wiring = Pre | Sandwich | Deep | Scaled
