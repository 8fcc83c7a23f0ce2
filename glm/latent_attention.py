"""Latent attention: keys and values of all heads are made from one short vector a token, and only that is remembered.

    c = n(W_c x)                      the latent, R channels                  r = rotate(W_r x)   one rotary key for all
    k_h = [U_h c, r]                  v_h = V_h c                             q_h = [a_h, rotate(b_h)]
    y = W_o concat_h softmax(q_h k_hᵀ / √(N + P) + mask) v_h

(DeepSeek-AI 2024, arXiv:2405.04434.) N channels of a query meet the latent's, P carry the position. Queries may come
through a bottleneck of their own. A cache holds [c, r], R + P numbers a token whatever the number of heads.

There are two ways to compute this. The naive form writes k_h and v_h out for every key, R (N + V) products each, and
then does N + P + V for a pair of query and key. The absorbed form moves U_h to the query and V_h to the result, since
a_h · U_h c = U_hᵀ a_h · c and Σ p V_h c = V_h Σ p c. That is R (N + V) products for every query instead, and all heads
attend to the remembered vectors as they are, one key head that is also the value: 2 (R + P) for a pair. Reading a
prompt is cheaper in the naive form, decoding in the absorbed one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from glm.attention import attend
from glm.cache import Memory, Shape
from glm.layout import Mask
from glm.linear import Weights
from glm.norms import Norm
from glm.positions import Rotation
from glm.shares import Cut, Run, columns, rows


@dataclass(frozen=True)
class LatentAttention:
    """The sizes in the equations above.

    heads       H
    query_rank  channels of the queries' own bottleneck; None: there is none
    rank        R, channels of the latent
    plain       N, channels of a query head that meet the latent's
    rotary      P, channels of a query head that carry the position
    value       channels of a value head
    norm        n, of the latent and of the queries' bottleneck
    bias        of the matrices into latent and bottleneck, and of W_o
    """

    heads: int
    query_rank: int | None
    rank: int
    plain: int
    rotary: int
    value: int
    norm: Norm
    bias: bool

    def build(self, width: int, weights: Weights) -> nn.Module:
        """A module over [B, T, width] whose matrices are stored as `weights` says."""
        return LatentAttentionModule(self, width, weights)

    @property
    def remembers(self) -> tuple[Shape, ...]:
        """(heads, width) of what a cache keeps for every token: the latent and the rotated key, side by side."""
        return ((1, self.rank + self.rotary),)

    @property
    def plan(self) -> Mapping[str, Cut]:
        """How the matrices are dealt out to ranks: whole heads; every rank has the latent."""
        queries = rows(Run("query heads", self.heads, self.plain + self.rotary))
        keys_and_values = rows(Run("query heads", self.heads, self.plain + self.value))
        out = columns(Run("query heads", self.heads, self.value))
        return {"query": queries, "query_up": queries, "up": keys_and_values, "out": out}

    def share(self, rank: int, ranks: int) -> "LatentAttention":
        """What one of `ranks` ranks holds: fewer heads."""
        return replace(self, heads=self.heads // ranks)

    def working(self, width: int) -> int:
        """Numbers that a token takes in a forward pass, at most: queries as they come, turned, and laid out."""
        return self.heads * 3 * (self.plain + self.rotary)

    def looking(self, queries: int, keys: int, itemsize: int) -> int:
        """Bytes beside that, for so many queries to so many keys, with numbers of `itemsize`.

        In the naive form keys and values of all heads are written out, and once more as they are laid out; torch's
        fused attention wants both equally wide, and without it there are the scores of all pairs, masked, and their
        softmax. In the absorbed form there are the queries moved to the latent, and what they find there.
        """
        if self.absorbing_is_cheaper(queries, keys):
            return queries * self.heads * 2 * (self.rank + self.rotary) * itemsize
        scores = 0 if self.plain + self.rotary == self.value else 3 * queries * keys
        return self.heads * (keys * 2 * (self.plain + self.rotary + self.value) + scores) * itemsize

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form takes fewer products for so many queries and keys."""
        N, P, R, V = self.plain, self.rotary, self.rank, self.value
        pairs, moved = queries * keys, R * (N + V)
        return pairs * 2 * (R + P) + queries * moved < pairs * (N + P + V) + keys * moved


