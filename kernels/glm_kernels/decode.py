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
graph stays valid while they grow. The grid depends on shapes and device only, and so has as many splits as a full cache
is worth; the keys that are there are dealt out in equal shares of whole blocks, and a program that gets none is over at
once. Where one split has it all it writes y. Else the splits are joined in the same launch (a second one costs about
2 µs, as long as reading 8 MB) by whoever finishes last, which counters tell: up to 16 at once, more in two steps,
neighbours first, since one program would read a megabyte alone. Partial sums are taken in the order of the splits: the
result is the same to the bit each time.

With new keys and values (`append_attention.py`) the cache does not hold the T newest tokens yet. They come beside the
queries, both are turned here (equation (1) of `rotary.py`), and the last split attends to them after its own share and
puts them into the cache. No program reads their places in the cache, so nobody waits for anybody.

Layout: any strides with the channels side by side (what is q only, is copied otherwise); 16-byte loads need strides
and addresses that are multiples of 16 bytes. float16, bfloat16 and float32, heads of up to 256 channels
and latents of up to 512 + 128; the reference takes the rest. There is
no backward pass: the tokens of training are many, see `attention`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.counters import counters_for
from glm_kernels.dispatch import Target, jit, takes_kernel, target, tl, triton
from glm_kernels.operators import operator
from glm_kernels.overlap import launched, overlaps, release, tiles_ahead, wait
from glm_kernels.rotary import FORMS, pairs
from glm_kernels.variants import POINTERS, Variant

