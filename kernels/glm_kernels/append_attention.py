"""A decode step's attention in one launch: turn queries and keys, put keys and values into the cache, attend.

What `rotary_append` and `decode_attention` do one after the other, for a few new tokens in each row. Between the two
everything would have to be finished before anything could go on, which costs as much as reading 8 MB; here the new
keys and values are at hand where they are attended to, and nobody reads them back from the cache. The kernel is that of
`decode.py`, whose head says how; equation (1) of `rotary.py` is the turn, in float32 and rounded once.

Bytes: those of `decode_attention`, and qkv read and the new keys and values written, B T (H + 2 G) K e and 2 B T G K e.
More than 16 tokens a row are taken 16 by 16.

Layout: qkv with channels side by side, the caches as for `decode_attention`. Heads of up to 256 channels; the reference
takes the rest. There is no backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm_kernels.decode import NEW, WIDEST, New, decode_attention_reference, launch
from glm_kernels.dispatch import takes_kernel
from glm_kernels.operators import operator
from glm_kernels.rotary import (
    alike,
    check_cache,
    check_turns,
    query_heads,
    rotary_append_reference,
    side_by_side,
)


def append_attention_reference(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    at: Tensor,
    length: Tensor,
    *,
    widths: Sequence[int] = (),
    pairing: str = "halves",
    scale: float | None = None,
) -> Tensor:
    """`append_attention` in plain torch."""
    turns = (qkv, qkv) if cos is None or sin is None else (cos, sin)  # without widths nobody looks at them
    q = rotary_append_reference(qkv, *turns, key_cache, value_cache, at, widths=widths, pairing=pairing)
    y = decode_attention_reference(q.transpose(1, 2), key_cache, value_cache, length, scale=scale)
    return y.transpose(1, 2)


def launch_all(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor, value_cache: Tensor, at: Tensor,
    length: Tensor, widths: Sequence[int], pairing: str, scale: float, y: Tensor, **how: Any,
) -> None:  # fmt: skip
    """Fill y [B, T, H, Kv] and the caches' slots from `at` on; `how` as of `decode.launch`."""
    T, G, (K, Kv) = qkv.shape[1], key_cache.shape[1], (key_cache.shape[3], value_cache.shape[3])
    heads = qkv.split((y.shape[2] * K, G * K, G * Kv), dim=-1)
    q, k, v = (x.unflatten(-1, (-1, width)) for x, width in zip(heads, (K, K, Kv), strict=True))
    for start in range(0, T, int(NEW)):
        end = min(start + int(NEW), T)
        some = slice(start, end)
        cosines, sines = (None if x is None else x[:, some] for x in (cos, sin))
        new = New(k[:, some], v[:, some], cosines, sines, at + start if start else at, widths, pairing)
        seen = length - (T - end) if end < T else length
        queries, out = (x[:, some].transpose(1, 2) for x in (q, y))
        launch(queries, key_cache, value_cache, seen, None, scale, None, None, out, new, **how)


@operator("append_attention", mutates_args=("key_cache", "value_cache"))
def append_attention_op(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor, value_cache: Tensor, at: Tensor,
    length: Tensor, widths: Sequence[int], pairing: str, scale: float,
) -> Tensor:  # fmt: skip
    """y [B, T, H, Kv]; keys and values go to the cache."""
    if not takes_kernel(qkv) or max(key_cache.shape[3], value_cache.shape[3]) > WIDEST:
        return append_attention_reference(
            qkv, cos, sin, key_cache, value_cache, at, length, widths=widths, pairing=pairing, scale=scale
        ).contiguous()
    y = result_like(qkv, key_cache, value_cache)
    if y.numel():
        if cos is not None and sin is not None:
            cos, sin = alike(cos, sin, qkv.shape[0])
        at, length = at.contiguous(), length.contiguous()
        launch_all(side_by_side(qkv), cos, sin, key_cache, value_cache, at, length, widths, pairing, scale, y)
    return y


@append_attention_op.register_fake
def _(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor, value_cache: Tensor, at: Tensor,
    length: Tensor, widths: Sequence[int], pairing: str, scale: float,
) -> Tensor:  # fmt: skip
    return result_like(qkv, key_cache, value_cache)


def result_like(qkv: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """Empty y [B, T, H, Kv]."""
    return qkv.new_empty(*qkv.shape[:2], query_heads(qkv, key_cache, value_cache), value_cache.shape[-1])


def append_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    at: Tensor,
    length: Tensor,
    *,
    widths: Sequence[int] = (),
    pairing: str = "halves",
    scale: float | None = None,
) -> Tensor:
    """Attention of T new tokens to what the cache holds and to themselves; they are put into it, turned.

    Token t of row b goes to slot at[b] + t (where there is no such slot nothing is written) and is the key at
    length[b] - T + t. So in a row that is in use at = length - T; one that is not has length 0, sees nothing, and still
    writes where `at` says. All of it is read on the device: the call may stand in a CUDA graph. It writes into its
    arguments and has no gradient.

    Args:
        qkv: [B, T, (H + G) K + G Kv]: H queries, G keys, G values. H follows from the shapes.
        cos: cos θ of every new token, [B or 1, T, Σw/2] float32 (float64 if qkv is), the axes side by side; None where
            nothing is turned.
        sin: sin θ likewise.
        key_cache: [B, G, S, K] in the dtype of qkv.
        value_cache: [B, G, S, Kv] likewise.
        at: [B], int32 or int64: the slot of each row's first new token.
        length: [B], int32 or int64: tokens in the cache, the new ones included; 0 for a row that is not in use.
        widths: Channels that each axis turns, none without cos and sin.
        pairing: "interleaved" or "halves".
        scale: Of the scores, K^-½ by default.

    Returns:
        y [B, T, H, Kv], contiguous; 0 for a query that sees no key.

    Raises:
        ValueError: Shapes, dtypes, devices or strides that do not fit.
    """
    check_cache(qkv, key_cache, value_cache, at, None, None)
    if (cos is None) != (sin is None) or (cos is None) != (len(widths) == 0):
        raise ValueError("cos, sin and widths belong together: give all of them, or none")
    if cos is not None and sin is not None:
        check_turns(qkv, cos, sin, widths, pairing, key_cache.shape[-1])
    if length.shape != at.shape or length.dtype not in (torch.int32, torch.int64) or length.device != qkv.device:
        raise ValueError(
            f"length must be {list(at.shape)} int32 or int64 on {qkv.device}; "
            f"it is {list(length.shape)} {length.dtype} on {length.device}"
        )
    scale = key_cache.shape[-1] ** -0.5 if scale is None else scale
    y: Tensor = append_attention_op(qkv, cos, sin, key_cache, value_cache, at, length, list(widths), pairing, scale)
    return y