class LatentAttentionModule(nn.Module):
    """Latent attention in whichever form takes fewer products, unless `absorbed` says which."""

    def __init__(self, spec: LatentAttention, width: int, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.absorbed: bool | None = None
        queries = spec.heads * (spec.plain + spec.rotary)
        if spec.query_rank is None:
            self.query = weights.linear(width, queries, False)
        else:
            self.query_down = weights.linear(width, spec.query_rank, spec.bias)
            self.query_norm = spec.norm.build(spec.query_rank)
            self.query_up = weights.linear(spec.query_rank, queries, False)
        self.down = weights.linear(width, spec.rank + spec.rotary, spec.bias)
        self.norm = spec.norm.build(spec.rank)
        self.up = weights.linear(spec.rank, spec.heads * (spec.plain + spec.value), False)
        self.out = weights.linear(spec.heads * spec.value, width, spec.bias)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, memory: Memory) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` gives the latents of earlier tokens and keeps the new ones."""
        (latents,) = memory.extend(self.latent(x, rotation))
        return self.answer(self.queries(self.bottleneck(x), rotation), latents, mask)

    def bottleneck(self, x: Tensor) -> Tensor:
        """What queries are made from: [B, T, D] -> [B, T, query rank], or the stream itself."""
        if self.spec.query_rank is None:
            return x
        y: Tensor = self.query_norm(self.query_down(x))
        return y

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Query heads, rotated: [B, T, query rank] -> [B, H, T, N + P]."""
        N, P = self.spec.plain, self.spec.rotary
        q = self.query(x) if self.spec.query_rank is None else self.query_up(x)
        plain, rotary = q.unflatten(-1, (-1, N + P)).split((N, P), dim=-1)
        return torch.cat((plain, rotation(rotary)), dim=-1).transpose(1, 2)

    def latent(self, x: Tensor, rotation: Rotation) -> Tensor:
        """What is remembered of a token, [c, r]: [B, T, D] -> [B, 1, T, R + P]."""
        c, r = self.down(x).split((self.spec.rank, self.spec.rotary), dim=-1)
        return torch.cat((self.norm(c), rotation(r[:, :, None])[:, :, 0]), dim=-1)[:, None]

    def answer(self, q: Tensor, latents: Tensor, mask: Mask) -> Tensor:
        """Queries [B, H, T, N + P], latents [B, 1, S, R + P] -> [B, T, D]."""
        absorbed = self.absorbed
        if absorbed is None:
            absorbed = self.spec.absorbing_is_cheaper(q.shape[2], latents.shape[2])
        y = (self.attend_absorbed if absorbed else self.attend_naive)(q, latents, mask)  # [B H T value]
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def attend_naive(self, q: Tensor, latents: Tensor, mask: Mask) -> Tensor:
        """Keys and values written out: -> [B, H, T, value]."""
        N, V = self.spec.plain, self.spec.value
        c, r = latents.split((self.spec.rank, self.spec.rotary), dim=-1)
        plain, v = self.up(c[:, 0]).unflatten(-1, (-1, N + V)).transpose(1, 2).split((N, V), dim=-1)  # [B H S …]
        k = torch.cat((plain, r.expand(-1, plain.shape[1], -1, -1)), dim=-1)
        return attend(q, k, v, mask)

    def attend_absorbed(self, q: Tensor, latents: Tensor, mask: Mask) -> Tensor:
        """All heads attend to the latents themselves: -> [B, H, T, value]."""
        N, V = self.spec.plain, self.spec.value
        up: Tensor = self.up.dense(q.dtype)  # type: ignore[operator]
        into, from_ = up.unflatten(0, (-1, N + V)).split((N, V), dim=1)  # [H N R], [H V R]
        plain, rotary = q.split((N, self.spec.rotary), dim=-1)
        asked = torch.cat((torch.einsum("bhtn,hnr->bhtr", plain, into), rotary), dim=-1)
        found = attend(asked, latents, latents, mask, scale=q.shape[-1] ** -0.5)[..., : self.spec.rank]
        return torch.einsum("bhtr,hvr->bhtv", found, from_)
