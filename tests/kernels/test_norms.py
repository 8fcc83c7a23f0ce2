"""The norms of glm_kernels: on the CPU the reference, in Triton's interpreter and on a GPU the kernel.

Triton reads TRITON_INTERPRET when it is imported, so this file runs itself once more with it. What is tested twice
is the reference the first time and the kernel the second; on a GPU it is the kernel in bfloat16 too.
"""

import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT / "kernels"))

from glm_kernels import dispatch, layer_norm, norms, rms_norm  # noqa: E402

from glm.norms import LayerNorm, RMSNorm  # noqa: E402

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
directly = pytest.mark.skipif(dispatch.INTERPRETED, reason="tested without the interpreter")
kernel = pytest.mark.skipif(not dispatch.INTERPRETED, reason="run by test_in_the_interpreter")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDTHS = 1, 6, 42, 128, 431
ROWS = 1, 3, 17
EPS = 1e-5
KINDS = "weight first", "cast first", "layer"
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(dispatch.INTERPRETED, reason="wrong in the interpreter")),
]
GUARD = -7777.0  # what must stay around the outputs
LEFT, RIGHT = 3, 5

# ----------------------------------------------------------------------------- one case, checked in every way


def framed(count: int, width: int, like: Tensor, frame: float, extra: int = 0) -> tuple[Tensor, Tensor]:
    """A buffer full of `frame`, and the [count, width] rows in the middle of it."""
    buffer = like.new_full((count + 2, LEFT + width + RIGHT + extra), frame)
    return buffer, buffer[1:-1, LEFT : LEFT + width]


def inside_nan(value: Tensor, extra: int = 0) -> Tensor:
    """The same rows, or the same vector, as part of a larger tensor of NaN."""
    matrix = torch.atleast_2d(value)
    return framed(*matrix.shape, value, torch.nan, extra)[1].copy_(matrix).view(value.shape)


def inputs(count: int, width: int, dtype: torch.dtype, device: str, added: bool, kind: str) -> dict[str, Any]:
    """x, residual, weight and bias, amid NaN; rows in turn of size one, so small that eps matters, and zero."""
    generator = torch.Generator().manual_seed(count * 1000 + width)
    scale = torch.tensor([1.0, 1e-3, 0.0]).repeat(count)[:count, None]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": inside_nan((scale * (draw(count, width) + 1)).to(device, dtype)),
        "residual": inside_nan((scale * draw(count, width)).to(device, dtype), extra=9) if added else None,
        "weight": inside_nan((1 + draw(width) / 3).to(device, dtype)),
        "bias": inside_nan(draw(width).to(device, dtype)) if kind == "layer" else None,
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
    """The kernel's y, and s, in buffers of NaN with guard bands, which it must fill and leave alone."""
    outputs = [framed(*x.shape, x, GUARD, extra) for extra in ((0,) if residual is None else (0, 2))]
    for _, out in outputs:
        out.fill_(torch.nan)
    y, *s = (out for _, out in outputs)
    norms.launch(x, residual, weight, bias, y, s[0] if s else None, EPS, kind == "weight first")
    for buffer, out in outputs:
        assert out.isfinite().all(), "not all was written, or what is outside was read"
        result = out.clone()
        out.fill_(GUARD)
        assert (buffer == GUARD).all(), "written outside"
        out.copy_(result)
    return [out for _, out in outputs]


