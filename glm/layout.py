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
        self._set(positions, visible.shape[2], visible)

    def _set(self, positions: Tensor, keys: int, visible: Tensor | None) -> None:
        if positions.dim() != 3 or positions.is_floating_point():
            raise LayoutError(f"positions must be integers [B, T, A], not {positions.dtype} {list(positions.shape)}")
        if keys < positions.shape[1]:
            raise LayoutError(f"{positions.shape[1]} queries cannot be the newest of {keys} keys")
        self.positions = positions
        self.keys = keys
        self.start: Tensor | None = None  # [B], None = 0
        self.prefix_length: Tensor | None = None  # [B], None = 0
        self.step: Tensor | None = None  # [B, A], how positions go on; None leaves it to the reading rule
        self.reading = False  # whether a row is still being read, and cannot be continued
        self._visible = visible  # None: by the rule

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
        layout._set(positions, positions.shape[1] if keys is None else keys, None)
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
    def blanks(cls, read: int, spans: Sequence[tuple[int, int]], device: torch.device | str | None = None) -> "Layout":
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
        layout.start, layout.prefix_length = rows(self.start), rows(self.prefix_length)
        layout.step, layout.reading, layout._visible = rows(self.step), self.reading, rows(self._visible)
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

    @property
    def explicit(self) -> bool:
        """Whether visibility was given, instead of following from the rule of this file."""
        return self._visible is not None

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
        if self._visible is not None and bool(visible.all()):
            return EVERYTHING
        return Mask(visible[:, None], causal=False)

    def without_last(self, count: int) -> "Layout":
        """The layout of all but the last `count` of these tokens."""
        T, keys = self.positions.shape[1] - count, self.keys - count
        layout = Layout.rule(self.positions[:, :T], keys, start=self.start, prefix=self.prefix_length)
        layout.step, layout.reading = self.step, self.reading
        layout._visible = None if self._visible is None else self._visible[:, :T, :keys]
        return layout

    def following(self, count: int, step: Sequence[int]) -> "Layout":
        """The layout of `count` tokens after these: visibility as the last row's, positions going on by `step` [A].

        A layout that a reading rule made knows its own step. Raises LayoutError while a row is still being read.
        """
        B, _, A = self.positions.shape
        if self.reading:
            raise LayoutError("what is read sees all of itself: give it in one call up to and with its start token")
        if len(step) != A:
            raise LayoutError(f"these positions have {A} axes, the model's have {len(step)}")
        steps = torch.tensor(step, device=self.positions.device).expand(B, A) if self.step is None else self.step
        counts = torch.arange(1, count + 1, device=self.positions.device)
        positions = self.positions[:, -1:] + counts[:, None] * steps[:, None]
        if self._visible is None:
            layout = Layout.rule(positions, self.keys + count, start=self.start, prefix=self.prefix_length)
        else:
            seen = self._visible[:, -1:].expand(-1, count, -1)
            among_new = (counts[:, None] >= counts).expand(B, -1, -1)
            layout = Layout(positions, torch.cat((seen, among_new), dim=-1))
        layout.step = self.step
        return layout


@dataclass(frozen=True)
class Causal:
    """Reading rule of a causal model: real tokens are numbered 0, 1, 2 … and see the past."""

    @property
    def step(self) -> tuple[int, ...]:
        """How the position ids of the next token differ from the last one's."""
        return (1,)

    def read(self, ids: Tensor, real: Tensor | None = None) -> Layout:
        """Ids [B, T], `real` bool [B, T] (False on padding) -> Layout with one axis. Raises LayoutError."""
        fitting(ids, real)
        if real is None:
            B, T = ids.shape
            return Layout.causal(B, T, ids.device)
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)[..., None]
        return padded(positions, real, prefix=None)

    def following(self, layout: Layout, count: int) -> Layout:
        """The layout of the next `count` tokens."""
        return layout.following(count, self.step)


