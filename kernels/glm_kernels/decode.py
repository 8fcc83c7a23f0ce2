"""Decode attention: one or a few new tokens ask, a cache of S tokens answers.

    y_i = Σ_j p_ij v_j,  p_ij = exp(s_ij) / Σ_j exp(s_ij),  s_ij = scale q_i·k_j  over start ≤ j ≤ length - T + i

where query i of T stands at position length - T + i and sees what is before it and itself. H query heads share G key
heads (arXiv:1911.02150, arXiv:2305.13245), R = H/G neighbours each; their R·T queries are the rows of one matrix, so
that a key is read once for all of them. A row without a visible key gives 0.

Splitting the keys (Flash-Decoding; the sums of Milakov & Gimelshein 2018, arXiv:1805.02867). Any set J of keys is
summed up by three values, from which, for the set of all keys, y = a / z follows:

    m(J) = max_{j∈J} x_j,  z(J) = Σ_{j∈J} 2^(x_j - m),  a(J) = Σ_{j∈J} 2^(x_j - m) v_j   with x = s log₂e     (1)

Joining disjoint sets only moves the maximum, since 2^(x - m) = 2^(m(J) - m) 2^(x - m(J)):

    m = max(m(J), m(J')),  z = 2^(m(J) - m) z(J) + 2^(m(J') - m) z(J'),  and a likewise                        (2)

In a program J' is the next block of keys; between programs it is what another split of the keys came to. m starts at
the lowest finite number and not at -∞, so that no difference is ∞ - ∞: for an empty set z = 0 and a = 0.

An int8 cache has one scale a token: the key's multiplies its scores, the value's its probabilities, in registers:

    x_j = (scale log₂e κ_j) q·k_j,   Σ_j p_j (ω_j v_j) = Σ_j (p_j ω_j) v_j                                     (3)

In the absorbed form of latent attention (DeepSeek-AI 2024, arXiv:2405.04434; GLM-4.7-Flash) keys and values are one
latent vector, which is read once: all its K channels are the key, the first `value_width` of them the value.

Bytes of one call: every visible key and value once, B G length (K + Kv) e (latent: B length K e), plus 4 or 8 bytes
a token of scales; the queries and y are thousands of times less. Flops: 2 (K + Kv) a key and query. That is H/G
flops a byte in half precision for T = 1: memory is the bound up to some hundred rows, and the point of the kernel is
to keep loads in flight. Partial sums cost 8 B H T Kv bytes a split, written and read, which stay in the L2 cache.

One program a (sequence, group, tile of rows, split). `length` and `start` are read on the device, so a captured CUDA
graph stays valid while they grow; the number of splits depends on shapes and device only, and each takes an equal
share of the keys that are there. Who joins the splits: up to 16, the last program of a row to finish, which a counter
tells, so that a short cache takes a single launch (a second one costs about 2 µs, as long as reading 8 MB); above, a
second kernel, since one program would read megabytes alone. Either goes through the splits in their order: the result
is the same to the bit each time.

Layout: any strides with the channels side by side (what is q only, is copied otherwise); 16-byte loads need strides
and addresses that are multiples of 16 bytes. float16, bfloat16 and float32, heads of up to 256 channels
and latents of up to 512 + 128; the reference takes the rest. There is
no backward pass: the tokens of training are many, see `attention`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.dispatch import Target, jit, takes_kernel, target, tl, triton
from glm_kernels.operators import operator
from glm_kernels.variants import POINTERS, Variant

LAST = 16  # up to so many splits are joined by the last program of their row
LOWEST = tl.constexpr(-3.4028234663852886e38) if triton else -3.4028234663852886e38
WIDEST = 256  # channels of a key or a value that the kernel takes
LATENT = 512, 128  # of a latent: those that are values, and the others

# ----------------------------------------------------------------------------- reference


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    *,
    start: Tensor | None = None,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in plain torch."""
    T, S = q.shape[2], k.shape[2]
    j = torch.arange(S, device=q.device)
    last = length[:, None] - T + torch.arange(T, device=q.device)  # [B T]
    seen = j <= last[:, :, None]  # [B T S]
    if start is not None:
        seen = seen & (j >= start[:, None, None])
    k, v = (
        (k if key_scale is None else k * key_scale[..., None]),
        (v if value_scale is None else v * value_scale[..., None]),
    )
    unseen = ~seen.any(1)[:, None, :, None]  # what lies there may be NaN
    k, v = k.to(q.dtype).masked_fill(unseen, 0), v.to(q.dtype).masked_fill(unseen, 0)
    q = q.clone(memory_format=torch.contiguous_format)  # on a GPU torch wants it aligned
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=True)
    return y.masked_fill(~seen.any(2)[:, None, :, None], 0)


