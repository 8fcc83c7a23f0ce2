"""What is right in the exercises of chapter 5, by `glm` itself."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import glm
from docs.answers import which_field
from docs.check import Case, Exercise
from glm.family.chatglm import build
from glm.norms import LayerNorm, RMSNorm
from glm.residual import Deep, Pre, Sandwich, Scaled, Wiring

Function = Callable[[Tensor], Tensor]
D = 16


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms_norm_cases() -> Iterator[Case]:
    """Both orders, in float64, and in bfloat16 to the bit; a vector that is small beside √eps."""
    for dtype, seed in ((torch.float64, 0), (torch.bfloat16, 1)):
        for weight_first in (True, False):
            x, weight = random(2, 3, D, seed=seed).to(dtype), (1 + 0.1 * random(D, seed=9)).to(dtype)
            x[0, 0] *= 1e-4
            norm = RMSNorm(1e-5, weight_first).build(D).to(dtype)
            norm.load_state_dict({"weight": weight})
            arguments = {"x": x, "weight": weight, "eps": 1e-5, "weight_first": weight_first}
            with torch.no_grad():
                yield Case(arguments, {"result": norm(x)})


def some_norm(seed: int) -> nn.Module:
    """A LayerNorm with weights."""
    norm = LayerNorm(1e-5).build(D).double().requires_grad_(False)
    norm.load_state_dict({"weight": 1 + 0.1 * random(D, seed=seed), "bias": random(D, seed=seed + 1)})
    return norm


def some_sublayer(seed: int) -> Function:
    """A matrix and a tanh."""
    matrix = random(D, D, seed=seed) / math.sqrt(D)
    return lambda h: (h @ matrix).tanh()


def joined(wiring: Wiring, x: Tensor, f: Function, before: nn.Module, after: nn.Module) -> Tensor:
    """What the wiring's own module makes of it, given these norms."""
    module = wiring.build(LayerNorm(1e-5), D).double().requires_grad_(False)
    for name, norm in (("before", before), ("after", after)):
        if name in dict(module.named_children()):
            module.get_submodule(name).load_state_dict(norm.state_dict())
    y: Tensor = module(x, f)
    return y


def wired_cases() -> Iterator[Case]:
    """All four."""
    alpha = 3.5
    wirings: tuple[Wiring, ...] = (Pre(), Sandwich(), Deep(alpha), Scaled(alpha))
    for seed, wiring in enumerate(wirings):
        x, f, before, after = random(1, 3, D, seed=seed), some_sublayer(50 + seed), some_norm(60), some_norm(70)
        arguments = {"kind": type(wiring).__name__, "x": x, "f": f, "before": before, "after": after, "alpha": alpha}
        yield Case(arguments, {"result": joined(wiring, x, f, before, after)})


def two_chains_cases() -> Iterator[Case]:
    """One sublayer, and six."""
    for N, alpha in ((1, 2.0), (6, math.sqrt(56))):
        norms = [some_norm(10 * k) for k in range(N + 1)]
        sublayers = [some_sublayer(100 + k) for k in range(N)]
        x = random(3, D, seed=N)
        scaled, deep = [x], [norms[0](x)]
        for k, f in enumerate(sublayers):
            scaled.append(joined(Scaled(alpha), scaled[-1], f, norms[k], norms[k]))
            deep.append(joined(Deep(alpha), deep[-1], f, norms[k + 1], norms[k + 1]))
        arguments = {"x": x, "norms": norms, "sublayers": sublayers, "alpha": alpha}
        yield Case(arguments, {"scaled": torch.stack(scaled), "deep": torch.stack(deep)})


def which_field_cases() -> Iterator[Case]:
    """Each of the fields in turn."""
    spec = build(
        layers=3, width=32, inner=64, heads=4, vocabulary=40, context=64, eps=1e-5, two_axes=True,
        sop=36, mask=34, gmask=35, pad=3, stop=(37,),
    )  # fmt: skip
    right = glm.GLM(spec, dtype=torch.float64, seed=5)
    ids = torch.tensor([[5, 6, 7, 8, 35, 36, 9, 10]])
    block = spec.blocks[0]
    alpha = replace(block, wiring=Scaled(math.sqrt(2 * len(spec.blocks))))
    changes = (
        replace(spec, blocks=(alpha,) * 3),
        replace(spec, blocks=(block, alpha, block)),
        replace(spec, blocks=(replace(block, wiring=Pre()),) * 3),
        replace(spec, blocks=(replace(block, norm=LayerNorm(1e-3)),) * 3),
        replace(spec, final_norm=LayerNorm(1e-3)),
    )
    yield from which_field.cases(right, changes, ids)


EXERCISES = [
    Exercise("5.1", "rms_norm", cases=rms_norm_cases),
    Exercise("5.2", "wired", cases=wired_cases),
    Exercise("5.3", "two_chains", cases=two_chains_cases),
    Exercise("5.4", "which_field", cases=which_field_cases),
]
