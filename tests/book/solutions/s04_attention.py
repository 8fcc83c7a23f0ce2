"""Solutions of chapter 4, right and wrong."""

import math

import torch
from torch import Tensor

import glm
from glm.info import parameters


def mixed(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of as many key heads as query heads."""
    scores = (q @ k.mT * scale).masked_fill(~visible[:, None], -math.inf)
    return scores.softmax(-1) @ v


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return mixed(q, k, v, visible, q.shape[-1] ** -0.5)


def groups_tiled(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Query head h with the key head h modulo G."""
    n = q.shape[1] // k.shape[1]
    return mixed(q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1), visible, q.shape[-1] ** -0.5)


def not_scaled(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return grouped_attention(q * q.shape[-1] ** 0.5, k, v, visible)


def sees_everything(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return grouped_attention(q, k, v, torch.ones_like(visible))


def step(
    x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, keys: Tensor, values: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    G, K = keys.shape[1], keys.shape[3]
    rows = (x @ qkv.T + bias).unflatten(-1, (-1, K)).transpose(1, 2)  # [B, H + 2G, 1, K]
    q, k, v = rows.split((heads, G, G), dim=1)
    keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    visible = torch.ones(x.shape[0], 1, keys.shape[2], dtype=torch.bool)
    y = grouped_attention(q, keys, values, visible)
    return y.transpose(1, 2).flatten(2) @ out.T, keys, values


def forgets_itself(
    x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, keys: Tensor, values: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The new token sees the cache and not itself."""
    _, k, v = step(x, qkv, bias, out, keys, values, heads)
    q = (x @ qkv.T + bias).unflatten(-1, (-1, keys.shape[3])).transpose(1, 2)[:, :heads]
    visible = torch.ones(x.shape[0], 1, keys.shape[2], dtype=torch.bool)
    return grouped_attention(q, keys, values, visible).transpose(1, 2).flatten(2) @ out.T, k, v


def values_before_keys(
    x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, keys: Tensor, values: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = keys.shape[1] * keys.shape[3]
    order = torch.cat((torch.arange(len(bias) - 2 * n), torch.arange(len(bias) - 2 * n, len(bias)).roll(n)))
    return step(x, qkv[order], bias[order], out, keys, values, heads)


def new_token_in_front(
    x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, keys: Tensor, values: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    y, k, v = step(x, qkv, bias, out, keys, values, heads)
    return y, k.roll(1, dims=2), v.roll(1, dims=2)


def flat_rows(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def as_they_are(rows: Tensor, heads: int) -> Tensor:
    return rows


def other_way(rows: Tensor, heads: int) -> Tensor:
    """From the flat order to the order of heads."""
    return rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def equal_length(spec: glm.Spec) -> int:
    token = sum(2 * block.mixer.groups * block.mixer.head_width for block in spec.blocks)
    return math.ceil(parameters(spec) / token)


def with_query_heads(spec: glm.Spec) -> int:
    token = sum(2 * block.mixer.heads * block.mixer.head_width for block in spec.blocks)
    return math.ceil(parameters(spec) / token)


def one_layer(spec: glm.Spec) -> int:
    mixer = spec.blocks[0].mixer
    return math.ceil(parameters(spec) / (2 * mixer.groups * mixer.head_width))


RIGHT = {"4.1": [grouped_attention], "4.2": [step], "4.3": [flat_rows], "4.4": [equal_length]}
WRONG = {
    "4.1": [(groups_tiled, "result"), (not_scaled, "result"), (sees_everything, "result")],
    "4.2": [(forgets_itself, "y"), (values_before_keys, "y"), (new_token_in_front, "keys")],
    "4.3": [(as_they_are, "result"), (other_way, "result")],
    "4.4": [(with_query_heads, "result"), (one_layer, "result")],
}
