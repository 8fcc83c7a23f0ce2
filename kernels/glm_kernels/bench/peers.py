"""What a kernel is measured against: whatever can be imported, found by name, with a reason where it cannot.

Ours is looked up in the same way. No peer is needed: what is absent shows in the table with its reason.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from glm_kernels.bench.subject import MissingError

OURS = "glm_kernels"
PACKAGES = {
    "flashinfer": "flashinfer-python", "liger_kernel": "liger-kernel", "triton": "triton", "gemlite": "gemlite",
    "humming": "humming-kernels", "torchao": "torchao", "mslk": "mslk-cuda", "bitsandbytes": "bitsandbytes",
}  # fmt: skip


def find(module: str, name: str) -> Any:
    """`name`, which may have dots, from `module`.

    Raises:
        MissingError: The module cannot be imported, or has no such thing.
    """
    try:
        found = imported(module)
        for part in name.split("."):
            found = getattr(found, part, None)
    except ModuleNotFoundError as error:
        raise MissingError(f"{error.name or module} is not installed") from None
    except Exception as error:  # a package built for another torch fails in any way at all
        raise MissingError(f"{module} cannot be imported: {one_line(error)}") from None
    if not callable(found):  # a module of the same name may have been imported
        raise MissingError(f"{module} has no {name}")
    return found


@cache
def imported(module: str) -> Any:
    """`module`, without what it prints."""
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "error")
    return importlib.import_module(module)


def on_gpu(x: torch.Tensor, what: str) -> None:
    """Raises MissingError unless x is on a GPU, which is where `what` runs."""
    if not x.is_cuda:
        raise MissingError(f"{what} runs on a GPU only")


@cache
def compiled(function: Callable[..., Any], tuned: bool = False) -> Callable[..., Any]:
    """`torch.compile(function)` for one shape at a time, with its choice of tiles by measurement if `tuned`."""
    for limit in ("recompile_limit", "accumulated_recompile_limit"):  # every case is a shape of its own
        setattr(torch._dynamo.config, limit, 4096)
    mode = "max-autotune-no-cudagraphs" if tuned else None
    wrapped: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
    return wrapped


def versions() -> dict[str, str]:
    """Versions of the peers that are installed, and of torch and Triton."""
    found = {"torch": str(torch.__version__)}
    for package in PACKAGES.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def one_line(error: BaseException, most: int = 160) -> str:
    """The kind of an error and the first line of what it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:most]
