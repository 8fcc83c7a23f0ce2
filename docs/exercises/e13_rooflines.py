"""Exercises of chapter 13, rooflines. Replace what raises, then `python -m docs.check 13`."""

import glm


def step_bytes(spec: glm.Spec, rows: int, tokens: int) -> int:
    """Exercise 13.1. Bytes that a decoding step must read, weights and cache in bf16.

    spec     a model without experts, whose head is no embedding (`tied` is False) and which learnt no positions
    rows     of the batch
    tokens   in the cache of each row

    Every weight is read once for all rows, but of the embedding only some rows, which do not count here.
    `glm.info.parameters(spec)` counts the numbers of a model.
    """
    raise NotImplementedError


def floor(flops: float, size: float, multiply: float, read: float) -> tuple[float, str]:
    """Exercise 13.2. The least `seconds` that a work takes, and the `bound` that says so.

    flops, size       of the work: flops, and bytes to be read and written
    multiply, read    of the machine: flops and bytes a second

    Returns the seconds, and "C" where arithmetic takes longer, else "R".
    """
    raise NotImplementedError


def rows_bound_by_memory(outputs: int, inputs: int, weight: float, multiply: float, read: float) -> int:
    """Exercise 13.3. Up to how many rows a product waits for memory.

    outputs, inputs   O and I of the matrix [O, I]
    weight            bytes of one of its numbers
    multiply, read    of the machine: flops and bytes a second

    Rows are in half precision: each has I numbers that are read and O that are written. Returns the largest number of
    rows for which moving bytes takes at least as long as the arithmetic; there is one in every case.
    """
    raise NotImplementedError


def ideal_gain(rows: int, multiply: float, read: float) -> float:
    """Exercise 13.4. How many times as fast as in bf16 a product can be with int4 weights in groups of 128.

    rows              of the input
    multiply, read    of the machine: flops and bytes a second

    A group of 128 weights has one scale of two bytes. Weights alone are counted, activations are few. The arithmetic
    is done in half precision either way.
    """
    raise NotImplementedError
