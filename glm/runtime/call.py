"""A call: what all layers share while the engine reads tokens, a few of many rows or many of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm.cache import Notes
from glm.layout import Mask
from glm.positions import Rotary, Rotation, Unturned


@dataclass(frozen=True)
class Prompt:
    """Many tokens of one row, the newest of `keys`; those before `prefix` [1] are seen by all. Known to the host."""

    keys: int
    prefix: Tensor | None


@dataclass(frozen=True)
class Call:
    """T tokens of B rows.

    at       int32 [B]: the place in the cache of the first of them. An idle row's is the last place, which is nobody's.
    length   int32 [B]: tokens of the row with these, what a learned prefix holds among them; 0 for an idle row.
    turns    cos θ and sin θ of every token, [B, T, Σw/2]; None where nothing is turned.
    prompt   None while decoding: then nothing but tensors says who sees what, and the call can be recorded.
    notes    what layers leave for those above them.
    """

    at: Tensor
    length: Tensor
    turns: tuple[Tensor, Tensor] | None
    prompt: Prompt | None
    notes: Notes = field(default_factory=dict)

    def mask(self, queries: int, keys: int) -> Mask:
        """Who sees whom written out, [B, 1, T, S], for what has no kernel. An idle row sees its first place."""
        j = torch.arange(keys, device=self.at.device)
        last = self.length[:, None] - queries + torch.arange(queries, device=self.at.device)
        seen = j <= last.clamp(min=0)[..., None]  # [B T S]
        if self.prompt is not None and self.prompt.prefix is not None:
            seen = seen | (j < self.prompt.prefix[:, None, None])
        return Mask(seen[:, None], causal=False)


class Turns:
    """cos θ and sin θ, [B, T, Σw/2] each, the axes side by side; None where nothing is turned.

    Decoding looks them up in a table of the positions that come first, [P, 2, w/2] an axis: on the device, in one step.
    """

    def __init__(self, rotary: Rotary | Unturned, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rotary, self.dtype = rotary, dtype
        self.tables: list[Tensor] = []
        if isinstance(rotary, Rotary):
            every = torch.arange(positions, device=device)[None, :, None].expand(-1, -1, len(rotary.widths))
            turns = rotary.rotation(every, dtype).turns
            self.tables = [torch.stack((cos[0, :, 0], sin[0, :, 0]), dim=1) for cos, sin in turns]

    def computed(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """For any position ids [B, T, A]."""
        if not self.tables:
            return None
        cos, sin = zip(*self.rotary.rotation(positions, self.dtype).turns, strict=True)
        return side_by_side(cos)[:, :, 0], side_by_side(sin)[:, :, 0]

    def found(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """For position ids [B, T, A] that are in the table."""
        if not self.tables:
            return None
        places = positions.unbind(-1)
        cos, sin = side_by_side([table[at] for at, table in zip(places, self.tables, strict=True)]).unbind(2)
        return cos, sin

    def rotation(self, turns: tuple[Tensor, Tensor] | None) -> Rotation:
        """The same as the pure model's modules take it."""
        if turns is None or not isinstance(self.rotary, Rotary):
            return Rotation((), (), "halves")
        widths = [width // 2 for width in self.rotary.widths]
        cos, sin = (x[:, :, None].split(widths, dim=-1) for x in turns)
        return Rotation(list(zip(cos, sin, strict=True)), self.rotary.widths, self.rotary.pairing)


def side_by_side(axes: Sequence[Tensor]) -> Tensor:
    """[..., w/2] of each axis -> [..., Σw/2] of all of them."""
    return axes[0] if len(axes) == 1 else torch.cat(list(axes), dim=-1)
