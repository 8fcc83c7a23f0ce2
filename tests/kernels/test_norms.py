"""The norms of glm_kernels: on the CPU the reference, in Triton's interpreter and on a GPU the kernel."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from glm_kernels import dispatch, layer_norm, norms, rms_norm
from harness import (
    DEVICES,
    DTYPES,
    PROJECT,
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

from glm.norms import LayerNorm, RMSNorm

EPS = 1e-5
KINDS = "weight first", "cast first", "layer"
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70) | st.sampled_from([127, 128, 129, 431]))

# ----------------------------------------------------------------------------- one case, checked in every way


def inputs(count: int, width: int, dtype: torch.dtype, device: str, added: bool, kind: str) -> dict[str, Any]:
    """x, residual, weight and bias, amid NaN; rows in turn of size one, so small that eps matters, and zero."""
    generator = torch.Generator().manual_seed(count * 1000 + width)
    scale = torch.tensor([1.0, 1e-3, 0.0]).repeat(count)[:count, None]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": amid((scale * (draw(count, width) + 1)).to(device, dtype)),
        "residual": amid((scale * draw(count, width)).to(device, dtype), margin=5) if added else None,
        "weight": amid((1 + draw(width) / 3).to(device, dtype)),
        "bias": amid(draw(width).to(device, dtype)) if kind == "layer" else None,
    }


def public(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str) -> list[Tensor]:
    """[y] or [y, s] as a user gets them."""
    result: Any
    if bias is None:
        result = rms_norm(x, weight, EPS, residual=residual, weight_first=kind == "weight first")
    else:
        result = layer_norm(x, weight, bias, EPS, residual=residual)
    return [result] if residual is None else list(result)


def reference(s: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    if bias is None:
        return norms.rms_norm_reference(s, weight, EPS, weight_first=kind == "weight first")
    return norms.layer_norm_reference(s, weight, bias, EPS)


def launched(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str) -> list[Tensor]:
    """The kernel's y, and s, within guard bands."""
    outputs = [Guarded(tuple(x.shape), x, margin) for margin in ((3,) if residual is None else (3, 4))]
    y, *s = (output.out for output in outputs)
    norms.launch(x, residual, weight, bias, y, s[0] if s else None, EPS, kind == "weight first")
    return [output.written() for output in outputs]


def check(count: int, width: int, dtype: torch.dtype, device: str, added: bool, kind: str) -> None:
    """y to at most twice the error of plain torch, in half precision rounded in the same places; s to the bit."""
    case = inputs(count, width, dtype, device, added, kind)
    s = case["x"] if not added else case["x"] + case["residual"]
    weight, bias = case["weight"], case["bias"]
    truth = reference(s.double(), weight.double(), None if bias is None else bias.double(), kind)
    plain = reference(s, weight, bias, kind)
    first = None
    for way in [launched, public] if dispatch.takes_kernel(s) else [public]:  # between guards first
        y, *sums = way(**case, kind=kind)
        judge(y, plain, truth)
        if dtype != torch.float32:  # a rounding more or less shows in a quarter of them
            assert (y != plain).sum() <= 1 + 0.01 * y.numel()
        assert len(sums) == added
        assert all(torch.equal(each, s) for each in sums)
        first = y if first is None else first
        assert torch.equal(y, first)


def check_gradients(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: str, added: bool, kind: str, programs: int = 2
) -> None:
    """Those of x and of the parameters, by the kernels' launch with so many programs, and as a user gets them.

    All shapes together: in rows of one or two elements next to nothing is left of the gradient but rounding.
    """
    cases = [gradients(*shape, dtype, device, added, kind, programs) for shape in [*shapes, (3, 40)]]
    for ways in zip(*cases, strict=True):
        for values in zip(*ways, strict=True):
            judge(*(torch.cat([v.flatten() for v in column]) for column in zip(*values, strict=True)))


