"""RMSNorm and LayerNorm, each with the residual addition before it.

    s = x + residual                                        rounded to the dtype of x; without a residual, s = x
    RMSNorm:    y = w s / sqrt(mean s² + eps)               (Zhang & Sennrich 2019, arXiv:1910.07467)
    LayerNorm:  y = w (s - mean s) / sqrt(var s + eps) + b  (Ba et al. 2016, arXiv:1607.06450)

Bytes of N rows of width D at e bytes an element: x is read and y is written, 2 N D e; with a residual, that is read
and s written too, 4 N D e. The D or 2 D parameters are read once and stay in the cache. Flops: 4 N D for RMSNorm
(square, sum, scale, weight), 7 N D for LayerNorm (mean, centre, bias as well), N D more with a residual. Less than
four flops a byte, where a GPU could do a hundred: memory is the bound, and the point of the kernel is to read once.

Layout: x and residual are [..., D] of the same shape and dtype, the elements of a row side by side, rows at any one
stride (part of a wider tensor); what is laid out otherwise is copied first. w and b are [D], contiguous, in the dtype
of x. What comes back is contiguous. The kernel takes float16, bfloat16 and float32, D up to 16384; the reference takes
the rest. The backward pass is plain torch.
"""

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.dispatch import Target, jit, takes_kernel, tl, wide
from glm_kernels.variants import POINTERS, Variant

WIDEST = 16384  # a row is held in the registers of one program

# ----------------------------------------------------------------------------- reference


@overload
def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, residual: None = None, weight_first: bool
) -> Tensor: ...
@overload
def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, weight_first: bool
) -> tuple[Tensor, Tensor]: ...
def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, weight_first: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch."""
    s = x if residual is None else x + residual
    if weight_first:
        y = F.rms_norm(wide(s), weight.shape, wide(weight), eps).to(s.dtype)
    else:
        y = F.rms_norm(wide(s), weight.shape, None, eps).to(s.dtype) * weight
    return y if residual is None else (y, s)


@overload
def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: None = None) -> Tensor: ...
@overload
def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` in plain torch, which takes the statistics of half precision in float32 by itself."""
    s = x if residual is None else x + residual
    y = F.layer_norm(s, weight.shape, weight, bias, eps)
    return y if residual is None else (y, s)


# ----------------------------------------------------------------------------- kernel


@jit
def norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, s, x_row, residual_row, y_row, s_row, width, eps,
    weight_first: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row of y, and of s unless residual is None: a LayerNorm, or an RMSNorm if bias is None.

    The arithmetic is all in float32; to(dtype) stands where a value is rounded. Masked lanes hold zero until the
    statistics are taken.
    """
    dtype = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # there may be more than 2³¹ elements
    column = tl.arange(0, block)
    inside = column < width

    h = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(dtype)
        tl.store(s + row * s_row + column, rounded, mask=inside)
        h = rounded.to(tl.float32)

    if bias is not None:
        h = tl.where(inside, h - tl.sum(h) / width, 0.0)
    h *= tl.rsqrt(tl.sum(h * h) / width + eps)
    if bias is None and not weight_first:
        h = h.to(dtype).to(tl.float32)
    h *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + column, h.to(dtype), mask=inside)


def shape_of_launch(width: int) -> tuple[int, int]:
    """(block, warps) for rows of this width: the next power of two, and 16 elements or more a thread."""
    block = 1 << (width - 1).bit_length()
    return block, min(max(block // 512, 1), 16)


def launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, s: Tensor | None,
    eps: float, weight_first: bool,
) -> None:  # fmt: skip
    """Fill y, and s if there is a residual; all [N, D] with rows at any stride, but weight and bias [D]."""
    count, width = x.shape
    block, warps = shape_of_launch(width)
    strides = [0 if rows is None else rows.stride(0) for rows in (x, residual, y, s)]
    with torch.cuda.device_of(x):
        norm_kernel[(count,)](
            x, residual, weight, bias, y, s, *strides, width, eps, weight_first, block,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def variants(target: Target) -> list[Variant]:
    """What a launch can ask for: every form in every dtype at the greatest width, and at the common one."""
    return [
        variant(dtype, width, added, kind)
        for dtype in POINTERS
        for kind in ("weight first", "cast first", "layer")
        for width, added in ((WIDEST, kind != "weight first"), (4096, True))
    ]


def variant(dtype: torch.dtype, width: int, added: bool, kind: str) -> Variant:
    """The norm of `kind` as a launch at this width compiles it."""
    block, warps = shape_of_launch(width)
    tensors = {"x": True, "residual": added, "weight": True, "bias": kind == "layer", "y": True, "s": added}
    types = {name: POINTERS[dtype] for name, given in tensors.items() if given}
    types |= dict.fromkeys(["x_row", "residual_row", "y_row", "s_row", "width"], "i32") | {"eps": "fp32"}
    values: dict[str, Any] = {name: None for name, given in tensors.items() if not given}
    values |= {"weight_first": kind == "weight first", "block": block}
    label = f"{kind}{' added' if added else ''} {width} {POINTERS[dtype][1:]}"
    return Variant(label, norm_kernel, types, values, {"num_warps": warps, "enable_fp_fusion": True})


# ----------------------------------------------------------------------------- wrapper


def rows(x: Tensor) -> Tensor:
    """[..., D] -> [N, D] with the elements of a row side by side, without copying if that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("glm_kernels::norm", mutates_args=())
