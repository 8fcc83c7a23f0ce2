"""Integers as the kernels read them, and linear layers that hold them so.

How they lie is the business of `glm_kernels.packing`. Laying a matrix out shuffles every number in it; here that is
done some rows at a time, so that memory holds the matrix twice and little more.
"""

from typing import NamedTuple

import torch
from glm_kernels.packing import CHUNK, Prepacked, dequantised, from_row_scaled, unprepack, words_of
from torch import Tensor, nn
from torch.nn import functional as F

from glm.grouped import GroupedLinear, GroupedStack
from glm.linear import RowScaledLinear, RowScaledStack

AT_ONCE = 1 << 20  # numbers shuffled at a time; they take a few int32 each, which is little beside a model


class Integers(NamedTuple):
    """A matrix of integers, or one of every expert, as it is stored."""

    packed: Tensor  # uint8 or int32 [..., O, bytes or words], int8 as the official ChatGLM files have it
    scales: Tensor  # [..., O, groups]
    zeros: Tensor | None  # int8 [..., O, groups]
    bits: int
    bias: Tensor | None  # [..., O]

    @classmethod
    def of(cls, module: nn.Module) -> "Integers | None":
        """That of a linear layer of one of the kinds here; None for any other module."""
        if isinstance(module, RowScaledLinear | RowScaledStack) and type(module) in (RowScaledLinear, RowScaledStack):
            return cls(module.weight, module.weight_scale[..., None], None, module.bits, module.bias)
        if isinstance(module, GroupedLinear | GroupedStack) and type(module) in (GroupedLinear, GroupedStack):
            packed, scales, zeros = module.weight_packed, module.weight_scale, module.weight_zero_point
            return cls(packed, scales, zeros, module.form.bits, module.bias)
        return None

    @property
    def inputs(self) -> int:
        """I, columns of the matrix."""
        return self.packed.shape[-1] * self.packed.itemsize * 8 // self.bits

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.inputs // self.scales.shape[-1]

    @property
    def laid_out_shape(self) -> tuple[int, ...]:
        """Of the words, [..., tiles, O, 32]."""
        *experts, outputs, _ = self.packed.shape
        return (*experts, -(-self.inputs // (16 // self.bits * CHUNK)), outputs, CHUNK)

    def words(self) -> Tensor:
        """The integers as the kernel reads them, int16 [..., tiles, O, 32]."""
        *experts, outputs, _ = self.packed.shape
        words = torch.empty(self.laid_out_shape, dtype=torch.int16, device=self.packed.device)
        rows = max(1, AT_ONCE // (self.inputs * torch.Size(experts).numel()))
        for start in range(0, outputs, rows):
            some = slice(start, start + rows)
            words[..., some, :] = words_of(as_codes(self.packed[..., some, :], self.bits), self.bits)
        return words

    def turned(self) -> Tensor:
        """The scales as the kernel reads them, [..., groups, O]."""
        return self.scales.mT.contiguous()

    def turned_zeros(self) -> Tensor | None:
        """The zero points as the kernel reads them, [..., groups, O] in the dtype of the scales."""
        return None if self.zeros is None else self.zeros.mT.to(self.scales.dtype).contiguous()

    def lay_out(self) -> Prepacked:
        """All of it, as `glm_kernels.packing.prepack` does it."""
        return Prepacked(self.words(), self.turned(), self.turned_zeros())


def as_codes(packed: Tensor, bits: int) -> Tensor:
    """Integers counted from 0, side by side, from whichever way they are stored."""
    return from_row_scaled(packed, bits) if packed.dtype == torch.int8 else packed


class LaidOut(nn.Module):
    """A linear layer [..., I] -> [..., O], or one of every expert, whose integers lie as the kernel reads them.

    weight_packed      int16 [tiles, O, 32]
    weight_scale       [groups, O]
    weight_zero_point  [groups, O], where there are any
    bias               [O], where there is one

    and an axis of experts in front of all. The engine hands them to the kernel. Called by itself, the layer writes the
    matrix out as the one in whose place it stands does, and gives the same numbers.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, stored: Integers) -> None:
        """Room for what `stored` becomes, on its device; the bias is the same."""
        super().__init__()
        self.bits, self.inputs, self.group = stored.bits, stored.inputs, stored.group
        scales = torch.empty_like(stored.scales.mT, memory_format=torch.contiguous_format)
        words = torch.empty(stored.laid_out_shape, dtype=torch.int16, device=stored.packed.device)
        self.register_buffer("weight_packed", words)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_zero_point", None if stored.zeros is None else torch.empty_like(scales))
        self.bias = stored.bias

    @property
    def operands(self) -> Prepacked:
        """What a product takes."""
        return Prepacked(self.weight_packed, self.weight_scale, self.weight_zero_point)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as [..., O, I] in `dtype`."""
        return dequantised(*unprepack(self.operands, self.bits, self.inputs), self.bits, dtype)

    def forward(self, x: Tensor, *expert: int) -> Tensor:
        """[..., I] -> [..., O], with the matrix of one `expert` where there are several."""
        words, scales, zeros = (None if part is None else part[expert] for part in self.operands)
        assert words is not None
        assert scales is not None
        weight = dequantised(*unprepack(Prepacked(words, scales, zeros), self.bits, self.inputs), self.bits, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias[expert])
