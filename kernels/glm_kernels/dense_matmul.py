"""The product with a matrix of 16-bit weights for few rows, as decoding needs it, and with a matrix for each expert.

    y[n, o] = Σ_i x[n, i] W[o, i] + b[o]
    swiglu:   y = silu(g) u, with g and u the first and the second half of x Wᵀ + b    (arXiv:2002.05202)
    residual: y = r + …
    norm:     x ⊙ norm / sqrt(mean x² + eps) in the place of x, the RMSNorm before the product    (arXiv:1910.07467)

Bytes of N rows: 2 O I of weights, 2 N (I + O) of x and y. Flops: 2 N O I. That is N flops a byte: on a Hopper GPU
memory is the bound until about 170 rows. A library's product is made for many more rows; what can be won with few is
to keep memory busy from the first byte to the last, and to do what stands around the product in the same launch.

Layout: x [..., I], its rows at any one stride; W [O, I], as torch stores a linear layer, or [E, O, I], its rows at any
one stride too. The kernel takes float16 and bfloat16 (in the interpreter float32), of one matrix up to 16 rows. With
more rows torch multiplies, between the kernels of `norms.py` and `activations.py`. There are no gradients.

Up to 2 rows, by vector: a program has a tile of W for some outputs, and multiplies in float32 on the ordinary cores.
A thread adds up eight columns that came in one load of 16 bytes; threads are added once, at the end. With more rows,
by tile: W stands on the M side of the tensor cores, Yᵀ = W Xᵀ, and the few rows on the narrow side. In both, several
tiles are on their way at any time. With `swiglu` rows of gate and up alternate in a tile, so x is read once for both.
Why 2: counted in the machine code, one row takes 37 % of the instructions that an H200 can issue at 1.755 GHz while
weights come at 4.5 TB/s, two rows 50 %, four 78 %, and with a norm 49, 65 and 101 %; by tile it is 14 %, and 28 %.

Too few outputs to fill a device with programs: the columns are split between several. Each leaves its part in float32,
and the last to be done adds them, always in the same order.

Experts. The blocks of rows of all experts are numbered through, and a program finds its expert from the offsets on the
device: the host waits for nothing, and a captured CUDA graph stays valid. Blocks that are too many end at once.

Rounding. Products are added in float32 and rounded once, at the end; so are bias, SwiGLU and residual, which plain
torch rounds each. The reference takes the norm in float32, with its weight before the cast as
`rms_norm(…, weight_first=True)` does, and rounds once to the dtype of x. By vector x ⊙ norm is not rounded at all. By
tile it is rounded once, and the product is scaled in float32 by 1 / sqrt(mean x² + eps) before the bias: as many
roundings, elsewhere. So what is rounded there is not normalised yet. In float16 that is infinite from |x norm| = 65520
on, where the reference is not, and has fewer digits below 2⁻¹⁴ ≈ 6·10⁻⁵: take `rms_norm` first where a model's
activations go so far. bfloat16 has the range of float32. Every block of outputs weights its rows and sums their squares
anew, which `rms_norm` does once: what is saved is a launch, and writing and reading x, 4 N I bytes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels import activations
from glm_kernels.counters import counters_for
from glm_kernels.dispatch import INTERPRETED, Target, jit, takes_kernel, target, tl
from glm_kernels.norms import rms_norm, rms_norm_reference
from glm_kernels.operators import operator
from glm_kernels.overlap import TILES, fetch, launched, overlaps, release, tiles_ahead, wait
from glm_kernels.packed_matmul import matrix
from glm_kernels.splits import join
from glm_kernels.variants import POINTERS, Variant

MOST_ROWS = 16  # of one matrix that the kernel takes
MOST_BY_VECTOR = 2
MOST_SPLITS = 16

# ----------------------------------------------------------------------------- reference


def dense_matmul_reference(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, swiglu: bool = False,
    norm: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """`dense_matmul` in plain torch."""
    return reference(x, weight, bias, residual, norm, eps, None, swiglu)


def dense_matmul_experts_reference(
    x: Tensor, weight: Tensor, *, offsets: Tensor, bias: Tensor | None = None, swiglu: bool = False
) -> Tensor:
    """`dense_matmul_experts` in plain torch, which waits for the offsets."""
    return reference(x, weight, bias, None, None, None, offsets, swiglu)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float | None,
    offsets: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    """All forms in plain torch."""
    if norm is not None and eps is not None:
        x = rms_norm_reference(x, norm, eps, weight_first=True)
    if offsets is None:
        y = F.linear(x, weight, bias)
    else:
        cuts = offsets.tolist()
        parts = [
            F.linear(x[cuts[e] : cuts[e + 1]], weight[e], None if bias is None else bias[e]) for e in range(len(weight))
        ]
        y = torch.cat(parts)
    if swiglu:
        y = activations.swiglu_reference(y)
    return y if residual is None else residual + y


# ----------------------------------------------------------------------------- kernel


@jit
def block_of(offsets, block, count, rows: tl.constexpr, experts: tl.constexpr):  # type: ignore[no-untyped-def]
    """(expert, first row, end of its rows) of a block of rows; no rows for the blocks that are too many."""
    e = tl.arange(0, experts)
    begins = tl.load(offsets + e, mask=e < count, other=0)
    ends = tl.load(offsets + e + 1, mask=e < count, other=0)
    blocks = (ends - begins + rows - 1) // rows
    upto = tl.cumsum(blocks, 0)
    expert = tl.sum((upto <= block).to(tl.int32))
    mine = e == expert
    before = tl.sum(tl.where(mine, upto - blocks, 0))
    first_row = tl.sum(tl.where(mine, begins, 0)) + (block - before) * rows
    return tl.minimum(expert, count - 1).to(tl.int64), first_row, tl.sum(tl.where(mine, ends, 0))


@jit
def by_vector(  # type: ignore[no-untyped-def]
    x, weight, norm, first_row, end, m, height, inputs, first, last, x_row, weight_row,
    rows: tl.constexpr, outs: tl.constexpr, width: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """W (x ⊙ norm)ᵀ over tiles of `width` columns, for rows m of W: float32 [outs, rows] on the ordinary cores.

    And the sums of the squares of x, [rows], which stay 0 without a norm.
    """
    j = tl.arange(0, width)
    tile = weight + m.to(tl.int64)[:, None] * weight_row + j[None, :]
    line = x + first_row.to(tl.int64) * x_row + j[None, :]
    accs, squares = (), ()  # of each row
    for _ in tl.static_range(rows):
        accs += (tl.zeros([outs, width // 8], tl.float32),)  # type: ignore[assignment]
        squares += (tl.zeros([1, width], tl.float32),)  # type: ignore[assignment]
    for t in tl.range(first, last, num_stages=stages):
        column = t * width
        inside = (column + j < inputs)[None, :]
        # x before W: then threads are laid out as those that load W, eight columns each and whole warps to an output
        xs = ()
        for r in tl.static_range(rows):
            there = inside & (first_row + r < end)
            xs += (tl.load(line + r * tl.cast(x_row, tl.int64) + column, mask=there, other=0.0),)  # type: ignore[assignment]
        if norm is not None:
            scale = tl.load(norm + column + j[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(tile + column, mask=inside & (m < height)[:, None], other=0.0).to(tl.float32)
        summed, squared = (), ()
        for r in tl.static_range(rows):
            value = xs[r].to(tl.float32)  # type: ignore[var-annotated]
            if norm is not None:
                squared += (squares[r] + value * value,)
                value *= scale
            summed += (accs[r] + tl.sum(tl.reshape(w * value, [outs, width // 8, 8]), 2),)
        accs = summed
        if norm is not None:
            squares = squared
    acc, square = tl.zeros([outs, rows], tl.float32), tl.zeros([rows], tl.float32)
    row = tl.arange(0, rows)
    for r in tl.static_range(rows):
        acc = tl.where(row[None, :] == r, tl.sum(accs[r], 1)[:, None], acc)
        square = tl.where(row == r, tl.sum(tl.sum(squares[r], 1)), square)
    return acc, square


@jit
def by_tile(  # type: ignore[no-untyped-def]
    x, weight, norm, first_row, end, m, height, inputs, first, last, x_row, weight_row,
    rows: tl.constexpr, outs: tl.constexpr, width: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """The same on the tensor cores; x ⊙ norm is rounded to the dtype of x."""
    j = tl.arange(0, width)
    n = (first_row + tl.arange(0, rows)).to(tl.int64)
    tile = weight + m.to(tl.int64)[:, None] * weight_row + j[None, :]
    lines = x + n[:, None] * x_row + j[None, :]
    acc, square = tl.zeros([outs, rows], tl.float32), tl.zeros([rows, width], tl.float32)
    for t in tl.range(first, last, num_stages=stages):
        column = t * width
        inside = (column + j < inputs)[None, :]
        x_tile = tl.load(lines + column, mask=inside & (n < end)[:, None], other=0.0)
        w = tl.load(tile + column, mask=inside & (m < height)[:, None], other=0.0)
        if norm is not None:
            value = x_tile.to(tl.float32)
            square += value * value
            scale = tl.load(norm + column + j[None, :], mask=inside, other=0.0).to(tl.float32)
            x_tile = (value * scale).to(x_tile.dtype)
        acc = tl.dot(w, tl.trans(x_tile), acc, input_precision="ieee")
    return acc, tl.sum(square, 1)


@jit
def fetch_tiles(  # type: ignore[no-untyped-def]
    weight, norm, m, height, inputs, first, weight_row, width: tl.constexpr, tiles: tl.constexpr
):  # fmt: skip
    """Fetch the first tiles of W for rows m from tile `first` on, and with them the weights of the norm."""
    sector = tl.arange(0, width // 16) * 16  # 32 bytes
    row = weight + tl.minimum(m, height - 1).to(tl.int64)[:, None] * weight_row
    for t in tl.static_range(tiles):
        column = tl.minimum((first + t) * width + sector, inputs - 1)
        fetch(row + column[None, :])
        if norm is not None:
            fetch(norm + column)


@jit
def dense_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, norm, y, partial, squares, counter, offsets,
    x_row, weight_row, weight_expert, bias_expert, residual_row, y_row,
    N, height, inputs, count, tiles_each, splits, eps,
    rows: tl.constexpr, outs: tl.constexpr, width: tl.constexpr, stages: tl.constexpr, vector: tl.constexpr,
    gated: tl.constexpr, split: tl.constexpr, experts: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """`rows` rows of y [N, height], or with `gated` [N, height / 2], for `outs` rows of the matrix."""
    block, part = tl.program_id(0), tl.program_id(2)
    i = tl.arange(0, outs)
    if gated:  # gate and up alternate
        pair = tl.program_id(1) * (outs // 2) + i // 2
        m = tl.where(pair < height // 2, pair + i % 2 * (height // 2), height)
    else:
        m = tl.program_id(1) * outs + i
    if ahead is not None:
        release()
        if experts == 0:  # whose matrix it is, a kernel before has found out
            fetch_tiles(weight, norm, m, height, inputs, part * tiles_each, weight_row, width, ahead)
        wait()
    if experts == 0:
        first_row, end = block * rows, N
    else:
        expert, first_row, end = block_of(offsets, block, count, rows, experts)
        weight += expert * weight_expert
        if bias is not None:
            bias += expert * bias_expert
    n = (first_row + tl.arange(0, rows)).to(tl.int64)
    there = n < end

    first = part * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(inputs, width))
    if experts != 0:
        last = tl.where(first_row < end, last, first)
    if vector:
        acc, square = by_vector(
            x, weight, norm, first_row, end, m, height, inputs, first, last, x_row, weight_row,
            rows, outs, width, stages,
        )  # fmt: skip
    else:
        acc, square = by_tile(
            x, weight, norm, first_row, end, m, height, inputs, first, last, x_row, weight_row,
            rows, outs, width, stages,
        )  # fmt: skip

    finished = True
    if split:
        finished, acc, _, square = join(
            acc, acc, square, partial, squares, counter, n, there, m, height, N, height, splits, rows, outs, False
        )
    if finished:
        if norm is not None:
            acc *= tl.rsqrt(square / inputs + eps)[None, :]
        if bias is not None:
            acc += tl.load(bias + m, mask=m < height, other=0.0).to(tl.float32)[:, None]
        if gated:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [outs // 2, 2, rows]), (0, 2, 1)))
            value = gate / (1.0 + tl.exp(-gate)) * up
            o = tl.program_id(1) * (outs // 2) + tl.arange(0, outs // 2)
            inside = (o < height // 2)[:, None] & there[None, :]
        else:
            value, o = acc, m
            inside = (m < height)[:, None] & there[None, :]
        if residual is not None:
            value += tl.load(residual + n[None, :] * residual_row + o[:, None], mask=inside, other=0.0).to(tl.float32)
        tl.store(y + n[None, :] * y_row + o[:, None], value.to(y.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------- launch


class Shape(NamedTuple):
    """How a launch is cut: rows, rows of the matrix and columns a program, whether by vector, warps, stages."""

    rows: int
    outs: int
    width: int
    vector: bool
    warps: int
    stages: int


PATHS = 1, 2, 16, 64, 128  # rows a program: by vector; by tile; of experts with many rows


def path_of(count: int, device: Target) -> int:
    """Rows a program for so many rows."""
    paths = PATHS[:-1] if device.backend == "hip" else PATHS  # 64 KiB of shared memory
    return next((rows for rows in paths if count <= rows), paths[-1])


def shape_of_launch(rows: int, outputs: int, processors: int, device: Target) -> Shape:
    """For a path of `path_of`, and so many rows of the matrix that blocks of rows of x take, counted for each block."""
    if rows <= MOST_BY_VECTOR:
        if 2 * outputs >= 3 * 16 * processors:  # enough programs: more outputs share what is read of x
            return Shape(rows, 16, 256, True, 4, 4 if device.backend == "cuda" else 2)
        return Shape(rows, 8, 512, True, 4, 5 if device.backend == "cuda" else 2)
    large = device.shared >= 128 * 1024
    if rows == 16:
        return Shape(rows, 64, 128, False, 4, 4 if large else 3 if device.backend == "cuda" else 2)
    stages = 3 if large else 2
    blackwell = isinstance(device.arch, int) and 100 <= device.arch < 120
    return Shape(rows, 64 if rows == 128 and (blackwell or not large) else 128, 64, False, 8, stages)


def splits_for(blocks: int, tiles: int, processors: int) -> int:
    """Into how many parts the columns are cut: about two programs a processor, of two tiles or more."""
    if 2 * blocks >= 3 * processors:
        return 1
    return max(1, min(-(-2 * processors // max(blocks, 1)), tiles // 2, MOST_SPLITS))


def row_blocks_for(count: int, rows: int, experts: int) -> int:
    """Blocks of rows, or as many as there can be: an expert that has rows may leave all but one of a block's empty."""
    return -(-count // rows) if not experts else (count + min(experts, count) * (rows - 1)) // rows


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None, y: Tensor,
    offsets: Tensor | None, *, gated: bool, eps: float = 0.0, shape: Shape | None = None, splits: int | None = None,
) -> None:  # fmt: skip
    """Fill y [N, O]; x [N, I], residual [N, O] and the matrix with rows at any stride."""
    (N, inputs), height, device = x.shape, weight.shape[-2], target(x)
    experts = 0 if offsets is None else offsets.shape[0] - 1
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    if shape is None:
        path = path_of(-(-N // max(experts, 1)), device)
        shape = shape_of_launch(path, height * row_blocks_for(N, path, experts), processors, device)
    row_blocks, out_blocks = row_blocks_for(N, shape.rows, experts), -(-height // shape.outs)
    tiles = -(-inputs // shape.width)
    if splits is None:
        splits = splits_for(row_blocks * out_blocks, tiles, processors)
    if experts:
        splits = 1
    each = -(-tiles // splits)
    splits = -(-tiles // each)
    partial = squares = counter = None
    if splits > 1:
        partial = x.new_empty(splits, N, height, dtype=torch.float32)
        counter = counters_for(x, row_blocks * out_blocks)
        if norm is not None:
            squares = x.new_empty(splits, out_blocks, N, dtype=torch.float32)
    padded = 1 << (experts - 1).bit_length() if experts else 0
    ahead = tiles_ahead(x)
    with torch.cuda.device_of(x):
        dense_kernel[(row_blocks, out_blocks, splits)](
            x, weight, bias, residual, norm, y, partial, squares, counter, offsets,
            x.stride(0), weight.stride(-2), weight.stride(0) if experts else 0,
            bias.stride(0) if bias is not None and experts else 0,
            0 if residual is None else residual.stride(0), y.stride(0),
            N, height, inputs, experts, each, splits, eps,
            shape.rows, shape.outs, shape.width, shape.stages, shape.vector, gated, splits > 1, padded, ahead,
            **options(shape), **launched(ahead),
        )  # fmt: skip


def options(shape: Shape) -> dict[str, Any]:
    """What the compiler is told."""
    return {"num_warps": shape.warps, "enable_fp_fusion": True}


def variant(
    device: Target, dtype: torch.dtype, rows: int, *, small: bool = False, bias: bool = False, residual: bool = False,
    norm: bool = False, gated: bool = False, split: bool = False, experts: int = 0, ahead: int | None = None,
) -> Variant:  # fmt: skip
    """The kernel as a launch on this path compiles it, for a matrix of few outputs if `small`."""
    shape = shape_of_launch(rows, 1024 if small else 1 << 16, 132, device)
    given = {
        "x": True, "weight": True, "bias": bias, "residual": residual, "norm": norm, "y": True,
        "partial": split, "squares": split and norm, "counter": split, "offsets": experts > 0,
    }  # fmt: skip
    special = {"partial": "*fp32", "squares": "*fp32", "counter": "*i32", "offsets": "*i32"}
    types = {name: special.get(name, POINTERS[dtype]) for name, there in given.items() if there}
    types |= dict.fromkeys(
        ["x_row", "weight_row", "weight_expert", "bias_expert", "residual_row", "y_row",
         "N", "height", "inputs", "count", "tiles_each", "splits"], "i32",
    ) | {"eps": "fp32"}  # fmt: skip
    values: dict[str, Any] = {name: None for name, there in given.items() if not there}
    values |= {
        "rows": rows, "outs": shape.outs, "width": shape.width, "stages": shape.stages, "vector": shape.vector,
        "gated": gated, "split": split, "experts": experts, "ahead": ahead,
    }  # fmt: skip
    more = {
        "small": small, "split": split, "bias": bias, "residual": residual, "norm": norm, "swiglu": gated,
        f"{experts} experts": experts, "overlap": ahead is not None,
    }  # fmt: skip
    label = " ".join([POINTERS[dtype][1:], f"rows {rows}", *(name for name, there in more.items() if there)])
    told = options(shape) | launched(ahead)
    return Variant(label, dense_kernel, types, values, told, {"N", "count", "tiles_each", "splits"})


def variants(device: Target) -> list[Variant]:
    """What launches ask for: every path plain, and with what stands around a product in a model."""
    bfloat, half = torch.bfloat16, torch.float16
    found = [
        variant(device, bfloat, 1),
        variant(device, bfloat, 1, norm=True, gated=True),
        variant(device, bfloat, 1, small=True, split=True, bias=True, norm=True),
        variant(device, bfloat, 2, norm=True, gated=True),
        variant(device, bfloat, 16, split=True, bias=True, residual=True),
        variant(device, bfloat, 16, split=True, norm=True, gated=True),
        variant(device, bfloat, 1, gated=True, experts=128),
        variant(device, bfloat, path_of(128, device), gated=True, experts=128),
        variant(device, half, 1),
        variant(device, half, 16),
    ]
    if overlaps(device):
        found += [
            variant(device, bfloat, 1, ahead=TILES),
            variant(device, bfloat, 1, norm=True, gated=True, ahead=TILES),
            variant(device, bfloat, 1, small=True, split=True, bias=True, norm=True, ahead=TILES),
            variant(device, bfloat, 2, residual=True, ahead=TILES),
            variant(device, bfloat, 16, split=True, bias=True, residual=True, ahead=TILES),
            variant(device, bfloat, 16, split=True, norm=True, gated=True, ahead=TILES),
            variant(device, bfloat, 1, gated=True, experts=128, ahead=TILES),
        ]
    return found


# ----------------------------------------------------------------------------- wrapper


def computes(x: Tensor, weight: Tensor, offsets: Tensor | None) -> bool:
    """Whether the kernel does: half precision (in the interpreter float32 too), few rows or experts."""
    fits = x.dtype != torch.float32 or INTERPRETED
    few = offsets is not None or x.numel() <= MOST_ROWS * x.shape[-1]
    return takes_kernel(x) and fits and few and x.numel() > 0 and weight.numel() > 0


def composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float | None,
    swiglu: bool,
) -> Tensor:  # fmt: skip
    """torch's product between the kernels for what stands around it; all in plain torch where those are."""
    if norm is not None and eps is not None:
        x = rms_norm(x, norm, eps, weight_first=True)
    y = F.linear(x, weight, bias)
    if swiglu:
        y = activations.swiglu(y)
    return y if residual is None else residual + y


@operator("dense_product")
def dense_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float | None,
    offsets: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    """Every form of `dense_matmul` and `dense_matmul_experts`, whose arguments fit."""
    if not computes(x, weight, offsets):
        if offsets is None:
            return composed(x, weight, bias, residual, norm, eps, swiglu).contiguous()
        return reference(x, weight, bias, residual, norm, eps, offsets, swiglu).contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[-2] // (1 + swiglu))
    added = None if residual is None else matrix(residual)
    launch(matrix(x), weight, bias, added, norm, matrix(y), offsets, gated=swiglu, eps=eps or 0.0)
    return y


@dense_product.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float | None,
    offsets: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[-2] // (1 + swiglu))


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float | None,
    offsets: Tensor | None, swiglu: bool,
) -> None:  # fmt: skip
    """Raise a ValueError unless all fits together."""
    if not x.dtype.is_floating_point or x.dim() == 0:
        raise ValueError(f"x must be a floating [..., I]; it is {x.dtype} of {x.dim()} axes")
    if (norm is None) != (eps is None):
        raise ValueError("norm, the weight of an RMSNorm before the product, and its eps are given together")
    if eps is not None and not 0 <= eps < float("inf"):
        raise ValueError(f"eps is added to a mean square and must be 0 or more, and finite; not {eps}")
    if offsets is not None and (
        (offsets.dim(), offsets.dtype, offsets.device, x.dim()) != (1, torch.int32, x.device, 2) or len(offsets) < 2
    ):
        raise ValueError("offsets are int32 [E + 1] on the device of x, which is [N, I], of one expert or more")
    experts = () if offsets is None else (len(offsets) - 1,)
    if weight.dim() != 2 + len(experts):
        raise ValueError(f"weight must have {2 + len(experts)} axes, not {weight.dim()}")
    inputs, outputs = x.shape[-1], weight.shape[-2]
    if swiglu and outputs % 2:
        raise ValueError(f"SwiGLU takes a gate and an up half; {outputs} outputs cannot be halved")
    half = (*x.shape[:-1], outputs // (1 + swiglu))
    for name, other, shape in (
        ("weight", weight, (*experts, outputs, inputs)), ("bias", bias, (*experts, outputs)),
        ("residual", residual, half), ("norm", norm, (inputs,)),
    ):  # fmt: skip
        if other is not None and (tuple(other.shape), other.dtype, other.device) != (shape, x.dtype, x.device):
            raise ValueError(
                f"{name} must be {list(shape)} {x.dtype} on {x.device} for x {list(x.shape)}; "
                f"it is {list(other.shape)} {other.dtype} on {other.device}"
            )
    if weight.stride(-1) != 1 and inputs > 1:
        raise ValueError("the columns of weight must lie side by side: make it contiguous once, not at every call")
    for name, other in (("bias", bias), ("norm", norm)):
        if other is not None and not other.is_contiguous():
            raise ValueError(f"{name} must be contiguous")


def dense_matmul(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, swiglu: bool = False,
    norm: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + bias, see the top of this file.

    Args:
        x: [..., I].
        weight: [O, I], in the dtype of x, the columns side by side.
        bias: [O], in the dtype of x.
        residual: [..., O], or of half the width with `swiglu`; added at the end.
        swiglu: The first half of the outputs is the gate of the second.
        norm: [I], in the dtype of x: the weight of an RMSNorm of x before the product.
        eps: Added to that norm's mean square; given with `norm` only.

    Returns:
        y [..., O], or [..., O / 2] with `swiglu`, contiguous and in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    check(x, weight, bias, residual, norm, eps, None, swiglu)
    y: Tensor = dense_product(x, weight, bias, residual, norm, eps, None, swiglu)
    return y


def dense_matmul_experts(
    x: Tensor, weight: Tensor, *, offsets: Tensor, bias: Tensor | None = None, swiglu: bool = False
) -> Tensor:
    """The same with a matrix for each expert: rows offsets[e] to offsets[e + 1] of x are multiplied with matrix e.

    In half precision a GPU takes any number of rows without the host waiting for it; in float32 and float64 plain torch
    computes, which has to wait for the offsets.

    Args:
        x: [N, I], sorted by expert.
        weight: [E, O, I], in the dtype of x, the columns side by side.
        offsets: int32 [E + 1] on the device of x, from 0 to N: where each expert's rows begin.
        bias: [E, O], in the dtype of x.
        swiglu: The first half of the outputs is the gate of the second.

    Returns:
        y [N, O], or [N, O / 2] with `swiglu`, contiguous and in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    check(x, weight, bias, None, None, None, offsets, swiglu)
    y: Tensor = dense_product(x, weight, bias, None, None, None, offsets, swiglu)
    return y
