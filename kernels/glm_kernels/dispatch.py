"""Which side computes a call: the Triton kernel, or the reference in plain torch beside it.

The kernel computes on a GPU, and in Triton's interpreter (TRITON_INTERPRET=1 in the environment) on the CPU too.
Everything else, float64 among it, and every machine without Triton, gets the reference: a caller writes one line.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "Target", "jit", "takes_kernel", "target", "tl", "triton", "wide"]

try:
    import triton
    from triton import language as tl
except ImportError:  # the reference runs
    triton, tl = None, SimpleNamespace(constexpr=Any)

INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def jit(kernel: Any) -> Any:
    """`triton.jit`, or nothing where there is no Triton."""
    return triton.jit(kernel) if triton else kernel


def wide(x: Tensor) -> Tensor:
    """`x` in the precision of statistics, softmax and rotations: float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def takes_kernel(x: Tensor) -> bool:
    """Whether a kernel computes what is asked of x, rather than the reference.

    Raises:
        NotImplementedError: bfloat16 in Triton's interpreter, whose arithmetic is silently wrong there.
    """
    if triton is None or not (x.is_cuda or INTERPRETED) or x.dtype == torch.float64:
        return False
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise NotImplementedError("Triton's interpreter is wrong in bfloat16: use float16 or float32")
    return True


class Target(NamedTuple):
    """What a launch is shaped for: ("cuda", 90) or ("hip", "gfx942")."""

    backend: str
    arch: int | str

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may use.

        CUDA C++ Programming Guide, technical specifications per compute capability; for AMD the CDNA3 ISA guide.
        """
        return 1024 * SHARED.get(self.arch, 64 if self.backend == "hip" else 99)


SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, "gfx950": 160}  # KiB; other CUDA devices have 99, AMD's 64


def target(x: Tensor) -> Target:
    """The device that x lies on; an H100 for the interpreter, which stands in for any."""
    if not x.is_cuda:
        return Target("cuda", 90)
    with torch.cuda.device_of(x):
        active = triton.runtime.driver.active.get_current_target()
    return Target(active.backend, active.arch)
