"""RMSNorm and LayerNorm, each with the residual addition before it.

    s = x + residual                                        rounded to the dtype of x; without a residual, s = x
    RMSNorm:    y = w s / sqrt(mean s² + eps)               (Zhang & Sennrich 2019, arXiv:1910.07467)
    LayerNorm:  y = w (s - mean s) / sqrt(var s + eps) + b  (Ba et al. 2016, arXiv:1607.06450)

Gradients. With c = s, or s - mean s for LayerNorm, r = 1 / sqrt(mean c² + eps), n = r c, and g = w dy,

    ds = r (g - n mean(g n)), for LayerNorm minus its mean;    dw = Σ dy n,  db = Σ dy over the rows

and what came for s itself is added to ds. The row is at hand, so n and r are computed again rather than kept.

Bytes of N rows of width D at e bytes an element: x is read and y is written, 2 N D e; with a residual, that is read
and s written too, 4 N D e. The D or 2 D parameters are read once and stay in the cache. Flops: 4 N D for RMSNorm
(square, sum, scale, weight), 7 N D for LayerNorm (mean, centre, bias as well), N D more with a residual. Less than
four flops a byte, where a GPU could do a hundred: memory is the bound, and the point of the kernel is to read once.
Backward reads s and dy and writes ds, 3 N D e, and with a residual reads the gradient of s too, 4 N D e; 11 N D flops
for RMSNorm and 15 N D for LayerNorm. dw and db are summed in two stages, in the same order every time: each of P
programs sums its rows in registers, P D floats, and a second kernel sums those.

Layout: x and residual are [..., D] of the same shape and dtype, the elements of a row side by side, rows at any one
stride (part of a wider tensor); what is laid out otherwise is copied first. w and b are [D], contiguous, in the dtype
of x. What comes back is contiguous. The kernel takes float16, bfloat16 and float32, D up to 16384; the reference takes
the rest.
"""

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.dispatch import Target, jit, takes_kernel, tl, wide
from glm_kernels.operators import operator
from glm_kernels.overlap import TILES, fetch, launched, overlaps, release, tiles_ahead, wait
from glm_kernels.variants import POINTERS, Variant

WIDEST = 16384  # a row is held in the registers of one program
FOLD = 64, 32  # rows and columns that one program of the second stage sums at a time

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


def backward_reference(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, centred: bool, eps: float, parameters: bool
) -> list[Tensor]:
    """[the gradient of s], and with `parameters` dw and for a LayerNorm db: the equations at the top of this file."""
    dtype, batch = s.dtype, list(range(s.ndim - 1))
    s, weight, dy = wide(s), wide(weight), wide(dy)
    if centred:
        s = s - s.mean(-1, keepdim=True)
    r = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    n, g = s * r, weight * dy
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    if centred:
        dx = dx - dx.mean(-1, keepdim=True)
    if ds is not None:
        dx = dx + ds
    sums = [(dy * n).sum(batch), dy.sum(batch)][: 1 + centred] if parameters else []
    return [gradient.to(dtype) for gradient in (dx, *sums)]


# ----------------------------------------------------------------------------- kernel


