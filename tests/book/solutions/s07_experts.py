"""Solutions of chapter 7, right and wrong."""

from collections.abc import Callable

import torch
from torch import Tensor

import glm
from glm.experts import Experts


def route(x: Tensor, weight: Tensor, bias: Tensor, top: int, scale: float) -> tuple[Tensor, Tensor]:
    s = 1 / (1 + (-x @ weight.T).exp())
    chosen = (s + bias).argsort(dim=-1, descending=True)[:, :top]
    picked = s.gather(1, chosen)
    return chosen, scale * picked / picked.sum(1, keepdim=True)


def route_without_bias(x: Tensor, weight: Tensor, bias: Tensor, top: int, scale: float) -> tuple[Tensor, Tensor]:
    return route(x, weight, bias * 0, top, scale)


def route_weighing_the_bias(x: Tensor, weight: Tensor, bias: Tensor, top: int, scale: float) -> tuple[Tensor, Tensor]:
    picked, chosen = ((x @ weight.T).sigmoid() + bias).topk(top)
    return chosen, scale * picked / picked.sum(1, keepdim=True)


def route_by_softmax(x: Tensor, weight: Tensor, bias: Tensor, top: int, scale: float) -> tuple[Tensor, Tensor]:
    picked, chosen = (x @ weight.T).softmax(-1).topk(top)
    return chosen, scale * picked / picked.sum(1, keepdim=True)


def mixture(x: Tensor, chosen: Tensor, weights: Tensor, experts: list[Callable[[Tensor], Tensor]]) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        n, j = (chosen == e).nonzero(as_tuple=True)
        if len(n):
            y[n] += expert(x[n]) * weights[n, j, None]
    return y


def mixture_unweighed(x: Tensor, chosen: Tensor, weights: Tensor, experts: list[Callable[[Tensor], Tensor]]) -> Tensor:
    return mixture(x, chosen, torch.full_like(weights, 1 / weights.shape[1]), experts)


def mixture_of_other_weights(
    x: Tensor, chosen: Tensor, weights: Tensor, experts: list[Callable[[Tensor], Tensor]]
) -> Tensor:
    return mixture(x, chosen, weights.flip(1), experts)


def experts_read(spec: glm.Spec, tokens: int, bytes_each: int) -> float:
    total = 0.0
    for block in spec.blocks:
        if isinstance(experts := block.feed_forward, Experts):
            read = experts.count * (1 - (1 - experts.top / experts.count) ** tokens)
            total += read * 3 * experts.expert.inner * spec.width * bytes_each
    return total


def experts_read_by_each(spec: glm.Spec, tokens: int, bytes_each: int) -> float:
    return tokens * experts_read(spec, 1, bytes_each)


def experts_read_in_every_block(spec: glm.Spec, tokens: int, bytes_each: int) -> float:
    sparse = sum(isinstance(block.feed_forward, Experts) for block in spec.blocks)
    return experts_read(spec, tokens, bytes_each) * len(spec.blocks) / sparse


def rebalanced(bias: Tensor, chosen: Tensor, step: float) -> Tensor:
    visits = torch.zeros_like(bias).index_add(0, chosen.flatten(), torch.ones(chosen.numel(), dtype=bias.dtype))
    return bias + step * (visits.mean() - visits).sign()


def rebalanced_in_proportion(bias: Tensor, chosen: Tensor, step: float) -> Tensor:
    visits = chosen.flatten().bincount(minlength=len(bias)).double()
    return bias + step * (visits.mean() - visits)


def rebalanced_the_wrong_way(bias: Tensor, chosen: Tensor, step: float) -> Tensor:
    return 2 * bias - rebalanced(bias, chosen, step)


def which_field(
    right: glm.Spec, broken: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor
) -> str:
    experts = right.blocks[-1].feed_forward
    x = torch.randn(500, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    chosen, weights = broken(x)
    if chosen.shape[1] != experts.top:
        return "top"
    each = experts.count // experts.router.groups
    if any(len(set((row // each).tolist())) > experts.router.kept for row in chosen):
        return "router.kept"
    sums = weights.sum(1)
    return "router.scale" if (sums - sums[0]).abs().max() < 1e-9 else "router.normalised"


def which_field_guessed(
    right: glm.Spec, broken: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor
) -> str:
    return "router.scale"


RIGHT = {
    "7.1": [route],
    "7.2": [mixture],
    "7.3": [experts_read],
    "7.4": [rebalanced],
    "7.5": [which_field],
}
WRONG = {
    "7.1": [(route_without_bias, "chosen"), (route_weighing_the_bias, "weights"), (route_by_softmax, "weights")],
    "7.2": [(mixture_unweighed, "result"), (mixture_of_other_weights, "result")],
    "7.3": [(experts_read_by_each, "result"), (experts_read_in_every_block, "result")],
    "7.4": [(rebalanced_in_proportion, "result"), (rebalanced_the_wrong_way, "result")],
    "7.5": [(which_field_guessed, "result")],
}
