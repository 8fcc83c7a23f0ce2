"""Shares: which part of a matrix each of several ranks holds, so that what they compute adds up.

Both sublayers of a block are sums over things that do not know of each other – heads, inner channels, experts:

    W_out f(W_in x) = Σ_r W_out[:, r] f_r(W_in[r] x)                          (Shoeybi et al. 2019, arXiv:1909.08053)

So a rank that holds some rows of the matrices going in and the same columns of the matrix coming out is a narrower
sublayer of the same kind, and the whole is the sum over ranks. `plan` of an idea's spec says how its matrices are cut,
by the name of the module; what it does not name is held whole by every rank. `share` is the spec of the narrower one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm.errors import ParallelError


@dataclass(frozen=True)
class Run:
    """`units` of `size` neighbours along an axis of a matrix, dealt out in order and never broken.

    Every rank gets equally many. Where that does not go up, `repeated` units (key heads, which several query heads
    share anyway) may be fewer than the ranks, and are then held by several ranks each; `ragged` ones (tokens of a
    vocabulary) are fewer on the last ranks.
    """

    what: str  # as an error calls them
    units: int
    size: int = 1
    repeated: bool = False
    ragged: bool = False

    def held(self, rank: int, ranks: int) -> range:
        """The indices that a rank holds, counted from the run's beginning. Raises ParallelError."""
        if self.ragged:
            each = -(-self.units // ranks)
            first, last = min(rank * each, self.units), min((rank + 1) * each, self.units)
        elif self.units % ranks == 0 or (self.repeated and ranks % self.units == 0):
            first = rank * self.units // ranks
            last = first + max(1, self.units // ranks)
        else:
            raise ParallelError(
                f"{self.units} {self.what} cannot be dealt out to {ranks} processes: start a number that divides them"
            )
        return range(first * self.size, last * self.size)

    @property
    def length(self) -> int:
        """Indices of the whole run."""
        return self.units * self.size


@dataclass(frozen=True)
class Cut:
    """A matrix cut across `axis` – 0 its rows (outputs), 1 its columns (inputs) – which consists of these runs.

    Each run is dealt out by itself: of q | k | v or gate | up a rank holds some of every part. Biases and scales of
    rows are cut with them. The bias of a matrix cut across its columns is added once, by the first rank.
    """

    axis: int
    runs: tuple[Run, ...]

    def held(self, rank: int, ranks: int) -> list[int]:
        """The indices along the axis that a rank holds, in its order. Raises ParallelError."""
        indices, start = [], 0
        for run in self.runs:
            indices += [start + i for i in run.held(rank, ranks)]
            start += run.length
        return indices

    @property
    def length(self) -> int:
        """Indices of the whole axis."""
        return sum(run.length for run in self.runs)


def rows(*runs: Run) -> Cut:
    """Outputs are dealt out."""
    return Cut(0, runs)


def columns(*runs: Run) -> Cut:
    """Inputs are dealt out: the outputs are parts of a sum."""
    return Cut(1, runs)


@dataclass(frozen=True)
class Share:
    """What a rank holds of one tensor: the indices `held` along `dim`, in this order; zeros where it is `void`."""

    dim: int
    held: Sequence[int]
    void: bool = False

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of the share of a tensor of shape `whole`."""
        return (*whole[: self.dim], len(self.held), *whole[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """A copy of the share of `whole`."""
        part = whole.index_select(self.dim, torch.tensor(self.held, device=whole.device))
        return part.zero_() if self.void else part
