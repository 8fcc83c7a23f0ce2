"""Solutions of chapter 5, right and wrong."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import glm
from glm.norms import LayerNorm
from glm.residual import Pre, Scaled

Function = Callable[[Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_first: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y * weight.to(y.dtype)).to(x.dtype) if weight_first else y.to(x.dtype) * weight


def always_weight_first(x: Tensor, weight: Tensor, eps: float, weight_first: bool) -> Tensor:
    return rms_norm(x, weight, eps, True)


def eps_outside_of_the_root(x: Tensor, weight: Tensor, eps: float, weight_first: bool) -> Tensor:
    return (x.double() / (x.double().square().mean(-1, keepdim=True).sqrt() + eps) * weight).to(x.dtype)


def with_the_mean_taken_out(x: Tensor, weight: Tensor, eps: float, weight_first: bool) -> Tensor:
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps, weight_first)


def wired(kind: str, x: Tensor, f: Function, before: Function, after: Function, alpha: float) -> Tensor:
    if kind == "Pre":
        return x + f(before(x))
    if kind == "Sandwich":
        return x + after(f(before(x)))
    if kind == "Deep":
        return after(alpha * x + f(x))
    return alpha * before(x) + f(before(x))


def residual_not_normalised(
    kind: str, x: Tensor, f: Function, before: Function, after: Function, alpha: float
) -> Tensor:
    return alpha * x + f(before(x)) if kind == "Scaled" else wired(kind, x, f, before, after, alpha)


def sandwich_around_the_sum(
    kind: str, x: Tensor, f: Function, before: Function, after: Function, alpha: float
) -> Tensor:
    return after(x + f(before(x))) if kind == "Sandwich" else wired(kind, x, f, before, after, alpha)


def two_chains(x: Tensor, norms: Sequence[Function], sublayers: Sequence[Function], alpha: float) -> dict[str, Tensor]:
    scaled, deep = [x], [norms[0](x)]
    for f, norm, following in zip(sublayers, norms[:-1], norms[1:], strict=True):
        scaled.append(alpha * norm(scaled[-1]) + f(norm(scaled[-1])))
        deep.append(following(alpha * deep[-1] + f(deep[-1])))
    return {"scaled": torch.stack(scaled), "deep": torch.stack(deep)}


def norms_one_place_off(
    x: Tensor, norms: Sequence[Function], sublayers: Sequence[Function], alpha: float
) -> dict[str, Tensor]:
    """`Deep` with the norm of the same number behind the sublayer."""
    states = [norms[0](x)]
    for f, norm in zip(sublayers, norms, strict=False):
        states.append(norm(alpha * states[-1] + f(states[-1])))
    return two_chains(x, norms, sublayers, alpha) | {"deep": torch.stack(states)}


def begun_with_x(
    x: Tensor, norms: Sequence[Function], sublayers: Sequence[Function], alpha: float
) -> dict[str, Tensor]:
    return two_chains(x, [lambda h: h, *norms[1:]], sublayers, alpha) | {
        "scaled": two_chains(x, norms, sublayers, alpha)["scaled"]
    }


def which_field(right: glm.GLM, broken: Callable[[Tensor], Tensor], ids: Tensor) -> str:
    block = right.spec.blocks[0]
    alpha = replace(block, wiring=Scaled(math.sqrt(6)))
    wanted = broken(ids)
    for field, blocks, final_norm in (
        ("blocks[0:3].wiring.alpha", (alpha,) * 3, LayerNorm(1e-5)),
        ("blocks[1].wiring.alpha", (block, alpha, block), LayerNorm(1e-5)),
        ("blocks[0:3].wiring", (replace(block, wiring=Pre()),) * 3, LayerNorm(1e-5)),
        ("blocks[0:3].norm.eps", (replace(block, norm=LayerNorm(1e-3)),) * 3, LayerNorm(1e-5)),
        ("final_norm.eps", (block,) * 3, LayerNorm(1e-3)),
    ):
        model = glm.GLM(replace(right.spec, blocks=blocks, final_norm=final_norm), dtype=right.dtype)
        model.load_state_dict(right.state_dict())
        with torch.inference_mode():
            if torch.equal(model(ids), wanted):
                return field
    raise AssertionError


def all_blocks_alike(right: glm.GLM, broken: Callable[[Tensor], Tensor], ids: Tensor) -> str:
    return which_field(right, broken, ids).replace("blocks[1]", "blocks[0:3]")


RIGHT = {"5.1": [rms_norm], "5.2": [wired], "5.3": [two_chains], "5.4": [which_field]}
WRONG = {
    "5.1": [
        (always_weight_first, "result"),
        (eps_outside_of_the_root, "result"),
        (with_the_mean_taken_out, "result"),
    ],
    "5.2": [(residual_not_normalised, "result"), (sandwich_around_the_sum, "result")],
    "5.3": [(norms_one_place_off, "deep"), (begun_with_x, "deep")],
    "5.4": [(all_blocks_alike, "result")],
}
