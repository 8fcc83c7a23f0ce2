"""Integers of 4 and 8 bits: as files store them, and as the kernels read them.

Storage. A row of I integers q, each -2^(bits-1) to 2^(bits-1) - 1, is stored as codes q + 2^(bits-1), from 0 on, side
by side with the first in the lowest bits: uint8 [O, I · bits / 8], for int4 the even column in the low nibble, or the
same memory seen as int32 words [O, I · bits / 32], which is the pack-quantized layout of compressed-tensors. Scales
are [O, groups] and zero points int8 [O, groups]:

    W[o, i] = s[o, g] (q[o, i] - z[o, g])        g = i // group

The official ChatGLM files differ: two's complement, for int4 the even column in the *high* nibble. `from_row_scaled`.

Kernel layout. int16 words [tiles, O, 32]. A tile has 128 columns of int4 or 64 of int8: chunks of 32 columns. Word j of
a row of a tile holds column j of each chunk, the first chunk in the lowest bits:

    word[t, o, j] = Σ_i code[o, (t · chunks + i) · 32 + j] · 2^(bits · i)

So shifting and masking a whole tile of words gives a tile of codes that stand side by side in a row, with no shuffling
between threads; and the part of a tile that a program reads, some rows next to each other, is one piece of memory.
Columns that fill up the last tile are 0. Scales and zero points are turned on their side, [groups, O], and zero points
are in the scales' dtype. Experts are one more axis, in front of all.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32


class Prepacked(NamedTuple):
    """A matrix in the kernel's layout; `int4_matmul(x, *prepacked, group=…)` takes it as it takes a stored one."""

    packed: Tensor  # int16 [tiles, O, 32]
    scales: Tensor  # [groups, O]
    zeros: Tensor | None  # [groups, O]


def as_bytes(packed: Tensor) -> Tensor:
    """Stored integers as uint8 [..., O, I · bits / 8], whether they came as bytes or as int32 words.

    Raises:
        ValueError: Neither.
    """
    if packed.dtype not in (torch.uint8, torch.int32):
        raise ValueError(f"packed integers are uint8 or int32 as stored, or int16 as prepacked; not {packed.dtype}")
    return packed.contiguous().view(torch.uint8)


def codes_of(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., I], from 0 on."""
    stored = as_bytes(packed)
    return stored if bits == 8 else torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Stored integers as int8 [..., I]. Inverse of `pack`."""
    return (codes_of(packed, bits) - (1 << (bits - 1))).view(torch.int8)


def pack(integers: Tensor, bits: int) -> Tensor:
    """int8 [..., I], I even for 4 bits -> uint8 [..., I · bits / 8]."""
    codes: Tensor = (integers.view(torch.uint8) + (1 << (bits - 1))) & ((1 << bits) - 1)
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def from_row_scaled(weight: Tensor, bits: int) -> Tensor:
    """The bytes of an official ChatGLM matrix, int8 [O, I · bits / 8], as storage. For 4 bits its own inverse."""
    stored = weight.view(torch.uint8)
    return stored ^ 0x80 if bits == 8 else ((stored >> 4) | (stored << 4)) ^ 0x88


def words_of(packed: Tensor, bits: int) -> Tensor:
    """Stored integers [..., O, bytes] -> int16 [..., tiles, O, 32]. Exact; `stored_of` is the inverse."""
    chunks = 16 // bits
    codes = codes_of(packed, bits).to(torch.int32)
    codes = F.pad(codes, (0, -codes.shape[-1] % (chunks * CHUNK))).unflatten(-1, (-1, chunks, CHUNK))  # […, O, t, i, j]
    words: Tensor = codes[..., 0, :].clone()
    for i in range(1, chunks):
        words |= codes[..., i, :] << (bits * i)
    return words.to(torch.int16).movedim(-2, -3).contiguous()


def stored_of(words: Tensor, bits: int, inputs: int) -> Tensor:
    """int16 [..., tiles, O, 32] -> the uint8 [..., O, inputs · bits / 8] that `words_of` made them of."""
    words = words.movedim(-3, -2).to(torch.int32)  # […, O, t, j]
    codes = torch.stack([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(16 // bits)], dim=-2)
    codes = codes.flatten(-3)[..., :inputs].to(torch.uint8)
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def prepack(packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int) -> Prepacked:
    """From storage to the kernel's layout: done once, when a model is loaded."""
    turned = None if zeros is None else zeros.to(scales.dtype).mT.contiguous()
    return Prepacked(words_of(packed, bits), scales.mT.contiguous(), turned)


def unprepack(prepacked: Prepacked, bits: int, inputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of `prepack`: (packed, scales, zeros) as stored."""
    words, scales, zeros = prepacked
    back = None if zeros is None else zeros.mT.to(torch.int8).contiguous()
    return stored_of(words, bits, inputs), scales.mT.contiguous(), back


def dequantised(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix [..., O, I] in `dtype` from storage: differences of integers are exact, the product is rounded."""
    q = unpack(packed, bits).to(dtype).unflatten(-1, (scales.shape[-1], -1))
    if zeros is not None:
        q = q - zeros.to(dtype)[..., None]
    weight: Tensor = (q * scales.to(dtype)[..., None]).flatten(-2)
    return weight