def judge(y: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> None:
    """At most twice the error of plain torch, or a rounding; in half precision, rounded in the same places."""
    truth = reference(s.double(), weight.double(), None if bias is None else bias.double(), kind)
    plain = reference(s, weight, bias, kind)
    for norm in (torch.inf, 2):
        ours, theirs, size = (torch.linalg.vector_norm(v.double(), norm) for v in (y - truth, plain - truth, truth))
        assert ours <= 2 * max(theirs, size * torch.finfo(y.dtype).eps / 2)
    if y.dtype != torch.float32:  # a rounding more or less shows in a quarter of them
        assert (y != plain).sum() <= 1 + 0.01 * y.numel()


def check(count: int, width: int, dtype: torch.dtype, device: str, added: bool, kind: str) -> None:
    case = inputs(count, width, dtype, device, added, kind)
    s = case["x"] if not added else case["x"] + case["residual"]
    results = []
    if dispatch.takes_kernel(case["x"]):  # first, since a broken kernel does no harm between guards
        results.append(launched(**case, kind=kind))
    results.append(public(**case, kind=kind))
    for y, *sums in results:
        assert y.dtype == dtype
        judge(y, s, case["weight"], case["bias"], kind)
        assert len(sums) == added
        assert all(torch.equal(each, s) for each in sums)
    assert torch.equal(results[0][0], results[-1][0])


# ----------------------------------------------------------------------------- reference, interpreter, GPU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype, kind: str, added: bool, device: str) -> None:
    for count, width in itertools.product(ROWS, WIDTHS):
        check(count, width, dtype, device, added, kind)


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


@kernel
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    with pytest.raises(NotImplementedError, match="use float16"):
        rms_norm(torch.ones(1, 6).bfloat16(), torch.ones(6).bfloat16(), EPS, weight_first=True)


MUTANTS = {  # name: what is replaced, by what
    "no eps": ("/ width + eps", "/ width"),
    "mask too wide": ("column < width", "column <= width"),
    "mask too narrow": ("column < width", "column < width - 1"),
    "weight before and after the cast swapped": ("and not weight_first", "and weight_first"),
    "residual not written": ("tl.store(s + row * s_row + column, rounded, mask=inside)", "pass"),
    "statistics of the sum before it is rounded": ("h = rounded.to(tl.float32)", "pass"),
    "mean over the block": ("tl.sum(h) / width", "tl.sum(h) / block"),
    "variance over the block": ("tl.sum(h * h) / width", "tl.sum(h * h) / block"),
    "what is masked counts for the variance": ("tl.where(inside, h - tl.sum(h) / width, 0.0)", "h - tl.sum(h) / width"),
    "stride of another tensor": ("residual + row * residual_row", "residual + row * x_row"),
    "output taken for contiguous": ("y + row * y_row", "y + row * width"),
}


@kernel
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MUTANTS[name]
    source = inspect.getsource(norms.norm_kernel.fn)
    assert source.count(right) == 1
    path = tmp_path / "mutant.py"
    path.write_text("from glm_kernels.dispatch import jit, tl\n\n\n" + source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(norms, "norm_kernel", mutant.norm_kernel)

    def check_all() -> None:  # float16 is enough
        for kind, added, width in itertools.product(KINDS, [False, True], (6, 431)):
            check(3, width, torch.float16, "cpu", added, kind)

    with pytest.raises(AssertionError):
        check_all()


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    """This file again, with the kernel on the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 2 * len(KINDS) * 2 + len(MUTANTS)


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


def ahead_of_time(target: Any, dtype: str, width: int, added: bool, kind: str) -> Any:
    """The kernel as a launch at this width compiles it, without a device."""
    import triton

    block, warps = norms.shape_of_launch(width)
    tensors = {"x": True, "residual": added, "weight": True, "bias": kind == "layer", "y": True, "s": added}
    signature = {name: f"*{dtype}" if given else "constexpr" for name, given in tensors.items()}
    signature |= dict.fromkeys(["x_row", "residual_row", "y_row", "s_row", "width"], "i32") | {"eps": "fp32"}
    values = {name: None for name, given in tensors.items() if not given}
    values |= {"weight_first": kind == "weight first", "block": block}
    signature |= dict.fromkeys(values, "constexpr")
    assert list(signature) == norms.norm_kernel.arg_names
    numbers = [i for i, given in enumerate(signature.values()) if given not in ("constexpr", "fp32")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in numbers}
    source = triton.compiler.ASTSource(norms.norm_kernel, signature, values, aligned)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def spilled(binary: Any, folder: Path) -> int:
    """Bytes of stack, or on AMD registers, that went to memory."""
    if "amdgcn" in binary.asm:
        return sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", binary.asm["amdgcn"]))
    from triton.backends import nvidia

    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@directly
@needs_triton
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda t: str(t[1]))
def test_compiles_for_every_gpu_without_spilling(
    target: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variant at the greatest width; the common width reads 16 bytes at a time."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtype, kind in itertools.product(("fp16", "bf16", "fp32"), KINDS):
        binary = ahead_of_time(GPUTarget(*target), dtype, norms.WIDEST, kind != "weight first", kind)
        assert spilled(binary, tmp_path) == 0, (dtype, kind)
    binary = ahead_of_time(GPUTarget(*target), "bf16", 4096, True, "cast first")
    assert spilled(binary, tmp_path) == 0
    if target[0] == "cuda":
        assert re.search(r"ld\.global[\w.]*\.v4\.b32", binary.asm["ptx"])
    else:
        assert "buffer_load_dwordx4" in binary.asm["amdgcn"] or "global_load_dwordx4" in binary.asm["amdgcn"]
