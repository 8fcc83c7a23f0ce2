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

    def linear(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A module [..., inputs] -> [..., outputs]."""
        return Linear(inputs, outputs, bias=bias)


@dataclass(frozen=True)
class RowScaled:
    """W[o, i] = s[o] q[o, i] with q a signed integer of `bits` (8 or 4) and one scale s for a whole row.

    int4 puts two columns in a byte, the even column in the high nibble, both in two's complement.
    """

    bits: int

    def linear(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A module [..., inputs] -> [..., outputs]."""
        return RowScaledLinear(inputs, outputs, bias, self.bits)


Weights = Dense | RowScaled | Grouped


class Linear(nn.Linear):
    """y = W x + b, a single float32 row on the CPU by all threads.

    Decoding one token is nothing but products of a matrix and a vector. BLAS computes one of those in one thread,
    at half the speed of memory or less, but several of a batch side by side: so the rows of W are dealt out.
    """

    def reset_parameters(self) -> None:
        """Nothing: `GLM` draws its numbers or loads them. (On "meta", torch's own way would import its compiler.)"""

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if x.numel() != self.in_features or x.dtype != torch.float32 or x.device.type != "cpu":
            return super().forward(x)
        parts = math.gcd(self.out_features, torch.get_num_threads())
        rows = self.weight.view(parts, -1, self.in_features)
        y = torch.bmm(x.view(1, 1, -1).expand(parts, -1, -1), rows.transpose(1, 2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


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
        integers = unpack_int4(self.weight) if self.bits == 4 else self.weight
        return integers.to(dtype) * self.weight_scale.to(dtype)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.dense(x.dtype), self.bias)


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
