"""The product with a matrix of small integers, for both widths: `int_matmul.py` calls it.

The weights stand on the M side, Yᵀ = W Xᵀ: a program computes `outs` outputs for `rows` rows. So the few rows of
decoding are the narrow side of a tensor-core instruction (8 or 16 wide), and the weights are its left operand, which
may lie in registers: words come through shared memory, are turned into numbers there where they are used, and never
go back to memory.

Numbers without conversion. A half-precision number with the exponent of 2^m and the code c in the lowest bits of its
mantissa is 2^m + c: 128 + c in bfloat16, 1024 + c in float16. One `lop3` masks two codes and sets two exponents, one
fused multiply-add takes 2^m, the offset of the codes and the zero point away again, exactly. A code of 8 bits is too
long for the mantissa of bfloat16: its upper bit chooses between 128 and 256, which is subtracted from 128 and the
other seven. The same in plain Triton (`asm` False) is for the interpreter and for AMD, and what the first is held to.

Scales. With few rows a group's partial product is scaled, in float32, which is exact in the weights and cheap. With
many (`fold`) the weights are, in their own dtype. A scale of a whole row waits until the end.

Few rows do not fill a device with programs, so the columns are split between several. Each leaves its part in float32;
the last one to be done adds them, always in the same order: results do not depend on which was last.

An RMSNorm before the product: its factor of a row, r = 1 / sqrt(mean x² + eps), commutes with the product,
(r x ⊙ norm) Wᵀ = r ((x ⊙ norm) Wᵀ). So x is multiplied by the norm's weight where it is loaded, in float32, and rounded
once; the squares are summed beside the product, and r waits until the end. A split's squares cover its own columns
only, so it leaves them too. Every block of outputs sums the squares of its rows anew.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.counters import counters_for
from glm_kernels.dispatch import INTERPRETED, Target, jit, takes_kernel, target, tl, triton
from glm_kernels.norms import rms_norm_reference
from glm_kernels.operators import operator
from glm_kernels.overlap import TILES, fetch, launched, overlaps, release, tiles_ahead, wait
from glm_kernels.packing import CHUNK, Prepacked, as_bytes, dequantised, prepack, unprepack
from glm_kernels.splits import join
from glm_kernels.variants import POINTERS, Variant

MOST_SPLITS = 16

# ----------------------------------------------------------------------------- kernel


def constexpr_function(function: Any) -> Any:
    """`triton.constexpr_function`, or nothing where there is no Triton."""
    return triton.constexpr_function(function) if triton else function


@constexpr_function
def ptx(bits, i, bfloat, scaled):  # type: ignore[no-untyped-def]
    """PTX that makes two words ($1, 32 bits) two numbers ($0): those of chunk i, plus $2, times $3 if `scaled`."""
    kind, magic, one = ("bf16x2", "0x43004300", "0x3F803F80") if bfloat else ("f16x2", "0x64006400", "0x3C003C00")
    mask = "0x000F000F" if bits == 4 else "0x007F007F" if bfloat else "0x00FF00FF"
    lines = [".reg .b32 t, u, v;", f"shr.b32 u, $1, {bits * i};", f"lop3.b32 t, u, {mask}, {magic}, 0xEA;"]
    if bits == 8 and bfloat:  # (128 + seven bits) - (128 if the upper bit is set, else 256)
        lines += ["lop3.b32 u, u, 0x00800080, 0x43804380, 0x6A;", "mov.b32 v, 0xBF80BF80;", "fma.rn.bf16x2 t, u, v, t;"]
    lines += [f"mov.b32 v, {one};", f"fma.rn.{kind} t, t, v, $2;"]
    if scaled:
        lines += ["mov.b32 v, 0x80008000;", f"fma.rn.{kind} t, t, $3, v;"]
    return "{ " + " ".join(lines) + " mov.b32 $0, t; }"


@constexpr_function
def offset(bits, bfloat, asm):  # type: ignore[no-untyped-def]
    """What the codes, or with `asm` the masked words, are above the integers; $2 takes it away."""
    codes = 1 << (bits - 1)
    if not asm:
        return float(codes)
    return float((0 if bits == 8 else 128 + codes) if bfloat else 1024 + codes)


@jit
def numbers(  # type: ignore[no-untyped-def]
    words, shift, scale, i: tl.constexpr, bits: tl.constexpr, fold: tl.constexpr, asm: tl.constexpr
):  # fmt: skip
    """The numbers of chunk i in a tile of words; `shift` and `scale` are of its shape and dtype."""
    dtype = shift.dtype
    if asm and fold:
        return tl.inline_asm_elementwise(
            ptx(bits, i, dtype == tl.bfloat16, True), "=r,r,r,r", [words, shift, scale], dtype, is_pure=True, pack=2
        )
    if asm:
        return tl.inline_asm_elementwise(
            ptx(bits, i, dtype == tl.bfloat16, False), "=r,r,r", [words, shift], dtype, is_pure=True, pack=2
        )
    code = (words.to(tl.int32) >> (bits * i)) & ((1 << bits) - 1)
    number = code.to(dtype) + shift
    return (number * scale).to(dtype) if fold else number


@jit
def product(  # type: ignore[no-untyped-def]
    x, words, scales, zeros, norm, n, there, o, outputs, inputs, first, last,
    x_row, words_tile, scales_group,
    bits: tl.constexpr, group: tl.constexpr, per_scale: tl.constexpr, rows: tl.constexpr, outs: tl.constexpr,
    chunk: tl.constexpr, fold: tl.constexpr, asm: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """W (x ⊙ norm)ᵀ over the tiles from `first` to `last`, for outputs o and rows n: float32 [outs, rows].

    And the sums of the squares of x, [rows], which stay 0 without `count`.
    """
    dtype = x.dtype.element_ty
    chunks: tl.constexpr = 16 // bits
    j = tl.arange(0, chunk)
    inside = o < outputs
    acc = tl.zeros([outs, rows], tl.float32)
    part = tl.zeros([outs, rows], tl.float32)
    square = tl.zeros([rows, chunk], tl.float32)
    for t in tl.range(first, last):
        w = tl.load(
            words + tl.cast(t, tl.int64) * words_tile + (o[:, None] * chunk + j[None, :]), mask=inside[:, None], other=0
        )
        for i in tl.static_range(chunks):
            column = (t * chunks + i) * chunk
            at = o
            if per_scale != 0:
                at = o + tl.minimum(column, inputs - 1) // group * scales_group
            shift = tl.full([outs, 1], 0.0, tl.float32) - offset(bits, dtype == tl.bfloat16, asm)
            if zeros is not None:
                shift -= tl.load(zeros + at, mask=inside, other=0.0).to(tl.float32)[:, None]
            shift = tl.broadcast_to(shift.to(dtype), [outs, chunk])
            if per_scale != 0 and i % per_scale == 0:
                s = tl.load(scales + at, mask=inside, other=0.0)
            if fold and per_scale != 0:
                scale = tl.broadcast_to(s.to(dtype)[:, None], [outs, chunk])
                q = numbers(w, shift, scale, i, bits, True, asm)
            else:
                q = numbers(w, shift, shift, i, bits, False, asm)
            columns = column + j
            x_tile = tl.load(
                x + n[:, None] * x_row + columns[None, :], mask=there[:, None] & (columns < inputs)[None, :], other=0.0
            )
            if norm is not None:
                raw = x_tile.to(tl.float32)
                if count:
                    square += raw * raw
                weight = tl.load(norm + columns, mask=columns < inputs, other=0.0).to(tl.float32)
                x_tile = (raw * weight[None, :]).to(dtype)
            if fold or per_scale == 0:
                acc = tl.dot(q, tl.trans(x_tile), acc, input_precision="ieee")
            else:
                part = tl.dot(q, tl.trans(x_tile), part, input_precision="ieee")
                if (i + 1) % per_scale == 0:
                    acc += part * s.to(tl.float32)[:, None]
                    part = tl.zeros([outs, rows], tl.float32)
    if per_scale == 0:
        acc *= tl.load(scales + o, mask=inside, other=0.0).to(tl.float32)[:, None]
    return acc, tl.sum(square, 1)


@jit
def fetch_tiles(  # type: ignore[no-untyped-def]
    words, scales, zeros, norm, o, outputs, inputs, first, words_tile, scales_group,
    bits: tl.constexpr, group: tl.constexpr, chunk: tl.constexpr, gated: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """Fetch the first tiles of words for outputs o from tile `first` on, with their scales and weights of the norm."""
    width: tl.constexpr = 16 // bits * chunk
    sector = tl.arange(0, chunk // 16) * 16  # 32 bytes
    columns = tl.arange(0, width // 16) * 16
    for t in tl.static_range(tiles):
        tile = tl.minimum(first + t, tl.cdiv(inputs, width) - 1)
        for half in tl.static_range(1 + gated):  # gate and up
            row = tl.minimum(o, outputs - 1) + half * outputs
            fetch(words + tl.cast(tile, tl.int64) * words_tile + (row[:, None] * chunk + sector[None, :]))
            if group != 0 or t == 0:
                at = row
                if group != 0:
                    at = row + tile * width // group * scales_group
                fetch(scales + at)
                if zeros is not None:
                    fetch(zeros + at)
        if norm is not None:
            fetch(norm + tl.minimum(tile * width + columns, inputs - 1))


@jit
def packed_kernel(  # type: ignore[no-untyped-def]
    x, words, scales, zeros, bias, residual, norm, y, partial, squares, counter, offsets,
    x_row, residual_row, y_row, words_tile, words_expert, scales_group, scales_expert, bias_expert,
    N, outputs, inputs, tiles_each, splits, eps,
    bits: tl.constexpr, group: tl.constexpr, per_scale: tl.constexpr, rows: tl.constexpr, outs: tl.constexpr,
    chunk: tl.constexpr, fold: tl.constexpr, gated: tl.constexpr, split: tl.constexpr, experts: tl.constexpr,
    asm: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """`rows` rows of `outs` outputs of y [N, outputs]; with `gated` the matrix has twice as many rows."""
    block, part = tl.program_id(0), tl.program_id(2)
    o = tl.program_id(1) * outs + tl.arange(0, outs)
    if ahead is not None:
        release()
        if experts == 0:  # whose matrix it is, a kernel before has found out
            fetch_tiles(
                words, scales, zeros, norm, o, outputs, inputs, part * tiles_each, words_tile, scales_group,
                bits, group, chunk, gated, ahead,
            )  # fmt: skip
        wait()
    if experts == 0:
        first_row, end = block * rows, N
    else:  # block counts through the experts' blocks of rows, whose number is known on the device only
        e = tl.arange(0, experts)
        begins = tl.load(offsets + e)
        ends = tl.load(offsets + e + 1)
        upto = tl.cumsum((ends - begins + rows - 1) // rows, 0)
        expert = tl.sum((upto <= block).to(tl.int32))
        mine = e == expert  # none of them for the blocks that are too many
        before = tl.sum(tl.where(mine, upto - (ends - begins + rows - 1) // rows, 0))
        first_row = tl.sum(tl.where(mine, begins, 0)) + (block - before) * rows
        end = tl.sum(tl.where(mine, ends, 0))
        expert = tl.minimum(expert, experts - 1).to(tl.int64)
        words += expert * words_expert
        scales += expert * scales_expert
        if zeros is not None:
            zeros += expert * scales_expert
        if bias is not None:
            bias += expert * bias_expert
    n = (first_row + tl.arange(0, rows)).to(tl.int64)
    there = n < end
    height = outputs
    if gated:
        height = 2 * outputs

    tiles = tl.cdiv(inputs, 16 // bits * chunk)
    first = part * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    if experts != 0:
        last = tl.where(end > first_row, last, first)
    acc, square = product(
        x, words, scales, zeros, norm, n, there, o, outputs, inputs, first, last,
        x_row, words_tile, scales_group, bits, group, per_scale, rows, outs, chunk, fold, asm, True,
    )  # fmt: skip
    up = acc
    if gated:
        up, _ = product(
            x, words, scales, zeros, norm, n, there, o + outputs, height, inputs, first, last,
            x_row, words_tile, scales_group, bits, group, per_scale, rows, outs, chunk, fold, asm, False,
        )  # fmt: skip
    inside = (o < outputs)[:, None] & there[None, :]

    finished = True
    if split:
        finished, acc, up, square = join(
            acc, up, square, partial, squares, counter, n, there, o, outputs, N, height, splits, rows, outs, gated
        )
    if finished:
        if norm is not None:
            r = tl.rsqrt(square / inputs + eps)[None, :]
            acc *= r
            if gated:
                up *= r
        if bias is not None:
            acc += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
        if gated:
            if bias is not None:
                up += tl.load(bias + outputs + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
            acc = acc / (1.0 + tl.exp(-acc)) * up
        if residual is not None:
            acc += tl.load(residual + n[None, :] * residual_row + o[:, None], mask=inside, other=0.0).to(tl.float32)
        tl.store(y + n[None, :] * y_row + o[:, None], acc.to(y.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------- launch


class Shape(NamedTuple):
    """How a launch is cut: rows and outputs a program, whether weights are scaled, warps, stages, most splits."""

    rows: int
    outs: int
    fold: bool
    warps: int
    stages: int
    splits: int


PATHS = 8, 16, 32, 64, 128  # rows a program: matrix by vector; skinny, three times; large


def path_of(count: int, device: Target) -> int:
    """Rows a program for so many rows."""
    paths = [rows for rows in PATHS if device.backend == "cuda" or rows >= 16]
    if device.backend == "hip":
        paths = paths[:-1]  # 64 KiB of shared memory
    return next((rows for rows in paths if count <= rows), paths[-1])


def shape_of_launch(rows: int, device: Target, normed_gate: bool = False) -> Shape:
    """For a path of `path_of`; `normed_gate` is a norm before and SwiGLU after."""
    if rows <= 16:
        return Shape(rows, 64, False, 4, 4, MOST_SPLITS)
    stages = 3 if device.shared >= 128 * 1024 else 2
    if rows <= 64:
        return Shape(rows, 128, False, 8, stages, MOST_SPLITS // 2)
    arch = device.arch if isinstance(device.arch, int) else 0
    if normed_gate and arch < 90:  # two sums and x ⊙ norm in registers: a wider or deeper tile spills
        return Shape(rows, 64, True, 8, 2, 1)
    blackwell = 100 <= arch < 120  # of 128 Triton 3.7 makes a trap
    return Shape(rows, 128 if stages == 3 and not blackwell else 64, True, 8, stages, 1)


def splits_for(shape: Shape, blocks: int, tiles: int, processors: int) -> int:
    """Into how many parts the columns are cut: about four programs a processor, four tiles each or more."""
    wanted = -(-4 * processors // max(blocks, 1))
    return max(1, min(wanted, tiles // 4, shape.splits))


def chunks_a_scale(group: int, inputs: int, bits: int) -> int:
    """Chunks of a tile that share a scale; 0 if all of a row do."""
    if group == inputs:
        return 0
    chunks = 16 // bits
    return next(n for n in (4, 2, 1) if n <= chunks and group % (n * CHUNK) == 0)


def options(shape: Shape) -> dict[str, Any]:
    """What the compiler is told."""
    return {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}


def launch(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    norm: Tensor | None, y: Tensor, offsets: Tensor | None, *, bits: int, group: int, gated: bool, eps: float = 0.0,
    shape: Shape | None = None, splits: int | None = None,
) -> None:  # fmt: skip
    """Fill y [N, O]; x [N, I] and residual [N, O] with rows at any stride, the rest as `prepack` made it."""
    (N, inputs), outputs, device = x.shape, y.shape[1], target(x)
    experts = 0 if offsets is None else offsets.shape[0] - 1
    if shape is None:
        path = path_of(N if not experts else -(-N // experts), device)
        shape = shape_of_launch(path, device, norm is not None and gated)
    row_blocks = -(-N // shape.rows) + experts  # a block of each expert may be begun
    out_blocks, tiles = -(-outputs // shape.outs), words.shape[-3]
    if splits is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        splits = 1 if experts else splits_for(shape, row_blocks * out_blocks, tiles, processors)
    splits = 1 if experts else splits
    each = -(-tiles // splits)
    splits = -(-tiles // each)
    partial = squares = counter = None
    if splits > 1:
        partial = x.new_empty(splits, N, outputs * (1 + gated), dtype=torch.float32)
        counter = counters_for(x, row_blocks * out_blocks)
        if norm is not None:
            squares = x.new_empty(splits, out_blocks, N, dtype=torch.float32)
    padded, per_scale = 0, chunks_a_scale(group, inputs, bits)
    if offsets is not None:
        padded = max(1, 1 << (experts - 1).bit_length())
        offsets = torch.cat((offsets, offsets[-1:].expand(padded - experts))) if padded > experts else offsets
    asm, ahead = device.backend == "cuda" and not INTERPRETED, tiles_ahead(x)
    with torch.cuda.device_of(x):
        packed_kernel[(row_blocks, out_blocks, splits)](
            x, words, scales, zeros, bias, residual, norm, y, partial, squares, counter, offsets,
            x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
            words.stride(-3), words.stride(0) if experts else 0, scales.stride(-2), scales.stride(0) if experts else 0,
            bias.stride(0) if bias is not None and experts else 0,
            N, outputs, inputs, each, splits, eps,
            bits, group if per_scale else 0, per_scale, shape.rows, shape.outs, CHUNK, shape.fold, gated, splits > 1,
            padded, asm, ahead, **options(shape), **launched(ahead),
        )  # fmt: skip


def variant(
    device: Target, bits: int, dtype: torch.dtype, rows: int, per_scale: int, *,
    zeros: bool = False, bias: bool = False, residual: bool = False, norm: bool = False, gated: bool = False,
    experts: int = 0, ahead: int | None = None,
) -> Variant:  # fmt: skip
    """The kernel as a launch on this path compiles it."""
    shape = shape_of_launch(rows, device, norm and gated)
    split = shape.splits > 1 and not experts
    given = {
        "x": True, "words": True, "scales": True, "zeros": zeros, "bias": bias, "residual": residual,
        "norm": norm, "y": True, "partial": split, "squares": split and norm, "counter": split, "offsets": experts > 0,
    }  # fmt: skip
    special = {"words": "*i16", "partial": "*fp32", "squares": "*fp32", "counter": "*i32", "offsets": "*i32"}
    types = {name: special.get(name, POINTERS[dtype]) for name, there in given.items() if there}
    types |= dict.fromkeys(
        ["x_row", "residual_row", "y_row", "words_tile", "words_expert", "scales_group", "scales_expert", "bias_expert",
         "N", "outputs", "inputs", "tiles_each", "splits"], "i32",
    ) | {"eps": "fp32"}  # fmt: skip
    values: dict[str, Any] = {name: None for name, there in given.items() if not there}
    values |= {
        "bits": bits, "group": per_scale * CHUNK, "per_scale": per_scale, "rows": rows, "outs": shape.outs,
        "chunk": CHUNK, "fold": shape.fold,
        "gated": gated, "split": split, "experts": experts, "asm": device.backend == "cuda", "ahead": ahead,
    }  # fmt: skip
    scale = "row" if per_scale == 0 else f"group {per_scale * CHUNK}"
    more = {
        "asymmetric": zeros, "bias": bias, "residual": residual, "norm": norm, "swiglu": gated,
        f"{experts} experts": experts, "overlap": ahead is not None,
    }  # fmt: skip
    label = " ".join([f"int{bits}", POINTERS[dtype][1:], f"rows {rows}", scale, *(k for k, v in more.items() if v)])
    return Variant(label, packed_kernel, types, values, options(shape) | launched(ahead), {"N", "tiles_each", "splits"})


def variants(device: Target) -> list[Variant]:
    """What a launch can ask for, in both widths."""
    return [one for bits in (4, 8) for one in variants_of(bits, device)]


def variants_of(bits: int, device: Target) -> list[Variant]:
    """Every path with the common scales, the other scales and fused forms on the narrowest and widest path."""
    paths = sorted({path_of(rows, device) for rows in PATHS})
    most = 16 // bits
    found = [variant(device, bits, torch.bfloat16, rows, scale) for rows in paths for scale in (most, 0)]
    for rows in (paths[0], paths[-1]):
        found.append(variant(device, bits, torch.bfloat16, rows, most, zeros=True, bias=True))
        found.append(variant(device, bits, torch.bfloat16, rows, most, gated=True))
        found.append(variant(device, bits, torch.bfloat16, rows, most, residual=True))
        found += [variant(device, bits, torch.bfloat16, rows, most, norm=True, gated=gated) for gated in (False, True)]
        found.append(variant(device, bits, torch.bfloat16, rows, most, gated=True, experts=128))
        found.append(variant(device, bits, torch.float16, rows, most))
        found.append(variant(device, bits, torch.float16, rows, 0, bias=True))
        found += [variant(device, bits, torch.bfloat16, rows, n) for n in (1, 2) if n < most]
    for rows in paths[:2] if overlaps(device) else ():  # what a decode step asks for
        early = partial(variant, device, bits, torch.bfloat16, rows, ahead=TILES)
        found += [early(most), early(0, bias=True), early(most, zeros=True, residual=True)]
        found += [early(most, norm=True, gated=gated) for gated in (False, True)]
        found.append(early(most, gated=True, experts=128))
    return found


# ----------------------------------------------------------------------------- wrapper


def computes(x: Tensor, inputs: int, group: int) -> bool:
    """Whether the kernel does: half precision (in the interpreter float32 too), whole chunks a scale."""
    fits = x.dtype != torch.float32 or INTERPRETED
    return takes_kernel(x) and fits and x.numel() > 0 and (group == inputs or group % CHUNK == 0)


def matrix(x: Tensor) -> Tensor:
    """[..., D] -> [N, D] with the elements of a row side by side, without copying if that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def stored(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, inputs: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(packed, scales, zeros) as files have them, from either layout."""
    return (
        unprepack(Prepacked(packed, scales, zeros), bits, inputs)
        if packed.dtype == torch.int16
        else (packed, scales, zeros)
    )


def normed(x: Tensor, norm: Tensor | None, eps: float | None) -> Tensor:
    """RMSNorm(x), in float32 and rounded once, or x where there is no norm."""
    return x if norm is None or eps is None else rms_norm_reference(x, norm, eps, weight_first=True)


def reference(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    norm: Tensor | None, eps: float | None, offsets: Tensor | None, bits: int, swiglu: bool,
) -> Tensor:  # fmt: skip
    """All forms in plain torch, from either layout."""
    x = normed(x, norm, eps)
    packed, scales, zeros = stored(packed, scales, zeros, bits, x.shape[-1])
    weight = dequantised(packed, scales, zeros, bits, x.dtype)
    if offsets is None:
        y = F.linear(x, weight, bias)
    else:
        cuts = offsets.tolist()
        parts = [
            F.linear(x[cuts[e] : cuts[e + 1]], weight[e], None if bias is None else bias[e]) for e in range(len(weight))
        ]
        y = torch.cat(parts)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def on_cpu(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> Tensor | None:
    """x W\u1d40 by torch's own operators for packed integers on the CPU, or None where they do not fit.

    They do in bfloat16 only: in float32 they sum so that errors are three times torch's.
    """
    outputs, inputs = scales.shape[-1] if packed.dtype == torch.int16 else packed.shape[0], x.shape[-1]
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and zeros is None and x.numel() > 0
    if not fits or outputs % 16:
        return None
    if bits == 8:
        if group != inputs:
            return None
        codes, scale, _ = stored(packed, scales, zeros, 8, inputs)
        weight = (as_bytes(codes) ^ 0x80).view(torch.int8)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(
            x.reshape(-1, inputs).contiguous(), weight, scale[:, 0].to(x.dtype)
        )
        return y.view(*x.shape[:-1], outputs)
    sizes = [size for size in (256, 128, 64, 32) if group % size == 0]
    if not sizes or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    codes, scale, _ = stored(packed, scales, zeros, 4, inputs)
    codes = as_bytes(codes)
    integers = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    each = scale.to(x.dtype).mT.repeat_interleave(group // sizes[0], 0)
    pairs = torch.stack((each, torch.zeros_like(each)), dim=-1).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, inputs).contiguous(), weight, sizes[0], pairs)
    return y.view(*x.shape[:-1], outputs)


@operator("packed_matmul")
def packed_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    norm: Tensor | None, eps: float | None, offsets: Tensor | None, bits: int, group: int, swiglu: bool,
) -> Tensor:  # fmt: skip
    """Every form of `int4_matmul` and `int8_matmul`, whose arguments fit."""
    inputs = x.shape[-1]
    if not computes(x, inputs, group):
        if offsets is None and bias is None and residual is None and not swiglu:
            y = on_cpu(normed(x, norm, eps), packed, scales, zeros, bits, group)
            if y is not None:
                return y.contiguous()
        return reference(x, packed, scales, zeros, bias, residual, norm, eps, offsets, bits, swiglu).contiguous()
    if packed.dtype != torch.int16:
        packed, scales, zeros = prepack(packed, scales, zeros, bits=bits)
    outputs = scales.shape[-1] // (1 + swiglu)
    y = x.new_empty(*x.shape[:-1], outputs)
    added = None if residual is None else matrix(residual)
    launch(
        matrix(x), packed, scales, zeros, bias, added, norm, matrix(y), offsets,
        bits=bits, group=group, gated=swiglu, eps=eps or 0.0,
    )  # fmt: skip
    return y


@packed_matmul.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    norm: Tensor | None, eps: float | None, offsets: Tensor | None, bits: int, group: int, swiglu: bool,
) -> Tensor:  # fmt: skip
    outputs = scales.shape[-1 if packed.dtype == torch.int16 else -2] // (1 + swiglu)
    return x.new_empty(*x.shape[:-1], outputs)


def check(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    norm: Tensor | None, eps: float | None, offsets: Tensor | None, bits: int, group: int, swiglu: bool,
) -> None:  # fmt: skip
    """Raise a ValueError unless all fits together."""
    inputs, turned = x.shape[-1], packed.dtype == torch.int16
    if (norm is None) != (eps is None):
        raise ValueError("norm, the weight of an RMSNorm before the product, and its eps are given together")
    if eps is not None and not 0 <= eps < float("inf"):
        raise ValueError(f"eps is added to a mean square and must be 0 or more, and finite; not {eps}")
    if group < 1 or inputs % group or inputs * bits % 8:
        raise ValueError(f"groups of {group} do not divide the {inputs} columns of x into whole bytes of int{bits}")
    experts = () if offsets is None else (offsets.shape[0] - 1,)
    if scales.dim() != 2 + len(experts):
        raise ValueError(f"scales have {2 + len(experts)} axes, not {scales.dim()}")
    outputs, groups = scales.shape[-1 if turned else -2], inputs // group
    if swiglu and outputs % 2:
        raise ValueError(f"SwiGLU takes a gate and an up half; {outputs} outputs cannot be halved")
    if turned:
        width = 16 // bits * CHUNK
        wanted: tuple[int, ...] = (*experts, -(-inputs // width), outputs, CHUNK)
    else:
        wanted = (*experts, outputs, inputs * bits // (32 if packed.dtype == torch.int32 else 8))
        as_bytes(packed[..., :0])
    per_group = (groups, outputs) if turned else (outputs, groups)
    half = (*x.shape[:-1], outputs // (1 + swiglu))
    for name, other, shape in (
        ("packed", packed, wanted), ("scales", scales, (*experts, *per_group)),
        ("zeros", zeros, (*experts, *per_group)),
        ("bias", bias, (*experts, outputs)), ("residual", residual, half), ("norm", norm, (inputs,)),
    ):  # fmt: skip
        if other is not None and (tuple(other.shape) != shape or other.device != x.device):
            raise ValueError(
                f"{name} must be {list(shape)} on {x.device} for x {list(x.shape)} in groups of {group}; "
                f"it is {list(other.shape)} on {other.device}"
            )
    for name, other in (("bias", bias), ("residual", residual), ("norm", norm)):
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x is, not {other.dtype}")
    if zeros is not None and not turned and zeros.dtype != torch.int8:
        raise ValueError(f"zeros are int8 on the scale of the signed integers, not {zeros.dtype}")
    for name, other in (("packed", packed), ("scales", scales), ("zeros", zeros), ("bias", bias), ("norm", norm)):
        if other is not None and not other.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if offsets is not None and (offsets.dtype != torch.int32 or offsets.device != x.device or x.dim() != 2):
        raise ValueError("offsets are int32 [E + 1] on the device of x, which is [N, I]")


def multiply(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    norm: Tensor | None, eps: float | None, offsets: Tensor | None, bits: int, group: int, swiglu: bool,
) -> Tensor:  # fmt: skip
    """`packed_matmul`, its arguments checked: raises a ValueError unless they fit together."""
    check(x, packed, scales, zeros, bias, residual, norm, eps, offsets, bits, group, swiglu)
    y: Tensor = packed_matmul(x, packed, scales, zeros, bias, residual, norm, eps, offsets, bits, group, swiglu)
    return y