def decode_latent_attention_reference(
    q: Tensor, latent: Tensor, length: Tensor, *, value_width: int, start: Tensor | None = None, scale: float
) -> Tensor:
    """`decode_latent_attention` in plain torch."""
    k = latent[:, None]
    return decode_attention_reference(q, k, k[..., :value_width], length, start=start, scale=scale)


# ----------------------------------------------------------------------------- kernels


@jit
def real(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 -> dtype, exactly: x + 128 becomes the low byte of 2^23 + x + 128 in float32; conversion is a slow pipe."""
    if x.dtype == tl.int8:
        bits = x.to(tl.uint8, bitcast=True) ^ 0x80
        return ((bits.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    else:
        return x


@jit
def decode_kernel(  # type: ignore[no-untyped-def]
    q, k, v, key_scale, value_scale, length, start, y, sums, totals, tops, arrived,
    q_row, q_head, q_token, k_row, k_group, k_token, v_row, v_group, v_token, ks_row, ks_group, ks_token,
    vs_row, vs_group, vs_token, y_row, y_head, y_token, scale, G, R, T, S, splits, once,
    K: tl.constexpr, V: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
    joins: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, rest: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """m, z and a of one split of the keys for `rows` of the R·T queries of a group; the last split's program joins all.

    Keys have K channels and then `rest` more, values V; KB, VB and RB are the powers of two above. Without v the
    values are the first K channels of the keys. `once` says that the splits are joined here.
    """
    tiles = tl.cdiv(R * T, rows)
    program = tl.program_id(0)
    group, split = program // tiles, tl.program_id(1)
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)
    r = (program % tiles) * rows + tl.arange(0, rows)  # row r is token r % T of head r // T in the group
    head, token = g * R + r // T, r % T
    real_row = r < R * T

    # the queries, and the keys of this split: an equal share, in blocks, of those between start and length
    c, d = tl.arange(0, KB), tl.arange(0, VB)
    q += b * q_row + head[:, None] * q_head + token[:, None] * q_token
    x_q = tl.load(q + c, mask=real_row[:, None] & (c < K), other=0.0)
    if rest > 0:
        e = tl.arange(0, RB)
        x_rest = tl.load(q + K + e, mask=real_row[:, None] & (e < rest), other=0.0)
    count = tl.load(length + b).to(tl.int32)
    first = 0 if start is None else tl.maximum(tl.load(start + b).to(tl.int32), 0)
    end = tl.minimum(count, S)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), splits), block) * block
    begin = first + split * share
    end = tl.minimum(begin + share, end)
    last = count - T + token  # the last key each row sees

    # (1) of the empty set, then (2) with one block of keys after the other
    n = tl.arange(0, block)
    k += b * k_row + g * k_group
    top = tl.full([rows], LOWEST, tl.float32)
    parts = tl.zeros([rows, block], tl.float32)  # of z, added up at the end: a sum across warps makes all of them wait
    acc = tl.zeros([rows, VB], tl.float32)
    if v is not None:
        v += b * v_row + g * v_group
    if key_scale is not None:
        key_scale += b * ks_row + g * ks_group
        value_scale += b * vs_row + g * vs_group
    for i in tl.range(0, tl.cdiv(tl.maximum(end - begin, 0), block), num_stages=stages):
        j = begin + i * block + n
        there = j < end
        at = j.to(tl.int64)
        keys = tl.load(k + at[:, None] * k_token + c, mask=there[:, None] & (c < K), other=0)
        if v is not None:
            values = tl.load(v + at[:, None] * v_token + d, mask=there[:, None] & (d < V), other=0)
            values = real(values, x_q.dtype)
        else:
            values = keys
        x = tl.dot(x_q, tl.trans(real(keys, x_q.dtype)), input_precision="ieee")
        if rest > 0:
            others = tl.load(k + K + at[:, None] * k_token + e, mask=there[:, None] & (e < rest), other=0)
            x = tl.dot(x_rest, tl.trans(others), x, input_precision="ieee")
        if key_scale is not None:  # (3)
            x *= (scale * tl.load(key_scale + at * ks_token, mask=there, other=0.0).to(tl.float32))[None, :]
        else:
            x *= scale
        x = tl.where(there[None, :] & (j[None, :] <= last[:, None]), x, -float("inf"))

        higher = tl.maximum(top, tl.max(x, 1))
        keep, p = tl.exp2(top - higher), tl.exp2(x - higher[:, None])
        parts = parts * keep[:, None] + p
        acc *= keep[:, None]
        top = higher
        if value_scale is not None:  # (3), relative to the block's largest: float16 has no room for small products
            w = tl.load(value_scale + at * vs_token, mask=there, other=0.0).to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(w)), 1e-37)
            acc += tl.dot((p * (w / largest)[None, :]).to(x_q.dtype), values, input_precision="ieee") * largest
        else:
            acc = tl.dot(p.to(x_q.dtype), values, acc, input_precision="ieee")

    # what the split came to
    total = tl.sum(parts, 1)
    at_row = (group * splits).to(tl.int64) * (R * T) + r
    mine = at_row + split * (R * T)
    inside = real_row[:, None] & (d < V)
    tl.store(sums + mine[:, None] * V + d, acc, mask=inside)
    tl.store(totals + mine, total, mask=real_row)
    tl.store(tops + mine, top, mask=real_row)

    # whoever is last has all before it: all of a program's stores come before its count, which releases and acquires
    if once != 0:
        tl.debug_barrier()
        if tl.atomic_add(arrived + program, 1, sem="acq_rel", scope="gpu") == splits - 1:
            top = tl.full([rows], LOWEST, tl.float32)
            total = tl.zeros([rows], tl.float32)
            acc = tl.zeros([rows, VB], tl.float32)
            for i in tl.range(0, splits, num_stages=joins):  # (2) with one split after the other
                its = at_row + i * (R * T)
                its_top = tl.load(tops + its, mask=real_row, other=LOWEST)
                higher = tl.maximum(top, its_top)
                keep, add = tl.exp2(top - higher), tl.exp2(its_top - higher)
                total = total * keep + add * tl.load(totals + its, mask=real_row, other=0.0)
                acc = acc * keep[:, None] + add[:, None] * tl.load(sums + its[:, None] * V + d, mask=inside, other=0.0)
                top = higher
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            place = y + b * y_row + head[:, None] * y_head + token[:, None] * y_token + d
            tl.store(place, result.to(y.dtype.element_ty), mask=inside)
            tl.store(arrived + program, 0)  # for the next call


@jit
def join_kernel(  # type: ignore[no-untyped-def]
    sums, totals, tops, y, y_row, y_head, y_token, G, R, T, splits,
    V: tl.constexpr, VB: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """(2) over all splits, for one query of one head, so many splits at once as a `chunk` has."""
    program = tl.program_id(0)
    group, r = program // (R * T), program % (R * T)
    b, head, token = (group // G).to(tl.int64), (group % G).to(tl.int64) * R + r // T, r % T
    d = tl.arange(0, VB)
    at_row = (group * splits).to(tl.int64) * (R * T) + r

    top = LOWEST
    total = 0.0
    acc = tl.zeros([VB], tl.float32)
    for i in tl.range(0, splits, chunk):
        s = i + tl.arange(0, chunk)
        there = s < splits
        its = at_row + s * (R * T)
        its_top = tl.load(tops + its, mask=there, other=LOWEST)
        higher = tl.maximum(top, tl.max(its_top))
        keep, add = tl.exp2(top - higher), tl.exp2(its_top - higher)
        total = total * keep + tl.sum(add * tl.load(totals + its, mask=there, other=0.0))
        a = tl.load(sums + its[:, None] * V + d, mask=there[:, None] & (d < V), other=0.0)
        acc = acc * keep + tl.sum(add[:, None] * a, 0)
        top = higher
    result = acc / tl.where(total > 0, total, 1.0)
    y += b * y_row + head * y_head + token * y_token
    tl.store(y + d, result.to(y.dtype.element_ty), mask=d < V)


# ----------------------------------------------------------------------------- launch


class Shape(NamedTuple):
    """Of a launch: `rows` of queries and a `block` of keys a step, `stages` of loads in flight, `joins` likewise of
    partial sums, warps a program, and so many programs `resident` on a multiprocessor.
    """

    rows: int
    block: int
    stages: int
    joins: int
    warps: int
    resident: int


BLOCKS = (64, 4), (64, 3), (64, 2), (32, 4), (32, 3), (32, 2), (16, 3), (16, 2)  # and stages, best first


def power(n: int) -> int:
    """The power of two at or above n, 16 at least: what tl.dot takes."""
    return max(16, 1 << (n - 1).bit_length())


def shape_of_launch(dtype: torch.dtype, stored: int, K: int, V: int, rest: int, queries: int, on: Target) -> Shape:
    """For `queries` a group and keys of K + rest channels, each `stored` bytes; V is 0 where values are keys.

    The accumulator, rows × values, has 64 registers a thread at most. While it is small two programs share a
    multiprocessor, and the keys and values of all stages leave room for the other. float32 has no tensor cores, and an
    operand of its products lies in registers whole: few keys a step.
    """
    value, full = power(V or K), dtype == torch.float32
    rows = min(power(queries), 16 if full or value > 512 else 32 if value > 256 else 64)
    resident = 2 if rows * value <= 4096 else 1
    warps = 4 if (rows == 16 or resident == 2) and not full else 8
    room = on.shared // resident - 8192 * (3 - resident)
    a_key = stored * (power(K) + (power(V) if V else 0) + (power(rest) if rest else 0))
    widest = max(16, stored * 1024 // value) if full else 64 if value <= 128 else 32
    fits = [(n, s) for n, s in BLOCKS if s * n * a_key <= room and n <= widest]
    block, stages = fits[0] if fits else (16, 1)
    return Shape(rows, block, stages, min(4, 1 + room // (rows * value * 4)), warps, resident)


def splits_of_launch(programs: int, S: int, block: int, wave: int) -> int:
    """How many parts the keys of every row are split in, for so many programs without splitting.

    A wave is what runs at the same time. The least number whose waves are nine tenths full, or else the fullest, as
    long as every part has a block of keys.
    """
    most = max(1, min(-(-S // block), wave))

    def fullness(splits: int) -> float:
        return programs * splits / (-(-programs * splits // wave) * wave)

    return next((s for s in range(1, most + 1) if fullness(s) >= 0.9), max(range(1, most + 1), key=fullness))


def multiprocessors(x: Tensor) -> int:
    """Of the device; those of an H100 for the interpreter."""
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count) if x.is_cuda else 132


class Partial(NamedTuple):
    """What every split came to: a [B·G, splits, R·T, V], z and m [B·G, splits, R·T], all in float32."""

    sums: Tensor
    totals: Tensor
    tops: Tensor


def partial_of(q: Tensor, groups: int, splits: int, V: int) -> Partial:
    """Room for what the splits of one call come to."""
    B, H, T, _ = q.shape
    a = q.new_empty(B * groups, splits, H // groups * T, V + 2, dtype=torch.float32).flatten()
    n = a.numel() // (V + 2)
    shape = B * groups, splits, H // groups * T
    return Partial(a[: n * V].view(*shape, V), a[n * V : n * (V + 1)].view(shape), a[n * (V + 1) :].view(shape))


COUNTERS = 1 << 16
counters: dict[tuple[torch.device, int], Tensor] = {}  # zero between calls: the last program of a row sets its own back


def counters_for(x: Tensor) -> Tensor | None:
    """Counters of the current stream, whose kernels run one after the other; None if they cannot be made now.

    Graphs that use them must not run at the same time as each other if they were captured on the same stream.
    """
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    key = (x.device, stream)
    if key not in counters:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph's memory is not ours to keep
            return None
        counters[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
    return counters[key]


def launch(
    q: Tensor, k: Tensor, v: Tensor | None, length: Tensor, start: Tensor | None, scale: float,
    key_scale: Tensor | None, value_scale: Tensor | None, y: Tensor, *,
    shape: Shape | None = None, splits: int | None = None, last: int = LAST, partial: Partial | None = None,
) -> None:  # fmt: skip
    """Fill y [B, H, T, V]; the rest as of `decode_attention`, without v the values are the first V channels of k."""
    B, H, T, width = q.shape
    G, S, V = k.shape[1], k.shape[2], y.shape[3]
    K, rest = (width, 0) if v is not None else (V, width - V)
    queries = H // G * T
    shape = shape or shape_of_launch(q.dtype, k.element_size(), K, 0 if v is None else V, rest, queries, target(q))
    programs = B * G * -(-queries // shape.rows)
    if programs == 0:
        return
    splits = splits or splits_of_launch(programs, S, shape.block, shape.resident * multiprocessors(q))
    partial = partial or partial_of(q, G, splits, V)
    arrived = counters_for(q) if splits <= last and programs <= COUNTERS else None
    strides = [
        n for x in (q, k, v, key_scale, value_scale, y) for n in (x.stride()[:3] if x is not None else (0, 0, 0))
    ]
    with torch.cuda.device_of(q):
        decode_kernel[(programs, splits)](
            q, k, v, key_scale, value_scale, length, start, y, *partial, partial.tops if arrived is None else arrived,
            *strides, scale * 1.4426950408889634, G, H // G, T, S, splits, int(arrived is not None),
            K, V, shape.rows, shape.block, shape.stages, shape.joins, power(K), power(V), rest, power(rest or 1),
            num_warps=shape.warps, enable_fp_fusion=True,
        )  # fmt: skip
        if arrived is None:
            join_kernel[(B * G * queries,)](
                *partial, y, *y.stride()[:3], G, H // G, T, splits, V, power(V), chunk_of(V),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def chunk_of(V: int) -> int:
    """So many splits at once that a thread holds 64 of their sums."""
    return max(1, 8192 // power(V))


def variants(target: Target) -> list[Variant]:
    """Every kind of launch: the published head sizes and numbers of rows, each way to store a cache, each dtype."""
    half, full = torch.bfloat16, torch.float32
    plain = [(half, 64, 16), (half, 80, 16), (half, 128, 16), (half, 128, 32), (half, 128, 64), (half, 192, 16)]
    plain += [
        (half, 256, 16),
        (half, 256, 64),
        (torch.float16, 128, 16),
        (full, 64, 16),
        (full, 128, 16),
        (full, 256, 16),
    ]
    int8 = [(half, 128, 16), (half, 128, 64), (half, 256, 16), (torch.float16, 128, 16), (full, 128, 16)]
    return [
        *(variant(target, dtype, K, K, rows) for dtype, K, rows in plain),
        *(variant(target, dtype, K, K, rows, int8=True) for dtype, K, rows in int8),
        variant(target, half, 128, 128, 16, started=True),
        *(variant(target, dtype, 576, 0, rows) for dtype, rows in ((half, 16), (half, 32), (full, 16))),
        *(join_variant(half, V) for V in (128, 512)),
    ]


def variant(
    target: Target, dtype: torch.dtype, K: int, V: int, queries: int, *, int8: bool = False, started: bool = False
) -> Variant:
    """As a launch with so many queries a group compiles it; V = 0 is the latent of GLM-4.7-Flash, 512 of K as values.

    Registers are fitted to an H100; elsewhere the same shapes may spill a few, as the table shows.
    """
    first, rest = (K, 0) if V else (512, K - 512)
    shape = shape_of_launch(dtype, 1 if int8 else dtype.itemsize, first, V, rest, queries, target)
    pointer = POINTERS[dtype]
    stored = "*i8" if int8 else pointer
    types = {"q": pointer, "k": stored, "v": stored if V else None, "length": "*i32", "y": pointer}
    types |= dict.fromkeys(("key_scale", "value_scale"), "*fp32" if int8 else None)
    types |= {"start": "*i32" if started else None, "arrived": "*i32"}
    types |= dict.fromkeys(("sums", "totals", "tops"), "*fp32")
    strides = [f"{x}_{axis}" for x in ("q", "y") for axis in ("row", "head", "token")]
    strides += [f"{x}_{axis}" for x in ("k", "v", "ks", "vs") for axis in ("row", "group", "token")]
    counts = ["G", "R", "T", "S", "splits", "once"]
    types |= dict.fromkeys([*strides, *counts], "i32") | {"scale": "fp32"}
    given = {name: kind for name, kind in types.items() if kind is not None}
    values: dict[str, Any] = {name: None for name in types if name not in given}
    V = V or first
    values |= {"K": first, "V": V, "KB": power(first), "VB": power(V), "rest": rest, "RB": power(rest or 1)}
    values |= {"rows": shape.rows, "block": shape.block, "stages": shape.stages, "joins": shape.joins}
    label = f"{K}{'' if rest == 0 else ' latent'}{' int8' if int8 else ''}{' started' if started else ''}"
    return Variant(
        f"{label} rows {shape.rows} {pointer[1:]}", decode_kernel, given, values,
        {"num_warps": shape.warps, "enable_fp_fusion": True}, unaligned=(*counts, "ks_token", "vs_token"),
        hot=target == Target("cuda", 90),
    )  # fmt: skip


def join_variant(dtype: torch.dtype, V: int) -> Variant:
    """The second kernel for values of this width."""
    types = dict.fromkeys(("sums", "totals", "tops"), "*fp32") | {"y": POINTERS[dtype]}
    counts = ["G", "R", "T", "splits"]
    types |= dict.fromkeys(["y_row", "y_head", "y_token", *counts], "i32")
    values = {"V": V, "VB": power(V), "chunk": chunk_of(V)}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return Variant(f"{V} {POINTERS[dtype][1:]}", join_kernel, types, values, options, unaligned=counts)


# ----------------------------------------------------------------------------- wrapper


@operator("decode")
def decode(
    q: Tensor, k: Tensor, v: Tensor | None, length: Tensor, start: Tensor | None, scale: float,
    key_scale: Tensor | None, value_scale: Tensor | None, value_width: int,
) -> Tensor:  # fmt: skip
    """y [B, H, T, value_width]; without v the values are the first `value_width` channels of k [B, G, S, K]."""
    rest = k.shape[3] - value_width
    fits = max(k.shape[3], value_width) <= WIDEST if v is not None else value_width <= LATENT[0] and rest <= LATENT[1]
    if takes_kernel(q) and fits:
        y = q.new_empty(*q.shape[:3], value_width)
        launch(q, k, v, length, start, scale, key_scale, value_scale, y)
        return y
    v = k[..., :value_width] if v is None else v
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    return decode_attention_reference(q, k, v, length, start=start, scale=scale, **scales).contiguous()


@decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor | None, length: Tensor, start: Tensor | None, scale: float,
    key_scale: Tensor | None, value_scale: Tensor | None, value_width: int,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], value_width)


def backward(ctx: Any, grad: Tensor) -> None:
    """There is none."""
    raise NotImplementedError("decode attention has no backward pass: train with glm_kernels.attention")


decode.register_autograd(backward)


def check(q: Tensor, length: Tensor, caches: dict[str, Tensor], scales: dict[str, Tensor | None], **rows: Any) -> None:
    """Raise a ValueError unless everything fits q [B, H, T, K] and the caches [B, G, S, …]."""
    if q.ndim != 4:
        raise ValueError(f"q must be [batch, heads, tokens, channels]; it is {list(q.shape)}")
    B, H, _, K = q.shape
    int8 = all(x is not None for x in scales.values()) and len(scales) > 0
    if len({x is None for x in scales.values()}) > 1:
        raise ValueError("key_scale and value_scale belong together: an int8 cache has both")
    G, S = caches["k"].shape[1:3] if caches["k"].ndim == 4 else (0, 0)
    for name, x in caches.items():
        shape = f"[{B}, groups, tokens, {K}]" if name == "k" else f"[{B}, {G}, {S}, channels]"
        if x.ndim != 4 or x.shape[:3] != (B, G, S) or (x.shape[3] != K and name == "k"):
            raise ValueError(f"{name} must be {shape}; it is {list(x.shape)}")
        if x.dtype != (torch.int8 if int8 else q.dtype) or x.device != q.device:
            needed = "torch.int8, since there are scales" if int8 else f"{q.dtype} as q is, or int8 with scales"
            raise ValueError(f"{name} must be {needed}, on {q.device}; it is {x.dtype} on {x.device}")
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(f"{name} must have its channels side by side: its strides are {x.stride()}")
    if G == 0 or H % G:
        raise ValueError(f"the {H} heads of q must be a multiple of the {G} groups of keys")
    for name, scale in scales.items():
        if scale is None:
            continue
        if scale.shape != (B, G, S) or scale.device != q.device or scale.dtype not in (torch.float32, q.dtype):
            raise ValueError(
                f"{name} must be {[B, G, S]}, float32 or {q.dtype}, on {q.device}; "
                f"it is {list(scale.shape)} {scale.dtype} on {scale.device}"
            )
    for name, x in {"length": length, **rows}.items():
        if x is None:
            continue
        if x.shape != (B,) or x.dtype not in (torch.int32, torch.int64) or x.device != q.device:
            raise ValueError(
                f"{name} must be [{B}], int32 or int64, on {q.device}; it is {list(x.shape)} {x.dtype} on {x.device}"
            )


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    *,
    start: Tensor | None = None,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """Attention of the T newest tokens to a cache that holds them already; query i is at length - T + i.

    Args:
        q: [B, H, T, K].
        k: [B, G, S, K] with room for S tokens, H a multiple of G; int8 if there are scales.
        v: [B, G, S, Kv], likewise. What lies outside [start, length) is not read.
        length: [B], int32 or int64: tokens in the cache, the new ones included; 0 for a row that is not in use.
        start: [B], likewise: the first token that may be seen (left padding). Zero by default.
        scale: Of the scores, K^-½ by default.
        key_scale: [B, G, S], float32 or the dtype of q: the factor of each token's int8 key.
        value_scale: Likewise of its value.

    Returns:
        y [B, H, T, Kv], contiguous, in the dtype of q; 0 for a query that sees no key. It has no gradient.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that do not fit.
    """
    check(q, length, {"k": k, "v": v}, {"key_scale": key_scale, "value_scale": value_scale}, start=start)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, length, start = side_by_side(q), length.contiguous(), None if start is None else start.contiguous()
    y: Tensor = decode(q, k, v, length, start, scale, key_scale, value_scale, v.shape[3])
    return y


def decode_latent_attention(
    q: Tensor, latent: Tensor, length: Tensor, *, value_width: int, start: Tensor | None = None, scale: float
) -> Tensor:
    """`decode_attention` to latents that are keys, and with their first channels values, of all heads at once.

    Args:
        q: [B, H, T, K], the queries taken into the space of the latent (absorbed).
        latent: [B, S, K], such as K = 576 for GLM-4.7-Flash.
        length: [B], as of `decode_attention`.
        value_width: How many of the K channels are the value, 512 there.
        start: [B], likewise.
        scale: Of the scores; it is that of the heads' own width, which K does not tell.

    Returns:
        y [B, H, T, value_width], contiguous, in the dtype of q; 0 for a query that sees no key. It has no gradient.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that do not fit.
    """
    if latent.ndim != 3:
        raise ValueError(f"latent must be [batch, tokens, channels]; it is {list(latent.shape)}")
    if not 0 < value_width <= latent.shape[2]:
        raise ValueError(f"value_width must be of 1 to {latent.shape[2]} channels; it is {value_width}")
    check(q, length, {"k": latent[:, None]}, {}, start=start)
    q, length, start = side_by_side(q), length.contiguous(), None if start is None else start.contiguous()
    y: Tensor = decode(q, latent[:, None], None, length, start, scale, None, None, value_width)
    return y


def side_by_side(q: Tensor) -> Tensor:
    """`q` itself, or a copy, with its channels next to each other."""
    return q if q.stride(3) == 1 else q.contiguous()
