"""How a kernel is tried: between guard bands, amid NaN, against float64, with faults put in on purpose.

A test file of a kernel is run twice. Triton reads TRITON_INTERPRET when it is imported, so the file's last test,
`rerun(__file__)`, runs the file once more with it. What is tested twice is the reference the first time and the kernel
the second; on a GPU it is the kernel in bfloat16 too.
"""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT / "kernels"))

from glm_kernels import dispatch  # noqa: E402

INTERPRETED = dispatch.INTERPRETED
needs_triton = pytest.mark.skipif(dispatch.triton is None, reason="needs triton")
directly = pytest.mark.skipif(INTERPRETED, reason="tested without the interpreter")
kernel = pytest.mark.skipif(not INTERPRETED, reason="run by the rerun in the interpreter")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="wrong in the interpreter")),
]

# ----------------------------------------------------------------------------- tensors amid others

GUARD = -7777.0  # what must stay around the outputs


def amid(value: Tensor, frame: float = torch.nan, margin: int = 3) -> Tensor:
    """The same values as a part of a larger tensor full of `frame`, on every side: strides are the larger one's."""
    buffer = value.new_full([size + 2 * margin for size in value.shape], frame)
    inner = buffer[tuple(slice(margin, margin + size) for size in value.shape)]
    return inner.copy_(value)


class Guarded:
    """An output to be filled: `out` is NaN, or for integers the lowest value, and lies within guard bands."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, margin: int = 3) -> None:
        floating = like.dtype.is_floating_point
        self.guard = GUARD if floating else 77
        self.poison = torch.nan if floating else torch.iinfo(like.dtype).min
        self.buffer = like.new_full([size + 2 * margin for size in shape], self.guard)
        self.out = self.buffer[tuple(slice(margin, margin + size) for size in shape)]
        self.out.fill_(self.poison)

    def written(self, infinite: bool = False) -> Tensor:
        """What stands in `out`, when all of it was written (with `infinite`, ±inf is a value) and nothing around it."""
        result = self.out.clone()
        if not result.dtype.is_floating_point:
            assert (result != self.poison).all(), "not all was written"
        elif infinite:
            assert not result.isnan().any(), "not all was written, or what is outside was read"
        else:
            assert result.isfinite().all(), "not all was written, or what is outside was read"
        return self.partly_written()

    def partly_written(self) -> Tensor:
        """What stands in `out`, poison too, when nothing around it was written."""
        result = self.out.clone()
        self.out.fill_(self.guard)
        assert (self.buffer == self.guard).all(), "written outside"
        self.out.copy_(result)
        return result


# ----------------------------------------------------------------------------- judgement


def judge(
    ours: Tensor, plain: Tensor | Sequence[Tensor], truth: Tensor, factor: float = 2.0, rounding: Tensor | None = None
) -> None:
    """At most `factor` times the error of plain torch in the same dtype, or of one rounding, in rms and at most.

    Args:
        ours: What the kernel computed.
        plain: What plain torch computes in the dtype of `ours`; of several ways to compute it, the worst counts.
        truth: The same in float64.
        factor: The project's rule is 2.
        rounding: What one rounding of each of the terms that are added up to `truth` comes to, where it is not one
            rounding of `truth`: terms can cancel, as in the gradient of a softmax. Nobody can be nearer than that.
    """
    ways = [plain] if isinstance(plain, Tensor) else plain
    assert all(ours.dtype == way.dtype for way in ways)
    assert all(ours.shape == x.shape for x in (*ways, truth))

    def size(x: Tensor, norm: float) -> float:
        return torch.linalg.vector_norm(x.double().flatten(), norm).item() if x.numel() else 0.0

    for norm in (torch.inf, 2):
        mine, theirs = size(ours - truth, norm), max(size(way - truth, norm) for way in ways)
        least = size(truth, norm) * torch.finfo(ours.dtype).eps / 2
        if rounding is not None:
            least = max(least, size(rounding, norm))
        bound = factor * max(theirs, least)
        assert mine <= bound, f"{norm}-norm of the error {mine:.3g}, plain torch {theirs:.3g}, bound {bound:.3g}"


# ----------------------------------------------------------------------------- faults on purpose


def put_in(
    monkeypatch: pytest.MonkeyPatch, folder: Path, module: ModuleType, name: str, right: str, wrong: str, times: int = 1
) -> None:
    """Replace the kernel `name` of `module` by one whose source has `wrong` for `right`, which stands there `times`."""
    source = inspect.getsource(getattr(module, name).fn)
    assert source.count(right) == times, f"{right!r} stands {source.count(right)} times in {name}"
    path = folder / "mutant.py"
    path.write_text(f"from {module.__name__} import *\nfrom {module.__name__} import jit, tl\n\n\n")
    with path.open("a") as file:
        helpers = {
            key: value for key, value in vars(module).items() if hasattr(value, "fn") or isinstance(value, int | float)
        }
        file.write("".join(f"from {module.__name__} import {key}\n" for key in helpers if not key.startswith("__")))
        file.write("\n\n" + source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(module, name, getattr(mutant, name))


# ----------------------------------------------------------------------------- the interpreter


def rerun(file: str, at_least: int) -> None:
    """The test file again, with the kernels on the CPU; so many of its tests, or more, must have passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
