"""The product with a matrix of 16-bit weights for few rows, with what stands around it in a model, against cuBLAS.

Bytes: the matrix, x and the vectors read, the residual read, y written. Flops: 2 N O I. Every side computes the norm
before and the bias, SwiGLU and residual after: ours in the same launch, the others as they can. The roof is R.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.bench import cases as published
from glm_kernels.bench.cases import Model
from glm_kernels.bench.peers import OURS, compiled, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, Side, Subject, Work, generator, sample

EPS = 1e-5
ROWS = (1, 2, 4, 8, 16)
HEADS = {"ChatGLM-6B": 130528, "ChatGLM3-6B": 65024, "GLM-4-9B": 151552}  # outputs of the language-model head


@dataclass(frozen=True, kw_only=True)
class DenseCase(Case):
    """N rows times a matrix [O, I], and what is fused with it."""

    matrix: str
    outputs: int
    inputs: int
    rows: int
    norm: bool = False
    bias: bool = False
    swiglu: bool = False
    residual: bool = False

    @property
    def results(self) -> int:
        """Width of y."""
        return self.outputs // (1 + self.swiglu)


def matrices(model: Model) -> Iterator[DenseCase]:
    """Those of one layer and the head, for one row. An RMSNorm is fused, a LayerNorm is not."""
    width, inner, heads = model.hidden, model.inner, model.heads * model.key
    qkv = heads + 2 * model.groups * model.key
    gated, normed = model.activation == "swiglu", model.norm != "layer"
    biased = not gated  # ChatGLM-6B has a bias everywhere but in its head, ChatGLM2 and later at queries, keys, values
    case = partial(DenseCase, model=model.name, dtype=model.dtype, rows=1)
    yield case(matrix="qkv", outputs=qkv, inputs=width, norm=normed, bias=True)
    yield case(matrix="attention output", outputs=width, inputs=heads, bias=biased, residual=True)
    if gated:
        yield case(matrix="gate and up", outputs=2 * inner, inputs=width, norm=normed, swiglu=True, importance=0)
    else:
        yield case(matrix="up", outputs=inner, inputs=width, bias=biased)
    yield case(matrix="down", outputs=width, inputs=inner, bias=biased, residual=True, importance=0 if gated else 1)
    yield case(matrix="head", outputs=HEADS[model.name], inputs=width, norm=normed)


def all_cases() -> list[DenseCase]:
    """Every matrix with every number of rows; one row first, and of that the feed-forward layer of GLM-4-9B."""

    def everything() -> Iterator[DenseCase]:
        for model in (published.GLM_4_9B, published.CHATGLM3_6B, published.CHATGLM_6B):
            for case in matrices(model):
                for rows in ROWS:
                    least = 2 if rows > 1 else 0 if model is published.GLM_4_9B else 1
                    yield DenseCase(**case.fields | {"rows": rows}, importance=max(case.importance, least))

    return list(everything())


def make_inputs(case: DenseCase, device: torch.device, seed: int) -> Inputs:
    """x [N, I], weight [O, I], and of norm [I], bias [O] and residual [N, results] what the case has."""
    random, dtype = generator(device, seed), case.torch_dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=dtype)

    inputs = {"x": draw(case.rows, case.inputs), "weight": draw(case.outputs, case.inputs) * case.inputs**-0.5}
    if case.norm:
        inputs["norm"] = 1 + draw(case.inputs) / 8
    if case.bias:
        inputs["bias"] = draw(case.outputs)
    if case.residual:
        inputs["residual"] = draw(case.rows, case.results)
    return inputs


def work(case: DenseCase) -> Work:
    """See the head of this file."""
    weights = case.outputs * case.inputs
    vectors = case.norm * case.inputs + case.bias * case.outputs
    moved = weights + vectors + case.rows * (case.inputs + (1 + case.residual) * case.results)
    return Work(moved * case.torch_dtype.itemsize, 2 * case.rows * weights)


def outputs(case: DenseCase) -> float:
    """Bytes of y."""
    return case.rows * case.results * case.torch_dtype.itemsize


# ----------------------------------------------------------------------------- the sides


def plainly(
    x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """torch's operators, one after another; the norm of half precision in float32, its weight before the cast."""
    if norm is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = F.rms_norm(x.to(wide), norm.shape, norm.to(wide), EPS).to(x.dtype)
    y = F.linear(x, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def ours(case: DenseCase, inputs: Inputs) -> Call:
    """The kernel of this project."""
    more = {"eps": EPS} if case.norm else {}
    return partial(find(OURS, "dense_matmul"), **inputs, **more, swiglu=case.swiglu)


def arguments(case: DenseCase, inputs: Inputs) -> tuple[Any, ...]:
    """Of `plainly`."""
    return *(inputs.get(name) for name in ("x", "weight", "norm", "bias", "residual")), case.swiglu


def cublas(case: DenseCase, inputs: Inputs) -> Call:
    """cuBLAS with torch's operators around it."""
    return partial(plainly, *arguments(case, inputs))


def with_our_kernels(case: DenseCase, inputs: Inputs) -> Call:
    """cuBLAS with this project's norm and SwiGLU around it, each a launch of its own."""
    rms_norm, swiglu = find(OURS, "rms_norm"), find(OURS, "swiglu")

    def call() -> Tensor:
        x = inputs["x"]
        if case.norm:
            x = rms_norm(x, inputs["norm"], EPS, weight_first=True)
        y = F.linear(x, inputs["weight"], inputs.get("bias"))
        y = swiglu(y) if case.swiglu else y
        return inputs["residual"] + y if case.residual else y

    return call


def inductor(case: DenseCase, inputs: Inputs) -> Call:
    """What torch.compile makes of the operators, its own products tried too."""
    on_gpu(inputs["x"], "torch.compile")
    return partial(compiled(plainly, tuned=True), *arguments(case, inputs))


def sides(case: DenseCase) -> list[Side]:
    """Ours and the peers."""
    return [
        Side(OURS, partial(ours, case)),
        Side("cuBLAS", partial(cublas, case)),
        Side("cuBLAS, our kernels", partial(with_our_kernels, case)),
        Side("torch.compile", partial(inductor, case)),
    ]


def expected(case: DenseCase, inputs: Inputs) -> list[Expected]:
    """All rows and some outputs of y, against float64."""
    columns = sample(case.results, 1024).to(inputs["x"].device)
    chosen = torch.cat((columns, columns + case.results)) if case.swiglu else columns
    some = dict(inputs) | {name: inputs[name][chosen] for name in ("weight", "bias") if name in inputs}
    if case.residual:
        some["residual"] = inputs["residual"][:, columns]
    exact = {name: value.double() for name, value in some.items()}
    plain, truth = (plainly(*arguments(case, each)) for each in (some, exact))
    return [Expected("y", lambda output: output[:, columns], plain, truth)]


def label(case: DenseCase) -> str:
    """As "GLM-4-9B norm + gate and up + SwiGLU 27392×4096"."""
    parts = ["norm"] * case.norm + [case.matrix] + ["SwiGLU"] * case.swiglu + ["residual"] * case.residual
    return f"{case.model} {' + '.join(parts)} {case.outputs}×{case.inputs}"


SUBJECT = Subject(
    "dense", "16-bit weights, few rows", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("rows", case.rows),
)  # fmt: skip
