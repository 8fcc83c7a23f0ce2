"""SwiGLU, GeGLU and GELU of the feed-forward layer.

Bytes: x read, y written: 3 F a row for the gated ones, whose x has 2 F channels, 2 F for GELU. Flops, counted as 8 an
element of y, bound nothing. The roof is R, which only reads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.bench import cases as published
from glm_kernels.bench.norms import ROWS
from glm_kernels.bench.peers import OURS, compiled, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, MissingError, Side, Subject, Work, generator, sample


@dataclass(frozen=True, kw_only=True)
class ActivationCase(Case):
    """N rows; `kind` is "swiglu", "geglu erf", "geglu tanh", "gelu erf" or "gelu tanh"; F channels come out."""

    kind: str
    inner: int
    rows: int

    @property
    def gated(self) -> bool:
        """Whether x has 2 F channels."""
        return "glu" in self.kind

    @property
    def tanh(self) -> bool:
        """Which GELU."""
        return self.kind.endswith("tanh")


def all_cases() -> list[ActivationCase]:
    """Every model's width and activation."""

    def everything() -> Iterator[ActivationCase]:
        for model in published.MODELS.values():
            for rows in ROWS:
                first = model in (published.GLM_4_9B, published.CHATGLM_6B) and rows in (1, 4096)
                yield ActivationCase(
                    model=model.name, dtype=model.dtype, kind=model.activation, inner=model.inner, rows=rows,
                    importance=0 if first else 2,
                )  # fmt: skip

    return list(dict.fromkeys(everything()))


def make_inputs(case: ActivationCase, device: torch.device, seed: int) -> Inputs:
    """x."""
    shape = case.rows, case.inner * (2 if case.gated else 1)
    return {"x": torch.randn(shape, generator=generator(device, seed), device=device, dtype=case.torch_dtype)}


def work(case: ActivationCase) -> Work:
    """See the head of this file."""
    y = case.rows * case.inner
    return Work((3 if case.gated else 2) * y * case.torch_dtype.itemsize, 8 * y)


def outputs(case: ActivationCase) -> float:
    """Bytes of y."""
    return case.rows * case.inner * case.torch_dtype.itemsize


# ----------------------------------------------------------------------------- the sides


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) · second half, in plain torch."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def geglu(x: Tensor, approximate: str) -> Tensor:
    """First half · gelu(second half), in plain torch."""
    up, gate = x.chunk(2, -1)
    return up * F.gelu(gate, approximate=approximate)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu,
    "geglu erf": partial(geglu, approximate="none"),
    "geglu tanh": partial(geglu, approximate="tanh"),
    "gelu erf": partial(F.gelu, approximate="none"),
    "gelu tanh": partial(F.gelu, approximate="tanh"),
}


def ours(case: ActivationCase, inputs: Inputs) -> Call:
    """The kernel of this project."""
    kernel = find(OURS, case.kind.split()[0])
    return partial(kernel, inputs["x"]) if case.kind == "swiglu" else partial(kernel, inputs["x"], tanh=case.tanh)


def torch_compiled(case: ActivationCase, inputs: Inputs) -> Call:
    """The same in plain torch, compiled into one kernel."""
    on_gpu(inputs["x"], "torch.compile")
    return partial(compiled(PLAIN[case.kind]), inputs["x"])


def liger(case: ActivationCase, inputs: Inputs) -> Call:
    """Liger's gated activations, which take the halves by themselves: they are laid out beforehand."""
    if not case.gated or case.kind == "geglu erf":
        raise MissingError(f"has no {case.kind}")
    swish = case.kind == "swiglu"
    module, name = ("swiglu", "LigerSiLUMulFunction") if swish else ("geglu", "LigerGELUMulFunction")
    apply = find(f"liger_kernel.ops.{module}", f"{name}.apply")
    on_gpu(inputs["x"], "liger")
    first, second = (half.contiguous() for half in inputs["x"].chunk(2, -1))
    return partial(apply, first, second) if swish else partial(apply, second, first)


def flashinfer(case: ActivationCase, inputs: Inputs) -> Call:
    """flashinfer's gated activations; its GeGLU takes the halves the other way round, laid out beforehand."""
    if not case.gated:
        raise MissingError(f"has no {case.kind}")
    names = {"swiglu": "silu_and_mul", "geglu erf": "gelu_and_mul", "geglu tanh": "gelu_tanh_and_mul"}
    kernel = find("flashinfer.activation", names[case.kind])
    on_gpu(inputs["x"], "flashinfer")
    x = inputs["x"] if case.kind == "swiglu" else torch.cat(inputs["x"].chunk(2, -1)[::-1], -1)
    return partial(kernel, x)


def sides(case: ActivationCase) -> list[Side]:
    """Ours and the peers."""
    return [
        Side(OURS, partial(ours, case)),
        Side("torch", lambda inputs: partial(PLAIN[case.kind], inputs["x"])),
        Side("torch.compile", partial(torch_compiled, case)),
        Side("liger", partial(liger, case)),
        Side("flashinfer", partial(flashinfer, case)),
    ]


# ----------------------------------------------------------------------------- what is right


def expected(case: ActivationCase, inputs: Inputs) -> list[Expected]:
    """Some rows of y."""
    rows = sample(case.rows, 512).to(inputs["x"].device)
    some: Any = inputs["x"][rows]
    return [Expected("y", lambda y: y[rows], PLAIN[case.kind](some), PLAIN[case.kind](some.double()))]


NAMES = {"swiglu": "SwiGLU", "geglu": "GeGLU", "gelu": "GELU"}


def label(case: ActivationCase) -> str:
    """As "GLM-4-9B SwiGLU"."""
    kind, *form = case.kind.split()
    return " ".join([case.model, NAMES[kind], *form])


SUBJECT = Subject(
    "activations", "Activations", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("rows", case.rows),
)  # fmt: skip
