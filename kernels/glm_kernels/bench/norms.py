"""RMSNorm and LayerNorm, alone and with the residual addition before.

Bytes: x read, y written; with a residual that read and the sum written too; the parameters once. Flops as in the head
of `glm_kernels/norms.py`. The roof is R, which only reads: writing costs a device more, so 100 % cannot be had.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.bench import cases as published
from glm_kernels.bench.peers import OURS, compiled, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, MissingError, Side, Subject, Work, generator, sample

EPS = 1e-5
ROWS = (1, 8, 32, 1024, 4096, 32768)


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """N rows of width D; `kind` is "layer", or "rms before" or "rms after" the cast comes the weight."""

    kind: str
    width: int
    rows: int
    residual: bool


def all_cases() -> list[NormCase]:
    """Every model's width and norm."""

    def everything() -> Iterator[NormCase]:
        for model in published.NAMED:
            for rows in ROWS:
                for residual in (True, False):
                    first = model in (published.GLM_4_9B, published.CHATGLM_6B) and rows in (1, 32768) and residual
                    yield NormCase(
                        model=model.name, dtype=model.dtype, kind=model.norm, width=model.hidden, rows=rows,
                        residual=residual, importance=0 if first else 2 if residual else 3,
                    )  # fmt: skip

    return list(dict.fromkeys(everything()))


def make_inputs(case: NormCase, device: torch.device, seed: int) -> Inputs:
    """x, residual, weight and bias."""
    random = generator(device, seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=case.torch_dtype)

    inputs = {"x": draw(case.rows, case.width), "weight": 1 + draw(case.width) / 8}
    if case.residual:
        inputs["residual"] = draw(case.rows, case.width)
    if case.kind == "layer":
        inputs["bias"] = draw(case.width)
    return inputs


def work(case: NormCase) -> Work:
    """See the head of this file."""
    values, size = case.rows * case.width, case.torch_dtype.itemsize
    parameters = case.width * (2 if case.kind == "layer" else 1)
    moved = (4 if case.residual else 2) * values + parameters
    return Work(moved * size, ((7 if case.kind == "layer" else 4) + case.residual) * values)


def outputs(case: NormCase) -> float:
    """Bytes of y, and of the sum."""
    return (1 + case.residual) * case.rows * case.width * case.torch_dtype.itemsize


# ----------------------------------------------------------------------------- the sides


def with_sum(norm: Callable[[Tensor], Any], x: Tensor, residual: Tensor | None) -> Any:
    """The norm of x, or (norm of the sum, sum)."""
    if residual is None:
        return norm(x)
    s = x + residual
    return norm(s), s


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
    """LayerNorm of torch."""
    return with_sum(lambda s: F.layer_norm(s, weight.shape, weight, bias, EPS), x, residual)


def rms(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
    """RMSNorm of torch."""
    return with_sum(lambda s: F.rms_norm(s, weight.shape, weight, EPS), x, residual)


def torch_norm(case: NormCase, inputs: Inputs, compile: bool) -> Call:
    """torch's norm and addition, as they are or compiled into one kernel."""
    function = layer if case.kind == "layer" else rms
    if compile:
        on_gpu(inputs["x"], "torch.compile")
        function = compiled(function)
    return partial(function, inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual"))


def ours(case: NormCase, inputs: Inputs) -> Call:
    """The kernel of this project."""
    residual = inputs.get("residual")
    if case.kind == "layer":
        layer_norm = find(OURS, "layer_norm")
        return partial(layer_norm, inputs["x"], inputs["weight"], inputs["bias"], EPS, residual=residual)
    first = case.kind == "rms before"
    return partial(find(OURS, "rms_norm"), inputs["x"], inputs["weight"], EPS, residual=residual, weight_first=first)


def liger(case: NormCase, inputs: Inputs) -> Call:
    """Liger's kernels; LayerNorm has none with the addition, which is torch's then."""
    on_gpu(inputs["x"], "liger")
    residual = inputs.get("residual")
    if case.kind == "layer":
        apply = find("liger_kernel.ops.layer_norm", "LigerLayerNormFunction.apply")
        return lambda: with_sum(lambda s: apply(s, inputs["weight"], inputs["bias"], EPS), inputs["x"], residual)
    casting = "gemma" if case.kind == "rms before" else "llama"
    if residual is not None:
        added = find("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction.apply")
        return partial(added, inputs["x"], residual, inputs["weight"], EPS, 0.0, casting)
    apply = find("liger_kernel.ops.rms_norm", "LigerRMSNormFunction.apply")
    return partial(apply, inputs["x"], inputs["weight"], EPS, 0.0, casting, False)


def flashinfer(case: NormCase, inputs: Inputs) -> Call:
    """flashinfer's RMSNorm; with the addition it writes over its inputs, which are copies of its own."""
    on_gpu(inputs["x"], "flashinfer")
    if case.kind == "layer":
        raise MissingError("has no LayerNorm in these dtypes")
    if not case.residual:
        return partial(find("flashinfer.norm", "rmsnorm"), inputs["x"], inputs["weight"], EPS)
    add = find("flashinfer.norm", "fused_add_rmsnorm")
    x, residual = inputs["x"].clone(), inputs["residual"].clone()

    def call() -> tuple[Tensor, Tensor]:
        add(x, residual, inputs["weight"], EPS)
        return x, residual

    return call


def sides(case: NormCase) -> list[Side]:
    """Ours and the peers."""
    return [
        Side(OURS, partial(ours, case)),
        Side("torch", partial(torch_norm, case, compile=False)),
        Side("torch.compile", partial(torch_norm, case, compile=True)),
        Side("liger", partial(liger, case)),
        Side("flashinfer", partial(flashinfer, case), steady=not case.residual),
    ]


# ----------------------------------------------------------------------------- what is right


def normal(case: NormCase, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The equations in `dtype`; statistics of half precision in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    s = inputs["x"] if not case.residual else inputs["x"] + inputs["residual"]  # rounded, as the models do
    s, weight = s.to(wide), inputs["weight"]
    if case.kind == "layer":
        s = s - s.mean(-1, keepdim=True)
    n = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
    if case.kind == "rms after":
        y: Tensor = n.to(dtype) * weight.to(dtype)
    else:
        y = n * weight.to(wide) + (inputs["bias"].to(wide) if case.kind == "layer" else 0)
    return y.to(dtype)


def expected(case: NormCase, inputs: Inputs) -> list[Expected]:
    """Some rows of y, and of the sum."""
    rows = sample(case.rows, 2048).to(inputs["x"].device)
    some = {name: value[rows] if value.ndim == 2 else value for name, value in inputs.items()}

    def y(output: Any) -> Tensor:
        first: Tensor = (output[0] if isinstance(output, tuple) else output)[rows]
        return first

    found = [Expected("y", y, normal(case, some, case.torch_dtype), normal(case, some, torch.float64))]
    if case.residual:
        exact = some["x"].double() + some["residual"].double()
        found.append(Expected("s", lambda output: output[1][rows], some["x"] + some["residual"], exact))
    return found


def label(case: NormCase) -> str:
    """As "GLM-4-9B RMSNorm + residual"."""
    norm = "LayerNorm" if case.kind == "layer" else "RMSNorm"
    return f"{case.model} {norm}{' + residual' if case.residual else ''}"


SUBJECT = Subject(
    "norms", "Norms", all_cases, make_inputs, outputs, work, sides, expected, label, lambda case: ("rows", case.rows)
)  # fmt: skip
