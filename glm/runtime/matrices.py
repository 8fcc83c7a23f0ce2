"""Matrices of the engine: y = f(W n(x) + b) + residual in one call, whatever the weights are stored as.

What differs is data: a dense matrix, or integers of 8 or 4 bits with their scales. Where a kernel computes, integers
are laid out for it once; elsewhere they stay as they are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from glm_kernels import (
    dense_matmul,
    dense_matmul_experts,
    int4_matmul,
    int4_matmul_experts,
    int8_matmul,
    int8_matmul_experts,
)
from glm_kernels import swiglu as fused_swiglu
from glm_kernels.dispatch import INTERPRETED
from torch import Tensor, nn

from glm.errors import ConfigError
from glm.grouped import Grouped, fitting
from glm.linear import Dense, Linear, LinearStack, Weights
from glm.quantization import quantize
from glm.runtime.laid_out import Integers, LaidOut, as_codes
from glm.runtime.norms import FusedNorm

Product = Callable[..., Tensor]


class Width(NamedTuple):
    """What computes with integers of so many bits."""

    product: Product
    experts: Product


WIDTHS = {
    4: Width(int4_matmul, int4_matmul_experts),
    8: Width(int8_matmul, int8_matmul_experts),
}


@dataclass(frozen=True)
class Matrix:
    """One matrix [O, I], or one of every expert: the `operands` of its product, and by name what goes with them."""

    product: Product
    operands: tuple[Tensor | None, ...]
    named: dict[str, Any]
    folds: bool = True  # whether the product can take a norm in

    def __call__(
        self, x: Tensor, *, norm: FusedNorm | None = None, residual: Tensor | None = None, swiglu: bool = False
    ) -> Tensor:
        """[..., I] -> [..., O]: n(x) in the place of x; with `swiglu` silu(first half) · second half; plus residual."""
        extra = norm.folded if norm is not None and self.folds else {}
        if norm is not None and not extra:
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
        self.form, self.dtype = form, dtype
        self.laid_out = lays_out(dtype, device)

    def matrix(self, module: nn.Module) -> Matrix:
        """That of a linear layer. Raises ConfigError where it is to become integers and is so already."""
        if type(module) is Linear:
            if self.form is None:
                return Matrix(dense_matmul, (module.weight,), {"bias": module.bias})
            form = fitting(self.form, module.in_features)
            return self.integers(Integers(*quantize(module.weight.detach(), form), form.bits, module.bias))
        return self.stored(module)

    def stack(self, module: nn.Module) -> Matrix:
        """That of every expert."""
        if type(module) is LinearStack:
            if self.form is None:
                return Matrix(dense_matmul_experts, (module.weight,), {"bias": module.bias})
            form = fitting(self.form, module.weight.shape[-1])
            parts = [quantize(weight, form) for weight in module.weight.detach()]
            packed, scales = (torch.stack([part[i] for part in parts]) for i in range(2))  # type: ignore[misc]
            zeros = None if form.symmetric else torch.stack([part[2] for part in parts])  # type: ignore[misc]
            return self.integers(Integers(packed, scales, zeros, form.bits, module.bias))
        return self.stored(module)

    def stored(self, module: nn.Module) -> Matrix:
        """That of a layer whose file holds integers, or of one that is not known here and computes by itself."""
        stored = Integers.of(module)
        if stored is None and not isinstance(module, LaidOut):
            return Matrix(partial(by_itself, module), (), {}, folds=False)
        if self.form is not None:
            raise ConfigError("the weights are integers already: leave `weights` out, or load a dense checkpoint")
        if stored is not None:
            return self.integers(stored)
        assert isinstance(module, LaidOut)
        return integer_matrix(module.operands, module.bits, module.group, module.bias)

    def integers(self, stored: Integers) -> Matrix:
        """A matrix of stored integers, laid out for the kernel if one computes."""
        operands = stored.lay_out() if self.laid_out else (as_codes(stored.packed, stored.bits), *stored[1:3])
        return integer_matrix(operands, stored.bits, stored.group, stored.bias)


def known(module: nn.Module) -> bool:
    """Whether a linear layer is one of the kinds whose matrix the engine takes."""
    return type(module) in (Linear, LinearStack, LaidOut) or Integers.of(module) is not None


def by_itself(module: nn.Module, x: Tensor, *, residual: Tensor | None, swiglu: bool) -> Tensor:
    """The product that a changed linear layer makes, and what stands behind it."""
    y: Tensor = module(x)
    y = fused_swiglu(y) if swiglu else y
    return y if residual is None else y + residual


def lays_out(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel computes products with integers there, so that they are laid out for it."""
    return dtype in (torch.float16, torch.bfloat16) and (device.type == "cuda" or INTERPRETED)


def integer_matrix(operands: tuple[Tensor | None, ...], bits: int, group: int, bias: Tensor | None) -> Matrix:
    """Of integers, stored or laid out; one of every expert where the scales have three axes."""
    width, scales = WIDTHS[bits], operands[1]
    assert scales is not None
    return Matrix(width.experts if scales.dim() == 3 else width.product, operands, {"group": group, "bias": bias})


def integer_form(weights: str | None, stored: Weights) -> Grouped | None:
    """What dense matrices are to become: "int8" and "int4" are groups of 128 without zero points.

    None is whatever the model has, "bf16" as well if that is dense. Raises ConfigError for anything else.
    """
    if weights == "bf16" and stored != Dense():
        raise ConfigError('the weights are integers already: leave `weights="bf16"` out, or load a dense checkpoint')
    if weights in (None, "bf16"):
        return None
    if weights not in ("int8", "int4"):
        raise ConfigError(f'weights is "bf16", "int8", "int4", or None for those of the model, not {weights!r}')
    return Grouped(int(weights[3:]), 128, symmetric=True)
