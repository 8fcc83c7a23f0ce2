"""Layout: where every token stands, and which tokens it may see. The idea GLM is named for.

A general language model reads a text with blanks and writes the blanks' contents after it (Du et al. 2022,
arXiv:2103.10360). What it reads sees all of itself; what it writes sees that and what it has written before.
Two position axes say where a token belongs: the first is its place in the text (for a written token, the place
of its blank), the second its place inside the blank (0 for tokens that were read, 1 for the token that starts
a blank). Ordinary causal language models are the case with nothing read and one axis.

Everything is one rule of visibility on columns of keys. Query i of T, the newest of S tokens, is token
t = i + S - T, and sees key j iff

    start ≤ j   and   (j < prefix  or  j ≤ t)

`start` is the number of padding tokens on the left of a row, `prefix` the number of tokens up to the end of what
was read. A query that would see nothing (padding) sees itself, so that its output is finite and meaningless.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glm.errors import LayoutError


class Mask(NamedTuple):
    """What scaled dot-product attention takes: `allowed` bool [B, 1, T, S] or None, and whether causal."""

    allowed: Tensor | None
    causal: bool


EVERYTHING = Mask(None, causal=False)


class Layout:
    """Position ids [B, T, A] and visibility [B, T, S] of T tokens, the newest of S.

    `Layout(positions, visible)` takes any visibility; `Layout.causal`, `Layout.prefix` and `Layout.blanks` build
    the usual ones from the rule above, which costs no memory until a mask is needed.
    """

    def __init__(self, positions: Tensor, visible: Tensor) -> None:
        """Positions: integers [B, T, A]; visible: bool [B, T, S], S ≥ T. Raises LayoutError if they do not fit."""
        if visible.dtype != torch.bool or visible.dim() != 3 or visible.shape[:2] != positions.shape[:2]:
            raise LayoutError(
                f"visible must be bool [B, T, S] with the B and T of positions {list(positions.shape)}, "
                f"not {visible.dtype} {list(visible.shape)}"
            )
        self._set(positions, visible.shape[2])
        self._visible = visible

    def _set(self, positions: Tensor, keys: int) -> None:
        if positions.dim() != 3 or positions.is_floating_point():
            raise LayoutError(
                f"positions must be integers [B, T, A], not {positions.dtype} {list(positions.shape)}"
            )
        if keys < positions.shape[1]:
            raise LayoutError(f"{positions.shape[1]} queries cannot be the newest of {keys} keys")
        self.positions = positions
        self.keys = keys
        self.start: Tensor | None = None  # [B], None = 0
        self.prefix_length: Tensor | None = None  # [B], None = 0
        self._visible: Tensor | None = None  # set where the rule is not used

    @classmethod
    def rule(
        cls,
        positions: Tensor,
        keys: int | None = None,
        *,
        start: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> "Layout":
        """The rule of this file: positions [B, T, A], `keys` S (default T), `start` and `prefix` [B] or None."""
        layout = cls.__new__(cls)
        layout._set(positions, positions.shape[1] if keys is None else keys)
        layout.start, layout.prefix_length = start, prefix
        return layout

    @classmethod
    def causal(cls, batch: int, length: int, device: torch.device | str | None = None) -> "Layout":
        """Positions 0, 1, 2 … on one axis; everybody sees the past: [B, T, 1]."""
        return cls.rule(torch.arange(length, device=device).expand(batch, -1)[..., None])

    @classmethod
    def prefix(
        cls, batch: int, length: int, read: int, blank: int, device: torch.device | str | None = None
    ) -> "Layout":
        """`read` tokens that all see each other, then one blank written at place `blank`: [B, T, 2]."""
        return cls.blanks(read, [(blank, length - read)], device).repeat(batch)

    @classmethod
    def blanks(
        cls, read: int, spans: Sequence[tuple[int, int]], device: torch.device | str | None = None
    ) -> "Layout":
        """One row: `read` tokens of text with blanks, then each `(place of its blank, length)` in the order written.

        A written span has the length of its tokens with the one that starts it. Positions [1, T, 2].
        """
        first = [torch.arange(read)] + [torch.full((length,), place) for place, length in spans]
        second = [torch.zeros(read, dtype=torch.long)] + [torch.arange(1, length + 1) for _, length in spans]
        positions = torch.stack((torch.cat(first), torch.cat(second)), dim=-1)[None].to(device)
        return cls.rule(positions, prefix=torch.tensor([read], device=device))

    def repeat(self, batch: int) -> "Layout":
        """The same row `batch` times."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.expand(batch, *x.shape[1:])

        layout = Layout.rule(self.positions.expand(batch, -1, -1), self.keys)
        layout.start, layout.prefix_length, layout._visible = (
            rows(self.start),
            rows(self.prefix_length),
            rows(self._visible),
        )
        return layout

    @property
    def visible(self) -> Tensor:
        """Who may see whom, bool [B, T, S]: the explicit one, or the rule written out."""
        if self._visible is not None:
            return self._visible
        B, T, _ = self.positions.shape
        j = torch.arange(self.keys, device=self.positions.device)
        t = j[self.keys - T :, None]
        seen = (j <= t)[None]
        if self.prefix_length is not None:
            seen = seen | (j < self.prefix_length[:, None, None])
        if self.start is not None:
            seen = seen & (j >= self.start[:, None, None])
        return seen.expand(B, -1, -1)

    def mask(self, always: int = 0) -> Mask:
        """For attention over `always` columns that every query sees (a learned prefix), then the S keys."""
        B, T, _ = self.positions.shape
        if self._visible is None and self.start is None:
            if T == 1:
                return EVERYTHING
            if self.prefix_length is None and self.keys == T and always == 0:
                return Mask(None, causal=True)
        visible = self.visible
        if always:
            visible = torch.cat((visible.new_ones(B, T, always), visible), dim=-1)
        else:
            t = torch.arange(self.keys - T, self.keys, device=visible.device)
            itself = t[:, None] == torch.arange(self.keys, device=visible.device)
            visible = visible | (itself & ~visible.any(-1, keepdim=True))
        return EVERYTHING if bool(visible.all()) else Mask(visible[:, None], causal=False)

    def following(self, count: int, step: Sequence[int]) -> "Layout":
        """The layout of `count` tokens after these: positions go on by `step` [A], visibility as the last row's."""
        B, _, A = self.positions.shape
        if len(step) != A:
            raise LayoutError(f"these positions have {A} axes, the model's have {len(step)}")
        steps = torch.tensor(list(step), device=self.positions.device)
        counts = torch.arange(1, count + 1, device=self.positions.device)
        positions = self.positions[:, -1:] + counts[:, None] * steps
        if self._visible is None:
            return Layout.rule(positions, self.keys + count, start=self.start, prefix=self.prefix_length)
        seen = self._visible[:, -1:].expand(-1, count, -1)
        among_new = (counts[:, None] >= counts).expand(B, -1, -1)
        return Layout(positions, torch.cat((seen, among_new), dim=-1))


