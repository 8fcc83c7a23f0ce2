"""Matrices of the engine: y = f(W n(x) + b) + residual in one call, whatever the weights are stored as.

What differs is data: a dense matrix, or integers of 8 or 4 bits with their scales. Where a kernel computes, integers
are laid out for it once; elsewhere they stay as they are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from glm_kernels import (
    dense_matmul,
    dense_matmul_experts,
    int4_matmul,
    int4_matmul_experts,
    int4_prepack,
    int8_matmul,
    int8_matmul_experts,
    int8_prepack,
)
from glm_kernels.dispatch import INTERPRETED
from glm_kernels.packing import from_row_scaled
from torch import Tensor, nn

from glm.errors import ConfigError
from glm.grouped import Grouped, GroupedLinear, GroupedStack
from glm.linear import Linear, LinearStack, RowScaledLinear, RowScaledStack
from glm.quantization import quantize
from glm.runtime.norms import FusedNorm

Product = Callable[..., Tensor]


class Width(NamedTuple):
    """What computes with integers of so many bits."""

    product: Product
    experts: Product
    prepack: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


WIDTHS = {
    4: Width(int4_matmul, int4_matmul_experts, int4_prepack),
    8: Width(int8_matmul, int8_matmul_experts, int8_prepack),
}


@dataclass(frozen=True)
class Matrix:
    """One matrix [O, I], or one of every expert: the `operands` of its product, and by name what goes with them."""

    product: Product
    operands: tuple[Tensor | None, ...]
    named: dict[str, Any]

    def __call__(
        self, x: Tensor, *, norm: FusedNorm | None = None, residual: Tensor | None = None, swiglu: bool = False
    ) -> Tensor:
        """[..., I] -> [..., O]: n(x) in the place of x; with `swiglu` silu(first half) · second half; plus residual."""
        extra: dict[str, Any] = {}
        if norm is not None and norm.folds:
            extra = {"norm": norm.weight, "eps": norm.eps}
        elif norm is not None:
            x = norm(x)
        return self.product(x, *self.operands, **self.named, **extra, residual=residual, swiglu=swiglu)

    def experts(self, x: Tensor, offsets: Tensor, *, swiglu: bool = False) -> Tensor:
        """Rows offsets[e] to offsets[e + 1] of x [N, I] with the matrix of expert e: -> [N, O]."""
        return self.product(x, *self.operands, **self.named, offsets=offsets, swiglu=swiglu)

    @property
    def bytes(self) -> int:
        """What a product reads of it: numbers, integers, scales, bias."""
        tensors = (*self.operands, *self.named.values())
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


class Store:
    """Makes the engine's matrices of a model's linear layers; dense ones become integers of the given `form`."""

    def __init__(self, form: Grouped | None, dtype: torch.dtype, device: torch.device) -> None:
        self.form = form
        self.laid_out = dtype in (torch.float16, torch.bfloat16) and (device.type == "cuda" or INTERPRETED)

    def matrix(self, module: nn.Module) -> Matrix:
        """That of a linear layer. Raises ConfigError where it is to become integers and is so already."""
        if isinstance(module, Linear):
            if self.form is None:
                return Matrix(dense_matmul, (module.weight,), {"bias": module.bias})
            form = fitting(self.form, module.in_features)
            packed, scales, zeros = quantize(module.weight.detach(), form)
            return self.integers(packed, scales, zeros, form.bits, module.in_features, module.bias)
        return self.stored(module)

    def stack(self, module: nn.Module) -> Matrix:
        """That of every expert."""
        if isinstance(module, LinearStack):
            if self.form is None:
                return Matrix(dense_matmul_experts, (module.weight,), {"bias": module.bias})
            form = fitting(self.form, module.weight.shape[-1])
            parts = [quantize(weight, form) for weight in module.weight.detach()]
            packed, scales = (torch.stack([part[i] for part in parts]) for i in range(2))  # type: ignore[misc]
            zeros = None if form.symmetric else torch.stack([part[2] for part in parts])  # type: ignore[misc]
            return self.integers(packed, scales, zeros, form.bits, module.weight.shape[-1], module.bias, experts=True)
        return self.stored(module)

    def stored(self, module: nn.Module) -> Matrix:
        """That of a layer whose file holds integers."""
        experts = isinstance(module, RowScaledStack | GroupedStack)
        if not experts and not isinstance(module, RowScaledLinear | GroupedLinear):
            raise TypeError(f"no linear layer: {type(module).__name__}")
        if self.form is not None:
            raise ConfigError("the weights are integers already: leave `weights` out, or load a dense checkpoint")
        if isinstance(module, RowScaledLinear | RowScaledStack):
            inputs = module.weight.shape[-1] * 8 // module.bits
            packed, scales = from_row_scaled(module.weight, module.bits), module.weight_scale[..., None]
            return self.integers(packed, scales, None, module.bits, inputs, module.bias, experts)
        assert isinstance(module, GroupedLinear | GroupedStack)
        inputs = module.weight_packed.shape[-1] * 32 // module.form.bits
        operands = (module.weight_packed, module.weight_scale, module.weight_zero_point)
        return self.integers(*operands, module.form.bits, inputs, module.bias, experts)

    def integers(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        inputs: int,
        bias: Tensor | None,
        experts: bool = False,
    ) -> Matrix:
        """A matrix of stored integers, laid out for the kernel if one computes."""
        width, group = WIDTHS[bits], inputs // scales.shape[-1]
        operands: tuple[Tensor | None, ...] = (packed, scales, zeros)
        if self.laid_out:
            operands = tuple(width.prepack(packed, scales, zeros))
        product = width.experts if experts else width.product
        return Matrix(product, operands, {"group": group, "bias": bias})


def fitting(form: Grouped, inputs: int) -> Grouped:
    """`form` with the largest group, of those up to its own, that divides a row; whole rows if none does."""
    groups = [group for group in (form.group, 128, 64, 32) if group and group <= (form.group or 0)]
    return Grouped(form.bits, next((group for group in groups if inputs % group == 0), None), form.symmetric)


def integer_form(weights: str | None) -> Grouped | None:
    """What `weights` names: "int8" and "int4" are groups of 128 without zero points, None is as the model has them."""
    if weights is None:
        return None
    if weights not in ("int8", "int4"):
        raise ConfigError(f'weights is "int8", "int4", or None for those of the model, not {weights!r}')
    return Grouped(int(weights[3:]), 128, symmetric=True)