@dataclass(frozen=True)
class Blank:
    """Reading rule of a blank-filling model: all up to the first `sop` token is read, the rest is written.

    `masks` are the ids of the blank tokens, the one to be filled first found in this order. With two axes a
    written token counts 1, 2, 3 … on the second axis. On the first, a token written for a blank whose id is in
    `fixed` has that blank's place; for other blanks places go on counting.
    """

    sop: int
    masks: tuple[int, ...]
    axes: int
    fixed: tuple[int, ...]

    @property
    def step(self) -> tuple[int, ...]:
        """How the position ids of the next written token differ from the last one's, where a layout does not say."""
        return (0, 1) if self.axes == 2 else (1,)

    def read(self, ids: Tensor, real: Tensor | None = None) -> Layout:
        """Ids [B, T], `real` bool [B, T] (False on padding) -> Layout with `axes` axes.

        A row without `sop` is read only. Raises LayoutError for a row with `sop` and no blank.
        """
        fitting(ids, real)
        B, T = ids.shape
        keep = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        positions = torch.zeros(B, T, self.axes, dtype=torch.long)
        prefix, step = torch.zeros(B, dtype=torch.long), torch.zeros(B, self.axes, dtype=torch.long)
        reading = False
        for row in range(B):
            where = keep[row].nonzero().flatten().cpu()
            tokens = ids[row].cpu()[where].tolist()
            positions[row, where], step[row], read = self.row(tokens)
            prefix[row] = where[read - 1] + 1 if read else 0
            reading = reading or read == len(tokens)
        positions, prefix = positions.to(ids.device), prefix.to(ids.device)
        layout = Layout.rule(positions, prefix=prefix) if real is None else padded(positions, real, prefix)
        layout.step, layout.reading = step.to(ids.device), reading
        return layout

    def row(self, tokens: list[int]) -> tuple[Tensor, Tensor, int]:
        """Of one row: position ids [count, axes], how they go on [axes], and how many tokens are read."""
        read, blank = self.read_and_blank(tokens)
        return self.places(len(tokens), read, blank), torch.tensor((int(blank is None), 1)[: self.axes]), read

    def read_and_blank(self, tokens: list[int]) -> tuple[int, int | None]:
        """How many tokens of a row are read, and the fixed place of what is written; None: places go on counting."""
        if self.sop not in tokens:
            return len(tokens), None
        mask = next((mask for mask in self.masks if mask in tokens), None)
        if mask is None:
            raise LayoutError(
                f"ids hold the start token {self.sop} but none of the blanks {list(self.masks)} it fills: "
                "put a mask token before it, or give a Layout"
            )
        return tokens.index(self.sop), tokens.index(mask) if mask in self.fixed else None

    def places(self, count: int, read: int, blank: int | None) -> Tensor:
        """Position ids [count, axes] of a row of which `read` tokens are read."""
        place = torch.stack((torch.arange(count), torch.zeros(count, dtype=torch.long)), dim=-1)
        place[read:, 1] = torch.arange(1, count - read + 1)
        if blank is not None:
            place[read:, 0] = blank
        return place[:, : self.axes]

    def following(self, layout: Layout, count: int) -> Layout:
        """The layout of the next `count` written tokens. Raises LayoutError while a row is still being read."""
        return layout.following(count, self.step)


@dataclass(frozen=True)
class InTurn(Blank):
    """Reading rule of a model that fills blanks of any kind in turn: start token n writes for the n-th blank.

    With two axes what is written counts from 1 on the second one, anew for each blank, and sees what was written
    for those before. A row without start token is an ordinary causal text.
    """

    def row(self, tokens: list[int]) -> tuple[Tensor, Tensor, int]:
        """Of one row: position ids [count, axes], how they go on [axes], and how many tokens are read."""
        read = tokens.index(self.sop) if self.sop in tokens else len(tokens)
        spans = [i for i, id in enumerate(tokens) if id == self.sop]
        blanks = [i for i, id in enumerate(tokens[:read]) if id in self.masks]
        if len(spans) > len(blanks):
            raise LayoutError(
                f"ids hold {len(spans)} start tokens {self.sop} but {len(blanks)} of the blanks {list(self.masks)} "
                "they fill: put a mask token before each, or give a Layout"
            )
        place = torch.stack((torch.arange(len(tokens)), torch.zeros(len(tokens), dtype=torch.long)), dim=-1)
        for start, end, blank in zip(spans, [*spans[1:], len(tokens)], blanks, strict=False):
            place[start:end, 1] = torch.arange(1, end - start + 1)
            if tokens[blank] in self.fixed:
                place[start:end, 0] = blank
        written = bool(spans)
        moves = not written or tokens[blanks[len(spans) - 1]] not in self.fixed
        return place[:, : self.axes], torch.tensor((int(moves), int(written))[: self.axes]), read if written else 0


LayoutRule = Causal | Blank


def fitting(ids: Tensor, real: Tensor | None) -> None:
    """Raise LayoutError unless `real` says of each of the ids whether it is no padding."""
    if real is not None and (real.dtype != torch.bool or real.shape != ids.shape):
        raise LayoutError(f"real must be bool {list(ids.shape)}, not {real.dtype} {list(real.shape)}")


def padded(positions: Tensor, real: Tensor, prefix: Tensor | None) -> Layout:
    """The rule for rows with padding: on the left it is a `start`, anywhere else it is written out."""
    start = real.shape[1] - real.sum(-1)
    everywhere = Layout.rule(positions, start=start, prefix=prefix)
    on_the_left = torch.arange(real.shape[1], device=real.device) >= start[:, None]
    if bool((on_the_left == real).all()):
        return everywhere if bool(start.any()) else Layout.rule(positions, prefix=prefix)
    columns = Layout.rule(positions, prefix=prefix).visible & real[:, None, :]
    return Layout(positions, columns)
