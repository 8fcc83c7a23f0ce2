"""Tensor-parallel parts: a model cut for several devices, put together again.

Megatron's way (Shoeybi et al. 2019, arXiv:1909.08053): of two matrices in a row the first is cut by its outputs
(axis 0) and the second by its inputs (axis 1), so that each device computes with its own parts and only the sums
are exchanged. Norms, and biases added to such a sum, are whole on every device. A matrix that is several matrices
on top of each other, such as the two branches of a GLU, is cut block by block: device k has part k of each.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm.errors import CheckpointError
from glm.fields import shown

FILE = re.compile(r"mp_rank_(\d{2})_model_states\.pt")
LATEST = "latest"  # a file that names the folder of the newest parts


@dataclass(frozen=True)
class Cut:
    """Tensors whose names match `names` (a regular expression) are cut along `axis`, each of `blocks` by itself."""

    names: str
    axis: int
    blocks: int = 1

    def whole(self, shape: Sequence[int], parts: int) -> tuple[int, ...]:
        """The shape of `parts` parts of `shape` put together."""
        return tuple(n * parts if axis == self.axis else n for axis, n in enumerate(shape))

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts, in the order of their devices, as one tensor."""
        if self.blocks == 1:
            return torch.cat(tuple(parts), dim=self.axis)
        pieces = [part.chunk(self.blocks, dim=self.axis) for part in parts]
        return torch.cat([piece[block] for block in range(self.blocks) for piece in pieces], dim=self.axis)

    def split(self, whole: Tensor, parts: int) -> list[Tensor]:
        """The way back: views of what each device gets, to be concatenated where there are several blocks."""
        blocks = [block.chunk(parts, dim=self.axis) for block in whole.chunk(self.blocks, dim=self.axis)]
        return [torch.cat([block[part] for block in blocks], dim=self.axis) for part in range(parts)]


def part_files(folder: Path) -> list[Path]:
    """The files of the parts in `folder`, or in the one its `latest` names, in the order of their devices; maybe none.

    Raises CheckpointError where one is missing between others, or `latest` names no folder in here.
    """
    found = {int(match[1]): path for path in folder.iterdir() if (match := FILE.fullmatch(path.name))}
    if not found and (folder / LATEST).is_file():
        with (folder / LATEST).open(encoding="utf-8", errors="replace") as file:
            name = file.read(200).strip()
        if not re.fullmatch(r"\w[\w.\-]*", name) or not (folder / name).is_dir() or (folder / name).is_symlink():
            raise CheckpointError(f"{folder / LATEST}: names {shown(name)}, which is no folder beside it")
        return part_files(folder / name)
    for number in range(len(found)):
        if number not in found:
            raise CheckpointError(
                f"{folder}: has {len(found)} parts, but mp_rank_{number:02d}_model_states.pt is missing"
            )
    return [found[number] for number in range(len(found))]


def cut_of(name: str, cuts: Iterable[Cut]) -> Cut | None:
    """How the tensor `name` is cut; None where every device has all of it."""
    return next((cut for cut in cuts if re.fullmatch(cut.names, name)), None)


def same_everywhere(name: str, parts: Sequence[Tensor]) -> Tensor:
    """A tensor that every device has. Raises CheckpointError where they differ."""
    for number, part in enumerate(parts[1:], 1):
        if not torch.equal(part, parts[0]):
            raise CheckpointError(f"the tensor {name!r} should be the same in all parts, but differs in part {number}")
    return parts[0]
