"""Activations of the feed-forward sublayer: GELU, and the products SwiGLU and GeGLU.

    SwiGLU:  y = silu(a) b         x = [a | b]    (Shazeer 2020, arXiv:2002.05202; ChatGLM2 and all later models)
    GeGLU:   y = b gelu(a)         x = [b | a]    (GLM-130B: the second half is the activated one)
    GELU:    y = gelu(a)           x = a          (GLM, ChatGLM-6B)

    silu(a) = a σ(a),    gelu(a) = a Φ(a) = a (1 + erf(a / √2)) / 2    (Hendrycks & Gimpel 2016, arXiv:1606.08415)

or for gelu its approximation a (1 + tanh u) / 2 = a σ(2u) with u = √(2/π) (a + 0.044715 a³). In half precision the
activated half is rounded before the product, as plain torch rounds it. The gradients come from x alone:

    da = dy b f'(a),    db = dy f(a)      with    silu' = σ(a) + a σ(a) σ(-a),    gelu' = Φ(a) + a φ(a),
                                                  in the tanh form σ(2u) + a σ(2u) σ(-2u) 2u'

where σ(z) σ(-z) = t / (1 + t)² with t = exp(-|z|): 1 - σ(z) would be rounded to nothing where z is large.

Bytes of N rows of F results at e bytes an element: a product reads 2 N F e and writes N F e, its backward pass reads
3 N F e and writes 2 N F e; GELU 2 N F e and 3 N F e. Flops: about ten an element, and one exponential (erf: about
twenty). A GPU could do a hundred flops in the time of a byte: memory is the bound.

Layout: x is [..., 2F] or [..., F], the elements of a row side by side, rows at any one stride; what is laid out
otherwise is copied first. What comes back is contiguous. Loads are 16 bytes wide where F and the stride are multiples
of 16 elements. The kernel takes float16, bfloat16 and float32, the reference takes float64 too.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.dispatch import Target, jit, takes_kernel, tl, wide
from glm_kernels.operators import operator
from glm_kernels.overlap import launched, overlaps, release, tiles_ahead, wait
from glm_kernels.variants import POINTERS, Variant

KINDS = "silu", "gelu", "gelu_tanh"
ALONE, FIRST, SECOND = 0, 1, 2  # what is activated: x itself, or one half of it, to be multiplied by the other

BLOCK, WARPS = 1024, 4  # 8 elements a thread: one load of 16 bytes in half precision, two in float32

# ----------------------------------------------------------------------------- reference


def swiglu_reference(x: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def geglu_reference(x: Tensor, *, tanh: bool) -> Tensor:
    """`geglu` in plain torch."""
    b, a = x.chunk(2, dim=-1)
    return b * gelu_reference(a, tanh=tanh)


def gelu_reference(x: Tensor, *, tanh: bool) -> Tensor:
    """`gelu` in plain torch."""
    return F.gelu(x, approximate="tanh" if tanh else "none")


def forward_reference(x: Tensor, kind: str, part: int) -> Tensor:
    """The form that `part` says, of the activation `kind`."""
    if kind == "silu":
        return swiglu_reference(x)
    tanh = kind == "gelu_tanh"
    return gelu_reference(x, tanh=tanh) if part == ALONE else geglu_reference(x, tanh=tanh)


def slope_reference(a: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(f(a), f'(a))."""
    if kind == "gelu":
        share = (1 + torch.erf(a * math.sqrt(0.5))) / 2
        return a * share, share + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    z, dz = a, torch.ones_like(a)
    if kind == "gelu_tanh":
        z, dz = (math.sqrt(8 / math.pi) * v for v in (a + 0.044715 * a**3, 1 + 3 * 0.044715 * a * a))
    share = torch.sigmoid(z)
    return a * share, share + a * share * torch.sigmoid(-z) * dz


def backward_reference(dy: Tensor, x: Tensor, kind: str, part: int) -> Tensor:
    """dx in plain torch, rounded once."""
    halves = wide(x).chunk(1 if part == ALONE else 2, dim=-1)
    value, slope = slope_reference(halves[part == SECOND], kind)
    if part == ALONE:
        dx = wide(dy) * slope
    else:
        da, db = wide(dy) * halves[part == FIRST] * slope, wide(dy) * value
        dx = torch.cat((da, db) if part == FIRST else (db, da), dim=-1)
    return dx.to(x.dtype)


