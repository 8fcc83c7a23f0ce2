"""What is right in the exercises of chapter 7, by `glm` itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import glm
from docs.check import Case, Exercise
from glm.experts import Experts, Router, RouterModule, mix
from glm.feed_forward import FeedForward
from glm.info import active_parameters, parameters
from glm.linear import Dense


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router(spec: Router, weight: Tensor, bias: Tensor, top: int) -> RouterModule:
    """A router with these numbers, computing in float64."""
    module = RouterModule(spec, weight.shape[1], weight.shape[0], top).double().requires_grad_(False)
    module.weight.copy_(weight)
    module.bias = bias
    return module


def route_cases() -> Iterator[Case]:
    """Without a bias, and with one that is larger than any score."""
    for seed, (E, top, scale, strength) in enumerate(((6, 2, 1.0, 0.0), (16, 4, 2.5, 0.3), (9, 9, 1.8, 5.0))):
        x, weight, bias = random(20, 12, seed=seed), random(E, 12, seed=50 + seed), random(E, seed=90 + seed) * strength
        chosen, weights = router(Router(1, 1, True, scale), weight, bias, top)(x)
        arguments = {"x": x, "weight": weight, "bias": bias, "top": top, "scale": scale}
        yield Case(arguments, {"chosen": chosen, "weights": weights})


def once(expert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An expert that answers once, and not if nothing is asked."""
    calls: list[int] = []

    def answer(x: Tensor) -> Tensor:
        if calls or not len(x):
            raise ValueError("an expert is asked once, for all of its tokens, and only if it has any")
        calls.append(len(x))
        return expert(x)

    return answer


def mixture_cases() -> Iterator[Case]:
    """All experts visited, and many that are not."""
    for seed, (N, E, top) in enumerate(((30, 4, 2), (3, 40, 3), (1, 5, 1))):
        x, matrices = random(N, 6, seed=seed), random(E, 6, 6, seed=seed + 20)
        chosen, weights = random(N, E, seed=seed + 40).topk(top).indices, random(N, top, seed=seed + 60)
        expected = mix(x, chosen, weights, lambda x, e, m=matrices: (x @ m[e]).sin(), range(E))  # type: ignore[misc]
        experts = [once(lambda x, m=matrix: (x @ m).sin()) for matrix in matrices]  # type: ignore[misc]
        yield Case({"x": x, "chosen": chosen, "weights": weights, "experts": experts}, {"result": expected})


def experts_read_cases() -> Iterator[Case]:
    """One token, whose experts are what a model's active parameters count, and several."""
    for name in ("glm-4.5-air", "glm-4.7-flash", "glm-5"):
        spec = glm.release(name).spec
        [experts] = {block.feed_forward for block in spec.blocks if isinstance(block.feed_forward, Experts)}
        every = (parameters(spec) - active_parameters(spec)) / (experts.count - experts.top) * experts.count
        for tokens in (1, 7, 64):
            touched = every * (1 - (1 - experts.top / experts.count) ** tokens)
            yield Case({"spec": spec, "tokens": tokens, "bytes_each": 2}, {"result": 2 * touched})


def rebalanced_cases() -> Iterator[Case]:
    """Experts with less, more, none and exactly their share."""
    for chosen, E, step in (
        (torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]]), 4, 0.001),
        (torch.tensor([[4], [4], [2]]), 6, 0.5),
    ):
        bias = random(E, seed=E)
        share = chosen.numel() / E
        by_hand = [(step if n < share else -step if n > share else 0.0) for n in chosen.flatten().bincount(minlength=E)]
        yield Case(
            {"bias": bias, "chosen": chosen, "step": step}, {"result": bias + torch.tensor(by_hand, dtype=bias.dtype)}
        )


def which_field_cases() -> Iterator[Case]:
    """Each of the fields in turn."""
    experts = Experts(FeedForward(8, ("silu", "identity"), False), 12, 3, 1, Router(4, 2, True, 2.5))
    spec = glm.release("glm-4.5").spec
    spec = replace(spec, blocks=(*spec.blocks[:-1], replace(spec.blocks[-1], feed_forward=experts)), weights=Dense())
    weight, bias = random(12, 16, seed=1), random(12, seed=2) / 10
    for field, changed in (
        ("router.normalised", replace(experts, router=replace(experts.router, normalised=False))),
        ("router.scale", replace(experts, router=replace(experts.router, scale=1.0))),
        ("router.kept", replace(experts, router=replace(experts.router, kept=4))),
        ("top", replace(experts, top=4)),
    ):
        broken = router(changed.router, weight, bias, changed.top)
        [difference] = glm.diff(
            spec, replace(spec, blocks=(*spec.blocks[:-1], replace(spec.blocks[-1], feed_forward=changed)))
        ).changes
        assert difference.field.endswith(field)
        arguments = {"right": spec, "broken": broken.__call__, "weight": weight, "bias": bias}
        yield Case(arguments, {"result": field})


EXERCISES = [
    Exercise("7.1", "route", route_cases),
    Exercise("7.2", "mixture", mixture_cases),
    Exercise("7.3", "experts_read", experts_read_cases),
    Exercise("7.4", "rebalanced", rebalanced_cases),
    Exercise("7.5", "which_field", which_field_cases),
]
