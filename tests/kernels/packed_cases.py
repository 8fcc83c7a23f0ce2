"""What the tests of int4_matmul and int8_matmul share: cases, and how one is checked in every way."""

from typing import Any, NamedTuple

import torch
from glm_kernels import counters, packed_matmul, packing
from glm_kernels.packed_matmul import Shape
from harness import Guarded, amid, judge
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

SMALL = {8: 32, 16: 16, 32: 16, 64: 32, 128: 32}  # outputs a program in the interpreter, by rows: several programs

EPS = 1e-3  # such that it shows in rows of small numbers


class Case(NamedTuple):
    """One product: rows N, outputs O, inputs I; `group` None is the whole row."""

    N: int
    O: int  # noqa: E741
    I: int  # noqa: E741
    group: int | None
    zeros: bool = False
    bias: bool = False
    residual: bool = False
    swiglu: bool = False
    path: int = 8
    splits: int = 1
    experts: tuple[int, ...] = ()  # rows of each
    fold: bool = False
    norm: bool = False


@st.composite
def cases(draw: Any) -> Case:
    """All paths and forms at small, odd sizes."""
    group = draw(st.sampled_from([None, 32, 64, 96, 128]))
    inputs = 2 * draw(st.integers(1, 90)) if group is None else group * draw(st.integers(1, 3))
    flags = [draw(st.booleans()) for _ in range(6)]
    return Case(
        draw(st.integers(1, 37)), 2 * draw(st.integers(1, 25)) + (0 if flags[3] else draw(st.integers(0, 1))), inputs,
        group, *flags[:4], path=draw(st.sampled_from([8, 16, 32])), splits=draw(st.integers(1, 3)), fold=flags[4],
        norm=flags[5],
    )  # fmt: skip


def inputs(case: Case, bits: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments, those that may have strides amid NaN."""
    g = torch.Generator().manual_seed(case.N * 7919 + case.O * 101 + case.I)
    E, lead = len(case.experts), (len(case.experts),) if case.experts else ()
    group = case.group or case.I
    N = sum(case.experts) if E else case.N
    low = -(1 << (bits - 1))
    q = torch.randint(low, -low, (*lead, case.O, case.I), generator=g).to(torch.int8)
    zeros = torch.randint(low, -low, (*lead, case.O, case.I // group), generator=g).to(torch.int8)
    scales = (0.5 + torch.rand(*lead, case.O, case.I // group, generator=g)) / 2**bits
    out = case.O // 2 if case.swiglu else case.O

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    x = draw(N, case.I) / case.I**0.5
    if case.norm:  # rows of all sizes: the factor of one is not that of another
        x *= 10 ** (2 * torch.rand(N, 1, generator=g) - 1).to(device, dtype)
    return {
        "x": amid(x),
        "packed": packing.pack(q, bits).to(device),
        "scales": scales.to(device, dtype),
        "zeros": zeros.to(device) if case.zeros else None,
        "bias": draw(*lead, case.O) if case.bias else None,
        "residual": amid(draw(N, out), margin=5) if case.residual and not E else None,
        "norm": amid(1 + draw(case.I) / 2) if case.norm else None,
        "eps": EPS if case.norm else None,
        "offsets": torch.tensor([0, *case.experts]).cumsum(0).int().to(device) if E else None,
    }


def launched(case: Case, bits: int, given: dict[str, Any]) -> Tensor:
    """The kernel's y between guard bands; every split and path is forced."""
    packed, scales, zeros = packing.prepack(given["packed"], given["scales"], given["zeros"], bits=bits)
    group = case.group or case.I
    y = Guarded((len(given["x"]), case.O // 2 if case.swiglu else case.O), given["x"])
    shape = Shape(case.path, SMALL[case.path], case.fold, 4, 2, 16)
    packed_matmul.launch(
        given["x"], packed, scales, zeros, given["bias"], given["residual"], given["norm"], y.out, given["offsets"],
        bits=bits, group=group, gated=case.swiglu, eps=given["eps"] or 0.0, shape=shape, splits=case.splits,
    )  # fmt: skip
    assert all((c == 0).all() for c in counters.kept.values()), "counters not set back"
    return y.written()


def exact(case: Case, bits: int, given: dict[str, Any]) -> Tensor:
    """In float64, written down anew."""
    q = packing.unpack(given["packed"], bits).double()
    group = case.group or case.I
    if case.zeros:
        q = q - given["zeros"].double().repeat_interleave(group, -1)
    w = q * given["scales"].double().repeat_interleave(group, -1)
    x = given["x"].double()
    if case.norm:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * given["norm"].double()
    which = torch.zeros(len(x), dtype=torch.long, device=x.device)
    if case.experts:
        which = torch.arange(len(case.experts)).repeat_interleave(torch.tensor(case.experts)).to(x.device)
    else:
        w = w[None]
    y = torch.einsum("ni,noi->no", x, w[which])
    if case.bias:
        y = y + (given["bias"].double()[which] if case.experts else given["bias"].double())
    if case.swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if given["residual"] is None else y + given["residual"].double()


def check(case: Case, bits: int, dtype: torch.dtype, device: str) -> Tensor:
    """The kernel, twice, in its guard bands, against float64 of the exact matrix."""
    given = inputs(case, bits, dtype, device)
    y = launched(case, bits, given)
    plain = packed_matmul.reference(**given, bits=bits, swiglu=case.swiglu)
    judge(y, plain, exact(case, bits, given))
    assert torch.equal(y, launched(case, bits, given)), "not the same twice"
    return y