def gradients(
    count: int, width: int, dtype: torch.dtype, device: str, added: bool, kind: str, programs: int
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """For the launch, if there is one, and for autograd: (ours, plain torch, float64) of x, weight and bias."""
    case = inputs(count, width, dtype, device, added, kind)
    generator = torch.Generator().manual_seed(width)
    dy, ds = (
        amid(torch.randn(count, width, generator=generator).to(device, dtype), margin=margin) for margin in (2, 3)
    )
    s, weight, bias = case["x"] if not added else case["x"] + case["residual"], case["weight"], case["bias"]

    def expected(cast: torch.dtype) -> list[Tensor]:
        """By autograd, of the reference in this dtype: of s, weight and bias."""
        leaves = [v.detach().to(cast).requires_grad_() for v in (s, weight, bias) if v is not None]
        y = reference(leaves[0], leaves[1], leaves[2] if bias is not None else None, kind)
        dx, *sums = torch.autograd.grad(y, leaves, dy.to(cast))
        return [dx + ds.to(cast) if added else dx, *sums]

    def by_launch() -> list[Tensor]:
        outputs = [Guarded(shape, s) for shape in ((count, width), *[(width,)] * (1 if bias is None else 2))]
        dx, dw, db = [*(output.out for output in outputs), None][:3]
        given = amid(s), ds if added else None
        norms.launch_backward(dy, given[1], given[0], weight, dx, dw, db, EPS, bias is not None, programs)
        return [output.written() for output in outputs]

    def by_autograd() -> list[Tensor]:
        leaves = {name: None if v is None else v.detach().requires_grad_() for name, v in case.items()}
        outputs = public(**leaves, kind=kind)
        wanted = [leaf for name, leaf in leaves.items() if leaf is not None and name != "residual"]
        return list(torch.autograd.grad(outputs, wanted, [dy, ds][: 1 + added]))

    plain, truth = expected(dtype), expected(torch.float64)
    ways = [by_launch, by_autograd] if dispatch.takes_kernel(s) else [by_autograd]
    return [list(zip(way(), plain, truth, strict=True)) for way in ways]


# ----------------------------------------------------------------------------- reference, interpreter, GPU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype, kind: str, added: bool, device: str) -> None:
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(SHAPES)
    def drawn(shape: tuple[int, int]) -> None:
        check(*shape, dtype, device, added, kind)

    drawn()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_norm(dtype: torch.dtype, kind: str, added: bool, device: str) -> None:
    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(SHAPES, st.integers(1, 4))
    def drawn(shape: tuple[int, int], programs: int) -> None:
        check_gradients([shape], dtype, device, added, kind, programs)

    drawn()


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device: str) -> None:
    """Whatever the strides, and without rows."""
    wide = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(device)
    weight, bias = wide[0, 0, :6] + 1, wide[0, 1, :6]
    sliced, broadcast, stepped = wide[..., 8:14], wide[:, :1, :6].expand(2, 3, 6), wide[..., ::7]
    for x in (sliced, broadcast, stepped, sliced.transpose(0, 1), wide[0, 0, :36].view(6, 6).t(), wide[0, 0, :6]):
        for kind, residual in itertools.product(KINDS, (None, x.flip(0))):
            b = bias if kind == "layer" else None
            y, *sums = public(x, residual, weight, b, kind)
            s = x if residual is None else x + residual
            torch.testing.assert_close(y, reference(s, weight, b, kind))
            assert all(torch.equal(each, s) for each in sums)
            assert all(each.is_contiguous() for each in (y, *sums))
    assert rms_norm(wide[:0, 0, :6], weight, EPS, weight_first=True).shape == (0, 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, added: bool, device: str) -> None:
    case = inputs(3, 6, torch.float32, device, added, kind)
    leaves = [None if value is None else value.clone().requires_grad_() for value in case.values()]
    torch.library.opcheck(norms.norm, (*leaves, EPS, kind == "weight first"))
    x, weight, centred = case["x"], case["weight"], kind == "layer"
    ds = case["residual"]
    for parameters in (False, True):
        torch.library.opcheck(norms.norm_backward, (x, ds, x, weight, centred, EPS, parameters))


@kernel
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    with pytest.raises(NotImplementedError, match="use float16"):
        rms_norm(torch.ones(1, 6).bfloat16(), torch.ones(6).bfloat16(), EPS, weight_first=True)


NORM, GRADIENT, FOLD = "norm_kernel", "norm_gradient_kernel", "fold_kernel"
MUTANTS = {  # name: the kernel, what is replaced, by what
    "no eps": (NORM, "/ width + eps", "/ width"),
    "mask too wide": (NORM, "column < width", "column <= width"),
    "mask too narrow": (NORM, "column < width", "column < width - 1"),
    "weight before and after the cast swapped": (NORM, "and not weight_first", "and weight_first"),
    "residual not written": (NORM, "tl.store(s + row * s_row + column, rounded, mask=inside)", "pass"),
    "statistics of the sum before it is rounded": (NORM, "h = rounded.to(tl.float32)", "pass"),
    "mean over the block": (NORM, "tl.sum(h) / width", "tl.sum(h) / block"),
    "variance over the block": (NORM, "tl.sum(h * h) / width", "tl.sum(h * h) / block"),
    "what is masked counts for the variance": (
        NORM,
        "tl.where(inside, h - tl.sum(h) / width, 0.0)",
        "h - tl.sum(h) / width",
    ),
    "stride of another tensor": (NORM, "residual + row * residual_row", "residual + row * x_row"),
    "output taken for contiguous": (NORM, "y + row * y_row", "y + row * width"),
    "backward without eps": (GRADIENT, "/ width + eps", "/ width"),
    "backward mask too narrow": (GRADIENT, "column < width", "column < width - 1"),
    "backward mask too wide": (GRADIENT, "column < width", "column <= width"),
    "not centred": (GRADIENT, "n - tl.sum(n) / width", "n"),
    "backward counts the mask": (
        GRADIENT,
        "tl.where(inside, n - tl.sum(n) / width, 0.0)",
        "n - tl.sum(n) / width",
    ),
    "no projection": (GRADIENT, "g - n * (tl.sum(g * n) / width)", "g"),
    "gradient not centred": (GRADIENT, "g -= tl.sum(g) / width", "pass"),
    "gradient of s forgotten": (GRADIENT, "g += tl.load(ds + row * ds_row", "g += 0 * tl.load(ds + row * ds_row"),
    "weight forgotten": (GRADIENT, "g *= w", "pass"),
    "dw of the last row alone": (GRADIENT, "sum_w += g * n", "sum_w = g * n"),
    "every program takes every row": (GRADIENT, "range(program, count, tl.num_programs(0))", "range(0, count)"),
    "parts overwrite each other": (GRADIENT, "part = program * width", "part = 0 * width"),
    "fold leaves out the first part": (FOLD, "range(0, count, some)", "range(1, count, some)"),
    "fold reads past the end": (FOLD, "(row < count)[:, None]", "(row <= count)[:, None]"),
    "fold of one column for all": (FOLD, "tl.program_id(0) * block + tl.arange(0, block)", "tl.arange(0, block)"),
}


