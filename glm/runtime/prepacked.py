"""Integers laid out beforehand, in a file beside the checkpoint: at start nothing is left to do but to read.

    glm prepack FOLDER

writes FOLDER/prepacked.safetensors, under the names of our parameters and in the form of `LaidOut`:

    blocks.3.mixer.qkv.weight_packed        int16 [tiles, O, 32]
    blocks.3.mixer.qkv.weight_scale         [groups, O]
    blocks.3.mixer.qkv.weight_zero_point    [groups, O], where there are zero points

All that is no integer matrix stays where it is: the engine reads this file in the place of the stored integers, and
the checkpoint for the rest.

The file says what it was made of, and is used for nothing else. `layout` is a digest of what the layout makes of a
small matrix, so that a change of it cannot be forgotten. `checkpoint` is one of the config, of every tensor's name,
shape, dtype and place, and of a page out of the middle of its numbers: all numbers would take as long to read as the
file saves, and another training or quantising changes them everywhere. A file that does not fit is left alone with a
warning; one that fits and is damaged is an error.
"""

import json
import os
import warnings
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from itertools import groupby
from os import PathLike
from pathlib import Path

import torch
from glm_kernels import packing
from torch import Tensor, nn

from glm.atomic import new_file
from glm.checkpoint import Checkpoint, Stored, in_order, inside, some
from glm.errors import CheckpointError, GLMError
from glm.hub import PREPACKED
from glm.pretrained import Opened
from glm.runtime.laid_out import Integers, LaidOut
from glm.tensor_file import Outgoing, TensorInfo, read_file, write_tensors

PAGE = 4096  # bytes of each tensor that the fingerprint knows


def prepack(source: str | PathLike[str], *, revision: str | None = None, quiet: bool = False) -> Path:
    """Writes the file beside the checkpoint `source`, a folder or hub id, in the place of any other; its path.

    Of a hub id that is in the hub's cache, in the folder of the revision: whoever loads the id there finds it.
    Memory holds the largest matrix twice, as stored and as laid out. Raises GLMError where no matrix is of integers or
    the file cannot be written, and what loading raises.
    """
    from glm.progress import progress_bar  # which the engine, reading, has no use for

    opened = Opened.of(source, revision=revision)
    tensors = [tensor for name, stored in matrices(opened.model) for tensor in outgoing(opened, name, stored)]
    if not tensors:
        raise GLMError(f"{source}: has no integers to lay out; `glm quantize {source} DST` makes some")
    path = opened.base.folder / PREPACKED
    with (
        progress_bar("laying out", sum(tensor.nbytes for tensor in tensors), quiet) as progress,
        new_file(path) as file,
    ):
        write_tensors(file, tensors, marks(opened), progress)
    return path


def matrices(model: nn.Module) -> list[tuple[str, Integers]]:
    """Every matrix of stored integers, and the name of its module."""
    found = ((name, Integers.of(module)) for name, module in model.named_modules())
    return [(name, stored) for name, stored in found if stored is not None]


def outgoing(opened: Opened, name: str, stored: Integers) -> list[Outgoing]:
    """The tensors that one matrix becomes; each is read and laid out when its turn has come."""
    integers, scales, zeros = (f"{name}.{leaf}" for leaf in ("weight_packed", "weight_scale", "weight_zero_point"))
    source = integers if integers in opened.lines else f"{name}.weight"
    like, dtype = LaidOut(stored), opened.stored_dtype(scales)

    def words() -> Tensor:
        return stored._replace(packed=opened.read(source, stored.packed)).words()

    def turned(name: str) -> Tensor:
        return opened.read(name, stored.scales).mT.to(dtype)

    tensors = [
        Outgoing(integers, torch.int16, tuple(like.weight_packed.shape), words),
        Outgoing(scales, dtype, tuple(like.weight_scale.shape), partial(turned, scales)),
    ]
    if stored.zeros is not None:
        tensors.append(Outgoing(zeros, dtype, tuple(like.weight_scale.shape), partial(turned, zeros)))
    return tensors


