"""The activations of glm_kernels: on the CPU the reference, in Triton's interpreter and on a GPU the kernel."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from glm_kernels import activations, dispatch, geglu, gelu, swiglu
from glm_kernels.activations import ALONE, BLOCK, FIRST, SECOND
from harness import (
    DEVICES,
    DTYPES,
    Guarded,
    amid,
    directly,
    judge,
    kernel,
    needs_triton,
    put_in,
    rerun,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm.feed_forward import FeedForward
from glm.linear import Dense

FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str, int]] = {
    "swiglu": (swiglu, "silu", FIRST),
    "geglu": (lambda x: geglu(x, tanh=False), "gelu", SECOND),
    "geglu tanh": (lambda x: geglu(x, tanh=True), "gelu_tanh", SECOND),
    "gelu": (lambda x: gelu(x, tanh=False), "gelu", ALONE),
    "gelu tanh": (lambda x: gelu(x, tanh=True), "gelu_tanh", ALONE),
}
WIDTHS = st.integers(1, 40) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1])
SHAPES = st.lists(st.tuples(st.integers(1, 5), WIDTHS), min_size=1, max_size=3)

# ----------------------------------------------------------------------------- one form, checked in every way


def inputs(count: int, width: int, dtype: torch.dtype, device: str, part: int) -> tuple[Tensor, Tensor]:
    """x and dy amid NaN: values about one, about eight, small and zero, from row to row."""
    generator = torch.Generator().manual_seed(1000 * count + width)
    scale = torch.tensor([1.0, 8.0, 0.1, 0.0]).repeat(count)[:count, None]
    x = scale * torch.randn(count, width * (1 if part == ALONE else 2), generator=generator)
    dy = torch.randn(count, width, generator=generator)
    return amid(x.to(device, dtype)), amid(dy.to(device, dtype))


def gradient(x: Tensor, dy: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What autograd finds for x."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, dy)[0]


def check(shapes: list[tuple[int, int]], dtype: torch.dtype, device: str, form: str) -> None:
    """Every shape between guards, and all their values together against plain torch and float64."""
    public, kind, part = FORMS[form]

    def plain(x: Tensor) -> Tensor:
        return activations.forward_reference(x, kind, part)

    cases = [inputs(count, width, dtype, device, part) for count, width in [*shapes, (4, 70)]]
    launches = dispatch.takes_kernel(cases[0][0])  # first, since a broken kernel does no harm between guards
    found: list[list[Tensor]] = []
    for x, dy in cases:
        if launches:
            out, dout = (Guarded(tuple(like.shape), x, margin=40) for like in (dy, x))
            activations.launch(x, out.out, kind, part)
            y = out.written()
            activations.launch_backward(dy, x, dout.out, kind, part)
            dx = dout.written()
        else:
            y, dx = public(x), gradient(x, dy, public)
        truth = plain(x.double()), gradient(x.double(), dy.double(), plain)
        found.append([y, plain(x), truth[0], dx, gradient(x, dy, plain), truth[1]])
    columns = list(zip(*found, strict=True))
    y, same, exact = (torch.cat([v.flatten() for v in column]) for column in columns[:3])
    judge(y, same, exact)
    parts = 1 if part == ALONE else 2
    for half in range(parts):  # of the gradient each by itself
        judge(*(torch.cat([v.chunk(parts, dim=-1)[half].flatten() for v in column]) for column in columns[3:]))
    if dtype != torch.float32:  # rounded in the same places: a rounding more or less shows in a quarter of them
        assert (y != same).float().mean() <= 0.02
    for (x, dy), (y, _, _, dx, _, _) in zip(cases, found, strict=True):
        if launches:
            assert torch.equal(public(x), y)
            assert torch.equal(gradient(x, dy, public), dx)
        assert public(x).is_contiguous()


# ----------------------------------------------------------------------------- reference, interpreter, GPU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(dtype: torch.dtype, form: str, device: str) -> None:
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(SHAPES)
    def drawn(shapes: list[tuple[int, int]]) -> None:
        check(shapes, dtype, device, form)

    drawn()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str, device: str) -> None:
    """Whatever the strides, and without rows."""
    public, kind, part = FORMS[form]
    wide = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(device)
    sliced = wide[..., 8:14]
    for x in (sliced, wide[:, :1, :6].expand(2, 3, 6), wide[..., ::5], sliced.transpose(0, 1), wide[0, 0, :6]):
        y = public(x)
        torch.testing.assert_close(y, activations.forward_reference(x, kind, part))
        assert y.is_contiguous()
        torch.testing.assert_close(
            gradient(x, y, public), gradient(x, y, lambda x: activations.forward_reference(x, kind, part))
        )
    assert public(wide[:0]).shape == (0, 3, 40 if part == ALONE else 20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, device: str) -> None:
    _, kind, part = FORMS[form]
    x, dy = inputs(3, 6, torch.float32, device, part)
    torch.library.opcheck(activations.activation, (x.clone().requires_grad_(), kind, part))
    torch.library.opcheck(activations.activation_backward, (dy, x, kind, part))


@kernel
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    with pytest.raises(NotImplementedError, match="use float16"):
        swiglu(torch.ones(1, 6).bfloat16())


FORWARD, BACKWARD, SHARE = "activation_kernel", "activation_gradient_kernel", "share_of"
MUTANTS = {  # name: the kernel, what is replaced, by what
    "mask too wide": (FORWARD, "column < width", "column <= width"),
    "mask too narrow": (FORWARD, "column < width", "column < width - 1"),
    "no tail mask": (FORWARD, "value.to(dtype), mask=inside", "value.to(dtype)"),
    "block not advanced": (FORWARD, "% blocks * block", "% blocks"),
    "block of another row": (FORWARD, "tl.program_id(0) // blocks", "tl.program_id(0)"),
    "gate and up swapped": (FORWARD, "value *= share_of(value, kind)", "value = value"),
    "output taken for contiguous": (FORWARD, "row * y_row", "row * width"),
    "one rounding less": (FORWARD, "value.to(dtype).to(tl.float32) * other", "value * other"),
    "sigmoid of minus": (SHARE, "tl.sigmoid(a)", "tl.sigmoid(-a)"),
    "no root in erf": (SHARE, "0.7071067811865476", "1.0"),
    "no cube": (SHARE, "0.044715", "0.0"),
    "backward mask too wide": (BACKWARD, "column < width", "column <= width"),
    "backward mask too narrow": (BACKWARD, "column < width", "column < width - 1"),
    "other half forgotten": (BACKWARD, "gradient *= other", "pass"),
    "db of what is not activated": (BACKWARD, "gradient * value * share", "gradient * value"),
    "slope without a square": (BACKWARD, "value * dz * t * d * d", "value * dz * t * d"),
    "share of minus": (BACKWARD, "z < 0", "z > 0"),
    "slope of the cube": (BACKWARD, "0.134145", "0.044715"),
    "density without its half": (BACKWARD, "tl.exp(-0.5 * value", "tl.exp(-value"),
    "dx taken for contiguous": (BACKWARD, "db + row * dx_row", "db + row * width"),
}


def check_all() -> None:
    for form in FORMS:
        check([(3, 6), (2, BLOCK + 1)], torch.float16, "cpu", form)


@kernel
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, tmp_path, activations, *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all()


@kernel
def test_swapped_halves_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = activations.halves
    monkeypatch.setattr(activations, "halves", lambda x, part: right(x, {ALONE: 0, FIRST: SECOND, SECOND: FIRST}[part]))
    with pytest.raises(AssertionError):
        check_all()


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=2 * len(FORMS) + len(MUTANTS))


# ----------------------------------------------------------------------------- the reference, and around it


@directly
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_reference_is_what_the_model_does(dtype: torch.dtype) -> None:
    """To the bit; float64 stays float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=generator).to(dtype)
    branches = {
        "swiglu": ("silu", "identity"),
        "geglu": ("identity", "gelu"),
        "geglu tanh": ("identity", "gelu_tanh"),
        "gelu": ("gelu",),
        "gelu tanh": ("gelu_tanh",),
    }
    for form, names in branches.items():
        module = FeedForward(inner=6, branches=names, bias=False).build(8, Dense()).to(dtype)
        with torch.no_grad():
            for matrix in module.parameters():
                matrix.normal_(generator=generator)
            y = FORMS[form][0](module.up(x))
            assert y.dtype == dtype
            assert torch.equal(module.down(y), module(x))


