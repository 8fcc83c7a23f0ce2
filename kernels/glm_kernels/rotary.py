"""Rotary positions: queries and keys turned, and keys and values put into the cache in the same launch.

Pairs of channels (a, b) of every head are turned by the angle θ of their token (Su et al. 2021, arXiv:2104.09864):

    (a, b) -> (a cos θ - b sin θ, a sin θ + b cos θ)                    (1)

Axis after axis takes the next w channels of a head, w = `widths[axis]`; those beyond stay as they are. Paired are
"interleaved" channels (0, 1), (2, 3) …, or "halves", (i, i + w/2) within the w of an axis. ChatGLM-6B has two axes of
half a head in halves, GLM-130B and GLM-4.5 one axis in halves, ChatGLM2 to GLM-4 the first half interleaved. The
gradient is the same turn with sin negated. Products, sums and nothing else, in float32 and without fused multiply-add,
rounded once: to the bit what plain torch computes.

cos and sin come for each token, [B, T, Σw/2] float32, the axes side by side. They are the same in all layers, so a
model makes them once a step; in a CUDA graph with `position` on the device that is one gather, `cos_table[position]`,
or the computation of the angles itself. A kernel that took the table and the position would spare that one launch, but
in every layer load the position before it can load cos: two latencies of memory one after the other instead of one. A
table would also end somewhere.

An int8 cache keeps each head of a token as k ≈ scale · int8, scale = max|k| / 127 in float32; zeros have scale 0.

Bytes of N tokens of h heads of K channels, e bytes each: 2 N h K e, and 4 N Σw for cos and sin; an int8 cache is
written with K + 4 bytes a head. Flops: 6 a pair, less than one a byte: memory is the bound, at one token the launch.

Layout: x [B, T, heads, K] with the channels of a head side by side, everything else at any stride, so that x may be a
part of a packed qkv; cos and sin with channels side by side, a row of them may be expanded; caches [B, G, S, K] with
channels side by side. Loads are 16 bytes wide if w (halves: w/2) and the strides are multiples of 16 elements. The
kernels take float16, bfloat16 and float32, the reference takes float64 too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm_kernels.dispatch import Target, jit, takes_kernel, tl, wide
from glm_kernels.operators import operator
from glm_kernels.variants import POINTERS, Variant

PAIRINGS = "interleaved", "halves"
HEADS = 16  # that one program turns, of one token

# ----------------------------------------------------------------------------- reference


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, *, widths: Sequence[int], pairing: str, inverse: bool = False
) -> Tensor:
    """`rotary` in plain torch."""
    *parts, rest = x.split([*widths, x.shape[-1] - sum(widths)], dim=-1)
    turned, start = [], 0
    for part, width in zip(parts, widths, strict=True):
        c, s = (table[..., None, start // 2 : (start + width) // 2] for table in (cos, -sin if inverse else sin))
        if pairing == "interleaved":
            a, b = wide(part)[..., 0::2], wide(part)[..., 1::2]
            pairs = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
        else:
            a, b = wide(part).chunk(2, dim=-1)
            pairs = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
        turned.append(pairs.to(x.dtype))
        start += width
    return torch.cat([*turned, rest], dim=-1)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [..., K], scale [...] float32) with x ≈ scale · int8."""
    scale = x.float().abs().amax(-1) / 127
    steps = x.float() / torch.where(scale > 0, scale, 1.0)[..., None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def rotary_append_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    at: Tensor,
    *,
    widths: Sequence[int],
    pairing: str,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """`rotary_append` in plain torch."""
    T = qkv.shape[1]
    G, S, K = key_cache.shape[1:]
    H = query_heads(qkv, key_cache, value_cache)
    q, k, v = qkv.split((H * K, G * K, G * value_cache.shape[-1]), dim=-1)
    q, k = (rotary_reference(x.unflatten(-1, (-1, K)), cos, sin, widths=widths, pairing=pairing) for x in (q, k))
    # who has no slot does once more what its nearest neighbour with one does, or puts back what is there: so the host
    # need not wait to hear how many have one
    begin = at[:, None].long()
    slot = (begin + torch.arange(T, device=at.device)).clamp(0, S - 1)  # [B T]
    source = slot - begin
    has_one = ((source >= 0) & (source < T))[..., None]
    row, source = torch.arange(len(qkv), device=at.device)[:, None], source.clamp(0, T - 1)
    for new, cache, scale in ((k, key_cache, key_scale), (v.unflatten(-1, (G, -1)), value_cache, value_scale)):
        new = new[row, source]  # [B T G K]
        if scale is not None:
            new, steps = quantised(new)
            scale[row, :, slot] = torch.where(has_one, steps, scale[row, :, slot])
        cache[row, :, slot] = torch.where(has_one[..., None], new, cache[row, :, slot])
    return q


# ----------------------------------------------------------------------------- kernels


@jit
def turned(  # type: ignore[no-untyped-def]
    x, inside, cos, sin, sign, start, width: tl.constexpr, block: tl.constexpr, interleaved: tl.constexpr
):
    """Equation (1) on the `width` channels from `start` on of heads at x [heads, 1]: two of [heads, block], float32."""
    pair = tl.arange(0, block)
    there = pair < width // 2
    c = tl.load(cos + start // 2 + pair, mask=there, other=0.0)[None, :]
    s = sign * tl.load(sin + start // 2 + pair, mask=there, other=0.0)[None, :]
    if interleaved:
        channel = tl.arange(0, 2 * block)[None, :]
        both = tl.load(x + start + channel, mask=inside & (channel < width), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [both.shape[0], block, 2]))
    else:
        there = inside & there[None, :]
        a = tl.load(x + start + pair[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(x + start + width // 2 + pair[None, :], mask=there, other=0.0).to(tl.float32)
    return a * c - b * s, a * s + b * c


@jit
def put_pairs(  # type: ignore[no-untyped-def]
    y, inside, a, b, start, width: tl.constexpr, block: tl.constexpr, interleaved: tl.constexpr
):
    """Store pairs [heads, block] where `turned` read them."""
    if interleaved:
        channel = tl.arange(0, 2 * block)[None, :]
        both = tl.reshape(tl.join(a, b), [a.shape[0], 2 * block])
        tl.store(y + start + channel, both, mask=inside & (channel < width))
    else:
        pair = tl.arange(0, block)[None, :]
        there = inside & (pair < width // 2)
        tl.store(y + start + pair, a, mask=there)
        tl.store(y + start + width // 2 + pair, b, mask=there)


@jit
def turn(  # type: ignore[no-untyped-def]
    x, y, inside, cos, sin, sign,
    widths: tl.constexpr, blocks: tl.constexpr, rest: tl.constexpr, rest_block: tl.constexpr, interleaved: tl.constexpr,
):  # fmt: skip
    """Heads at x, turned, to y; both pointers [heads, 1]."""
    dtype = y.dtype.element_ty
    start = 0
    for axis in tl.static_range(len(widths)):
        a, b = turned(x, inside, cos, sin, sign, start, widths[axis], blocks[axis], interleaved)
        put_pairs(y, inside, a.to(dtype), b.to(dtype), start, widths[axis], blocks[axis], interleaved)
        start += widths[axis]
    if rest > 0:
        channel = tl.arange(0, rest_block)[None, :]
        there = inside & (channel < rest)
        tl.store(y + start + channel, tl.load(x + start + channel, mask=there, other=0.0), mask=there)


@jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, y, x_row, x_token, x_head, turn_row, turn_token, y_row, y_token, y_head, tokens, heads, sign,
    widths: tl.constexpr, blocks: tl.constexpr, rest: tl.constexpr, rest_block: tl.constexpr,
    interleaved: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    """y for `some` heads of one token; sign is -1 for the inverse."""
    parts = tl.cdiv(heads, some)
    place = tl.program_id(0) // parts
    row, token = (place // tokens).to(tl.int64), (place % tokens).to(tl.int64)
    head = tl.program_id(0) % parts * some + tl.arange(0, some)[:, None]
    turns = row * turn_row + token * turn_token
    x += row * x_row + token * x_token
    y += row * y_row + token * y_token
    turn(
        x + head * x_head, y + head * y_head, head < heads, cos + turns, sin + turns, sign,
        widths, blocks, rest, rest_block, interleaved,
    )  # fmt: skip


@jit
def steps_of(x, scale):  # type: ignore[no-untyped-def]
    """x / scale to the nearest integer, of two the even one, as int8; where scale is zero so is x."""
    x = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
    x = x + 12582912.0 - 12582912.0  # 1.5 · 2²³: float32 has no fractions there
    return tl.minimum(tl.maximum(x, -127.0), 127.0).to(tl.int8)


@jit
def peak_of(x, inside, start, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """The greatest magnitude of `width` channels from `start` on of heads at x [heads, 1]: likewise."""
    channel = tl.arange(0, block)[None, :]
    values = tl.load(x + start + channel, mask=inside & (channel < width), other=0.0)
    return tl.max(tl.abs(values.to(tl.float32)), 1, keep_dims=True)


@jit
def put_quantised(x, y, scale, inside, start, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channels at x to y in int8, with the given scale."""
    channel = tl.arange(0, block)[None, :]
    there = inside & (channel < width)
    values = tl.load(x + start + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(y + start + channel, steps_of(values, scale), mask=there)


@jit
def turn_quantised(  # type: ignore[no-untyped-def]
    x, y, inside, cos, sin,
    widths: tl.constexpr, blocks: tl.constexpr, rest: tl.constexpr, rest_block: tl.constexpr, interleaved: tl.constexpr,
):  # fmt: skip
    """`turn` to int8; returns the scale [heads, 1]. Each pair is turned twice, for the scale and to be kept."""
    dtype = x.dtype.element_ty
    start = 0
    peak = tl.zeros([inside.shape[0], 1], tl.float32)
    for axis in tl.static_range(len(widths)):
        a, b = turned(x, inside, cos, sin, 1.0, start, widths[axis], blocks[axis], interleaved)
        a, b = tl.abs(a.to(dtype).to(tl.float32)), tl.abs(b.to(dtype).to(tl.float32))
        peak = tl.maximum(peak, tl.max(tl.maximum(a, b), 1, keep_dims=True))
        start += widths[axis]
    if rest > 0:
        peak = tl.maximum(peak, peak_of(x, inside, start, rest, rest_block))
    scale = tl.div_rn(peak, 127.0)
    start = 0
    for axis in tl.static_range(len(widths)):
        a, b = turned(x, inside, cos, sin, 1.0, start, widths[axis], blocks[axis], interleaved)
        a, b = steps_of(a.to(dtype).to(tl.float32), scale), steps_of(b.to(dtype).to(tl.float32), scale)
        put_pairs(y, inside, a, b, start, widths[axis], blocks[axis], interleaved)
        start += widths[axis]
    if rest > 0:
        put_quantised(x, y, scale, inside, start, rest, rest_block)
    return scale


@jit
def rotary_append_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, q, key_cache, value_cache, key_scale, value_scale, at,
    qkv_row, qkv_token, turn_row, turn_token, q_row, q_token, q_head, key_row, key_head, key_slot,
    value_row, value_head, value_slot, key_scale_row, key_scale_head, value_scale_row, value_scale_head,
    tokens, heads, groups, slots, key_width,
    widths: tl.constexpr, blocks: tl.constexpr, rest: tl.constexpr, rest_block: tl.constexpr,
    interleaved: tl.constexpr, value_width: tl.constexpr, value_block: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    """`some` heads of one token: queries to q, or keys or values to the slot of the token, if there is such a slot."""
    heads_parts, groups_parts = tl.cdiv(heads, some), tl.cdiv(groups, some)
    parts = heads_parts + 2 * groups_parts
    place, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row, token = (place // tokens).to(tl.int64), (place % tokens).to(tl.int64)
    lane = tl.arange(0, some)[:, None]
    x = qkv + row * qkv_row + token * qkv_token
    turns = row * turn_row + token * turn_token
    cos += turns
    sin += turns
    if part < heads_parts:
        head = part * some + lane
        to = q + row * q_row + token * q_token + head * q_head
        turn(x + head * key_width, to, head < heads, cos, sin, 1.0, widths, blocks, rest, rest_block, interleaved)
    else:
        slot = tl.load(at + row).to(tl.int64) + token
        free = (slot >= 0) & (slot < slots)
        x += heads * key_width
        if part < heads_parts + groups_parts:
            group = (part - heads_parts) * some + lane
            inside = (group < groups) & free
            new = x + group * key_width
            kept = key_cache + row * key_row + group * key_head + slot * key_slot
            if key_scale is None:
                turn(new, kept, inside, cos, sin, 1.0, widths, blocks, rest, rest_block, interleaved)
            else:
                scale = turn_quantised(
                    new, kept, inside, cos, sin, widths, blocks, rest, rest_block, interleaved
                )  # fmt: skip
                tl.store(key_scale + row * key_scale_row + group * key_scale_head + slot, scale, mask=inside)
        else:
            group = (part - heads_parts - groups_parts) * some + lane
            inside = (group < groups) & free
            new = x + groups * key_width + group * value_width
            kept = value_cache + row * value_row + group * value_head + slot * value_slot
            if value_scale is None:
                channel = tl.arange(0, value_block)[None, :]
                there = inside & (channel < value_width)
                tl.store(kept + channel, tl.load(new + channel, mask=there, other=0.0), mask=there)
            else:
                scale = tl.div_rn(peak_of(new, inside, 0, value_width, value_block), 127.0)
                put_quantised(new, kept, scale, inside, 0, value_width, value_block)
                tl.store(value_scale + row * value_scale_row + group * value_scale_head + slot, scale, mask=inside)


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def pairs(widths: Sequence[int], pairing: str) -> tuple[tuple[int, ...], bool]:
    """(widths, interleaved) of a kernel: interleaved axes are one, since their pairs lie side by side throughout."""
    interleaved = pairing == "interleaved"
    return (sum(widths),) if interleaved else tuple(widths), interleaved


def forms(widths: Sequence[int], pairing: str, head_width: int) -> tuple[dict[str, Any], int]:
    """(compile-time arguments, warps) of heads so wide."""
    axes, interleaved = pairs(widths, pairing)
    blocks = tuple(power(width // 2) for width in axes)
    rest = head_width - sum(axes)
    values = {"widths": axes, "blocks": blocks, "rest": rest, "rest_block": power(max(rest, 1))}
    tile = HEADS * min(blocks) * (2 if interleaved else 1)  # what one load reads; 8 elements a thread are 16 bytes
    return values | {"interleaved": interleaved, "some": HEADS}, min(max(tile // 256, 1), 4)


def launch(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, widths: Sequence[int], pairing: str, inverse: bool) -> None:
    """Fill y, which is like x [B, T, heads, K]; cos and sin [B, T, Σw/2] with the same strides."""
    B, T, heads, K = x.shape
    values, warps = forms(widths, pairing, K)
    with torch.cuda.device_of(x):
        rotary_kernel[(B * T * -(-heads // HEADS),)](
            x, cos, sin, y, *x.stride()[:3], *cos.stride()[:2], *y.stride()[:3], T, heads, -1.0 if inverse else 1.0,
            **values, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def launch_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, q: Tensor, key_cache: Tensor, value_cache: Tensor, at: Tensor,
    key_scale: Tensor | None, value_scale: Tensor | None, widths: Sequence[int], pairing: str,
) -> None:  # fmt: skip
    """Fill q [B, T, H, K], and the caches' slots from `at` on."""
    B, T, H, K = q.shape
    _, G, S, Kv = value_cache.shape
    values, warps = forms(widths, pairing, K)
    scale_strides = [
        stride for scale in (key_scale, value_scale) for stride in (scale.stride()[:2] if scale is not None else (0, 0))
    ]
    with torch.cuda.device_of(qkv):
        rotary_append_kernel[(B * T * (-(-H // HEADS) + 2 * -(-G // HEADS)),)](
            qkv, cos, sin, q, key_cache, value_cache, key_scale, value_scale, at,
            *qkv.stride()[:2], *cos.stride()[:2], *q.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
            *scale_strides, T, H, G, S, K, **values, value_width=Kv, value_block=power(Kv),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


UNALIGNED = "tokens", "heads", "groups", "slots"
FORMS = {  # of the published models: widths, pairing, K
    "two axes of 128": ((64, 64), "halves", 128),  # ChatGLM-6B
    "all of 128": ((128,), "halves", 128),  # GLM-130B
    "half of 128": ((64,), "halves", 128),  # GLM-4.5
    "interleaved half of 128": ((64,), "interleaved", 128),  # ChatGLM2, ChatGLM3, GLM-4
    "interleaved all of 64": ((64,), "interleaved", 64),  # GLM-4.7-Flash, the part of a head that is turned
}


def variants(target: Target) -> list[Variant]:
    """What a launch can ask for, in the forms of the published models: both kernels, and the cache in int8."""
    turns = [variant(form, dtype) for form in FORMS for dtype in POINTERS]
    appends = [
        variant(form, dtype, int8)
        for form in FORMS
        for dtype in (torch.float16, torch.bfloat16)
        for int8 in (False, True)
    ]
    return turns + appends


def variant(form: str, dtype: torch.dtype, int8: bool | None = None) -> Variant:
    """`rotary_kernel`, or if int8 is not None `rotary_append_kernel`."""
    widths, pairing, K = FORMS[form]
    values, warps = forms(widths, pairing, K)
    kernel = rotary_kernel if int8 is None else rotary_append_kernel
    types = dict.fromkeys((name for name in kernel.arg_names if name not in values), "i32")
    types |= {name: POINTERS[dtype] for name in ("x", "y", "qkv", "q") if name in types}
    types |= {"cos": "*fp32", "sin": "*fp32"}
    label = f"{form} {POINTERS[dtype][1:]}"
    if int8 is None:
        types["sign"] = "fp32"
    else:
        values |= {"value_width": K, "value_block": K}
        caches = dict.fromkeys(("key_cache", "value_cache"), "*i8" if int8 else POINTERS[dtype])
        types = {name: kind for name, kind in types.items() if name not in values} | caches | {"at": "*i32"}
        if int8:
            types |= {"key_scale": "*fp32", "value_scale": "*fp32"}
            label += " to int8"
        else:
            types = {name: kind for name, kind in types.items() if name not in ("key_scale", "value_scale")}
            values |= {"key_scale": None, "value_scale": None}
    return Variant(label, kernel, types, values, {"num_warps": warps, "enable_fp_fusion": False}, UNALIGNED)


# ----------------------------------------------------------------------------- wrapper


def side_by_side(x: Tensor) -> Tensor:
    """x with the elements of the last axis side by side, copied if need be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def alike(cos: Tensor, sin: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin for so many rows, with the same strides."""
    cos, sin = (side_by_side(table).expand(rows, -1, -1) for table in (cos, sin))
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


@operator("rotary")
def rotary_op(x: Tensor, cos: Tensor, sin: Tensor, widths: Sequence[int], pairing: str, inverse: bool) -> Tensor:
    """x [B, T, heads, K], turned."""
    if not takes_kernel(x):
        return rotary_reference(x, cos, sin, widths=widths, pairing=pairing, inverse=inverse).contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        launch(side_by_side(x), *alike(cos, sin, x.shape[0]), y, widths, pairing, inverse)
    return y


@rotary_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, widths: Sequence[int], pairing: str, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """A turn is linear: of x nothing is needed."""
    _, cos, sin, ctx.widths, ctx.pairing, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The turn back. cos and sin are no parameters: they get no gradient."""
    dx = rotary_op(dy, *ctx.saved_tensors, ctx.widths, ctx.pairing, not ctx.inverse)
    return dx, None, None, None, None, None


rotary_op.register_autograd(backward, setup_context=remember)


@operator("rotary_append", mutates_args=("key_cache", "value_cache", "key_scale", "value_scale"))
def rotary_append_op(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    at: Tensor,
    widths: Sequence[int],
    pairing: str,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    """Queries [B, T, H, K], turned; keys and values go to the cache."""
    if not takes_kernel(qkv):
        return rotary_append_reference(
            qkv, cos, sin, key_cache, value_cache, at,
            widths=widths, pairing=pairing, key_scale=key_scale, value_scale=value_scale,
        ).contiguous()  # fmt: skip
    q = queries_like(qkv, key_cache, value_cache)
    if qkv.numel():
        launch_append(
            side_by_side(qkv), *alike(cos, sin, qkv.shape[0]), q, key_cache, value_cache, at.contiguous(),
            key_scale, value_scale, widths, pairing,
        )  # fmt: skip
    return q


@rotary_append_op.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    at: Tensor,
    widths: Sequence[int],
    pairing: str,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    return queries_like(qkv, key_cache, value_cache)


def query_heads(qkv: Tensor, key_cache: Tensor, value_cache: Tensor) -> int:
    """H, from what the keys and values leave of qkv."""
    G, K, Kv = key_cache.shape[1], key_cache.shape[-1], value_cache.shape[-1]
    return (qkv.shape[-1] - G * (K + Kv)) // K


def queries_like(qkv: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """Empty queries [B, T, H, K]."""
    return qkv.new_empty(*qkv.shape[:2], query_heads(qkv, key_cache, value_cache), key_cache.shape[-1])


def check_turns(x: Tensor, cos: Tensor, sin: Tensor, widths: Sequence[int], pairing: str, head_width: int) -> None:
    """Raise a ValueError unless x [B, T, …] can be turned so."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}; it is {pairing!r}")
    if not widths or any(width < 2 or width % 2 for width in widths) or sum(widths) > head_width:
        raise ValueError(f"widths must be even and together at most a head's {head_width}; they are {tuple(widths)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"what is turned must be floating; it is {x.dtype}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, T = x.shape[:2]
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.ndim == 3 and table.shape[0] in (1, B) and table.shape[1:] == (T, sum(widths) // 2)
        if not fits or (table.dtype, table.device) != (dtype, x.device):
            raise ValueError(
                f"{name} must be {[B, T, sum(widths) // 2]} (or 1 for {B}) {dtype} on {x.device}; "
                f"it is {list(table.shape)} {table.dtype} on {table.device}"
            )


def check_cache(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    at: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """Raise a ValueError unless the caches, their scales and `at` fit qkv [B, T, C]."""
    if qkv.ndim != 3 or key_cache.ndim != 4 or value_cache.ndim != 4:
        raise ValueError("qkv must be [B, T, (H + G) K + G Kv], the caches [B, G, S, K] and [B, G, S, Kv]")
    if key_cache.shape[:3] != value_cache.shape[:3] or key_cache.shape[0] != qkv.shape[0]:
        raise ValueError(
            f"the caches must have the {qkv.shape[0]} rows of qkv and the same groups and slots; "
            f"they are {list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    G, K, Kv = key_cache.shape[1], key_cache.shape[-1], value_cache.shape[-1]
    left = qkv.shape[-1] - G * (K + Kv)
    if left < 0 or left % K:
        raise ValueError(f"of {qkv.shape[-1]} channels, {G} keys of {K} and values of {Kv} leave no queries of {K}")
    if at.shape != qkv.shape[:1] or at.dtype not in (torch.int32, torch.int64) or at.device != qkv.device:
        raise ValueError(
            f"at must be {[qkv.shape[0]]} int32 or int64 on {qkv.device}; "
            f"it is {list(at.shape)} {at.dtype} on {at.device}"
        )
    for name, cache, scale in (("key", key_cache, key_scale), ("value", value_cache, value_scale)):
        dtype = qkv.dtype if scale is None else torch.int8
        if cache.dtype != dtype or cache.device != qkv.device or cache.stride(-1) != 1:
            raise ValueError(
                f"{name}_cache must be {dtype} {'without' if scale is None else 'with'} {name}_scale, on {qkv.device}, "
                f"channels side by side; it is {cache.dtype} on {cache.device} with strides {cache.stride()}"
            )
        if scale is not None and (
            (scale.shape, scale.dtype, scale.device) != (cache.shape[:3], torch.float32, qkv.device)
            or scale.stride(-1) != 1
        ):
            raise ValueError(
                f"{name}_scale must be {list(cache.shape[:3])} torch.float32 on {qkv.device}, slots side by side; "
                f"it is {list(scale.shape)} {scale.dtype} on {scale.device} with strides {scale.stride()}"
            )


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, widths: Sequence[int], pairing: str, inverse: bool = False
) -> Tensor:
    """Queries or keys, turned by the angles of their tokens: equation (1).

    Of a packed qkv [B, T, (H + 2G) K], queries and keys are `qkv[..., : (H + G) * K].unflatten(-1, (-1, K))`.

    Args:
        x: [B, T, heads, K].
        cos: cos θ of every token, [B or 1, T, Σw/2] float32 (float64 if x is), the axes side by side.
        sin: sin θ likewise. Neither gets a gradient.
        widths: Channels that each axis turns.
        pairing: "interleaved" or "halves".
        inverse: Turn back.

    Returns:
        Like x, contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [B, T, heads, K]; it is {list(x.shape)}")
    check_turns(x, cos, sin, widths, pairing, x.shape[-1])
    y: Tensor = rotary_op(x, cos, sin, list(widths), pairing, inverse)
    return y


def rotary_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    at: Tensor,
    *,
    widths: Sequence[int],
    pairing: str,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """Turned queries; turned keys and values are put into the cache, in each row behind what is there.

    Token t of row b goes to slot at[b] + t. Where there is no such slot nothing is written. Lengths stay on the device,
    so the call may stand in a CUDA graph. It writes into its arguments and has no gradient.

    Args:
        qkv: [B, T, (H + G) K + G Kv]: H queries, G keys, G values. H follows from the shapes.
        cos: cos θ of every token, [B or 1, T, Σw/2] float32 (float64 if qkv is), the axes side by side.
        sin: sin θ likewise.
        key_cache: [B, G, S, K] in the dtype of qkv, or int8.
        value_cache: [B, G, S, Kv] in the dtype of qkv, or int8.
        at: [B], int32 or int64: how many tokens each row holds.
        widths: Channels that each axis turns.
        pairing: "interleaved" or "halves".
        key_scale: [B, G, S] float32 for an int8 key_cache, k ≈ scale · int8.
        value_scale: Likewise.

    Returns:
        Queries [B, T, H, K], contiguous.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that do not fit.
    """
    check_cache(qkv, key_cache, value_cache, at, key_scale, value_scale)
    check_turns(qkv, cos, sin, widths, pairing, key_cache.shape[-1])
    q: Tensor = rotary_append_op(
        qkv, cos, sin, key_cache, value_cache, at, list(widths), pairing, key_scale, value_scale
    )
    return q