@dataclass(frozen=True)
class Causal:
    """Reading rule of a causal model: real tokens are numbered 0, 1, 2 … and see the past."""

    @property
    def step(self) -> tuple[int, ...]:
        """How the position ids of the next token differ from the last one's."""
        return (1,)

    def read(self, ids: Tensor, real: Tensor | None = None) -> Layout:
        """Ids [B, T], `real` bool [B, T] (False on padding) -> Layout with one axis."""
        if real is None:
            return Layout.causal(*ids.shape, ids.device)
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)[..., None]
        return padded(positions, real, prefix=None)

    def following(self, layout: Layout, count: int) -> Layout:
        """The layout of the next `count` tokens."""
        return layout.following(count, self.step)


@dataclass(frozen=True)
class Blank:
    """Reading rule of a blank-filling model: all up to the first `sop` token is read, the rest is written.

    `masks` are the ids of the blank tokens, the one to be filled first found in this order. With two axes a
    written token has its blank's place and counts 1, 2, 3 … on the second axis. With one axis places go on
    counting, except for blanks whose id is in `fixed`, where the blank's place is repeated.
    """

    sop: int
    masks: tuple[int, ...]
    axes: int
    fixed: tuple[int, ...]

    @property
    def step(self) -> tuple[int, ...]:
        """How the position ids of the next written token differ from the last one's."""
        return (0, 1) if self.axes == 2 else (1,)

    def read(self, ids: Tensor, real: Tensor | None = None) -> Layout:
        """Ids [B, T], `real` bool [B, T] (False on padding) -> Layout with `axes` axes.

        A row without `sop` is read only. Raises LayoutError for a row with `sop` and no blank.
        """
        B, T = ids.shape
        keep = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        positions = torch.zeros(B, T, self.axes, dtype=torch.long)
        prefix = torch.zeros(B, dtype=torch.long)
        for row in range(B):
            where = keep[row].nonzero().flatten().cpu()
            tokens = ids[row].cpu()[where].tolist()
            place, read = self.place(tokens)
            positions[row, where] = place
            prefix[row] = where[read - 1] + 1 if read else 0
        prefix = prefix.to(ids.device)
        if real is None:
            return Layout.rule(positions.to(ids.device), prefix=prefix)
        return padded(positions.to(ids.device), real, prefix)

    def place(self, tokens: list[int]) -> tuple[Tensor, int]:
        """Position ids [T, axes] of one row without padding, and how many of its tokens are read."""
        read = tokens.index(self.sop) if self.sop in tokens else len(tokens)
        written = torch.arange(1, len(tokens) - read + 1)
        place = torch.zeros(len(tokens), 2, dtype=torch.long)
        place[:, 0] = torch.arange(len(tokens))
        place[read:, 1] = written
        if len(written):
            mask = next((mask for mask in self.masks if mask in tokens), None)
            if mask is None:
                raise LayoutError(
                    f"ids hold the start token {self.sop} but none of the blanks {list(self.masks)} it fills: "
                    "put a mask token before it, or give a Layout"
                )
            if self.axes == 2 or mask in self.fixed:
                place[read:, 0] = tokens.index(mask)
        return place[:, : self.axes], read

    def following(self, layout: Layout, count: int) -> Layout:
        """The layout of the next `count` written tokens. Raises LayoutError while a row is still being read."""
        if self.axes == 2 and bool((layout.positions[:, -1, 1] == 0).any()):
            raise LayoutError(
                f"what is read sees all of itself: give it in one call up to and with the start token {self.sop}"
            )
        if self.axes == 1 and layout.positions.shape[1] > 1:
            last = layout.positions[:, -2:, 0]
            if bool((last[:, 0] == last[:, 1]).any()):
                raise LayoutError("a one-axis blank with a fixed place cannot be continued without a Layout")
        return layout.following(count, self.step)


LayoutRule = Causal | Blank


def padded(positions: Tensor, real: Tensor, prefix: Tensor | None) -> Layout:
    """The rule for rows with padding: on the left it is a `start`, anywhere else it is written out."""
    if real.dtype != torch.bool or real.shape != positions.shape[:2]:
        raise LayoutError(
            f"real must be bool {list(positions.shape[:2])}, not {real.dtype} {list(real.shape)}"
        )
    start = real.shape[1] - real.sum(-1)
    everywhere = Layout.rule(positions, start=start, prefix=prefix)
    on_the_left = torch.arange(real.shape[1], device=real.device) >= start[:, None]
    if bool((on_the_left == real).all()):
        return everywhere if bool(start.any()) else Layout.rule(positions, prefix=prefix)
    columns = Layout.rule(positions, prefix=prefix).visible & real[:, None, :]
    return Layout(positions, columns)
