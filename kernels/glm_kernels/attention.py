"""Attention of many queries: prompts, training samples, chunks of a long prompt against a cache; forward and backward.

Who sees whom. Query i of T, the newest of S tokens, stands at p = i + S - T. It sees key j iff

    start ≤ j < length   and   (j < prefix  or  segment ≤ j ≤ p)

`length`, one number a row, ends what is filled of a cache. `start` ends the padding on the left. The keys before
`prefix` were read and are seen by all (Du et al. 2022, arXiv:2103.10360); of what is written after them, a query sees
the past, from `segment` on. start, prefix and segment are one number a row, or one a query: so that several training
samples lie packed in one row (start and segment are where a query's sample begins, prefix where its context ends), and
so that several spans or answers share one context without seeing each other (segment is where a query's span begins).

Online softmax. With the scores of the visible keys, and -∞ for the others,

    s_ij = scale · q_i · k_j                                            (1)
    y_i  = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij)                            (2)

numerator and denominator may both be divided by exp(m) for any m; with m the greatest score nothing overflows. Keys
come in blocks, so m is the greatest so far. A row starts at m = -∞, w = 0, a = 0, and each block of keys gives

    m' = max(m, max_j s_ij)                                             (3)
    p_ij = exp(s_ij - m')                                               (4)
    w' = exp(m - m') w + Σ_j p_ij,    a' = exp(m - m') a + Σ_j p_ij v_j (5)

(Milakov & Gimelshein 2018, arXiv:1805.02867), since exp(m - m') turns what was divided by exp(m) into what is divided
by exp(m'). At the end

    y = a / w,    lse = m + log w                                       (6)

(Dao et al. 2022, arXiv:2205.14135). A query that sees no key has w = 0: its y is 0, its lse -∞. The kernels count in
base 2, exp(s) = 2^(s log₂e), with log₂e multiplied into the scale: a GPU has an instruction for 2^x.

Gradients. The probabilities of (2) come back from lse, block by block: p_ij = exp(s_ij - lse_i). Given dy and dlse,

    δ_i  = dy_i · y_i - dlse_i                                          (7)
    ds_ij = p_ij (dy_i · v_j - δ_i)                                     (8)
    dv_j = Σ_i p_ij dy_i,  dq_i = scale Σ_j ds_ij k_j,  dk_j = scale Σ_i ds_ij q_i   (9)

Cost. With N visible pairs a head, the forward pass takes 2 N (K + Kv) flops a head, the backward pass 2 N (4 K + 3 Kv):
both of its kernels compute the scores and dy · v again. q, y and their gradients are read or written once; k and v once
for every block of queries, mostly from the L2 cache. Beyond a few hundred keys arithmetic is the bound: the matrix
products, and beside them N exponentials, which a GPU computes 16 a clock and multiprocessor. Blocks of keys that no
query of a block sees are skipped. Those that all see need no mask; only those on a boundary pay for one.

Layout: q [B, H, T, K], k [B, G, S, K], v [B, G, S, Kv] with the channels of a head side by side, everything else at any
stride; what is laid out otherwise is copied first. H/G query heads that are neighbours share a key head. float16,
bfloat16, float32; K and Kv up to 256; a width that is no power of two costs as much as the next one.
"""

import functools
import math
from itertools import product
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from glm_kernels.dispatch import Target, jit, takes_kernel, target, tl, wide
from glm_kernels.operators import operator
from glm_kernels.variants import POINTERS, Variant

WIDEST = 256
NEVER = 2**31 - 1  # a key further than any
LOG2E = math.log2(math.e)

# ----------------------------------------------------------------------------- reference


class Bounds(NamedTuple):
    """What bounds the sight of queries; None is no bound. Integers [B], or but for length [B, T]."""

    start: Tensor | None = None
    prefix: Tensor | None = None
    segment: Tensor | None = None
    length: Tensor | None = None


def visible(queries: int, keys: int, bounds: Bounds, device: torch.device | None = None) -> Tensor:
    """Who sees whom, bool [B or 1, 1, T, S]: the rule at the top of this file."""

    def each_query(bound: Tensor) -> Tensor:
        return bound.reshape(bound.shape[0], 1, -1, 1)

    j = torch.arange(keys, device=device)
    seen = (j <= j.new_tensor(range(keys - queries, keys))[:, None])[None, None]
    if bounds.segment is not None:
        seen = seen & (j >= each_query(bounds.segment))
    if bounds.prefix is not None:
        seen = seen | (j < each_query(bounds.prefix))
    if bounds.start is not None:
        seen = seen & (j >= each_query(bounds.start))
    if bounds.length is not None:
        seen = seen & (j < each_query(bounds.length))
    return seen


