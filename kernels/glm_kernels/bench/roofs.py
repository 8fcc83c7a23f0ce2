"""What the device can do at most, measured in the same run as the kernels.

    R   bytes read in a second: a sum over more than fits any cache
    C   flops in a second: a bf16 matrix product of 8192³ random numbers (zeros would cost less power, and flatter)

A kernel is graded by the seconds that its bytes take at R or its flops at C, whichever is more.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm_kernels.bench.timing import Timer
from glm_kernels.dispatch import jit, takes_kernel, tl

GIGABYTES = 4
SIDE = 8192
DEEP = 4  # loads that a program has under way
SHAPES = tuple((block, warps, each) for block, warps in ((2048, 4), (4096, 8), (8192, 8)) for each in (2, 4, 8))


@dataclass(frozen=True)
class Roofs:
    """Bytes and flops a second."""

    read: float
    multiply: float
    details: dict[str, Any]


@jit
def read_kernel(x, sums, count, step, block: tl.constexpr, deep: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums[i] = the sum of every i-th of the blocks of x, which are taken in turn by all programs."""
    program = tl.program_id(0)
    column = tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for first in tl.range(program * block, count, step, num_stages=deep):
        total += tl.load(x + first + column, mask=first + column < count, other=0.0)
    tl.store(sums + program, tl.sum(total))


def read_stream(x: Tensor, sums: Tensor, block: int, warps: int) -> Tensor:
    """The sum of x [n] in float32, in as many parts as `sums` has, each by one program."""
    programs = len(sums)
    with torch.cuda.device_of(x):
        read_kernel[(programs,)](x, sums, x.numel(), programs * block, block, DEEP, num_warps=warps)
    return sums


def read_sum(x: Tensor, sums: Tensor, block: int, warps: int) -> Tensor:
    """The sum of x by the kernel, or by torch where the kernel cannot run."""
    return read_stream(x, sums, block, warps) if takes_kernel(x) else x.sum(dim=0, keepdim=True)


def read_roof(timer: Timer, device: torch.device, gigabytes: float) -> tuple[float, dict[str, Any]]:
    """R, from the best of several launch shapes.

    Raises:
        ArithmeticError: The stream did not read everything once.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    x = torch.randint(0, 2, (int(gigabytes * 2**28),), device=device, dtype=torch.float32)
    total = int(x.sum(dtype=torch.float64))
    calls = {}
    for block, warps, each in SHAPES:
        call = partial(read_sum, x, x.new_empty(processors * each), block, warps)
        if int(call().double().sum()) != total:
            raise ArithmeticError(f"the read stream of {block, warps, each} did not read every element once")
        calls[f"block {block}, {warps} warps, {each} programs a processor"] = [call]
    timings = timer(calls)
    fastest = min(timings, key=lambda name: timings[name].seconds)
    return x.nbytes / timings[fastest].seconds, {"bytes": x.nbytes, "launch": fastest} | asdict(timings[fastest])


def multiply_roof(timer: Timer, device: torch.device, side: int) -> tuple[float, dict[str, Any]]:
    """C, from square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    timing = timer({"matmul": [lambda: a @ b]})["matmul"]
    return 2 * side**3 / timing.seconds, {"side": side} | asdict(timing)


def measure(timer: Timer, device: torch.device, gigabytes: float = GIGABYTES, side: int = SIDE) -> Roofs:
    """Both roofs, of so many gigabytes read and matrices of `side`²."""
    read, read_details = read_roof(timer, device, gigabytes)
    multiply, multiply_details = multiply_roof(timer, device, side)
    return Roofs(read, multiply, {"read": read_details, "multiply": multiply_details})
