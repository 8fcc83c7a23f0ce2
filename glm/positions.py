"""Positions: rotary embedding over any number of position axes, and learned tables.

Rotary embedding (Su et al. 2021, arXiv:2104.09864) turns pairs of channels (a, b) of every query and key by an
angle θ = p ω that grows with the position p:

    (a, b) -> (a cos θ - b sin θ, a sin θ + b cos θ),    ω_i = base^(-2i / w),  i = 0 … w/2 - 1

so that q·k depends on positions only through their difference. Axis `a` of the position ids turns the next
`widths[a]` channels of each head; channels beyond `sum(widths)` are left alone. Full rotary is `(K,)`, half
rotary `(K/2,)`, two-dimensional rotary `(K/2, K/2)`.

Learned tables (Gehring et al. 2017, arXiv:1705.03122) are older: one row for every place a text can have, added to
the embedding of the token that stands there, x + Σ_a table_a[p_a]. Nothing is turned then (`Unturned`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glm.errors import LayoutError
from glm.linear import empty_embedding
from glm.norms import wide


@dataclass(frozen=True)
class Plain:
    """No stretching: the positions the model was trained on."""

    def stretch(self, frequencies: Tensor, base: float) -> Tensor:
        """ω unchanged, [w/2]."""
        return frequencies

    @property
    def gain(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Interpolation:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def stretch(self, frequencies: Tensor, base: float) -> Tensor:
        """ω / factor, [w/2]."""
        return frequencies / self.factor

    @property
    def gain(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow frequencies are interpolated, fast ones kept.

    A frequency that makes `beta_fast` turns or more within the `original` context is kept, one that makes
    `beta_slow` or fewer is divided by `factor`, between them a linear ramp; `gain` sharpens the softmax.
    `truncate` rounds the ramp's ends outwards to whole channels.
    """

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    gain: float
    truncate: bool

    def stretch(self, frequencies: Tensor, base: float) -> Tensor:
        """The blend of ω and ω / factor, [w/2]."""
        width = 2 * len(frequencies)

        def channel(
            turns: float,
        ) -> float:  # the (fractional) pair that makes so many turns in the original context
            return width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high
        ramp = ((torch.arange(len(frequencies), dtype=frequencies.dtype) - low) / (high - low)).clamp(0, 1)
        return frequencies / self.factor * ramp + frequencies * (1 - ramp)


Scaling = Plain | Interpolation | Yarn


@dataclass(frozen=True)
class Rotary:
    """The rotation of queries and keys: `widths[a]` channels for axis a, paired as `pairing` says.

    pairing   "interleaved": channels (0, 1), (2, 3) …; "halves": channels (i, i + w/2).
    rounding  "float16" where the checkpoints were trained with frequencies stored in that type, else None.
    """

    widths: tuple[int, ...]
    pairing: str
    base: float
    scaling: Scaling
    rounding: str | None

    def frequencies(self, width: int) -> Tensor:
        """ω in radians per position, float64 [width/2]."""
        if self.rounding is not None:  # as the checkpoints did it: in float32, then rounded
            exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
            omega = (1.0 / self.base**exponents).to(getattr(torch, self.rounding)).double()
        else:
            omega = self.base ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        return self.scaling.stretch(omega, self.base)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> "Rotation":
        """The turns for position ids [B, T, A], made once for all layers of a forward pass. Raises LayoutError."""
        if positions.shape[-1] != len(self.widths):
            raise LayoutError(f"positions have {positions.shape[-1]} axes, but the model turns by {len(self.widths)}")
        wider = torch.float64 if dtype == torch.float64 else torch.float32
        turns = []
        for axis, width in enumerate(self.widths):
            # float64 on purpose: at position 10⁶ a float32 angle is off by 0.06 radians
            angle = positions[..., axis, None].double() * self.frequencies(width).to(positions.device)
            gain = self.scaling.gain
            turns.append(((angle.cos() * gain).to(wider)[:, :, None], (angle.sin() * gain).to(wider)[:, :, None]))
        return Rotation(turns, self.widths, self.pairing)


@dataclass(frozen=True)
class Unturned:
    """No rotation: queries and keys stay as they are, whatever their positions."""

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> "Rotation":
        """The turns for position ids [B, T, A]: none."""
        return Rotation((), (), "halves")


@dataclass(frozen=True)
class Learned:
    """A table of `length` rows for each of `axes` position axes: axis a of a token adds row p_a of table a."""

    length: int
    axes: int

    def build(self, width: int) -> nn.Module:
        """A module: position ids [B, T, A] -> [B, T, width]."""
        return LearnedModule(self, width)


class LearnedModule(nn.Module):
    """Σ_a table_a[p_a]."""

    def __init__(self, spec: Learned, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.tables = nn.ModuleList(empty_embedding(spec.length, width) for _ in range(spec.axes))

    def forward(self, positions: Tensor) -> Tensor:
        """[B, T, A] -> [B, T, D]. Raises LayoutError for a position that the tables do not have."""
        if positions.shape[-1] != self.spec.axes:
            raise LayoutError(f"positions have {positions.shape[-1]} axes, but the model has {self.spec.axes} tables")
        lowest, highest = (int(end) for end in positions.aminmax())
        if lowest < 0 or highest >= self.spec.length:
            where = highest if highest >= self.spec.length else lowest
            raise LayoutError(f"position {where} is none of the {self.spec.length} the model learnt: shorten the text")
        x: Tensor = sum(table(positions[..., axis]) for axis, table in enumerate(self.tables))
        return x


class Rotation:
    """cos θ and sin θ of every token, [B, T, 1, w/2] an axis; call it to turn queries or keys."""

    def __init__(self, turns: Sequence[tuple[Tensor, Tensor]], widths: Sequence[int], pairing: str) -> None:
        self.turns = turns
        self.widths = widths
        self.split, self.join = PAIRINGS[pairing]

    def __call__(self, x: Tensor) -> Tensor:
        """Turn queries or keys [B, T, heads, K]."""
        if not self.turns:
            return x
        parts = x.split([*self.widths, x.shape[-1] - sum(self.widths)], dim=-1)
        turned = [self.turn(part, *turn) for part, turn in zip(parts, self.turns, strict=False)]
        return torch.cat([*turned, parts[-1]], dim=-1)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The equation at the top of this file on [B, T, heads, w]."""
        a, b = self.split(wide(x))
        return self.join(a * cos - b * sin, a * sin + b * cos).to(x.dtype)


def split_interleaved(x: Tensor) -> tuple[Tensor, Tensor]:
    """Channels 0, 2, 4 … and 1, 3, 5 …"""
    return x[..., 0::2], x[..., 1::2]


def join_interleaved(a: Tensor, b: Tensor) -> Tensor:
    """Inverse of `split_interleaved`."""
    return torch.stack((a, b), dim=-1).flatten(-2)


def split_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of the channels and the second."""
    a, b = x.chunk(2, dim=-1)
    return a, b


def join_halves(a: Tensor, b: Tensor) -> Tensor:
    """Inverse of `split_halves`."""
    return torch.cat((a, b), dim=-1)


PAIRINGS = {"interleaved": (split_interleaved, join_interleaved), "halves": (split_halves, join_halves)}