def scores(q: Tensor, k: Tensor, bounds: Bounds, scale: float) -> Tensor:
    """Equation (1): [B, H, T, S] in float32 at least."""
    heads = q.shape[1] // k.shape[1]
    s = scale * wide(q) @ wide(k).repeat_interleave(heads, 1).mT
    return s.masked_fill(~visible(q.shape[2], k.shape[2], bounds, q.device), -torch.inf)


def filled(x: Tensor, length: Tensor | None) -> Tensor:
    """x [B, G, S, …] in float32 at least, zero from `length` on, where a cache may hold anything."""
    x = wide(x)
    if length is None:
        return x
    return x.masked_fill(torch.arange(x.shape[2], device=x.device)[:, None] >= length.reshape(-1, 1, 1, 1), 0)


def forward_reference(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float) -> tuple[Tensor, Tensor]:
    """(y, lse) in plain torch."""
    k, v = filled(k, bounds.length), filled(v, bounds.length)
    s = scores(q, k, bounds, scale)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse.nan_to_num(neginf=0)[..., None])
    return (p @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)).to(q.dtype), lse


def backward_reference(
    dy: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    bounds: Bounds,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in plain torch: equations (7) to (9)."""
    G, heads = k.shape[1], q.shape[1] // k.shape[1]
    q_, y_, dy_ = wide(q), wide(y), wide(dy)
    k_, v_ = (filled(x, bounds.length).repeat_interleave(heads, 1) for x in (k, v))
    p = torch.exp(scores(q_, filled(k, bounds.length), bounds, scale) - lse.nan_to_num(neginf=0)[..., None])
    delta = (dy_ * y_).sum(-1, keepdim=True) - dlse[..., None]
    ds = p * (dy_ @ v_.mT - delta)
    dq, dk, dv = scale * ds @ k_, scale * ds.mT @ q_, p.mT @ dy_
    dk, dv = (x.unflatten(1, (G, heads)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# ----------------------------------------------------------------------------- kernels: who sees whom


@jit
def sight(  # type: ignore[no-untyped-def]
    i, row, start, prefix, segment, length,
    start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row, T, S,
    bounded: tl.constexpr,
):  # fmt: skip
    """What the queries i of a row see, as two intervals each: (low, high, low2, high2), the second after the first.

    The keys read, start ≤ j < prefix, and the keys written, segment ≤ j ≤ p, are one interval where they touch; then,
    and for queries that are not there (i ≥ T), the second is empty. An empty interval has high ≤ low.
    """
    there = i < T
    past = tl.where(there, tl.minimum(i + (S - T) + 1, S), 0)
    low = tl.zeros_like(past)
    high, low2, high2 = past, low, low
    if bounded:
        end = tl.minimum(tl.load(length + row * length_row), S)
        low = tl.maximum(tl.load(start + row * start_row + i * start_query, mask=there, other=0), 0)
        read = tl.load(prefix + row * prefix_row + i * prefix_query, mask=there, other=0)
        near = tl.maximum(tl.load(segment + row * segment_row + i * segment_query, mask=there, other=0), low)
        past = tl.minimum(past, end)
        touch = near <= read
        high = tl.where(there, tl.minimum(tl.where(touch, tl.maximum(read, past), read), end), 0)
        low2 = tl.where(touch, 0, near)
        high2 = tl.where(touch, 0, past)
    return low, high, low2, high2


@jit
def sees(j, low, high, low2, high2, bounded: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether queries see the keys j; the intervals lie along one axis, j along the other."""
    seen = (j >= low) & (j < high)
    if bounded:
        seen = seen | ((j >= low2) & (j < high2))
    return seen


@jit
def live_blocks(low, high, there, after, size: tl.constexpr, never: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of keys, from `after` on, that some query sees: (first, first that all see, end of those, end).

    Blocks that all queries see form one run within those that any sees; if there is none it lies, empty, at the end.
    """
    some = low < high
    end = tl.maximum(tl.cdiv(tl.max(tl.where(some, high, 0)), size), after)
    first = tl.minimum(tl.maximum(tl.min(tl.where(some, low, never)) // size, after), end)
    all_first = tl.maximum(tl.cdiv(tl.max(tl.where(there, low, 0)), size), first)
    all_end = tl.minimum(tl.min(tl.where(there, high, never)) // size, end)
    return first, tl.where(all_first < all_end, all_first, end), tl.where(all_first < all_end, all_end, end), end


@jit
def nth(n, first, end, first2, end2, first3, end3, first4):  # type: ignore[no-untyped-def]
    """The n-th block of the runs [first, end), [first2, end2), [first3, end3), [first4, …), one after the other."""
    n2 = n - (end - first)
    n3 = n2 - (end2 - first2)
    n4 = n3 - (end3 - first3)
    return tl.where(n2 < 0, first + n, tl.where(n3 < 0, first2 + n2, tl.where(n4 < 0, first3 + n3, first4 + n4)))


# ----------------------------------------------------------------------------- kernels: tiles


@jit
def rows_of(  # type: ignore[no-untyped-def]
    x, first, end, stride, width,
    rows: tl.constexpr, block: tl.constexpr, guarded: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Rows `first`, first + 1 … of a matrix as a tile [rows, block]: zero from row `end` on, if guarded against it, and
    from column `width` on, if padded."""
    i, c = tl.arange(0, rows), tl.arange(0, block)
    at = x + tl.cast(first, tl.int64) * stride + i[:, None] * stride + c[None, :]
    if guarded and padded:
        return tl.load(at, mask=((first + i)[:, None] < end) & (c[None, :] < width), other=0.0)
    if guarded:
        return tl.load(at, mask=(first + i)[:, None] < end, other=0.0)
    if padded:
        return tl.load(at, mask=c[None, :] < width, other=0.0)
    return tl.load(at)


@jit
def store_rows(tile, x, first, end, stride, width, rows: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a tile [rows, block] to rows `first`, first + 1 … of a matrix, up to row `end` and column `width`."""
    i, c = tl.arange(0, rows), tl.arange(0, block)
    at = x + tl.cast(first, tl.int64) * stride + i[:, None] * stride + c[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=((first + i)[:, None] < end) & (c[None, :] < width))


# ----------------------------------------------------------------------------- kernels: forward


@jit
def attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, y, lse, start, prefix, segment, length,
    q_row, q_head, q_query, k_row, k_head, k_key, v_row, v_head, v_key, y_row, y_head, y_query,
    start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row,
    H, heads, T, S, K, Kv, scale,
    channels: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr, bounded: tl.constexpr, padded: tl.constexpr,
    never: tl.constexpr,
):  # fmt: skip
    """y and lse of one block of `queries` of one head. `scale` has log₂e in it; lse [B, H, T] is contiguous."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most: they begin first
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k += row * k_row + head // heads * k_head
    v += row * v_row + head // heads * v_head

    i = block * queries + tl.arange(0, queries)
    low, high, low2, high2 = sight(
        i, row, start, prefix, segment, length,
        start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row, T, S, bounded,
    )  # fmt: skip
    first, all_first, all_end, end = live_blocks(low, high, i < T, 0, keys, never)
    first2, all_first2, all_end2, end2 = live_blocks(low2, high2, i < T, end, keys, never)

    q_tile = rows_of(
        q + row * q_row + head * q_head, block * queries, T, q_query, K, queries, channels, True, padded
    )  # [queries, channels]
    m = tl.full([queries], -float("inf"), tl.float32)
    w = tl.zeros([queries], tl.float32)
    a = tl.zeros([queries, channels], tl.float32)

    # blocks that every query sees: no masks
    count = all_end - all_first
    if bounded:
        count += all_end2 - all_first2
    for n in range(0, count):
        j = all_first + n
        if bounded:
            j = nth(n, all_first, all_end, all_first2, all_end2, 0, 0, 0)
        k_tile = rows_of(k, j * keys, S, k_key, K, keys, channels, False, padded)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (1)
        m_new = tl.maximum(m, tl.max(s, 1) * scale)  # (3)
        p = tl.exp2(s * scale - m_new[:, None])  # (4)
        rescale = tl.exp2(m - m_new)
        w = w * rescale + tl.sum(p, 1)  # (5)
        a = a * rescale[:, None]
        v_tile = rows_of(v, j * keys, S, v_key, Kv, keys, channels, False, padded)
        a = tl.dot(p.to(v_tile.dtype), v_tile, a, input_precision="ieee")
        m = m_new

    # blocks on a boundary
    filled = S
    if bounded:
        filled = tl.minimum(tl.load(length + row * length_row), S)
    count = (end - first) - (all_end - all_first)
    if bounded:
        count += (end2 - first2) - (all_end2 - all_first2)
    for n in range(0, count):
        j = tl.where(n < all_first - first, first + n, all_end + n - (all_first - first))
        if bounded:
            j = nth(n, first, all_first, all_end, end, first2, all_first2, all_end2)
        k_tile = rows_of(k, j * keys, filled, k_key, K, keys, channels, True, padded)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (1)
        key = j * keys + tl.arange(0, keys)[None, :]
        seen = sees(key, low[:, None], high[:, None], low2[:, None], high2[:, None], bounded)
        s = tl.where(seen, s * scale, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))  # (3)
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # nothing seen yet: every p is 0
        p = tl.exp2(s - m_safe[:, None])  # (4)
        rescale = tl.exp2(m - m_safe)
        w = w * rescale + tl.sum(p, 1)  # (5)
        a = a * rescale[:, None]
        v_tile = rows_of(v, j * keys, filled, v_key, Kv, keys, channels, True, padded)
        a = tl.dot(p.to(v_tile.dtype), v_tile, a, input_precision="ieee")
        m = m_new

    # (6)
    tl.store(lse + (row * H + head) * T + i, (m + tl.log2(w)) * 0.6931471805599453, mask=i < T)
    a = a / tl.where(w == 0, 1.0, w)[:, None]
    store_rows(a, y + row * y_row + head * y_head, block * queries, T, y_query, Kv, queries, channels)


# ----------------------------------------------------------------------------- kernels: backward


@jit
def gradient_kernel_q(  # type: ignore[no-untyped-def]
    q, k, v, y, dy, lse, dlse, dq, delta, start, prefix, segment, length,
    q_row, q_head, q_query, k_row, k_head, k_key, v_row, v_head, v_key, y_row, y_head, y_query,
    dy_row, dy_head, dy_query, dq_row, dq_head, dq_query,
    start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row,
    H, heads, T, S, K, Kv, scale, out_scale,
    channels: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr, bounded: tl.constexpr, padded: tl.constexpr,
    never: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head, and their δ, which the other gradients need.

    `scale` has log₂e in it, `out_scale` has not. lse, dlse and delta [B, H, T] are contiguous.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k += row * k_row + head // heads * k_head
    v += row * v_row + head // heads * v_head

    i = block * queries + tl.arange(0, queries)
    low, high, low2, high2 = sight(
        i, row, start, prefix, segment, length,
        start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row, T, S, bounded,
    )  # fmt: skip
    first, _, _, end = live_blocks(low, high, i < T, 0, keys, never)
    first2, _, _, end2 = live_blocks(low2, high2, i < T, end, keys, never)

    q_tile = rows_of(q + row * q_row + head * q_head, block * queries, T, q_query, K, queries, channels, True, padded)
    y_tile = rows_of(y + row * y_row + head * y_head, block * queries, T, y_query, Kv, queries, channels, True, padded)
    dy_tile = rows_of(
        dy + row * dy_row + head * dy_head, block * queries, T, dy_query, Kv, queries, channels, True, padded
    )
    at = (row * H + head) * T + i
    d = tl.sum(y_tile.to(tl.float32) * dy_tile.to(tl.float32), 1)  # (7)
    d -= tl.load(dlse + at, mask=i < T, other=0.0)
    tl.store(delta + at, d, mask=i < T)
    z = tl.load(lse + at, mask=i < T, other=0.0) * 1.4426950408889634
    z = tl.where(z == -float("inf"), 0.0, z)  # sees nothing

    grad = tl.zeros([queries, channels], tl.float32)
    filled = S
    if bounded:
        filled = tl.minimum(tl.load(length + row * length_row), S)
    count = end - first
    if bounded:
        count += end2 - first2
    for n in range(0, count):
        j = first + n
        if bounded:
            j = nth(n, first, end, first2, end2, 0, 0, 0)
        k_tile = rows_of(k, j * keys, filled, k_key, K, keys, channels, True, padded)
        v_tile = rows_of(v, j * keys, filled, v_key, Kv, keys, channels, True, padded)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (1)
        p = tl.exp2(s * scale - z[:, None])
        key = j * keys + tl.arange(0, keys)[None, :]
        p = tl.where(sees(key, low[:, None], high[:, None], low2[:, None], high2[:, None], bounded), p, 0.0)
        dp = tl.dot(dy_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - d[:, None])  # (8)
        grad = tl.dot(ds.to(k_tile.dtype), k_tile, grad, input_precision="ieee")  # (9)
    store_rows(grad * out_scale, dq + row * dq_row + head * dq_head, block * queries, T, dq_query, K, queries, channels)


@jit
def gradient_kernel_kv(  # type: ignore[no-untyped-def]
    q, k, v, dy, lse, delta, dk, dv, start, prefix, segment, length,
    q_row, q_head, q_query, k_row, k_head, k_key, v_row, v_head, v_key,
    dy_row, dy_head, dy_query, dk_row, dk_head, dk_key, dv_row, dv_head, dv_key,
    start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row,
    H, heads, T, S, K, Kv, scale, out_scale,
    channels: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr, bounded: tl.constexpr, padded: tl.constexpr,
    never: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of `keys` of one key head: a sum over its query heads and over the queries that see it.

    One program adds everything up, in one order: no atomics, the same bits every time.
    """
    block, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    filled = S
    if bounded:
        filled = tl.minimum(tl.load(length + row * length_row), S)
    k_tile = rows_of(k + row * k_row + group * k_head, block * keys, filled, k_key, K, keys, channels, True, padded)
    v_tile = rows_of(v + row * v_row + group * v_head, block * keys, filled, v_key, Kv, keys, channels, True, padded)
    j = block * keys + tl.arange(0, keys)[:, None]

    # the blocks of queries between the first and the last that see anything of these keys
    begin = tl.maximum(block * keys - (S - T), 0) // queries
    end = tl.cdiv(T, queries)
    if bounded:
        first, last = end, 0
        for n in range(0, end):
            low, high, low2, high2 = sight(
                n * queries + tl.arange(0, queries), row, start, prefix, segment, length,
                start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row, T, S, bounded,
            )  # fmt: skip
            meets = (tl.maximum(low, block * keys) < tl.minimum(high, block * keys + keys)) | (
                tl.maximum(low2, block * keys) < tl.minimum(high2, block * keys + keys)
            )
            live = tl.max(meets.to(tl.int32)) > 0
            first = tl.where(live, tl.minimum(first, n), first)
            last = tl.where(live, n + 1, last)
        begin, end = first, last

    grad_k = tl.zeros([keys, channels], tl.float32)
    grad_v = tl.zeros([keys, channels], tl.float32)
    for head in range(group * heads, group * heads + heads):
        for n in range(begin, end):
            i = n * queries + tl.arange(0, queries)
            low, high, low2, high2 = sight(
                i, row, start, prefix, segment, length,
                start_row, start_query, prefix_row, prefix_query, segment_row, segment_query, length_row, T, S, bounded,
            )  # fmt: skip
            q_tile = rows_of(
                q + row * q_row + head * q_head, n * queries, T, q_query, K, queries, channels, True, padded
            )
            dy_tile = rows_of(
                dy + row * dy_row + head * dy_head, n * queries, T, dy_query, Kv, queries, channels, True, padded
            )
            at = (row * H + head) * T + i
            d = tl.load(delta + at, mask=i < T, other=0.0)
            z = tl.load(lse + at, mask=i < T, other=0.0) * 1.4426950408889634
            z = tl.where(z == -float("inf"), 0.0, z)
            # all of [keys, queries]: so p and ds stay in the registers they are computed in
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # (1)
            p = tl.exp2(s * scale - z[None, :])
            p = tl.where(sees(j, low[None, :], high[None, :], low2[None, :], high2[None, :], bounded), p, 0.0)
            grad_v = tl.dot(p.to(dy_tile.dtype), dy_tile, grad_v, input_precision="ieee")  # (9)
            dp = tl.dot(v_tile, tl.trans(dy_tile), input_precision="ieee")
            ds = p * (dp - d[None, :])  # (8)
            grad_k = tl.dot(ds.to(q_tile.dtype), q_tile, grad_k, input_precision="ieee")  # (9)
    store_rows(grad_k * out_scale, dk + row * dk_row + group * dk_head, block * keys, S, dk_key, K, keys, channels)
    store_rows(grad_v, dv + row * dv_row + group * dv_head, block * keys, S, dv_key, Kv, keys, channels)


# ----------------------------------------------------------------------------- launch


class Tiles(NamedTuple):
    """How a launch is cut: queries and keys a block, warps a program, stages of prefetched keys."""

    queries: int
    keys: int
    warps: int
    stages: int


# By device, then by channels of a head. Found by compiling: the largest that spill no register and fit shared memory.
FORWARD = {
    "hopper": {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 3)},
    "blackwell": {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 3)},
    "ampere": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "cdna": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 4, 2), 256: Tiles(64, 32, 8, 2)},
    "float32": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 16, 4, 1), 256: Tiles(16, 16, 8, 1)},
}
BACKWARD_Q = {
    "hopper": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)},
    "blackwell": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)},
    "ampere": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(64, 32, 8, 1)},
    "cdna": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)},
    "float32": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
BACKWARD_KV = {
    "hopper": {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 32, 8, 2)},
    "blackwell": {64: Tiles(32, 128, 8, 2), 128: Tiles(32, 128, 8, 1), 256: Tiles(32, 32, 8, 2)},
    "ampere": {64: Tiles(32, 64, 4, 1), 128: Tiles(32, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
    "cdna": {64: Tiles(32, 64, 4, 1), 128: Tiles(32, 64, 4, 1), 256: Tiles(16, 32, 4, 1)},
    "float32": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 4, 1)},
}


def tiles_for(table: dict[str, dict[int, Tiles]], dtype: torch.dtype, channels: int, device: Target) -> Tiles:
    """What `table` says of the device. float32 is computed without tensor cores, the same everywhere."""
    if dtype == torch.float32:
        return table["float32"][channels]
    if device.backend == "hip":
        return table["cdna"][channels]
    return table[{"90": "hopper", "100": "blackwell", "103": "blackwell"}.get(str(device.arch), "ampere")][channels]


def channels_for(*widths: int) -> int:
    """The width of a tile that holds heads of these widths: 64, 128 or 256."""
    return max(64, 1 << (max(widths) - 1).bit_length())


@functools.cache
def constant(value: int, device: torch.device) -> Tensor:
    """An int32 [1] on the device: made once, so that a bound not given costs no launch."""
    return torch.full((1,), value, dtype=torch.int32, device=device)


def arguments(bounds: Bounds, always: bool, device: torch.device) -> tuple[list[Tensor | None], list[int], bool]:
    """start, prefix, segment and length for a kernel, their strides, and whether it is to look at them.

    `always`: also where none is given, so that fewer forms of the kernels exist.
    """
    if all(bound is None for bound in bounds) and not always:
        return [None] * 4, [0] * 7, False
    tensors: list[Tensor | None] = []
    strides = []
    for given, default in zip(bounds, (0, 0, 0, NEVER), strict=True):
        tensors.append(constant(default, device) if given is None else given)
        strides += [0, 0] if given is None else [given.stride(0), given.stride(1) if given.dim() == 2 else 0]
    return tensors, strides[:7], True


def options(tiles: Tiles) -> dict[str, Any]:
    """What the compiler is told."""
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}


def launch_forward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Bounds, scale: float) -> None:
    """Fill y [B, H, T, Kv] and lse [B, H, T]."""
    (B, H, T, K), (G, S), Kv = q.shape, k.shape[1:3], v.shape[3]
    channels = channels_for(K, Kv)
    tiles = tiles_for(FORWARD, q.dtype, channels, target(q))
    padded = not K == Kv == channels or q.dtype == torch.float32
    tensors, bound_strides, bounded = arguments(bounds, padded, q.device)
    strides = [stride for x in (q, k, v, y) for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):
        attention_kernel[(-(-T // tiles.queries), H, B)](
            q, k, v, y, lse, *tensors, *strides, *bound_strides, H, H // G, T, S, K, Kv, scale * LOG2E,
            channels, tiles.queries, tiles.keys, bounded, padded, NEVER, **options(tiles),
        )  # fmt: skip


def launch_backward(
    dy: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, delta: Tensor, bounds: Bounds, scale: float,
) -> None:  # fmt: skip
    """Fill dq, dk, dv, and delta [B, H, T], which the first kernel hands to the second."""
    (B, H, T, K), (G, S), Kv = q.shape, k.shape[1:3], v.shape[3]
    channels = channels_for(K, Kv)
    padded = not K == Kv == channels or q.dtype == torch.float32
    tensors, bound_strides, bounded = arguments(bounds, padded, q.device)
    shared = (*bound_strides, H, H // G, T, S, K, Kv, scale * LOG2E, scale, channels)
    with torch.cuda.device_of(q):
        tiles = tiles_for(BACKWARD_Q, q.dtype, channels, target(q))
        strides = [stride for x in (q, k, v, y, dy, dq) for stride in x.stride()[:3]]
        gradient_kernel_q[(-(-T // tiles.queries), H, B)](
            q, k, v, y, dy, lse, dlse, dq, delta, *tensors, *strides, *shared,
            tiles.queries, tiles.keys, bounded, padded, NEVER, **options(tiles),
        )  # fmt: skip
        tiles = tiles_for(BACKWARD_KV, q.dtype, channels, target(q))
        strides = [stride for x in (q, k, v, dy, dk, dv) for stride in x.stride()[:3]]
        gradient_kernel_kv[(-(-S // tiles.keys), G, B)](
            q, k, v, dy, lse, delta, dk, dv, *tensors, *strides, *shared,
            tiles.queries, tiles.keys, bounded, padded, NEVER, **options(tiles),
        )  # fmt: skip


def variants(device: Target) -> list[Variant]:
    """What launches can ask for: three kernels by dtype and channels; padded heads, and float32, always with bounds."""
    return [
        variant(kernel, tiles_for(table, dtype, channels, device), dtype, channels, bounded, padded)
        for dtype, channels in product(POINTERS, (64, 128, 256))
        for bounded, padded in ((False, False), (True, False), (True, True))[2 * (dtype == torch.float32) :]
        for kernel, table in KERNELS
    ]


KERNELS = (
    (attention_kernel, FORWARD),
    (gradient_kernel_q, BACKWARD_Q),
    (gradient_kernel_kv, BACKWARD_KV),
)


def variant(kernel: Any, tiles: Tiles, dtype: torch.dtype, channels: int, bounded: bool, padded: bool) -> Variant:
    """A kernel as a launch with these tiles compiles it."""
    bounds = ("start", "prefix", "segment", "length")
    values: dict[str, Any] = {} if bounded else dict.fromkeys(bounds)
    values |= {"channels": channels, "queries": tiles.queries, "keys": tiles.keys}
    values |= {"bounded": bounded, "padded": padded, "never": NEVER}
    pointers = {"lse": "*fp32", "dlse": "*fp32", "delta": "*fp32"} | dict.fromkeys(bounds, "*i32")
    matrices = ("q", "k", "v", "y", "dy", "dq", "dk", "dv")
    types = {}
    for name in kernel.arg_names:
        if name in pointers or name in matrices:
            types[name] = pointers.get(name, POINTERS[dtype])
        else:
            types[name] = "fp32" if name.endswith("scale") else "i32"
    label = f"{POINTERS[dtype][1:]} {channels}{' padded' if padded else ''}{' bounded' if bounded else ''}"
    kept = {name: kind for name, kind in types.items() if name not in values}
    odd = {"T", "S", "H", "heads", "length_row", "start_row", "start_query"}
    odd |= {"prefix_row", "prefix_query", "segment_row", "segment_query"} | (set() if bounded else set(bounds))
    return Variant(label, kernel, kept, values, options(tiles), odd, hot=dtype != torch.float32)


# ----------------------------------------------------------------------------- wrapper


def by_query(B: int, T: int, H: int, K: int, like: Tensor) -> Tensor:
    """Empty [B, H, T, K] that lies in memory as [B, T, H, K]: the matrix product that follows needs no copy."""
    return like.new_empty(B, T, H, K).transpose(1, 2)


def side_by_side(x: Tensor) -> Tensor:
    """x with the channels of a head side by side, without copying if that can be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def runs_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels can compute this, and there is anything to compute."""
    return takes_kernel(q) and max(q.shape[3], v.shape[3]) <= WIDEST and q.numel() > 0


@operator("attention")
def attention_op(
    q: Tensor, k: Tensor, v: Tensor,
    start: Tensor | None, prefix: Tensor | None, segment: Tensor | None, length: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, lse); the bounds are int32."""
    B, H, T, _ = q.shape
    bounds = Bounds(start, prefix, segment, length)
    y = by_query(B, T, H, v.shape[3], q)
    if runs_kernel(q, v):
        lse = q.new_empty(B, H, T, dtype=torch.float32)
        launch_forward(side_by_side(q), side_by_side(k), side_by_side(v), y, lse, bounds, scale)
        return y, lse
    result, lse = forward_reference(q, k, v, bounds, scale)
    return y.copy_(result), lse


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor,
    start: Tensor | None, prefix: Tensor | None, segment: Tensor | None, length: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, T, _ = q.shape
    return by_query(B, T, H, v.shape[3], q), wide(q.new_empty(B, H, T))


@operator("attention_backward")
def backward_op(
    dy: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
    start: Tensor | None, prefix: Tensor | None, segment: Tensor | None, length: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    bounds = Bounds(start, prefix, segment, length)
    dq, dk, dv = (by_query(x.shape[0], x.shape[2], x.shape[1], x.shape[3], x) for x in (q, k, v))
    if runs_kernel(q, v):
        dy, q, k, v = (side_by_side(x) for x in (dy, q, k, v))
        launch_backward(dy, dlse.contiguous(), q, k, v, y, lse, dq, dk, dv, torch.empty_like(lse), bounds, scale)
        return dq, dk, dv
    results = backward_reference(dy, dlse, q, k, v, y, lse, bounds, scale)
    return dq.copy_(results[0]), dk.copy_(results[1]), dv.copy_(results[2])


@backward_op.register_fake
def _(
    dy: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
    start: Tensor | None, prefix: Tensor | None, segment: Tensor | None, length: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (by_query(x.shape[0], x.shape[2], x.shape[1], x.shape[3], x) for x in (q, k, v))
    return dq, dk, dv


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and v; the bounds and the scale have none."""
    q, k, v, y, lse, *bounds = ctx.saved_tensors
    return *backward_op(dy, dlse, q, k, v, y, lse, *bounds, ctx.scale), None, None, None, None, None


attention_op.register_autograd(backward, setup_context=remember)


def check(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float) -> None:
    """Raise a ValueError unless all fits together."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v have four axes each; they have {q.dim()}, {k.dim()} and {v.dim()}")
    (B, H, T, K), G, S = q.shape, k.shape[1], k.shape[2]
    for name, x, shape in (("k", k, (B, G, S, K)), ("v", v, (B, G, S, v.shape[3]))):
        if (tuple(x.shape), x.dtype, x.device) != (shape, q.dtype, q.device):
            raise ValueError(
                f"{name} must be {list(shape)} {q.dtype} on {q.device} to fit q {list(q.shape)} and the keys; "
                f"it is {list(x.shape)} {x.dtype} on {x.device}"
            )
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads cannot share {G} key heads evenly")
    if not scale > 0:
        raise ValueError(f"scale must be positive; it is {scale}")
    for name, bound in zip(Bounds._fields, bounds, strict=True):
        shapes = ((B,),) if name == "length" else ((B,), (B, T))
        if bound is not None and (bound.dtype not in (torch.int32, torch.int64) or tuple(bound.shape) not in shapes):
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must be integers {wanted}; it is {bound.dtype} {list(bound.shape)}")
        if bound is not None and bound.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, as q is; it is on {bound.device}")


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    prefix: Tensor | None = None, start: Tensor | None = None, length: Tensor | None = None,
    segment: Tensor | None = None, scale: float | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    prefix: Tensor | None = None, start: Tensor | None = None, length: Tensor | None = None,
    segment: Tensor | None = None, scale: float | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    prefix: Tensor | None = None, start: Tensor | None = None, length: Tensor | None = None,
    segment: Tensor | None = None, scale: float | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale · q kᵀ) v over the keys that each query sees, see the top of this file. Differentiable.

    Query i of T stands at p = i + S - T and sees key j iff start ≤ j < length and (j < prefix or segment ≤ j ≤ p).
    Without any bounds that is causal attention.

    Args:
        q: [B, H, T, K].
        k: [B, G, S, K], H a multiple of G.
        v: [B, G, S, Kv].
        prefix: Keys before it are seen by all; integers [B] or [B, T], default 0.
        start: Keys before it are seen by none (padding; other samples of a packed row); [B] or [B, T], default 0.
        length: Keys from it on are seen by none, and never read (the rest of a cache); [B], default S.
        segment: Among the keys from `prefix` on, those before it are not seen; [B] or [B, T], default 0.
        scale: Of the scores; default 1/√K.
        return_lse: Also return log Σ exp of the scores of each query, [B, H, T] in float32 at least.

    Returns:
        y [B, H, T, Kv], lying in memory as [B, T, H, Kv]; zero for a query that sees nothing, whose lse is -∞.

    Raises:
        ValueError: Shapes, dtypes, devices or a scale that do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = Bounds(start, prefix, segment, length)
    check(q, k, v, bounds, scale)
    y, lse = attention_op(q, k, v, *(None if bound is None else bound.int() for bound in bounds), scale)
    return (y, lse) if return_lse else y


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    prefix: Tensor | None = None, start: Tensor | None = None, length: Tensor | None = None,
    segment: Tensor | None = None, scale: float | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` in plain torch, differentiated by torch."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, lse = forward_reference(q, k, v, Bounds(start, prefix, segment, length), scale)
    return (y, lse) if return_lse else y
