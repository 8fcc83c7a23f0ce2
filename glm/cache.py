"""What attention remembers between steps: the keys and values of every token so far, layer by layer.

Memory is `2 · L · G · K` numbers a token. A cache is allocated once for its full length, and every step writes its
tokens behind those already there. A learned prefix (P-Tuning v2, Liu et al. 2021, arXiv:2110.07602) is nothing but
what a memory holds before the first token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glm.errors import CacheError
from glm.layout import Layout

Shape = tuple[int, int]  # heads, width
Tensors = tuple[Tensor, ...]
Notes = dict[str, Tensor]
"""What layers leave for those above them in the same pass, by name; nothing of it is kept after that."""


class Passing:
    """The memory of one layer in a pass without a cache: the prefix, if any, then the tokens of this call."""

    def __init__(self, prefix: Tensors | None, notes: Notes) -> None:
        self.prefix = prefix
        self.notes = notes

    def extend(self, *new: Tensor) -> Tensors:
        """Tensors [B, heads, T, width] -> the same with the prefix before them, [B, heads, p + T, width]."""
        if self.prefix is None:
            return new
        return tuple(
            torch.cat((old.expand(x.shape[0], -1, -1, -1), x), dim=2) for old, x in zip(self.prefix, new, strict=True)
        )


class Slots:
    """The memory of one layer in a cache: buffers [B, heads, p + length, width], filled from the left."""

    def __init__(self, buffers: Tensors, filled: int, notes: Notes) -> None:
        self.buffers = buffers
        self.filled = filled
        self.notes = notes

    def extend(self, *new: Tensor) -> Tensors:
        """Write tensors [B, heads, T, width] behind what is there; return all so far, as views."""
        end = self.filled + new[0].shape[2]
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, self.filled : end] = x
        return tuple(buffer[:, :, :end] for buffer in self.buffers)


class Cache:
    """Room for `length` tokens in each of `batch` rows; made by `GLM.new_cache`."""

    def __init__(
        self,
        shapes: Sequence[Sequence[Shape]],
        batch: int,
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        prefix: Sequence[Tensors] | None = None,
    ) -> None:
        """`shapes[layer]`: (heads, width) of each tensor a layer remembers; `prefix[layer]`: what it starts with."""
        self.batch, self.length = batch, length
        self.before = 0 if prefix is None else prefix[0][0].shape[2]
        self.filled = 0
        self.layout: Layout | None = None
        self.buffers = [
            tuple(
                torch.zeros(batch, heads, self.before + length, width, dtype=dtype, device=device)
                for heads, width in layer
            )
            for layer in shapes
        ]
        for layer, start in zip(self.buffers, prefix or (), strict=False):
            for buffer, x in zip(layer, start, strict=True):
                buffer[:, :, : self.before] = x

    def __len__(self) -> int:
        """Tokens held."""
        return self.filled

    @property
    def bytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return sum(buffer.nbytes for layer in self.buffers for buffer in layer)

    def room_for(self, batch: int, tokens: int) -> None:
        """Raise CacheError unless `tokens` more fit into `batch` rows."""
        if batch != self.batch:
            raise CacheError(f"the cache was made for {self.batch} rows, not {batch}")
        if self.filled + tokens > self.length:
            raise CacheError(
                f"{tokens} tokens do not fit: the cache holds {self.filled} of {self.length}; "
                "make a longer one with model.new_cache(batch, length)"
            )

    def memories(self) -> list[Slots]:
        """One memory a layer, at the present end."""
        notes: Notes = {}
        return [Slots(buffers, self.before + self.filled, notes) for buffers in self.buffers]

    def rewind(self, layout: Layout) -> None:
        """Forget all tokens behind those of `layout`, which is `self.layout` or was it before, or one without its last.

        Raises CacheError for a layout that reaches further than the cache.
        """
        if layout.keys > self.filled or layout.positions.shape[0] != self.batch:
            raise CacheError(f"there is no way back to {layout.keys} tokens from {self.filled}")
        self.filled = layout.keys
        self.layout = layout

    def advance(self, layout: Layout) -> None:
        """The tokens of `layout` have been written by every layer."""
        self.filled += layout.positions.shape[1]
        self.layout = layout


Memory = Passing | Slots
