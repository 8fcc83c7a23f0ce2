"""The feed-forward sublayer: a product of activated branches.

    y = W_down (a₁(W₁ x) ⊙ a₂(W₂ x) ⊙ …) (+ biases)

One branch `(gelu,)` is the transformer's MLP; `(gelu, identity)` is GeGLU and `(silu, identity)` SwiGLU
(Shazeer 2020, arXiv:2002.05202). The branches are stacked in one matrix, in the order of `branches`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce

from torch import Tensor, nn
from torch.nn import functional as F

from glm.linear import Stack, Weights
from glm.shares import Cut, Run, columns, rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class FeedForward:
    """`inner` channels per branch; `branches` names one of `ACTIVATIONS` each."""

    inner: int
    branches: tuple[str, ...]
    bias: bool

    def build(self, width: int, weights: Weights | Stack) -> nn.Module:
        """A module [B, T, width] -> [B, T, width] whose matrices are stored as `weights` says."""
        return FeedForwardModule(self, width, weights)

    @property
    def plan(self) -> Mapping[str, Cut]:
        """How the matrices are dealt out to ranks: inner channels, the same of every branch."""
        channels = Run("inner channels", self.inner)
        return {"up": rows(*[channels] * len(self.branches)), "down": columns(channels)}

    def share(self, rank: int, ranks: int) -> "FeedForward":
        """What one of `ranks` ranks holds: fewer inner channels."""
        return replace(self, inner=self.inner // ranks)

    def working(self, width: int) -> int:
        """Numbers that a token takes in a forward pass, at most: the branches, the active ones, their product."""
        return (2 * len(self.branches) + 1) * self.inner


class FeedForwardModule(nn.Module):
    """down(product of activated branches of up(x))."""

    def __init__(self, spec: FeedForward, width: int, weights: Weights | Stack) -> None:
        super().__init__()
        self.spec = spec
        self.activations = [ACTIVATIONS[name] for name in spec.branches]
        self.up = weights.linear(width, len(spec.branches) * spec.inner, spec.bias)
        self.down = weights.linear(spec.inner, width, spec.bias)

    def forward(self, x: Tensor, *which: int) -> Tensor:
        """[B, T, D] -> [B, T, D]; `which` of several, where the matrices are stacks."""
        branches = self.up(x, *which).chunk(len(self.activations), dim=-1)  # each [B T F]
        active = [activate(branch) for activate, branch in zip(self.activations, branches, strict=True)]
        y: Tensor = self.down(reduce(Tensor.mul, active), *which)
        return y
