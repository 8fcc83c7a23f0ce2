"""Norms of the engine: one kernel, or none where the product behind it takes the norm in."""

import torch
from glm_kernels import layer_norm, rms_norm
from torch import Tensor, nn

from glm.norms import RMSNormModule

FOLDED = frozenset({torch.bfloat16})
"""In these dtypes an RMSNorm is taken into the product. There x ⊙ weight is not normalised yet, which float16 has no
room for; and only kernels for 16-bit numbers do it."""


class FusedNorm:
    """An RMSNorm or a LayerNorm of the model, as a function."""

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, RMSNormModule):
            self.weight, self.bias, self.eps = module.weight, None, module.spec.eps
            self.weight_first = module.spec.weight_first
        elif isinstance(module, nn.LayerNorm):
            self.weight, self.bias, self.eps = module.weight, module.bias, module.eps
        else:
            raise TypeError(f"no norm: {type(module).__name__}")

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps, weight_first=self.weight_first)
        return layer_norm(x, self.weight, self.bias, self.eps)

    @property
    def folds(self) -> bool:
        """Whether a product with a matrix can take it in."""
        return self.bias is None and self.weight.dtype in FOLDED


def fused_norm(module: nn.Module) -> FusedNorm | None:
    """The norm of a module; None for the identity."""
    return None if isinstance(module, nn.Identity) else FusedNorm(module)
