"""Experts: of many feed-forwards a token goes through a few, chosen by a router, and through those that are shared.

    s = sigmoid(W_r x)                                      how well each of E experts suits the token
    chosen = top_k(s + b)                                   b balances how much each expert gets to do: it selects,
    y = Σ_chosen c s_e / Σ_chosen s  expert_e(x) + shared(x)                  but does not weigh

(Shazeer et al. 2017, arXiv:1701.06538; shared experts: Dai et al. 2024, arXiv:2401.06066; the sigmoid and the balancing
bias: DeepSeek-AI 2024, arXiv:2412.19437.) With several groups of experts only those of the best groups can be chosen,
a group being worth its two best s + b.

The router computes in float32 whatever the model's dtype, and its bias is stored so: in bfloat16 close scores tie.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.errors import ConfigError
from glm.feed_forward import FeedForward
from glm.linear import Stack, Weights
from glm.norms import wide
from glm.shares import Cut, Run, rows


@dataclass(frozen=True)
class Router:
    """How experts are chosen and weighed.

    groups      the experts lie in so many groups of neighbours,
    kept        of which so many can be chosen from.
    normalised  whether the weights of the chosen are divided by their sum.
    scale       c in the equation above.
    """

    groups: int
    kept: int
    normalised: bool
    scale: float


@dataclass(frozen=True)
class Experts:
    """`count` feed-forwards like `expert`, of which a token goes through `top`, and `shared` more for all tokens."""

    expert: FeedForward
    count: int
    top: int
    shared: int
    router: Router

    def build(self, width: int, weights: Weights) -> nn.Module:
        """A module [B, T, width] -> [B, T, width]. Raises ConfigError where so many experts cannot be chosen."""
        groups, kept = self.router.groups, self.router.kept
        if self.count % groups or kept > groups or self.top > kept * self.count // groups:
            raise ConfigError(
                f"{self.top} of {self.count} experts cannot be chosen from {kept} of {groups} groups of neighbours"
            )
        if groups > 1 and self.count // groups < 2:
            raise ConfigError(f"a group is worth its two best experts: {self.count} are too few for {groups} groups")
        return ExpertsModule(self, width, weights)

    @property
    def together(self) -> FeedForward:
        """The shared experts: side by side they are one feed-forward, `shared` times as wide."""
        return replace(self.expert, inner=self.expert.inner * self.shared)

    @property
    def held(self) -> range:
        """Which of the experts there are matrices of: all."""
        return range(self.count)

    @property
    def plan(self) -> Mapping[str, Cut]:
        """How the matrices are dealt out to ranks: whole experts, and channels of the shared ones."""
        experts = rows(Run("experts", self.count))
        shared = {f"shared.{name}": cut for name, cut in self.together.plan.items()}
        return {"experts.up": experts, "experts.down": experts, **shared}

    def share(self, rank: int, ranks: int) -> "HeldExperts":
        """What one of `ranks` ranks holds: the router, some experts, and fewer channels of the shared ones."""
        each = self.count // ranks
        some = range(rank * each, (rank + 1) * each)
        fields = (self.expert, self.count, self.top, self.shared, self.router)
        return HeldExperts(*fields, some, self.together.share(rank, ranks))

    def working(self, width: int) -> int:
        """Numbers that a token takes in a forward pass, at most: what one expert reads, does and adds, and the sum."""
        return 2 * width + 2 * width + max(self.expert.working(width), self.together.working(width))


@dataclass(frozen=True)
class HeldExperts(Experts):
    """The experts of one rank: all are chosen from, but only those in `some` are asked; `beside` is what is shared."""

    some: range
    beside: FeedForward

    @property
    def together(self) -> FeedForward:
        """This rank's channels of the shared experts."""
        return self.beside

    @property
    def held(self) -> range:
        """Which of the experts there are matrices of."""
        return self.some


class ExpertsModule(nn.Module):
    """The equation at the top of this file. The experts' matrices are stacked, [E, …] each."""

    def __init__(self, spec: Experts, width: int, weights: Weights) -> None:
        super().__init__()
        self.router = RouterModule(spec.router, width, spec.count, spec.top)
        self.held = spec.held
        self.experts = spec.expert.build(width, Stack(weights, len(spec.held)))
        self.shared = spec.together.build(width, weights) if spec.shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        tokens = x.flatten(0, -2)  # [N D]
        chosen, weights = self.router(tokens)
        y = mix(tokens, chosen, weights, self.experts, self.held).to(x.dtype).view_as(x)
        return y if self.shared is None else y.add(self.shared(x))


def mix(x: Tensor, chosen: Tensor, weights: Tensor, expert: Callable[[Tensor, int], Tensor], held: range) -> Tensor:
    """y_n = Σ_j weights[n, j] expert(x_n, chosen[n, j]) for x [N, D], chosen and weights [N, k] -> [N, D].

    The sum is over those of the chosen that are `held`; `expert` counts from the first of them.

    Visits are sorted by expert, and each expert that has any is asked once for all of its tokens. A token's sum goes
    through its experts in the order of their numbers, so it does not depend on the tokens beside it.
    """
    visits = chosen.flatten()
    order = visits.argsort(stable=True)
    token, weight = order // chosen.shape[1], weights.flatten()[order]
    counts = visits.bincount().tolist()  # the one wait for the device
    y = torch.zeros_like(x, dtype=weights.dtype)
    for e, (n, w) in enumerate(zip(token.split(counts), weight.split(counts), strict=True)):
        if len(n) and e in held:
            y.index_add_(0, n, expert(x[n], e - held.start) * w[:, None])  # no token visits an expert twice
    return y


class RouterModule(nn.Module):
    """Which experts a token visits, and with which weights."""

    bias: Tensor

    def __init__(self, spec: Router, width: int, count: int, top: int) -> None:
        super().__init__()
        self.spec, self.top = spec, top
        self.weight = nn.Parameter(torch.empty(count, width))
        self.register_buffer("bias", torch.zeros(count, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> chosen experts and their weights, [N, k] each."""
        s = self.scores(x)
        chosen = self.allowed(s.detach() + self.bias).topk(self.top, dim=-1).indices
        return chosen, self.weights(s, chosen)

    def scores(self, x: Tensor) -> Tensor:
        """How well each expert suits each token: [N, D] -> s [N, E]."""
        return F.linear(wide(x), wide(self.weight)).sigmoid()

    def weights(self, s: Tensor, chosen: Tensor) -> Tensor:
        """Of the chosen experts, [N, k] both, by their scores [N, E]."""
        weights = s.gather(-1, chosen)
        if self.spec.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.spec.scale

    def allowed(self, choice: Tensor) -> Tensor:
        """-inf for the experts of groups that are not among the best: [N, E] -> [N, E]."""
        groups = choice.unflatten(-1, (self.spec.groups, -1))
        if self.spec.kept == self.spec.groups:
            return choice
        worth = groups.topk(2, dim=-1).values.sum(-1)  # [N groups]
        best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(self.spec.kept).indices, True)
        kept: Tensor = groups.masked_fill(~best[..., None], -torch.inf).flatten(-2)
        return kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RouterModule":
        """What `to`, `half` and their like do to every tensor: the bias changes its place, but is never narrowed."""

        def kept(x: Tensor) -> Tensor:
            y = fn(x)
            return y if x is not self.bias or y.dtype.itemsize >= 4 else x.to(y.device)

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call, no-any-return]
