"""What is right in the exercises of chapter 13, by `glm` and the benchmark of the kernels."""

from collections.abc import Iterator

import torch
from glm_kernels.bench.subject import Work

import glm
from docs.check import Case, Exercise
from glm.info import cache_bytes_per_token, weight_bytes

BF16 = torch.bfloat16


def step_bytes_cases() -> Iterator[Case]:
    """One row and several, short and long."""
    sizes = ("chatglm-6b", 1, 1), ("chatglm2-6b", 1, 8192), ("glm-4-9b-chat", 32, 1000), ("glm-4-32b-0414", 8, 4096)
    for name, rows, tokens in sizes:
        spec = glm.release(name).spec
        weights = weight_bytes(spec, BF16) - spec.vocabulary * spec.width * BF16.itemsize
        read = weights + rows * tokens * cache_bytes_per_token(spec, BF16)
        yield Case({"spec": spec, "rows": rows, "tokens": tokens}, {"result": read})


def floor_cases() -> Iterator[Case]:
    """Below, on and above the ridge."""
    for flops, size in ((1e9, 1e9), (4e10, 2e8), (4e10, 1e8), (3e12, 5e9)):
        seconds, bound = Work(size, flops).floor(read=2e12, multiply=4e14)
        arguments = {"flops": flops, "size": size, "multiply": 4e14, "read": 2e12}
        yield Case(arguments, {"seconds": seconds, "bound": bound})


def product(rows: int, outputs: int, inputs: int, weight: float) -> Work:
    """Rows in half precision times a matrix."""
    return Work(weight * outputs * inputs + 2 * rows * (inputs + outputs), 2.0 * rows * outputs * inputs)


def rows_bound_by_memory_cases() -> Iterator[Case]:
    """Found by trying: bf16, int8, int4, a large and a small matrix."""
    for outputs, inputs, weight in ((27392, 4096, 2.0), (4608, 4096, 0.515625), (4096, 13696, 1.0), (1024, 512, 2.0)):
        machine = {"multiply": 7.7e14, "read": 4.5e12}
        bounds = (product(rows, outputs, inputs, weight).floor(**machine)[1] for rows in range(1, 2**20))
        arguments = {"outputs": outputs, "inputs": inputs, "weight": weight, **machine}
        yield Case(arguments, {"result": next(n for n, bound in enumerate(bounds) if bound == "C")})


def ideal_gain_cases() -> Iterator[Case]:
    """Where both wait for memory, where one does, and where none does."""
    for rows in (1, 40, 64, 128, 500):
        machine = {"multiply": 7.7e14, "read": 4.5e12}
        bf16, int4 = (Work(weight, 2.0 * rows).floor(**machine)[0] for weight in (2, (128 / 2 + 2) / 128))
        yield Case({"rows": rows, **machine}, {"result": bf16 / int4})


EXERCISES = [
    Exercise("13.1", "step_bytes", cases=step_bytes_cases),
    Exercise("13.2", "floor", cases=floor_cases),
    Exercise("13.3", "rows_bound_by_memory", cases=rows_bound_by_memory_cases),
    Exercise("13.4", "ideal_gain", cases=ideal_gain_cases),
]