@jit
def norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, s, x_row, residual_row, y_row, s_row, width, eps,
    weight_first: tl.constexpr, block: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """One row of y, and of s unless residual is None: a LayerNorm, or an RMSNorm if bias is None.

    The arithmetic is all in float32; to(dtype) stands where a value is rounded. Masked lanes hold zero until the
    statistics are taken.
    """
    dtype = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # there may be more than 2³¹ elements
    column = tl.arange(0, block)
    inside = column < width
    if ahead is not None:
        release()
        if ahead > 0:
            sector = tl.minimum(tl.arange(0, (block + 7) // 8) * 8, width - 1)  # 32 bytes in float32
            fetch(weight + sector)
            if bias is not None:
                fetch(bias + sector)
        wait()

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


@jit
def norm_gradient_kernel(  # type: ignore[no-untyped-def]
    dy, ds, s, weight, dx, dw, db, dy_row, ds_row, s_row, dx_row, count, width, eps,
    centred: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Every P-th row of dx, and the sums of these rows for dw and db [P, width] float32; each unless it is None.

    Masked lanes of n and g hold zero.
    """
    dtype = dx.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_w, sum_b = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)

    for row in range(program, count, tl.num_programs(0)):
        n = tl.load(s + row * s_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        if centred:
            n = tl.where(inside, n - tl.sum(n) / width, 0.0)
        r = tl.rsqrt(tl.sum(n * n) / width + eps)
        n *= r
        if dw is not None:
            sum_w += g * n
        if db is not None:
            sum_b += g
        g *= w
        g = r * (g - n * (tl.sum(g * n) / width))
        if centred:
            g -= tl.sum(g) / width
        if ds is not None:
            g += tl.load(ds + row * ds_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * dx_row + column, g.to(dtype), mask=inside)

    part = program * width + column
    if dw is not None:
        tl.store(dw + part, sum_w, mask=inside)
    if db is not None:
        tl.store(db + part, sum_b, mask=inside)


@jit
def fold_kernel(parts, total, count, width, some: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """`block` columns of the sum of parts [count, width]."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    inside = column < width
    total_of = tl.zeros([block], tl.float32)
    for first in range(0, count, some):
        row = first + tl.arange(0, some)
        there = (row < count)[:, None] & inside[None, :]
        total_of += tl.sum(tl.load(parts + row[:, None] * width + column[None, :], mask=there, other=0.0), 0)
    tl.store(total + column, total_of.to(total.dtype.element_ty), mask=inside)


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
    ahead = tiles_ahead(x)
    with torch.cuda.device_of(x):
        norm_kernel[(count,)](
            x, residual, weight, bias, y, s, *strides, width, eps, weight_first, block, ahead,
            num_warps=warps, enable_fp_fusion=True, **launched(ahead),
        )  # fmt: skip


def programs_for(count: int, width: int, device: torch.device) -> int:
    """How many programs share the rows in the backward pass: 16 warps for each processor of the device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return min(count, processors * (16 // shape_of_launch(width)[1]))


def launch_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, dx: Tensor, dw: Tensor | None, db: Tensor | None,
    eps: float, centred: bool, programs: int,
) -> None:  # fmt: skip
    """Fill dx, and dw and db [D] if given; the others [N, D] with rows at any stride."""
    count, width = s.shape
    block, warps = shape_of_launch(width)
    parts = [None if sums is None else sums.new_empty(programs, width, dtype=torch.float32) for sums in (dw, db)]
    strides = [0 if rows is None else rows.stride(0) for rows in (dy, ds, s, dx)]
    with torch.cuda.device_of(s):
        norm_gradient_kernel[(programs,)](
            dy, ds, s, weight, dx, *parts, *strides, count, width, eps, centred, block,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        for part, total in zip(parts, (dw, db), strict=True):
            if part is not None:
                fold_kernel[(-(-width // FOLD[1]),)](
                    part, total, programs, width, *FOLD, num_warps=4, enable_fp_fusion=True
                )


def variants(target: Target) -> list[Variant]:
    """What a launch can ask for: every form in every dtype at the greatest width, and at the common one."""
    forward = [
        variant(dtype, width, added, kind)
        for dtype in POINTERS
        for kind in ("weight first", "cast first", "layer")
        for width, added in ((WIDEST, kind != "weight first"), (4096, True))
    ]
    backward = [
        gradient_variant(dtype, width, added, centred, parameters)
        for dtype in POINTERS
        for centred in (False, True)
        for width, added, parameters in ((WIDEST, True, True), (8192, True, True), (4096, False, False))
    ]
    if overlaps(target):
        forward += [variant(torch.bfloat16, 4096, True, kind, TILES) for kind in ("weight first", "layer")]
    return forward + backward + [fold_variant(dtype) for dtype in POINTERS]


def fold_variant(dtype: torch.dtype) -> Variant:
    """The second stage of the sums over rows."""
    types = {"parts": "*fp32", "total": POINTERS[dtype], "count": "i32", "width": "i32"}
    values = {"some": FOLD[0], "block": FOLD[1]}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return Variant(POINTERS[dtype][1:], fold_kernel, types, values, options, ("count",))


def gradient_variant(dtype: torch.dtype, width: int, added: bool, centred: bool, parameters: bool) -> Variant:
    """The backward pass of a LayerNorm if `centred`, else of an RMSNorm, as a launch at this width compiles it."""
    block, warps = shape_of_launch(width)
    tensors = {"dy": True, "ds": added, "s": True, "weight": True, "dx": True}
    types = {name: POINTERS[dtype] for name, given in tensors.items() if given}
    sums = {"dw": parameters, "db": parameters and centred}
    types |= {name: "*fp32" for name, given in sums.items() if given}
    types |= dict.fromkeys(["dy_row", "ds_row", "s_row", "dx_row", "count", "width"], "i32") | {"eps": "fp32"}
    values: dict[str, Any] = {name: None for name, given in (tensors | sums).items() if not given}
    values |= {"centred": centred, "block": block}
    kind = f"{'layer' if centred else 'rms'}{' added' if added else ''}{'' if parameters else ' without parameters'}"
    options = {"num_warps": warps, "enable_fp_fusion": True}
    hot = block * dtype.itemsize <= 16384  # beyond, the registers do not hold the sums as well as the row
    label = f"{kind} {width} {POINTERS[dtype][1:]}"
    return Variant(label, norm_gradient_kernel, types, values, options, ("count",), hot)


def variant(dtype: torch.dtype, width: int, added: bool, kind: str, ahead: int | None = None) -> Variant:
    """The norm of `kind` as a launch at this width compiles it."""
    block, warps = shape_of_launch(width)
    tensors = {"x": True, "residual": added, "weight": True, "bias": kind == "layer", "y": True, "s": added}
    types = {name: POINTERS[dtype] for name, given in tensors.items() if given}
    types |= dict.fromkeys(["x_row", "residual_row", "y_row", "s_row", "width"], "i32") | {"eps": "fp32"}
    values: dict[str, Any] = {name: None for name, given in tensors.items() if not given}
    values |= {"weight_first": kind == "weight first", "block": block, "ahead": ahead}
    label = f"{kind}{' added' if added else ''} {width} {POINTERS[dtype][1:]}{'' if ahead is None else ' overlap'}"
    options = {"num_warps": warps, "enable_fp_fusion": True} | launched(ahead)
    return Variant(label, norm_kernel, types, values, options)


# ----------------------------------------------------------------------------- wrapper


def rows(x: Tensor) -> Tensor:
    """[..., D] -> [N, D] with the elements of a row side by side, without copying if that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@operator("norm")
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


@operator("norm_backward")
def norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, centred: bool, eps: float, parameters: bool
) -> list[Tensor]:
    """[the gradient of s], and with `parameters` dw and for a LayerNorm db."""
    if not takes_kernel(s) or s.shape[-1] > WIDEST:
        found = backward_reference(dy, ds, s, weight, centred, eps, parameters)
        return [gradient.contiguous() for gradient in found]
    dx, *sums = gradients_like(s, weight, centred, parameters)
    if s.numel() == 0:
        return [dx, *(total.zero_() for total in sums)]
    dw, db = [*sums, None, None][:2]
    flat, ds = rows(s), None if ds is None else rows(ds)
    programs = programs_for(flat.shape[0], flat.shape[1], s.device)
    launch_backward(rows(dy), ds, flat, weight, rows(dx), dw, db, eps, centred, programs)
    return [dx, *sums]


def gradients_like(s: Tensor, weight: Tensor, centred: bool, parameters: bool) -> list[Tensor]:
    """Empty gradients of s, and with `parameters` of weight and for a LayerNorm bias."""
    dx = torch.empty_like(s, memory_format=torch.contiguous_format)
    return [dx, *(torch.empty_like(weight) for _ in range((1 + centred) * parameters))]


@norm_backward.register_fake
def _(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, centred: bool, eps: float, parameters: bool
) -> list[Tensor]:
    return gradients_like(s, weight, centred, parameters)


def backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients at the top of this file; those of frozen parameters are not computed."""
    s, weight = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[2:4])
    dx, *sums = norm_backward(grads[0], grads[1] if ctx.added else None, s, weight, ctx.centred, ctx.eps, parameters)
    dw, db = [*sums, None, None][:2]
    return dx, dx if ctx.added else None, dw, db, None, None


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
