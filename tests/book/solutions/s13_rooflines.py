"""Solutions of chapter 13, right and wrong."""

import math

import glm
from glm.info import parameters


def step_bytes(spec: glm.Spec, rows: int, tokens: int) -> int:
    token = sum(2 * block.mixer.groups * block.mixer.head_width for block in spec.blocks)
    return 2 * (parameters(spec) - spec.vocabulary * spec.width + rows * tokens * token)


def reads_the_embedding(spec: glm.Spec, rows: int, tokens: int) -> int:
    return step_bytes(spec, rows, tokens) + 2 * spec.vocabulary * spec.width


def weights_for_each_row(spec: glm.Spec, rows: int, tokens: int) -> int:
    return rows * step_bytes(spec, 1, tokens)


def all_heads(spec: glm.Spec, rows: int, tokens: int) -> int:
    token = sum(2 * block.mixer.heads * block.mixer.head_width for block in spec.blocks)
    return 2 * (parameters(spec) - spec.vocabulary * spec.width + rows * tokens * token)


def floor(flops: float, size: float, multiply: float, read: float) -> tuple[float, str]:
    return max(size / read, flops / multiply), "C" if flops / multiply > size / read else "R"


def one_after_the_other(flops: float, size: float, multiply: float, read: float) -> tuple[float, str]:
    return size / read + flops / multiply, floor(flops, size, multiply, read)[1]


def other_name(flops: float, size: float, multiply: float, read: float) -> tuple[float, str]:
    return floor(flops, size, multiply, read)[0], "R" if flops / multiply > size / read else "C"


def rows_bound_by_memory(outputs: int, inputs: int, weight: float, multiply: float, read: float) -> int:
    """N (2 O I / C - 2 (I + O) / R) ≤ w O I / R."""
    numbers = outputs * inputs
    return math.floor(weight * numbers / read / (2 * numbers / multiply - 2 * (inputs + outputs) / read))


def without_activations(outputs: int, inputs: int, weight: float, multiply: float, read: float) -> int:
    return math.floor(weight / 2 * multiply / read)


def ideal_gain(rows: int, multiply: float, read: float) -> float:
    return max(2 / read, 2 * rows / multiply) / max((0.5 + 2 / 128) / read, 2 * rows / multiply)


def always_the_bytes(rows: int, multiply: float, read: float) -> float:
    return 2 / (0.5 + 2 / 128)


def without_scales(rows: int, multiply: float, read: float) -> float:
    return max(2 / read, 2 * rows / multiply) / max(0.5 / read, 2 * rows / multiply)


RIGHT = {
    "13.1": [step_bytes], "13.2": [floor], "13.3": [rows_bound_by_memory], "13.4": [ideal_gain],
}  # fmt: skip
WRONG = {
    "13.1": [(reads_the_embedding, "result"), (weights_for_each_row, "result"), (all_heads, "result")],
    "13.2": [(one_after_the_other, "seconds"), (other_name, "bound")],
    "13.3": [(without_activations, "result")],
    "13.4": [(always_the_bytes, "result"), (without_scales, "result")],
}
