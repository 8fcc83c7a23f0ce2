"""Slots: the static cache of the engine, a row for each request that can be answered at the same time.

Every row has room for a learned prefix, for `length` tokens, and for `spare` more: tokens that are written and then
not kept, and at the very end a place that is nobody's, where idle rows write.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glm.cache import Notes, Shape, Tensors


class Slots:
    """Buffers [rows, heads, places, width] of every layer."""

    def __init__(
        self,
        shapes: Sequence[Sequence[Shape]],
        rows: int,
        length: int,
        spare: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        prefix: Sequence[Tensors] | None = None,
    ) -> None:
        """`shapes[layer]`: (heads, width) of each tensor a layer remembers; `prefix[layer]`: what it starts with."""
        self.rows, self.length = rows, length
        self.before = 0 if prefix is None else prefix[0][0].shape[2]
        self.places = self.before + length + spare
        self.prefix = prefix
        self.buffers = [
            tuple(torch.zeros(rows, heads, self.places, width, dtype=dtype, device=device) for heads, width in layer)
            for layer in shapes
        ]
        self.clear(slice(None))

    @property
    def nowhere(self) -> int:
        """The place where idle rows write."""
        return self.places - 1

    @property
    def bytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return sum(buffer.nbytes for layer in self.buffers for buffer in layer)

    def clear(self, rows: slice) -> None:
        """Back to zeros behind the learned prefix: numbers that are not finite must not outlive their request."""
        for i, layer in enumerate(self.buffers):
            for j, buffer in enumerate(layer):
                buffer[rows].zero_()
                if self.prefix is not None:
                    buffer[rows, :, : self.before] = self.prefix[i][j]

    def of(self, rows: slice) -> list[Tensors]:
        """The buffers of some rows, as views, layer by layer."""
        return [tuple(buffer[rows] for buffer in layer) for layer in self.buffers]


def append(buffer: Tensor, x: Tensor, at: Tensor) -> None:
    """Write x [B, T, heads, width] into buffer [B, heads, S, width], row b from place at[b] on."""
    B, T = x.shape[:2]
    place = at[:, None].long() + torch.arange(T, device=at.device)
    row = torch.arange(B, device=at.device)[:, None]
    buffer[row, :, place.clamp(max=buffer.shape[2] - 1)] = x


class Appending:
    """The slots of one layer as the memory of a pure module: see `glm.cache.Memory`."""

    def __init__(self, buffers: Tensors, at: Tensor, keys: int | None, notes: Notes) -> None:
        self.buffers, self.at, self.keys, self.notes = buffers, at, keys, notes

    def extend(self, *new: Tensor) -> Tensors:
        """Write tensors [B, heads, T, width]; return the first `keys` places of each row, or all."""
        for buffer, x in zip(self.buffers, new, strict=True):
            append(buffer, x.transpose(1, 2), self.at)
        return tuple(buffer[:, :, : self.keys] for buffer in self.buffers)
