"""Normalisation: what keeps every sublayer's input at one scale.

    LayerNorm:  y = w (x - mean x) / sqrt(var x + eps) + b        (Ba et al. 2016, arXiv:1607.06450)
    RMSNorm:    y = w x / sqrt(mean x² + eps)                     (Zhang & Sennrich 2019, arXiv:1910.07467)

Statistics are taken in float32 at least; a float64 model takes them in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """`x` in the precision that statistics, softmax and rotations are computed in: float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class LayerNorm:
    """Centre, scale to unit variance, then weight and bias."""

    eps: float

    def build(self, width: int) -> nn.Module:
        """A module over the last axis, [..., width] -> [..., width]."""
        return nn.LayerNorm(width, self.eps)


@dataclass(frozen=True)
class RMSNorm:
    """Scale to unit root mean square, then weight.

    The two published roundings differ in half precision only: `weight_first` multiplies by the weight before
    the cast back to the input's dtype, otherwise the normalised value is cast first.
    """

    eps: float
    weight_first: bool

    def build(self, width: int) -> nn.Module:
        """A module over the last axis, [..., width] -> [..., width]."""
        return RMSNormModule(self, width)


class RMSNormModule(nn.Module):
    """y = w x / sqrt(mean x² + eps) over the last axis."""

    def __init__(self, spec: RMSNorm, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], in the dtype of `x`."""
        if self.spec.weight_first:
            return F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.spec.eps).to(x.dtype)
        return F.rms_norm(wide(x), self.weight.shape, None, self.spec.eps).to(x.dtype) * self.weight


Norm = LayerNorm | RMSNorm