# ----------------------------------------------------------------------------- reading


def with_prepacked(opened: Opened) -> Opened:
    """The same model with its integers read laid out, from the file beside the checkpoint; as it was without one.

    A file that was not made of this checkpoint, or for another layout, is not used, and a warning says so. Raises
    CheckpointError for one that was, and is damaged.
    """
    found = tensors_of(opened)
    if found is None:
        return opened
    folder, gone = opened.base.folder, set[str]()
    table: list[Stored] = []
    for name, stored in matrices(opened.model):
        gone |= {f"{name}.{leaf}" for leaf, _ in opened.model.get_submodule(name).named_buffers()}
        opened.model.set_submodule(name, laid_out := LaidOut(stored))
        table += [Stored(f"{name}.{leaf}", f"{name}.{leaf}") for leaf, _ in laid_out.named_buffers()]
    if wrong := found.keys() ^ {line.name for line in table}:
        raise CheckpointError(f"{folder / PREPACKED}: lacks, or has no use for, {some(sorted(wrong))}; {anew(folder)}")
    replaced = {line.name for line in opened.table if line.parameter in gone}
    kept = {name: info for name, info in opened.checkpoint.tensors.items() if name not in replaced}
    table += [line for line in opened.table if line.parameter not in gone]
    return replace(opened, checkpoint=replace(opened.checkpoint, tensors=kept | found), table=table)


def tensors_of(opened: Opened) -> dict[str, TensorInfo] | None:
    """What the file beside the checkpoint holds; None where there is none, or one of something else."""
    folder = opened.base.folder
    path = folder / PREPACKED
    if not path.exists():
        return None
    try:
        tensors, found = read_file(inside(folder, PREPACKED))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {anew(folder)}") from None
    wanted = marks(opened)
    for mark, reason in REASONS.items():
        if found.get(mark) != wanted[mark]:
            warnings.warn(f"{path}: is not used: {reason}; {anew(folder)}", stacklevel=4)
            return None
    return tensors


def anew(folder: Path) -> str:
    """What to do about a file that does not fit."""
    return f"remove it, or write it anew with `glm prepack {folder}`"


# ----------------------------------------------------------------------------- what it was made of


REASONS = {
    "layout": "it is not laid out as these kernels read integers",
    "checkpoint": "it was made of another checkpoint than the one beside it",
}


def marks(opened: Opened) -> dict[str, str]:
    """What the file says of itself: see the top of this module."""
    form = opened.model.spec.weights
    return {"format": "pt", "layout": layout(), "form": str(form), "checkpoint": fingerprint(opened.base)}


@cache
def layout() -> str:
    """A digest of what becomes of a matrix of each width, wider than a tile and with its last tile not full."""
    digest = sha256()
    for bits in (4, 8):
        codes = torch.arange(3 * 160, dtype=torch.int32, device="cpu").mul(7).remainder(1 << bits) - (1 << bits - 1)
        scales = torch.arange(15, dtype=torch.float32, device="cpu").view(3, 5)
        laid = packing.prepack(packing.pack(codes.to(torch.int8).view(3, 160), bits), scales, scales.char(), bits=bits)
        for part in laid:
            assert part is not None
            digest.update(f"{part.dtype}{list(part.shape)}".encode() + part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the config, of where every tensor lies, and of a page of each."""
    digest = sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    ordered = sorted(checkpoint.tensors.items(), key=in_order)
    for path, tensors in groupby(ordered, key=lambda item: item[1].file):
        with path.open("rb", buffering=0) as file:
            for name, info in tensors:
                digest.update(f"{path.name} {name} {info.dtype} {info.shape} {info.begin} {info.end} ".encode())
                length = min(PAGE, info.nbytes)
                digest.update(os.pread(file.fileno(), length, info.begin + (info.nbytes - length) // 2))
    return digest.hexdigest()
