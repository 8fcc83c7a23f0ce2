"""Linear layers, and how their matrices are stored: as floating-point numbers, or as integers with one scale a row."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.grouped import Grouped


@dataclass(frozen=True)
class Dense:
    """y = W x + b, every weight a floating-point number of the model's dtype."""

    def linear(self, inputs: int, outputs: int, bias: bool) -> "Linear":
        """A module [..., inputs] -> [..., outputs]."""
        return Linear(inputs, outputs, bias=bias)

    def stack(self, count: int, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """`count` such layers in one: a module called with x [..., inputs] and the number of a layer."""
        return LinearStack(count, inputs, outputs, bias)


@dataclass(frozen=True)
class RowScaled:
    """W[o, i] = s[o] q[o, i] with q a signed integer of `bits` (8 or 4) and one scale s for a whole row.

    int4 puts two columns in a byte, the even column in the high nibble, both in two's complement.
    """

    bits: int

    def linear(self, inputs: int, outputs: int, bias: bool) -> "RowScaledLinear":
        """A module [..., inputs] -> [..., outputs]."""
        return RowScaledLinear(inputs, outputs, bias, self.bits)

    def stack(self, count: int, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """`count` such layers in one: a module called with x [..., inputs] and the number of a layer."""
        return RowScaledStack(count, inputs, outputs, bias, self.bits)


Weights = Dense | RowScaled | Grouped


@dataclass(frozen=True)
class Stack:
    """Stores `count` matrices as one, as `weights` would store each of them."""

    weights: Weights
    count: int

    def linear(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A module called with x [..., inputs] and the number of a matrix -> [..., outputs]."""
        return self.weights.stack(self.count, inputs, outputs, bias)


class Linear(nn.Linear):
    """y = W x + b, a single float32 row on the CPU by all threads.

    Decoding one token is nothing but products of a matrix and a vector. BLAS computes one of those in one thread,
    at half the speed of memory or less, but several of a batch side by side: so the rows of W are dealt out.
    """

    def reset_parameters(self) -> None:
        """Nothing: `GLM` draws its numbers or loads them. (On "meta", torch's own way would import its compiler.)"""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as [outputs, inputs] in `dtype`."""
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return affine(x, self.weight, self.bias)


class LinearStack(nn.Module):
    """y = W_e x + b_e for a number e."""

    def __init__(self, count: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(count, outputs)) if bias else None

    def forward(self, x: Tensor, e: int) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return affine(x, self.weight[e], None if self.bias is None else self.bias[e])


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b for x [..., inputs] and W [outputs, inputs]; the rows of a DTensor are dealt out already."""
    outputs, inputs = weight.shape
    if type(x) is not Tensor or x.numel() != inputs or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    parts = math.gcd(outputs, torch.get_num_threads())
    rows = weight.view(parts, -1, inputs)
    y = torch.bmm(x.view(1, 1, -1).expand(parts, -1, -1), rows.transpose(1, 2)).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class RowScaledLinear(nn.Module):
    """y = (s ⊙ q) x + b; the weight is written out in the dtype of `x` at every call."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("weight", torch.zeros(outputs, inputs * bits // 8, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as [outputs, inputs] in `dtype`."""
        return scaled(self.weight, self.weight_scale, self.bits, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.dense(x.dtype), self.bias)


class RowScaledStack(nn.Module):
    """y = (s_e ⊙ q_e) x + b_e for a number e; only that matrix is written out."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, count: int, inputs: int, outputs: int, bias: bool, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("weight", torch.zeros(count, outputs, inputs * bits // 8, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(count, outputs))
        self.bias = nn.Parameter(torch.zeros(count, outputs)) if bias else None

    def forward(self, x: Tensor, e: int) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        weight = scaled(self.weight[e], self.weight_scale[e], self.bits, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias[e])


def scaled(integers: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix s ⊙ q [outputs, inputs] in `dtype`, from its integers as they are stored."""
    values = unpack_int4(integers) if bits == 4 else integers
    return values.to(dtype) * scale.to(dtype)[:, None]


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """A table whose numbers come later. nn.Embedding would draw them, for which torch imports a second's worth."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 bytes [..., n] -> int8 values -8..7 [..., 2n]: high nibble first. Inverse of `pack_int4`."""
    high, low = packed >> 4, (packed << 4) >> 4  # shifts of int8 keep the sign
    return torch.stack((high, low), dim=-1).flatten(-2)


def pack_int4(values: Tensor) -> Tensor:
    """int8 values -8..7 [..., 2n] -> int8 bytes [..., n]: even columns in the high nibble."""
    high, low = values[..., 0::2], values[..., 1::2]
    return (high << 4) | (low & 15)
