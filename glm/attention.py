"""Attention: every token asks a question of all it may see.

    y = W_o concat_h softmax(q_h k_g(h)ᵀ / √K + mask) v_g(h) (+ bias)      (Vaswani et al. 2017, arXiv:1706.03762)

H query heads share G key heads, H/G neighbours each: G = H is multi-head, G = 1 multi-query (Shazeer 2019,
arXiv:1911.02150), between them grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.cache import Memory, Shape
from glm.layout import Mask
from glm.linear import Weights
from glm.norms import Norm
from glm.positions import Rotation
from glm.shares import Cut, Run, columns, rows


@dataclass(frozen=True)
class Attention:
    """H `heads`, G `groups` of key heads, K channels a head (`head_width`).

    `qk_norm` normalises every query and key head before the rotation (Henry et al. 2020, arXiv:2010.04245); None
    leaves them as they are.
    """

    heads: int
    groups: int
    head_width: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: Norm | None = None

    def build(self, width: int, weights: Weights) -> nn.Module:
        """A module over [B, T, width] whose matrices are stored as `weights` says."""
        return AttentionModule(self, width, weights)

    @property
    def remembers(self) -> tuple[Shape, ...]:
        """(heads, width) of what a cache keeps for every token: a key and a value."""
        return ((self.groups, self.head_width), (self.groups, self.head_width))

    @property
    def plan(self) -> Mapping[str, Cut]:
        """How the matrices are dealt out to ranks: whole heads, of q, k and v each."""
        q = Run("query heads", self.heads, self.head_width)
        k = Run("key heads", self.groups, self.head_width, repeated=True)
        return {"qkv": rows(q, k, k), "out": columns(q)}

    def share(self, rank: int, ranks: int) -> "Attention":
        """What one of `ranks` ranks holds: fewer heads, and the key heads that go with them."""
        return replace(self, heads=self.heads // ranks, groups=max(1, self.groups // ranks))

    def working(self, width: int) -> int:
        """Numbers that a token takes in a forward pass, at most: q, k, v as they come, turned, and laid out."""
        return 3 * (self.heads + 2 * self.groups) * self.head_width

    def looking(self, queries: int, keys: int, itemsize: int) -> int:
        """Bytes beside that, for so many queries to so many keys, of `itemsize` a number: they are read in place."""
        return 0


class AttentionModule(nn.Module):
    """Queries, keys and values from one matrix, its rows in the order q heads, k heads, v heads."""

    def __init__(self, spec: Attention, width: int, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        H, G, K = spec.heads, spec.groups, spec.head_width
        self.qkv = weights.linear(width, (H + 2 * G) * K, spec.qkv_bias)
        self.qk_norm = nn.Identity() if spec.qk_norm is None else HeadNorms(spec.qk_norm, H, G, K)
        self.out = weights.linear(H * K, width, spec.out_bias)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, memory: Memory) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` gives the keys and values of earlier tokens and keeps the new ones."""
        H, G, K = self.spec.heads, self.spec.groups, self.spec.head_width
        qk, v = self.qkv(x).unflatten(-1, (-1, K)).split((H + G, G), dim=2)  # [B T heads K]
        q, k = rotation(self.qk_norm(qk)).split((H, G), dim=2)
        k, v = memory.extend(k.transpose(1, 2), v.transpose(1, 2))  # [B G S K]
        y = attend(q.transpose(1, 2), k, v, mask)  # [B H T K]
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class HeadNorms(nn.Module):
    """One norm for every query head and one for every key head."""

    def __init__(self, norm: Norm, heads: int, groups: int, head_width: int) -> None:
        super().__init__()
        self.heads = (heads, groups)
        self.q, self.k = norm.build(head_width), norm.build(head_width)

    def forward(self, qk: Tensor) -> Tensor:
        """[B, T, H + G, K] -> the same."""
        q, k = qk.split(self.heads, dim=2)
        return torch.cat((self.q(q), self.k(k)), dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K]; None is 1 / √K."""
    B, H, T, K = q.shape
    G = k.shape[1]
    if T == 1:  # the heads of a group are queries at the same place: nothing needs repeating
        y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, K), k, v, attn_mask=mask.allowed, scale=scale)
        return y.reshape(B, H, T, -1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.allowed, is_causal=mask.causal, enable_gqa=H != G, scale=scale
    )