@directly
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str) -> None:
    public, _, part = FORMS[form]
    x, _ = inputs(3, 4, torch.float64, "cpu", part)
    assert torch.autograd.gradcheck(public, x.clone().requires_grad_())


@directly
def test_torch_compile_takes_it_whole() -> None:
    def block(x: Tensor) -> Tensor:
        return gelu(geglu(swiglu(2 * x), tanh=True) + 1, tanh=False)

    x = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = [function(x) for function in (block, compiled)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in results))


@directly
def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="two halves, and its size is 5"):
        swiglu(torch.ones(2, 5))
    with pytest.raises(ValueError, match="two halves"):
        geglu(torch.ones(2, 5), tanh=True)
    with pytest.raises(ValueError, match=r"floating \[..., F\]; it is torch.int64"):
        gelu(torch.ones(2, 5, dtype=torch.int64), tanh=True)


# ----------------------------------------------------------------------------- compiled ahead of time


@directly
@needs_triton
def test_reads_and_writes_sixteen_bytes_at_a_time() -> None:
    from glm_kernels.variants import Target, compile

    target = Target("cuda", 90)
    for variant in activations.variants(target):
        if variant.label in ("silu gated bf16", "gelu fp16"):
            built = compile(variant, target)
            assert built.count(r"LDG\.") == built.count(r"LDG\..*\.128") >= 1
            assert built.count(r"STG\.") == built.count(r"STG\..*\.128") >= 1
            assert built.shared == 0
