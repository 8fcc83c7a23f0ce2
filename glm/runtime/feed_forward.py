"""The feed-forward sublayer of the engine: two products, the activation inside the first where it is SwiGLU."""

from collections.abc import Callable
from functools import partial
from itertools import repeat

import torch
from glm_kernels import geglu, gelu
from torch import Tensor, nn

from glm.experts import ExpertsModule
from glm.feed_forward import ACTIVATIONS, FeedForwardModule
from glm.runtime.matrices import Store, known
from glm.runtime.norms import FusedNorm
from glm.runtime.wiring import Sublayer

SWIGLU = ("silu", "identity")
ROWS = 1024  # tokens of a prompt that an activation of its own is given: it holds the inner channels of them twice
FUSED: dict[tuple[str, ...], Callable[[Tensor], Tensor]] = {
    ("gelu",): partial(gelu, tanh=False),
    ("gelu_tanh",): partial(gelu, tanh=True),
    ("identity", "gelu"): partial(geglu, tanh=False),
    ("identity", "gelu_tanh"): partial(geglu, tanh=True),
}


def activation(branches: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    """The product of the activated branches, [..., n F] -> [..., F]; of `branches` that no kernel knows, in torch."""
    if branches in FUSED:
        return FUSED[branches]

    def product(x: Tensor) -> Tensor:
        parts = [ACTIVATIONS[name](part) for name, part in zip(branches, x.chunk(len(branches), -1), strict=True)]
        y = parts[0]
        for part in parts[1:]:
            y = y * part
        return y

    return product


def fused_feed_forward(module: nn.Module, store: Store) -> Sublayer:
    """The engine's form of a feed-forward: the module itself where there is no other, or where it is changed."""
    if type(module) is FeedForwardModule:
        return FusedFeedForward(module, store)
    if type(module) is ExpertsModule:
        each = module.experts
        if type(each) is FeedForwardModule and known(each.up) and known(each.down):
            return FusedExperts(module, each, store)
    return partial(as_it_is, module)


def as_it_is(module: nn.Module, h: Tensor, *, norm: FusedNorm | None, residual: Tensor | None) -> Tensor:
    """A feed-forward that has no fused form: [B, T, D] -> [B, T, D]."""
    y: Tensor = module(h if norm is None else norm(h))
    return y if residual is None else y + residual


class FusedFeedForward:
    """r + W_down f(W_up n(h))."""

    def __init__(self, module: FeedForwardModule, store: Store) -> None:
        self.up, self.down = store.matrix(module.up), store.matrix(module.down)
        self.swiglu = module.spec.branches == SWIGLU
        self.activate = activation(module.spec.branches)

    def __call__(self, h: Tensor, *, norm: FusedNorm | None, residual: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.swiglu:
            return self.down(self.up(h, norm=norm, swiglu=True), residual=residual)
        if h.shape[1] > ROWS:
            some, added = h.split(ROWS, 1), repeat(None) if residual is None else residual.split(ROWS, 1)
            return torch.cat([self(x, norm=norm, residual=r) for x, r in zip(some, added, strict=False)], dim=1)
        return self.down(self.activate(self.up(h, norm=norm)), residual=residual)


class FusedExperts:
    """The chosen experts and the shared ones. Nothing waits for the device: where experts begin is known only there."""

    def __init__(self, module: ExpertsModule, each: FeedForwardModule, store: Store) -> None:
        self.router = module.router
        self.count = len(module.held)
        self.up, self.down = store.stack(each.up), store.stack(each.down)
        self.swiglu = each.spec.branches == SWIGLU
        self.activate = activation(each.spec.branches)
        self.shared = None if module.shared is None else fused_feed_forward(module.shared, store)

    def __call__(self, h: Tensor, *, norm: FusedNorm | None, residual: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = h if norm is None else norm(h)
        tokens = h.flatten(0, -2)  # [N D]
        chosen, weights = self.router(tokens)  # [N k]
        visits, order = chosen.flatten().sort(stable=True)
        edges = torch.arange(self.count + 1, device=h.device)
        offsets = torch.searchsorted(visits, edges, out_int32=True)
        x = self.up.experts(tokens[order // chosen.shape[1]], offsets, swiglu=self.swiglu)
        y = self.down.experts(x if self.swiglu else self.activate(x), offsets)
        answers = torch.empty_like(y).index_copy_(0, order, y).unflatten(0, chosen.shape)  # [N k D]
        mixed: Tensor = (answers * weights[..., None]).sum(1).to(h.dtype).view_as(h)
        added = mixed if residual is None else mixed + residual
        return added if self.shared is None else self.shared(h, norm=None, residual=added)