LAST = 16  # up to so many splits are joined at once
LOWEST = tl.constexpr(-3.4028234663852886e38) if triton else -3.4028234663852886e38
WIDEST = 256  # channels of a key or a value that the kernel takes
NEW = tl.constexpr(16) if triton else 16  # new tokens a row that are put into the cache while it is attended to
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
def turned_heads(  # type: ignore[no-untyped-def]
    x, inside, cos, sin, turn, c, widths: tl.constexpr, interleaved: tl.constexpr
):
    """Channels c of heads at x [n, 1], turned by the angles of their tokens, `turn` [n] on in cos and sin."""
    a = tl.load(x + c, mask=inside, other=0.0)
    if cos is None:
        return a
    else:
        partner, angle, before = c, c * 0, c < 0  # the other of a pair, the pair's angle, and whether c is the first
        start = 0
        for axis in tl.static_range(len(widths)):
            width = widths[axis]
            i = c - start
            here = (i >= 0) & (i < width)
            if interleaved:
                other, pair, first = start + (i ^ 1), i // 2, i % 2 == 0
            else:
                other, pair, first = start + (i + width // 2) % width, i % (width // 2), i < width // 2
            partner = tl.where(here, other, partner)
            angle = tl.where(here, start // 2 + pair, angle)
            before |= here & first
            start += width
        there = inside & (c < start)
        angles = turn[:, None] + angle
        b = tl.load(x + partner, mask=there, other=0.0).to(tl.float32)
        cosines = tl.load(cos + angles, mask=there, other=1.0)
        sines = tl.load(sin + angles, mask=there, other=0.0)
        return (a.to(tl.float32) * cosines + b * tl.where(before, -sines, sines)).to(a.dtype)


@jit
def put_partial(sums, totals, tops, at, top, total, acc, real_row, inside, V: tl.constexpr, VB: tl.constexpr):  # type: ignore[no-untyped-def]
    """m, z and a of the rows at `at`."""
    tl.store(sums + at[:, None] * V + tl.arange(0, VB), acc, mask=inside)
    tl.store(totals + at, total, mask=real_row)
    tl.store(tops + at, top, mask=real_row)


@jit
def put_result(y, total, acc, inside):  # type: ignore[no-untyped-def]
    """a / z; 0 where no key is seen."""
    tl.store(y, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(y.dtype.element_ty), mask=inside)


@jit
def joined(  # type: ignore[no-untyped-def]
    sums, totals, tops, at, step, count, real_row, inside, V: tl.constexpr, VB: tl.constexpr, stages: tl.constexpr
):
    """(2): m, z and a of `count` partial sums together, the first at `at`, each `step` rows behind the one before."""
    top = tl.full([at.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([at.shape[0]], tl.float32)
    acc = tl.zeros([at.shape[0], VB], tl.float32)
    for i in tl.range(0, count, num_stages=stages):
        its = at + i * step
        its_top = tl.load(tops + its, mask=real_row, other=LOWEST)
        higher = tl.maximum(top, its_top)
        keep, add = tl.exp2(top - higher), tl.exp2(its_top - higher)
        total = total * keep + add * tl.load(totals + its, mask=real_row, other=0.0)
        its_sums = tl.load(sums + its[:, None] * V + tl.arange(0, VB), mask=inside, other=0.0)
        acc = acc * keep[:, None] + add[:, None] * its_sums
        top = higher
    return top, total, acc


@jit
def decode_kernel(  # type: ignore[no-untyped-def]
    q, k, v, key_scale, value_scale, length, start, y, sums, totals, tops, arrived, new_k, new_v, cos, sin, at,
    q_row, q_head, q_token, k_row, k_group, k_token, v_row, v_group, v_token, ks_row, ks_group, ks_token,
    vs_row, vs_group, vs_token, y_row, y_head, y_token, turn_row, turn_token, scale, G, R, T, S, splits, last, near,
    K: tl.constexpr, V: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
    joins: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, rest: tl.constexpr, RB: tl.constexpr,
    widths: tl.constexpr, interleaved: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """m, z and a of one split of the keys for `rows` of the R·T queries of a group; who is last joins and writes y.

    Keys have K channels and then `rest` more, values V; KB, VB and RB are the powers of two above. Without v the
    values are the first K channels of the keys. Up to `last` splits are joined at once, else first so many as are
    `near`. New keys and values have the strides of the queries but for those of their heads, which are K and V.
    """
    tiles = tl.cdiv(R * T, rows)
    program = tl.program_id(0)
    group, split = program // tiles, tl.program_id(1)
    b, g = (group // G).to(tl.int64), (group % G).to(tl.int64)

    if ahead is not None:  # there are no weights to fetch
        release()
        wait()

    # the keys of this split: an equal share, in blocks, of those between start and length
    count = tl.load(length + b).to(tl.int32)
    first = 0 if start is None else tl.maximum(tl.load(start + b).to(tl.int32), 0)
    end = tl.minimum(count if new_k is None else count - T, S)
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), splits), block), 1) * block
    busy = tl.maximum(tl.cdiv(end - first, share), 1)  # so many splits have a share
    if split >= busy:
        return
    begin = first + split * share
    end = tl.minimum(begin + share, end)

    # the queries
    r = (program % tiles) * rows + tl.arange(0, rows)  # row r is token r % T of head r // T in the group
    head, token = g * R + r // T, r % T
    last_seen = count - T + token  # the last key each row sees
    real_row = r < R * T
    c, d = tl.arange(0, KB), tl.arange(0, VB)
    q += b * q_row + head[:, None] * q_head + token[:, None] * q_token
    if new_k is None:
        x_q = tl.load(q + c, mask=real_row[:, None] & (c < K), other=0.0)
    else:
        angles = b * turn_row + token * turn_token
        x_q = turned_heads(q, real_row[:, None] & (c < K), cos, sin, angles, c, widths, interleaved)
    if rest > 0:
        e = tl.arange(0, RB)
        x_rest = tl.load(q + K + e, mask=real_row[:, None] & (e < rest), other=0.0)

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
        place = j.to(tl.int64)
        keys = tl.load(k + place[:, None] * k_token + c, mask=there[:, None] & (c < K), other=0)
        if v is not None:
            values = tl.load(v + place[:, None] * v_token + d, mask=there[:, None] & (d < V), other=0)
            values = real(values, x_q.dtype)
        else:
            values = keys
        x = tl.dot(x_q, tl.trans(real(keys, x_q.dtype)), input_precision="ieee")
        if rest > 0:
            others = tl.load(k + K + place[:, None] * k_token + e, mask=there[:, None] & (e < rest), other=0)
            x = tl.dot(x_rest, tl.trans(others), x, input_precision="ieee")
        if key_scale is not None:  # (3)
            x *= (scale * tl.load(key_scale + place * ks_token, mask=there, other=0.0).to(tl.float32))[None, :]
        else:
            x *= scale
        x = tl.where(there[None, :] & (j[None, :] <= last_seen[:, None]), x, -float("inf"))

        higher = tl.maximum(top, tl.max(x, 1))
        keep, p = tl.exp2(top - higher), tl.exp2(x - higher[:, None])
        parts = parts * keep[:, None] + p
        acc *= keep[:, None]
        top = higher
        if value_scale is not None:  # (3), relative to the block's largest: float16 has no room for small products
            w = tl.load(value_scale + place * vs_token, mask=there, other=0.0).to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(w)), 1e-37)
            acc += tl.dot((p * (w / largest)[None, :]).to(x_q.dtype), values, input_precision="ieee") * largest
        else:
            acc = tl.dot(p.to(x_q.dtype), values, acc, input_precision="ieee")
    total = tl.sum(parts, 1)

    # the new tokens, by the last split: put into the cache, and a block more for (2)
    if new_k is not None:  # noqa: SIM102, the one is known when it is compiled
        if split == busy - 1:
            t = tl.arange(0, NEW)
            there = (t < T)[:, None]
            new = b * q_row + t[:, None] * q_token
            turn = b * turn_row + t * turn_token
            keys = turned_heads(new_k + new + g * K, there & (c < K), cos, sin, turn, c, widths, interleaved)
            values = tl.load(new_v + new + g * V + d, mask=there & (d < V), other=0.0)
            if program % tiles == 0:
                slot = (tl.load(at + b).to(tl.int64) + t)[:, None]
                free = there & (slot >= 0) & (slot < S)
                tl.store(k + slot * k_token + c, keys, mask=free & (c < K))
                tl.store(v + slot * v_token + d, values, mask=free & (d < V))
            j = count - T + t
            seen = ((t < T) & (j >= 0) & (j < S))[None, :] & (j[None, :] <= last_seen[:, None])
            x = tl.where(seen, tl.dot(x_q, tl.trans(keys), input_precision="ieee") * scale, -float("inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            keep, p = tl.exp2(top - higher), tl.exp2(x - higher[:, None])
            total = total * keep + tl.sum(p, 1)
            acc = tl.dot(p.to(x_q.dtype), values, acc * keep[:, None], input_precision="ieee")
            top = higher

    # what the split came to; whoever is last has all before it: a program's stores come before its count, which
    # releases and acquires, and the barrier before that is for all of its threads
    inside = real_row[:, None] & (d < V)
    y += b * y_row + head[:, None] * y_head + token[:, None] * y_token + d
    if busy == 1:
        put_result(y, total, acc, inside)
        return
    first_row = (group * splits).to(tl.int64) * (R * T) + r
    put_partial(sums, totals, tops, first_row + split * (R * T), top, total, acc, real_row, inside, V, VB)
    near = busy if busy <= last else near
    part, parted = split // near, tl.cdiv(busy, near)
    members = tl.minimum(near, busy - part * near)
    arrived += program * (splits + 1)
    tl.debug_barrier()
    if tl.atomic_add(arrived + 1 + part, 1, sem="acq_rel", scope="gpu") == members - 1:
        tl.store(arrived + 1 + part, 0)  # for the next call
        its = first_row + part * near * (R * T)
        top, total, acc = joined(sums, totals, tops, its, R * T, members, real_row, inside, V, VB, joins)
        if parted == 1:
            put_result(y, total, acc, inside)
        else:
            tl.debug_barrier()  # all of it is read before some is written over
            put_partial(sums, totals, tops, its, top, total, acc, real_row, inside, V, VB)
            tl.debug_barrier()
            if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == parted - 1:
                tl.store(arrived, 0)
                step = near * R * T
                top, total, acc = joined(sums, totals, tops, first_row, step, parted, real_row, inside, V, VB, joins)
                put_result(y, total, acc, inside)


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
    operand of its products lies in registers whole: few keys a step. Of partial sums there are the fewer in flight the
    larger they are: loading one ahead costs registers too.
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
    return Shape(rows, block, stages, min(4, 1 + room // (rows * value * 16)), warps, resident)


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


class New(NamedTuple):
    """Tokens that come with the queries: k [B, T, G, K] and v [B, T, G, V] are parts of the same qkv as q.

    cos and sin [B, T, Σw/2] with the same strides, or None; `at` [B] the slot of the first token of each row.
    """

    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    at: Tensor
    widths: Sequence[int]
    pairing: str


def launch(
    q: Tensor, k: Tensor, v: Tensor | None, length: Tensor, start: Tensor | None, scale: float,
    key_scale: Tensor | None, value_scale: Tensor | None, y: Tensor, new: New | None = None, *,
    shape: Shape | None = None, splits: int | None = None, last: int = LAST, partial: Partial | None = None,
) -> None:  # fmt: skip
    """Fill y [B, H, T, V]; the rest as of `decode_attention`, without v the values are the first V channels of k.

    With new tokens, as few as a block of keys, the caches are written too.
    """
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
    arrived = counters_for(q, programs * (splits + 1)) if splits > 1 else partial.tops
    strides = [
        n for x in (q, k, v, key_scale, value_scale, y) for n in (x.stride()[:3] if x is not None else (0, 0, 0))
    ]
    turns: Sequence[int] = (0, 0)
    if new is not None and new.cos is not None:
        turns = new.cos.stride()[:2]
    given = (None,) * 5 if new is None else new[:5]
    widths, interleaved = ((), False) if new is None else pairs(new.widths, new.pairing)
    ahead = tiles_ahead(q)
    with torch.cuda.device_of(q):
        decode_kernel[(programs, splits)](
            q, k, v, key_scale, value_scale, length, start, y, *partial, arrived, *given, *strides, *turns,
            scale * 1.4426950408889634, G, H // G, T, S, splits, last, 1 + math.isqrt(splits - 1),
            K, V, shape.rows, shape.block, shape.stages, shape.joins, power(K), power(V), rest, power(rest or 1),
            widths, interleaved, ahead, num_warps=shape.warps, enable_fp_fusion=True, **launched(ahead),
        )  # fmt: skip


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
        *(variant(target, half, 128, 128, rows, new=new) for new in FORMS if "128" in new for rows in (16, 64)),
        variant(target, half, 64, 64, 16, new="none"),
        variant(target, torch.float16, 128, 128, 16, new="interleaved half of 128"),
        *(variant(target, half, 128, 128, 16, new=new, ahead=0) for new in FORMS if "half" in new and overlaps(target)),
    ]


def variant(
    target: Target,
    dtype: torch.dtype,
    K: int,
    V: int,
    queries: int,
    *,
    int8: bool = False,
    started: bool = False,
    new: str | None = None,
    ahead: int | None = None,
) -> Variant:
    """As a launch with so many queries a group compiles it; V = 0 is the latent of GLM-4.7-Flash, 512 of K as values.

    `new` is how keys of new tokens are turned, a name in `rotary.FORMS` or "none". Registers are fitted to an H100;
    elsewhere the same shapes may spill a few, as the table shows.
    """
    first, rest = (K, 0) if V else (512, K - 512)
    shape = shape_of_launch(dtype, 1 if int8 else dtype.itemsize, first, V, rest, queries, target)
    pointer = POINTERS[dtype]
    stored = "*i8" if int8 else pointer
    types = {"q": pointer, "k": stored, "v": stored if V else None, "length": "*i32", "y": pointer}
    types |= dict.fromkeys(("key_scale", "value_scale"), "*fp32" if int8 else None)
    types |= {"start": "*i32" if started else None, "arrived": "*i32"}
    types |= dict.fromkeys(("sums", "totals", "tops"), "*fp32")
    types |= dict.fromkeys(("new_k", "new_v"), pointer if new else None) | {"at": "*i32" if new else None}
    types |= dict.fromkeys(("cos", "sin"), "*fp32" if new and new != "none" else None)
    strides = [f"{x}_{axis}" for x in ("q", "y") for axis in ("row", "head", "token")]
    strides += [f"{x}_{axis}" for x in ("k", "v", "ks", "vs") for axis in ("row", "group", "token")]
    counts = ["G", "R", "T", "S", "splits", "last", "near"]
    types |= dict.fromkeys([*strides, "turn_row", "turn_token", *counts], "i32") | {"scale": "fp32"}
    given = {name: kind for name, kind in types.items() if kind is not None}
    values: dict[str, Any] = {name: None for name in types if name not in given}
    V = V or first
    values |= {"K": first, "V": V, "KB": power(first), "VB": power(V), "rest": rest, "RB": power(rest or 1)}
    values |= {"rows": shape.rows, "block": shape.block, "stages": shape.stages, "joins": shape.joins}
    values["widths"], values["interleaved"] = pairs(*FORMS[new][:2]) if new in FORMS else ((), False)
    label = f"{K}{'' if rest == 0 else ' latent'}{' int8' if int8 else ''}{' started' if started else ''}"
    label += f" new, turned: {new}" if new else ""
    values["ahead"] = ahead
    label += f" rows {shape.rows} {pointer[1:]}{'' if ahead is None else ' overlap'}"
    options = {"num_warps": shape.warps, "enable_fp_fusion": True} | launched(ahead)
    unaligned = *counts, "ks_token", "vs_token"
    return Variant(label, decode_kernel, given, values, options, unaligned, hot=target == Target("cuda", 90))


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
