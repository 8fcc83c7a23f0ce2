"""Exercises of chapter 11, checkpoints. Replace what raises, then `python -m docs.check 11`."""

from torch import Tensor

import glm


def flat(rows: Tensor, heads: int) -> Tensor:
    """Exercise 11.1. The rows of ChatGLM-6B's query_key_value as all queries, then all keys, then all values.

    rows    [3 n d, …]: a weight [3 n d, D] or a bias [3 n d], head by head as on disk
    heads   n

    Returns a tensor of the same shape.
    """
    raise NotImplementedError


def merged(parts: list[Tensor], axis: int, gated: bool) -> Tensor:
    """Exercise 11.2. One matrix of the parts that several devices hold, in their order.

    axis    along which it was cut: 0 for first matrices, 1 for second ones
    gated   whether it is two matrices on top of each other, each cut by itself (only with axis 0)
    """
    raise NotImplementedError


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """Exercise 11.3. A matrix from an official int4 file of the first generations.

    weight   int8 [out, in / 2], two columns in a byte
    scale    [out], one for each row

    Returns [out, in] in the dtype of `scale`.
    """
    raise NotImplementedError


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, version: int) -> Tensor:
    """Exercise 11.4. A matrix from a GPTQ file with four bits.

    qweight   int32 [in / 8, out]: eight rows of the transposed matrix in a word, the first in the lowest bits
    qzeros    int32 [groups, out / 8]: the zero points of eight columns in a word, likewise
    scales    [groups, out]; the `in` columns of a row are in so many groups of neighbours
    version   1 or 2

    Returns s (u - z), [out, in].
    """
    raise NotImplementedError


def which_mistake(right: glm.GLM, wrong: glm.GLM) -> str:
    """Exercise 11.5. A checkpoint of ChatGLM2's kind was converted with one mistake, the same in all layers. Which?

    right   read from the original
    wrong   read from the converted one: every tensor has its name and its shape

    Returns "q k v" (the rows of the fused matrix lie head by head, as if G were H), "gate up" (the two branches are
    swapped), "norms" (the two norms of a layer are swapped), "head" (it is the embedding) or "rotary" (the base is
    another one).
    """
    raise NotImplementedError