@kernel
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, tmp_path, norms, *MUTANTS[name])

    def check_all() -> None:  # float16 is enough
        for kind, added in itertools.product(KINDS, [False, True]):
            if MUTANTS[name][0] == NORM:
                for width in (6, 431):
                    check(3, width, torch.float16, "cpu", added, kind)
            else:
                check_gradients([(3, 6), (3, 431)], torch.float16, "cpu", added, kind)

    with pytest.raises(AssertionError):
        check_all()


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=4 * len(KINDS) * 2 + len(MUTANTS))


# ----------------------------------------------------------------------------- the reference, and around it


@directly
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_reference_is_what_the_model_does(dtype: torch.dtype) -> None:
    """To the bit, in both roundings; float64 stays float64."""
    x, weight, bias = torch.randn(6, 5, 42, generator=torch.Generator().manual_seed(0)).to(dtype).split((4, 1, 1))
    weight, bias = weight[0, 0], bias[0, 0]
    for kind in KINDS:
        norm = LayerNorm(EPS) if kind == "layer" else RMSNorm(EPS, weight_first=kind == "weight first")
        module = norm.build(42).to(dtype)
        values = {"weight": weight, "bias": bias} if kind == "layer" else {"weight": weight}
        module.load_state_dict(values)
        (y,) = public(x, None, weight, values.get("bias"), kind)
        assert y.dtype == dtype
        assert torch.equal(y, module(x))


@directly
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, added: bool) -> None:
    """Of every input, through every output."""
    case = inputs(2, 6, torch.float64, "cpu", added, kind)
    leaves = [None if value is None else value.clone().requires_grad_() for value in case.values()]
    assert torch.autograd.gradcheck(lambda *values: public(*values, kind=kind), leaves)
    assert torch.autograd.gradcheck(lambda *values: public(*values, kind=kind)[-1], leaves)


@directly
def test_torch_compile_takes_it_whole() -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, s = rms_norm(2 * x, weight, EPS, residual=x, weight_first=True)
        return layer_norm(y + s, weight, bias, EPS)

    x, weight, bias = torch.randn(3, 4, 42, generator=torch.Generator().manual_seed(0)).split(1)
    x.requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = [function(x, weight[0, 0], bias[0, 0]) for function in (block, compiled)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in results))


@directly
def test_tensors_that_do_not_fit_are_named() -> None:
    x, weight = torch.ones(2, 3, 6), torch.ones(6)
    for fault, arguments in {
        r"weight must be \[6\]": {"weight": torch.ones(5)},
        r"bias must be \[6\] torch.float32": {"bias": weight.half()},
        r"residual must be \[2, 3, 6\]": {"residual": x[0]},
        "weight must be contiguous": {"weight": torch.ones(12)[::2]},
        r"weight must be \[6\] torch.float32 on cpu": {"weight": weight.to("meta")},
    }.items():
        with pytest.raises(ValueError, match=fault):
            layer_norm(x, **{"weight": weight, "bias": weight, "eps": EPS, **arguments})


@directly
def test_without_triton_the_reference_runs() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(PROJECT / 'kernels')!r}); sys.modules['triton'] = None\n"
        "import torch, glm_kernels\n"
        "y = glm_kernels.rms_norm(torch.full((2, 3), 5.0), torch.ones(3), 0.0, weight_first=True)\n"
        "print(y.tolist(), 'glm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout == f"{[[1.0] * 3] * 2} False\n", done.stderr


# ----------------------------------------------------------------------------- compiled ahead of time


@directly
@needs_triton
def test_reads_and_writes_sixteen_bytes_at_a_time() -> None:
    from glm_kernels.variants import Target, compile

    for target in (Target("cuda", 90), Target("hip", "gfx942")):
        for variant in (
            norms.variant(torch.bfloat16, 4096, True, "cast first"),
            norms.gradient_variant(torch.bfloat16, 4096, True, True, True),
        ):
            built = compile(variant, target)
            assert built.spilled == 0
            if target.backend == "hip":
                assert built.count("(buffer|global)_load_dwordx4")
                continue
            assert built.count(r"LDG\.") == built.count(r"LDG\..*\.128") >= 2
            assert built.count(r"STG\.") == built.count(r"STG\..*\.128") >= 2
