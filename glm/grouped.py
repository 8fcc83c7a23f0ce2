"""Matrices of small integers, with a scale, and possibly a zero point, for each group of columns of a row.

    W[o, i] = s[o, g] (q[o, i] - z[o, g])        g = i // group

q and z are signed integers of `bits`; symmetric quantisation has no z. A weight takes `bits` plus its share of
the scale (and z): 4.125 bits for int4 in groups of 128 with 16-bit scales. How they are chosen: `quantization.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.errors import ConfigError
from glm.packing import unpack


@dataclass(frozen=True)
class Grouped:
    """Integers of `bits` (4 or 8), a scale for each `group` columns of a row (None: for the whole row)."""

    bits: int
    group: int | None
    symmetric: bool

    def __str__(self) -> str:
        """As people call it: "int4, groups of 128, asymmetric"."""
        where = "whole rows" if self.group is None else f"groups of {self.group}"
        return f"int{self.bits}, {where}, {'symmetric' if self.symmetric else 'asymmetric'}"

    def groups(self, inputs: int) -> int:
        """Groups in a row of so many columns. Raises ConfigError where they, or whole words, do not come out even."""
        if self.group is not None and inputs % self.group:
            fit = [group for group in (32, 64, 128) if inputs % group == 0]
            instead = f"{', '.join(map(str, fit))} or whole rows do" if fit else "take whole rows"
            raise ConfigError(f"groups of {self.group} do not divide the {inputs} columns of a matrix; {instead}")
        if inputs * self.bits % 32:
            raise ConfigError(f"the {inputs} columns of a matrix do not fill 32-bit words of int{self.bits}")
        return 1 if self.group is None else inputs // self.group

    def linear(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A module [..., inputs] -> [..., outputs]. Raises ConfigError where the groups do not divide `inputs`."""
        return GroupedLinear(self, inputs, outputs, bias)

    def stack(self, count: int, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """`count` such layers in one: a module called with x [..., inputs] and the number of a layer."""
        return GroupedStack(self, count, inputs, outputs, bias)


def fitting(form: Grouped, inputs: int) -> Grouped:
    """`form` with the largest group, of those up to its own, that divides a row; whole rows if none does."""
    groups = [group for group in (form.group, 128, 64, 32) if group and group <= (form.group or 0)]
    return Grouped(form.bits, next((group for group in groups if inputs % group == 0), None), form.symmetric)


class GroupedLinear(nn.Module):
    """y = (s ⊙ (q - z)) x + b; the weight is written out in the dtype of `x` at every call.

    weight_packed      int32 [outputs, inputs · bits / 32], see `packing.py`
    weight_scale       [outputs, groups]
    weight_zero_point  int8 [outputs, groups], where the form is not symmetric
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, form: Grouped, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.form, self.inputs = form, inputs
        groups = form.groups(inputs)
        self.register_buffer("weight_packed", torch.zeros(outputs, inputs * form.bits // 32, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.zeros(outputs, groups))
        zeros = None if form.symmetric else torch.zeros(outputs, groups, dtype=torch.int8)
        self.register_buffer("weight_zero_point", zeros)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as [outputs, inputs] in `dtype`."""
        return dequantize(self.weight_packed, self.weight_scale, self.weight_zero_point, self.form, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.dense(x.dtype), self.bias)


class GroupedStack(nn.Module):
    """y = (s_e ⊙ (q_e - z_e)) x + b_e for a number e; only that matrix is written out. Every tensor is [count, …]."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, form: Grouped, count: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.form = form
        for name, x in GroupedLinear(form, inputs, outputs, bias=False).named_buffers():
            self.register_buffer(name, x.new_zeros(count, *x.shape))
        if form.symmetric:
            self.register_buffer("weight_zero_point", None)
        self.bias = nn.Parameter(torch.zeros(count, outputs)) if bias else None

    def forward(self, x: Tensor, e: int) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        zeros = None if self.weight_zero_point is None else self.weight_zero_point[e]
        weight = dequantize(self.weight_packed[e], self.weight_scale[e], zeros, self.form, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias[e])


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, form: Grouped, dtype: torch.dtype | None = None
) -> Tensor:
    """The matrix s ⊙ (q - z) [outputs, inputs] in `dtype` (None: that of the scales), from what it is stored as."""
    dtype = dtype or scales.dtype
    inputs = packed.shape[-1] * 32 // form.bits
    integers = unpack(packed, form.bits, inputs).to(dtype).unflatten(-1, (scales.shape[-1], -1))  # [O groups group]
    if zeros is not None:
        integers -= zeros.to(dtype)[..., None]
    weight: Tensor = integers.mul_(scales.to(dtype)[..., None]).flatten(-2)
    return weight
