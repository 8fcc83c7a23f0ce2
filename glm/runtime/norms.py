"""Norms of the engine: one kernel, or none where the product behind it takes the norm in."""

from typing import Any

import torch
from glm_kernels import layer_norm, rms_norm
from torch import Tensor, nn

from glm.norms import RMSNormModule

FOLDED = frozenset({torch.bfloat16})
"""In these dtypes an RMSNorm is taken into the product. There x ⊙ weight is not normalised yet, which float16 has no
room for; and only kernels for 16-bit numbers do it."""


class FusedNorm:
    """A norm of the model as a function: of an RMSNorm or LayerNorm the kernel, anything else as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rms = module if type(module) is RMSNormModule else None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        module = self.module
        if self.rms is not None:
            return rms_norm(x, self.rms.weight, self.rms.spec.eps, weight_first=self.rms.spec.weight_first)
        if type(module) is nn.LayerNorm and module.bias is not None:
            return layer_norm(x, module.weight, module.bias, module.eps)
        y: Tensor = module(x)
        return y

    @property
    def folded(self) -> dict[str, Any]:
        """What a product is told that takes this norm in; nothing where it cannot."""
        if self.rms is None or self.rms.weight.dtype not in FOLDED:
            return {}
        return {"norm": self.rms.weight, "eps": self.rms.spec.eps}


def fused_norm(module: nn.Module) -> FusedNorm | None:
    """The norm of a module; None for the identity."""
    return None if isinstance(module, nn.Identity) else FusedNorm(module)
