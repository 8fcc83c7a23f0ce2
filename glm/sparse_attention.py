"""Sparse attention: a small indexer reads all the past, and attention only what the indexer finds worth it.

    score(t, s) = Σ_j w_j(x_t) relu(q_j(t) · k(s)) / √(K J)          J index heads of K channels, one key for all
    token t attends to those of the `top` highest scores among the tokens it may see

(DeepSeek Sparse Attention: DeepSeek-AI 2025, arXiv:2512.02556.) What attends is latent attention, and the indexer's
queries are made from the bottleneck of its queries. The key goes through a norm of its own, and the first channels of
queries and keys are rotated like those of the attention. A cache also holds the indexer's keys.

A layer without an indexer attends to what the nearest one below it with an indexer has chosen (arXiv:2603.12201).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from glm.cache import Memory, Shape
from glm.errors import ConfigError
from glm.latent_attention import LatentAttention, LatentAttentionModule
from glm.layout import Mask
from glm.linear import Weights
from glm.norms import Norm, wide
from glm.positions import Rotation
from glm.shares import Cut

CHOSEN = "chosen keys"  # what a layer calls its choice for those above it


@dataclass(frozen=True)
class Indexer:
    """J `heads` of K `width` channels choose the `top` keys of every query; `norm` is that of the index keys."""

    heads: int
    width: int
    top: int
    norm: Norm


@dataclass(frozen=True)
class SparseAttention:
    """`attention` to the keys that `indexer` chooses; None: to those that a layer below has chosen."""

    attention: LatentAttention
    indexer: Indexer | None

    def build(self, width: int, weights: Weights) -> nn.Module:
        """A module over [B, T, width]. Raises ConfigError where the attention has no bottleneck to index by."""
        rank, rotary = self.attention.query_rank, self.attention.rotary
        if self.indexer is not None and (rank is None or self.indexer.width < rotary):
            raise ConfigError("an indexer needs the bottleneck of queries, and heads as wide as the channels that turn")
        return SparseAttentionModule(self, width, weights)

    @property
    def remembers(self) -> tuple[Shape, ...]:
        """(heads, width) of what a cache keeps for every token: that of the attention, and the index key."""
        return (*self.attention.remembers, *(() if self.indexer is None else ((1, self.indexer.width),)))

    @property
    def plan(self) -> Mapping[str, Cut]:
        """How the matrices are dealt out to ranks: those of the attention; every rank has the indexer."""
        return {f"attention.{name}": cut for name, cut in self.attention.plan.items()}

    def share(self, rank: int, ranks: int) -> "SparseAttention":
        """What one of `ranks` ranks holds: fewer heads of the attention, which see what all see."""
        return replace(self, attention=self.attention.share(rank, ranks))

    def working(self, width: int) -> int:
        """Numbers that a token takes in a forward pass, at most, beside its scores."""
        return self.attention.working(width)

    def looking(self, queries: int, keys: int, itemsize: int) -> int:
        """Bytes beside that, for so many queries to so many keys, with numbers of `itemsize`.

        For the attention, and before it for every pair four numbers in float32: the sum of the scores so far, and of
        one head its product, what is above zero of that, and that weighed. Attention then sees a mask of its own.
        """
        pairs = queries * keys
        scores = 0 if self.indexer is None or keys <= self.indexer.top else 4 * torch.float32.itemsize * pairs
        return max(scores, self.attention.looking(queries, keys, itemsize) + (2 + itemsize) * pairs)


class SparseAttentionModule(nn.Module):
    """The equations at the top of this file."""

    def __init__(self, spec: SparseAttention, width: int, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.attention = LatentAttentionModule(spec.attention, width, weights)
        self.indexer = None
        if spec.indexer is not None and spec.attention.query_rank is not None:
            self.indexer = IndexerModule(spec.indexer, spec.attention.query_rank, width, weights)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, memory: Memory) -> Tensor:
        """[B, T, D] -> [B, T, D]; `memory` gives latents and index keys of earlier tokens and keeps the new ones."""
        asked = self.attention.bottleneck(x)
        latent = self.attention.latent(x, rotation)
        if self.indexer is None:
            (latents,) = memory.extend(latent)
            chosen = memory.notes[CHOSEN]
        else:
            latents, keys = memory.extend(latent, self.indexer.key(x, rotation))
            chosen = memory.notes[CHOSEN] = self.indexer(x, asked, keys, rotation, mask)
        return self.attention.answer(self.attention.queries(asked, rotation), *only(chosen, latents, mask))


def only(chosen: Tensor, latents: Tensor, mask: Mask) -> tuple[Tensor, Mask]:
    """The latents [B, 1, S, R] that are worth reading, and which of them a query sees; `chosen` is [B, T, k]."""
    B, T, k = chosen.shape
    S = latents.shape[2]
    if k == S:
        return latents, mask
    if T == 1:  # the others need not even be read
        allowed = None if mask.allowed is None else mask.allowed.expand(B, 1, 1, S).gather(-1, chosen[:, None])
        return latents.take_along_dim(chosen[:, :, :, None], dim=2), Mask(allowed, causal=False)
    picked = torch.zeros(B, T, S, dtype=torch.bool, device=latents.device).scatter(-1, chosen, True)
    return latents, Mask((picked & visible(mask, T, S, latents.device))[:, None], causal=False)


def visible(mask: Mask, queries: int, keys: int, device: torch.device) -> Tensor:
    """A mask written out: bool [B or 1, T, S]."""
    if mask.allowed is not None:
        return mask.allowed[:, 0]
    everything = torch.ones(1, queries, keys, dtype=torch.bool, device=device)
    return everything.tril() if mask.causal else everything


class IndexerModule(nn.Module):
    """Chooses, for every query, the keys with the highest scores."""

    def __init__(self, spec: Indexer, rank: int, width: int, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.query = weights.linear(rank, spec.heads * spec.width, False)
        self.down = weights.linear(width, spec.width, False)
        self.norm = spec.norm.build(spec.width)
        self.weigh = weights.linear(width, spec.heads, False)

    def key(self, x: Tensor, rotation: Rotation) -> Tensor:
        """The one key that all index heads share: [B, T, D] -> [B, 1, T, K]."""
        return rotation(self.norm(self.down(x))[:, :, None]).transpose(1, 2)

    @torch.no_grad()
    def forward(self, x: Tensor, asked: Tensor, keys: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        """Stream [B, T, D], bottleneck [B, T, …] and index keys [B, 1, S, K] -> numbers of the chosen keys [B, T, k].

        Where a query sees fewer than k keys, some of the chosen are such as it does not see.
        """
        J, K = self.spec.heads, self.spec.width
        T, S = x.shape[1], keys.shape[2]
        if self.spec.top >= S:
            return torch.arange(S, device=x.device).expand(*x.shape[:2], -1)
        q = wide(rotation(self.query(asked).unflatten(-1, (J, K)))).unbind(2)  # J of [B T K]
        w = (wide(self.weigh(x)) * (J * K) ** -0.5).unbind(-1)  # J of [B T]
        k = wide(keys[:, 0]).transpose(1, 2)  # [B K S]
        scores = torch.zeros(x.shape[0], T, S, dtype=k.dtype, device=k.device)
        for q_j, w_j in zip(q, w, strict=True):  # head by head, since all at once are J times as many numbers
            scores += w_j[..., None] * (q_j @ k).relu()
        return scores.masked_fill(~visible(mask, T, S, k.device), -torch.inf).topk(self.spec.top, dim=-1).indices