# ----------------------------------------------------------------------------- kernels


@jit
def share_of(a, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """What of a passes, f(a) / a: σ(a), Φ(a) or σ(2u)."""
    if kind == "silu":
        return tl.sigmoid(a)
    elif kind == "gelu":
        return 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)  # √½
    else:
        return tl.sigmoid(1.5957691216057308 * a * (1 + 0.044715 * a * a))  # √(8/π)


@jit
def activation_kernel(  # type: ignore[no-untyped-def]
    a, b, y, x_row, y_row, width, kind: tl.constexpr, block: tl.constexpr, ahead: tl.constexpr
):
    """`block` results of a row, f(a) b, or f(a) if b is None."""
    dtype = y.dtype.element_ty
    blocks = tl.cdiv(width, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # there may be more than 2³¹ elements
    column = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = column < width
    if ahead is not None:  # there are no weights to fetch
        release()
        wait()

    value = tl.load(a + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    value *= share_of(value, kind)
    if b is not None:
        other = tl.load(b + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32) * other
    tl.store(y + row * y_row + column, value.to(dtype), mask=inside)


@jit
def activation_gradient_kernel(  # type: ignore[no-untyped-def]
    dy, a, b, da, db, dy_row, x_row, dx_row, width, kind: tl.constexpr, block: tl.constexpr
):
    """The gradients of `block` results of a row: da, and db unless b is None."""
    dtype = da.dtype.element_ty
    blocks = tl.cdiv(width, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = column < width

    value = tl.load(a + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
    if kind == "gelu":
        share = share_of(value, kind)
        slope = share + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)  # 1 / √(2π)
    else:
        z, dz = value, 1.0
        if kind == "gelu_tanh":
            square = value * value
            z = 1.5957691216057308 * value * (1 + 0.044715 * square)  # √(8/π)
            dz = 1.5957691216057308 * (1 + 0.134145 * square)
        t = tl.exp(-tl.abs(z))
        d = 1 / (1 + t)
        share = tl.where(z < 0, t * d, d)
        slope = share + value * dz * t * d * d
    if b is not None:
        other = tl.load(b + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(db + row * dx_row + column, (gradient * value * share).to(dtype), mask=inside)
        gradient *= other
    tl.store(da + row * dx_row + column, (gradient * slope).to(dtype), mask=inside)


def halves(x: Tensor, part: int) -> tuple[Tensor, Tensor | None]:
    """Views of [N, F] or [N, 2F]: what is activated, and what it is multiplied by."""
    if part == ALONE:
        return x, None
    first, second = x.chunk(2, dim=-1)
    return (first, second) if part == FIRST else (second, first)


def launch(x: Tensor, y: Tensor, kind: str, part: int) -> None:
    """Fill y [N, F]; rows at any stride."""
    count, width = y.shape
    (a, b), ahead = halves(x, part), tiles_ahead(x)
    with torch.cuda.device_of(x):
        activation_kernel[(count * -(-width // BLOCK),)](
            a, b, y, x.stride(0), y.stride(0), width, kind, BLOCK, ahead,
            num_warps=WARPS, enable_fp_fusion=True, **launched(ahead),
        )  # fmt: skip


def launch_backward(dy: Tensor, x: Tensor, dx: Tensor, kind: str, part: int) -> None:
    """Fill dx, which is like x; rows at any stride."""
    count, width = dy.shape
    (a, b), (da, db) = halves(x, part), halves(dx, part)
    with torch.cuda.device_of(x):
        activation_gradient_kernel[(count * -(-width // BLOCK),)](
            dy, a, b, da, db, dy.stride(0), x.stride(0), dx.stride(0), width, kind, BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def variants(target: Target) -> list[Variant]:
    """What a launch can ask for: every form in every dtype, forward and backward."""
    found = [
        variant(kernel, dtype, kind, gated)
        for kernel in (activation_kernel, activation_gradient_kernel)
        for dtype in POINTERS
        for kind, gated in (("silu", True), ("gelu", True), ("gelu_tanh", True), ("gelu", False), ("gelu_tanh", False))
    ]
    if overlaps(target):
        found += [variant(activation_kernel, torch.bfloat16, "gelu", gated, ahead=0) for gated in (False, True)]
    return found


def variant(kernel: Any, dtype: torch.dtype, kind: str, gated: bool, ahead: int | None = None) -> Variant:
    """One of the kernels for one dtype; GeGLU differs from SwiGLU by the order of the pointers, not by the code."""
    names = kernel.arg_names
    tensors = [name for name in names if name in ("dy", "a", "b", "y", "da", "db")]
    absent = () if gated else ("b", "db")
    types = {name: POINTERS[dtype] for name in tensors if name not in absent}
    types |= {name: "i32" for name in names if name.endswith("_row") or name == "width"}
    values: dict[str, Any] = {name: None for name in tensors if name in absent} | {"kind": kind, "block": BLOCK}
    values |= {"ahead": ahead} if "ahead" in names else {}
    label = f"{kind}{' gated' if gated else ''} {POINTERS[dtype][1:]}{'' if ahead is None else ' overlap'}"
    options = {"num_warps": WARPS, "enable_fp_fusion": True} | launched(ahead)
    return Variant(label, kernel, types, values, options)


# ----------------------------------------------------------------------------- wrapper


def rows(x: Tensor) -> Tensor:
    """[..., F] -> [N, F] with the elements of a row side by side, without copying if that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def result_like(x: Tensor, part: int) -> Tensor:
    """An empty y for x."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (1 if part == ALONE else 2))


@operator("activation")
def activation(x: Tensor, kind: str, part: int) -> Tensor:
    """f(x), or f of the half `part` of x times the other half."""
    if not takes_kernel(x):
        return forward_reference(x, kind, part).contiguous()
    y = result_like(x, part)
    if y.numel():
        launch(rows(x), rows(y), kind, part)
    return y


@activation.register_fake
def _(x: Tensor, kind: str, part: int) -> Tensor:
    return result_like(x, part)


@operator("activation_backward")
def activation_backward(dy: Tensor, x: Tensor, kind: str, part: int) -> Tensor:
    """dx for `activation`."""
    if not takes_kernel(x):
        return backward_reference(dy, x, kind, part).contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel():
        launch_backward(rows(dy), rows(x), rows(dx), kind, part)
    return dx


@activation_backward.register_fake
def _(dy: Tensor, x: Tensor, kind: str, part: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep x: what was computed of it is cheaper to compute again than to read."""
    x, ctx.kind, ctx.part = inputs
    ctx.save_for_backward(x)


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    """The gradients at the top of this file."""
    (x,) = ctx.saved_tensors
    return activation_backward(dy, x, ctx.kind, ctx.part), None, None


activation.register_autograd(backward, setup_context=remember)


def check(x: Tensor, part: int) -> None:
    """Raise a ValueError unless x is floating and, for a product, has two halves."""
    if not x.dtype.is_floating_point or x.ndim == 0:
        raise ValueError(f"x must be a floating [..., F]; it is {x.dtype} of {x.ndim} axes")
    if part != ALONE and x.shape[-1] % 2:
        raise ValueError(f"the last axis must have two halves, and its size is {x.shape[-1]}")


def swiglu(x: Tensor) -> Tensor:
    """silu(first) · second, of the halves of the last axis.

    Args:
        x: [..., 2F].

    Returns:
        [..., F], contiguous and in the dtype of x.

    Raises:
        ValueError: The last axis is odd, or x holds no floating-point numbers.
    """
    check(x, FIRST)
    y: Tensor = activation(x, "silu", FIRST)
    return y


def geglu(x: Tensor, *, tanh: bool) -> Tensor:
    """first · gelu(second), of the halves of the last axis: in GLM-130B the second half is the activated one.

    Args:
        x: [..., 2F].
        tanh: Whether gelu is the approximation by tanh; GLM-130B's is exact.

    Returns:
        [..., F], contiguous and in the dtype of x.

    Raises:
        ValueError: The last axis is odd, or x holds no floating-point numbers.
    """
    check(x, SECOND)
    y: Tensor = activation(x, "gelu_tanh" if tanh else "gelu", SECOND)
    return y


def gelu(x: Tensor, *, tanh: bool) -> Tensor:
    """x Φ(x), or its approximation by tanh.

    Args:
        x: [..., F].
        tanh: Whether it is the approximation: ChatGLM-6B's is, that of the GLM conversions for transformers is exact.

    Returns:
        Like x, contiguous.

    Raises:
        ValueError: x holds no floating-point numbers.
    """
    check(x, ALONE)
    y: Tensor = activation(x, "gelu_tanh" if tanh else "gelu", ALONE)
    return y
