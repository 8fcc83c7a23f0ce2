"""Which keys a query sees, what that amounts to, and the same as a dense mask.

Key j is visible to a query at absolute position p iff start ≤ j < length and (j < prefix or segment ≤ j ≤ p). So a
query sees two intervals that do not overlap,

    [start, min(prefix, length))    and    [max(start, segment, prefix), min(p + 1, length)),

and pairs and keys can be counted without a mask. Only what is visible counts as work: a kernel that computes more,
or reads more, gets no credit for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Bounds of every query, all integers that broadcast to [B, T]; S keys.

    `given` are the arguments of the kernel these came from: prefix, start, length and segment, where there are any.
    """

    prefix: Tensor
    start: Tensor
    length: Tensor
    segment: Tensor
    position: Tensor
    keys: int
    given: dict[str, Tensor]

    def intervals(self) -> list[tuple[Tensor, Tensor]]:
        """The two intervals [low, high) of every query, [B, T] each; empty where high is not above low."""
        first = self.start, torch.minimum(self.prefix, self.length)
        second = (
            torch.maximum(torch.maximum(self.start, self.segment), self.prefix),
            torch.minimum(self.position + 1, self.length),
        )
        shape = torch.broadcast_shapes(*(bound.shape for bound in (*first, *second)))
        return [(low.expand(shape), high.expand(shape)) for low, high in (first, second)]

    def counts(self) -> Tensor:
        """How many keys each query sees, [B, T]."""
        return sum(((high - low).clamp(min=0) for low, high in self.intervals()), torch.tensor(0))

    def pairs(self) -> int:
        """How many (query, key) pairs are visible."""
        return int(self.counts().sum())

    def keys_seen(self) -> int:
        """How many keys are seen by any query, over all sequences."""
        changes = torch.zeros(self.counts().shape[0], self.keys + 1, dtype=torch.int64)
        for low, high in self.intervals():
            low, high = low.clamp(0, self.keys).long(), high.clamp(0, self.keys).long()
            some = (high > low).long()
            changes.scatter_add_(1, low, some).scatter_add_(1, high, -some)
        return int((changes.cumsum(1) > 0).sum())

    def dense(
        self, sequences: Sequence[int] | None = None, queries: Tensor | None = None, device: torch.device | None = None
    ) -> Tensor:
        """[B, T, S], True where visible; of some sequences and of some queries only, if so asked."""
        j = torch.arange(self.keys, device=device, dtype=torch.int32)
        shape = self.counts().shape

        def of(bound: Tensor) -> Tensor:
            rows = bound.expand(shape) if sequences is None else bound.expand(shape)[list(sequences)]
            return (rows if queries is None else rows[:, queries])[..., None].to(device, torch.int32)

        inside = (of(self.start) <= j) & (j < of(self.length))
        return inside & ((j < of(self.prefix)) | ((of(self.segment) <= j) & (j <= of(self.position))))


def visibility(batch: int, queries: int, keys: int, **given: Tensor) -> Visibility:
    """From the arguments of `attention`: prefix, start, segment [B] or [B, T], length [B]; absent ones do nothing."""

    def bound(name: str, otherwise: int) -> Tensor:
        value = given.get(name, torch.tensor(otherwise)).cpu().long()
        return value[:, None] if value.ndim == 1 else value

    position = torch.arange(queries)[None].expand(batch, queries) + keys - queries
    start, segment = bound("start", 0).clamp(min=0), bound("segment", 0).clamp(min=0)
    length = bound("length", keys).clamp(max=keys)
    return Visibility(bound("prefix", 0), start, length, segment, position, keys, given)