def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, weight_first: bool
) -> list[Tensor]:
    """[y], or [y, s] with a residual; a LayerNorm, or an RMSNorm if bias is None."""
    if takes_kernel(x) and x.shape[-1] <= WIDEST:
        y, s = torch.empty_like(x, memory_format=torch.contiguous_format), None
        if residual is not None:
            s, residual = torch.empty_like(y), rows(residual)
        launch(rows(x), residual, weight, bias, rows(y), None if s is None else rows(s), eps, weight_first)
        return [y] if s is None else [y, s]
    s = x if residual is None else x + residual
    if bias is None:
        y = rms_norm_reference(s, weight, eps, weight_first=weight_first)
    else:
        y = layer_norm_reference(s, weight, bias, eps)
    return [y.contiguous()] if residual is None else [y.contiguous(), s.contiguous()]


@norm.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, weight_first: bool
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(1 if residual is None else 2)]


def remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep what the backward pass needs: s, which is the input where there is no residual."""
    x, residual, weight, bias, ctx.eps, _ = inputs
    ctx.centred, ctx.added = bias is not None, residual is not None
    ctx.save_for_backward(output[1] if ctx.added else x, weight)


def backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """With n the normalised s, r = n / s and g = w dy: ds = r (g - n mean(g n)), for LayerNorm minus its mean."""
    s, weight = (wide(saved) for saved in ctx.saved_tensors)
    dy = wide(grads[0])
    if ctx.centred:
        s = s - s.mean(-1, keepdim=True)
    r = torch.rsqrt(s.square().mean(-1, keepdim=True) + ctx.eps)
    n, g = s * r, weight * dy
    ds = r * (g - n * (g * n).mean(-1, keepdim=True))
    if ctx.centred:
        ds = ds - ds.mean(-1, keepdim=True)
    if ctx.added:
        ds = ds + grads[1]
    dtype, batch = grads[0].dtype, list(range(dy.ndim - 1))
    ds = ds.to(dtype)
    dw = (dy * n).sum(batch).to(dtype)
    db = dy.sum(batch).to(dtype) if ctx.centred else None
    return ds, ds if ctx.added else None, dw, db, None, None


norm.register_autograd(backward, setup_context=remember)


def check(x: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError unless the other tensors fit x: the residual in shape, the parameters in width."""
    for name, other in others.items():
        shape = x.shape if name == "residual" else x.shape[-1:]
        if other is not None and (other.shape, other.dtype, other.device) != (shape, x.dtype, x.device):
            raise ValueError(
                f"{name} must be {list(shape)} {x.dtype} on {x.device}, as x is; "
                f"it is {list(other.shape)} {other.dtype} on {other.device}"
            )
        if other is not None and name != "residual" and not other.is_contiguous():
            raise ValueError(f"{name} must be contiguous")


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: None = None, weight_first: bool) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, weight_first: bool
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, weight_first: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """y = w s / sqrt(mean s² + eps) over the last axis of s = x + residual.

    The published roundings differ in half precision: `weight_first` multiplies by the weight before the cast back to
    the dtype of x (ChatGLM2 to GLM-4-9B as first released), otherwise the normalised value is cast first.

    Args:
        x: [..., D].
        weight: [D], contiguous, in the dtype of x.
        eps: Added to the mean square.
        residual: Like x. If given, s is returned too.
        weight_first: Which rounding.

    Returns:
        y [..., D], or with a residual (y, s), contiguous and in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    check(x, weight=weight, residual=residual)
    y, *s = norm(x, residual, weight, None, eps, weight_first)
    return (y, s[0]) if s else y


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: None = None) -> Tensor: ...
@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = w (s - mean s) / sqrt(var s + eps) + b over the last axis of s = x + residual.

    Args:
        x: [..., D].
        weight: [D], contiguous, in the dtype of x.
        bias: [D], contiguous, in the dtype of x.
        eps: Added to the variance.
        residual: Like x. If given, s is returned too.

    Returns:
        y [..., D], or with a residual (y, s), contiguous and in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    check(x, weight=weight, bias=bias, residual=residual)
    y, *s = norm(x, residual, weight, bias, eps, True)
    return (y, s[0]) if s else y
