"""Checkpoints: folders of safetensors in, folders of safetensors out; strict both ways.

    checkpoint = Checkpoint.open(folder)                 # config, index and headers read and checked; no weights
    fill(model, checkpoint, table, ignorable)            # every tensor accounted for, then copied one at a time
    save(folder, config, export(table, …))               # the way back, in the official layout

The table is a list of `Stored`: which tensor on disk is which part of which parameter. It is compared with the
headers in both directions before anything is allocated, and the model is touched only when every tensor has
arrived, so that an error leaves it as it was.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor, nn

from glm.atomic import new_folder
from glm.errors import CheckpointError
from glm.fields import read_object, shown
from glm.parts import part_files
from glm.reading import Arrival, read_all, read_tensor
from glm.shares import Share
from glm.tensor_file import (
    CODES,
    Outgoing,
    Progress,
    TensorInfo,
    finite,
    pieces,
    read_header,
    unfit,
    write_tensors,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG_BYTES = 1 << 20
SHARD_BYTES = 5 * 10**9
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")  # a name, and never a way to another folder


# ----------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class PerHead:
    """Rows of q, k and v that lie head by head on disk: [heads, 3, K] there, [3, heads, K] in memory."""

    heads: int

    def on_disk(self, rows: Tensor) -> Tensor:
        """A view [heads, 3, K, …] of rows [3 · heads · K, …], in the order of the disk."""
        return rows.view(3, self.heads, -1, *rows.shape[1:]).transpose(0, 1)


Packing = PerHead


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, and where it lives in the model.

    name       its official name on disk
    parameter  the name in `model.state_dict()`
    index      which part of the parameter it is: rows of a fused matrix, one expert of a stack
    packing    the order of its rows on disk, where that differs from memory's
    at_least   a dtype it is never narrower than, whatever the model's
    """

    name: str
    parameter: str
    index: tuple[int | slice, ...] = ()
    packing: Packing | None = None
    at_least: torch.dtype | None = None

    def part(self, parameter: Tensor) -> Tensor:
        """The part of its parameter, in memory's order and the shape on disk: a view."""
        return parameter[self.index]

    def on_disk(self, parameter: Tensor) -> Tensor:
        """The same part with its elements in the order of the disk: a view, possibly of more dimensions."""
        part = self.part(parameter)
        return part if self.packing is None else self.packing.on_disk(part)


# ----------------------------------------------------------------------------- in


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose config, index and headers were read and hold together. No weight has been read yet."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    listing: Path  # the file that names them all: the index, or the only weight file

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Reads config.json, and the headers of model.safetensors or of the shards its index names.

        Raises CheckpointError, naming the file, for whatever is missing, malformed, contradictory or outside.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder")
        single, several = ((folder / name).is_file() for name in (WEIGHTS, INDEX))
        if not (single or several) and part_files(folder):
            raise CheckpointError(
                f"{folder}: has the parts of a training run; `glm convert {folder} DST` makes safetensors of them"
            )
        config = read_object(inside(folder, CONFIG), CONFIG_BYTES)
        if single and several:
            raise CheckpointError(f"{folder}: has both {WEIGHTS} and {INDEX}; remove the one that is stale")
        if single:
            return cls(folder, config, read_header(inside(folder, WEIGHTS)), folder / WEIGHTS)
        if several:
            return cls(folder, config, read_shards(folder, shard_names(folder, INDEX)), folder / INDEX)
        if any(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder}: has weights as .bin files only; `glm convert {folder} DST` makes safetensors of them"
            )
        raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU in the dtype of the file. Raises CheckpointError if it has NaN or Inf in it."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        read_tensor(name, info, tensor)
        return tensor


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises CheckpointError unless it is a file that lies in there.

    A link may lead to the `blobs` beside `snapshots/<revision>`, the layout of the Hugging Face cache.
    """
    path = folder / name
    try:
        home, target = Path(os.path.realpath(folder, strict=True)), Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(Path(os.path.realpath(home.parent.parent / "blobs")))
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(f"{path}: is a link to a file outside of its folder")
    if not target.is_file():
        raise CheckpointError(f"{path}: is not a regular file")
    return path


def shard_names(folder: Path, index: str) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> file name in the same folder.

    Its `total_size` is not believed, nor needed: ChatGLM-6B's own index has a stale one.
    """
    names = read_object(inside(folder, index)).get("weight_map")
    if not (isinstance(names, dict) and names):
        raise CheckpointError(f"{folder / index}: weight_map should say which file each tensor is in")
    for tensor, file in names.items():
        if not (isinstance(file, str) and SHARD_NAME.fullmatch(file)):
            raise CheckpointError(
                f"{folder / index}: the tensor {shown(tensor)} is said to be in {shown(file)}, "
                "which is not the name of a file in this folder"
            )
    return names


def read_shards(
    folder: Path, names: Mapping[str, str], header: Callable[[Path], dict[str, TensorInfo]] = read_header
) -> dict[str, TensorInfo]:
    """The headers of all shards, which must hold exactly the tensors the index says they hold."""
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(names.values())):
        for name, info in header(inside(folder, file)).items():
            if names.get(name) != file:
                where = f"in {shown(names[name])}" if name in names else "nowhere"
                raise CheckpointError(f"{info.file}: holds the tensor {shown(name)}, which the index has {where}")
            tensors[name] = info
    for name, file in names.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file}: lacks the tensor {shown(name)}, which the index has there")
    return tensors


def agree(checkpoint: Checkpoint, names: Iterable[str], ignorable: Iterable[str] = ()) -> None:
    """Raises CheckpointError unless the checkpoint holds the tensors `names` and no others.

    `ignorable` are regular expressions for whole names of tensors that may be there and are not used.
    """
    wanted = dict.fromkeys(names)
    spare = [re.compile(pattern) for pattern in ignorable]
    missing = [name for name in wanted if name not in checkpoint.tensors]
    unexpected = [
        name
        for name in checkpoint.tensors
        if name not in wanted and not any(pattern.fullmatch(name) for pattern in spare)
    ]
    if missing:
        raise CheckpointError(f"{checkpoint.listing}: lacks the tensor {some(missing)}, which config.json calls for")
    if unexpected:
        file = checkpoint.tensors[unexpected[0]].file
        raise CheckpointError(f"{file}: holds the tensor {some(unexpected)}, which config.json has no place for")


def some(names: Sequence[str]) -> str:
    """The first of several names, and how many more."""
    return shown(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def match(model: nn.Module, checkpoint: Checkpoint, table: Iterable[Stored], ignorable: Iterable[str] = ()) -> None:
    """Compares the table with the model on one side and with the checkpoint's headers on the other; loads nothing.

    Raises CheckpointError when a tensor is missing, unexpected, or of another shape or kind; ValueError when the
    table does not cover the model exactly once, which is our mistake.
    """
    table = list(table)
    parameters = model.state_dict(keep_vars=True)
    cover(model, parameters, table)
    agree(checkpoint, (stored.name for stored in table), ignorable)
    for stored in table:
        check(stored, checkpoint.tensors[stored.name], parameters[stored.parameter])


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    table: Iterable[Stored],
    ignorable: Iterable[str] = (),
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    shares: Mapping[str, Share] | None = None,
    part: nn.Module | None = None,
) -> None:
    """Gives every parameter and buffer of `model`, which may be on the meta device, its numbers from the checkpoint.

    Floating-point tensors become `dtype` (default: what the model has), integers stay. They go to
    `device` piece by piece (`glm/reading.py`); beyond the weights a few MiB are held. `progress` is told bytes read.

    With `shares` (by parameter) only these are read and kept, and it is `part` that gets them, a module with the
    parameters of `model` in the shapes of the shares.

    Raises what `match` does, and CheckpointError for a tensor with NaN or Inf in it or a file that cannot be read
    to its end; the model is then as it was.
    """
    table = list(table)
    device = torch.get_default_device() if device is None else torch.device(device)
    match(model, checkpoint, table, ignorable)
    before = model.state_dict(keep_vars=True)
    after: dict[int, Tensor] = {}  # by identity, since tied parameters are one tensor of two names
    shares = shares or {}
    places = {stored.name: stored for stored in table}
    arrivals: list[Arrival] = []
    for name, info in sorted(checkpoint.tensors.items(), key=in_order):
        stored = places.get(name)
        if stored is None and not shares:
            arrivals.append(Arrival(name, info, None))  # a file that is damaged there may be damaged anywhere
            continue
        if stored is not None:
            old = before[stored.parameter]
            share = shares.get(stored.parameter)
            if id(old) not in after:
                shape = old.shape if share is None else share.shape(old.shape)
                after[id(old)] = torch.empty(shape, dtype=final_dtype(stored, old, dtype), device=device)
            if share is None:
                arrivals.append(Arrival(name, info, stored.on_disk(after[id(old)])))
                continue
            read_share(stored, info, share, old.shape, after[id(old)])
        if progress is not None:
            progress(info.nbytes)
    read_all(arrivals, device, progress)
    if part is not None:
        parts = part.state_dict(keep_vars=True)
        model, before, after = part, parts, {id(parts[name]): after[id(old)] for name, old in before.items()}
    put(model, before, after, device)


def read_share(stored: Stored, info: TensorInfo, share: Share, shape: Sequence[int], target: Tensor) -> None:
    """Reads of a tensor on disk what `share` has of it into `target`, that share of a parameter of `shape`.

    Raises what `read_tensor` does.
    """
    if share.void:
        target.zero_()
        return
    place = torch.full((shape[share.dim],), -1, device="cpu")  # of every index along the axis in the share
    place[list(share.held)] = torch.arange(len(share.held), device="cpu")
    index = list(stored.index)
    if share.dim < len(index) and isinstance(number := index[share.dim], int):  # one of a stack: all of it or nothing
        index[share.dim] = int(place[number])
        if index[share.dim] != -1:
            read_tensor(stored.name, info, replace(stored, index=tuple(index)).on_disk(target))
        return
    everywhere = place.view([-1 if axis == share.dim else 1 for axis in range(len(shape))]).expand(tuple(shape))
    places = stored.on_disk(everywhere)  # of every number on disk; the same along most axes
    varying = [axis for axis, stride in enumerate(places.stride()) if stride]
    places_alone = places[tuple(slice(None) if axis in varying else slice(1) for axis in range(places.dim()))]
    index[share.dim :] = []
    target = target[tuple(index)]
    by_rows = 0 in varying

    def wanted(rows: slice) -> bool:
        return not by_rows or bool((places_alone[rows] >= 0).any())

    for start, piece in pieces(stored.name, info, places.shape, wanted):
        if by_rows:  # some of the rows, which on disk may lie along several axes
            at = places_alone[start : start + len(piece)].flatten()
            kept = piece.flatten(0, len(varying) - 1)[at >= 0].to(target.dtype)
            target[at[at >= 0].to(target.device)] = kept.to(target.device)
        else:  # some numbers of every row
            at = places_alone.flatten()
            kept = piece[..., at >= 0].to(target.dtype)
            target[start : start + len(piece), ..., at[at >= 0].to(target.device)] = kept.to(target.device)
        if not finite(kept):
            raise CheckpointError(unfit(stored.name, info, piece, kept.dtype))


def in_order(item: tuple[str, TensorInfo]) -> tuple[Path, int]:
    """The order of reading: file by file, each from its beginning to its end."""
    return item[1].file, item[1].begin


def cover(model: nn.Module, tensors: Mapping[str, Tensor], table: Sequence[Stored]) -> None:
    """Raises ValueError unless every element of every tensor of the model is in the table once."""
    if len({stored.name for stored in table}) < len(table):
        raise ValueError("the table names a tensor on disk twice")
    parts: dict[int, list[Stored]] = {id(tensor): [] for tensor in tensors.values()}
    for stored in table:
        parts[id(tensors[stored.parameter])].append(stored)
    for name, tensor in tensors.items():
        depth = max((len(stored.index) for stored in parts[id(tensor)]), default=0)
        times = torch.zeros(tensor.shape[:depth], dtype=torch.int32, device="cpu")
        for stored in parts[id(tensor)]:
            try:
                times[stored.index] += 1
            except IndexError:
                raise ValueError(f"the table wants more of {name} than there is") from None
        if not times.eq(1).all():
            raise ValueError(f"the table does not cover {name} exactly once")
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in parts:
            raise ValueError(f"no checkpoint holds the buffer {name}, and it has no numbers of its own")


def check(stored: Stored, info: TensorInfo, parameter: Tensor) -> None:
    """Raises CheckpointError unless the tensor on disk can become this part of the parameter."""
    wanted = stored.part(parameter).shape
    if info.shape != wanted:
        raise CheckpointError(
            f"{info.file}: the tensor {shown(stored.name)} is {list(info.shape)}, but {list(wanted)} is wanted"
        )
    floating = parameter.is_floating_point()
    fits = info.dtype.is_floating_point and info.dtype.itemsize > 1 if floating else info.dtype == parameter.dtype
    if not fits:
        kind = "floating-point numbers of 16 bits or more" if floating else CODES[parameter.dtype]
        raise CheckpointError(
            f"{info.file}: the tensor {shown(stored.name)} holds {CODES[info.dtype]}, but {kind} are wanted"
        )


def final_dtype(stored: Stored, parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a parameter is kept as: integers stay, the rest is `dtype` or wider."""
    if dtype is None or not parameter.is_floating_point():
        dtype = parameter.dtype
    return dtype if stored.at_least is None else torch.promote_types(dtype, stored.at_least)


def put(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[int, Tensor], device: torch.device) -> None:
    """Exchanges the model's tensors for the new ones; what was tied, trainable or a buffer is so again."""
    olds = {**before, **dict(model.named_buffers(remove_duplicate=False))}
    news: dict[int, Tensor] = {}
    for name, old in olds.items():
        if id(old) not in news:
            new = after[id(old)] if id(old) in after else old.to(device)  # a buffer that the model made itself
            news[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, news[id(old)])


# ----------------------------------------------------------------------------- out


def export(
    table: Iterable[Stored],
    shapes: Mapping[str, Tensor],
    numbers: Callable[[Stored], Tensor],
    dtype: Callable[[str], torch.dtype | None],
) -> list[Outgoing]:
    """The tensors that `table` stores, to be made one at a time.

    `shapes` are the parameters by name, possibly on the meta device; `numbers` gives a stored tensor, in the order of
    the disk, when its turn comes; `dtype` what a parameter's floating-point numbers are stored as (None: as they are).
    """

    def outgoing(stored: Stored) -> Outgoing:
        parameter = shapes[stored.parameter]
        final, shape = final_dtype(stored, parameter, dtype(stored.parameter)), tuple(stored.part(parameter).shape)
        return Outgoing(stored.name, final, shape, lambda: numbers(stored).reshape(shape).to(final))

    return [outgoing(stored) for stored in table]


def save(
    destination: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Iterable[Outgoing],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    copies: Iterable[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint folder, complete or not at all, in shards of about `shard_bytes` with their index.

    Tensors are made and written one at a time. `copies` are files taken along as they are (tokenizers, prompts);
    `metadata` goes into every header. Raises GLMError when `destination` is taken or cannot be written.
    """
    tensors = list(tensors)
    metadata = {"format": "pt"} if metadata is None else metadata
    shards = split(tensors, shard_bytes)
    with new_folder(Path(destination)) as folder:
        for file in copies:
            copyfile(file, folder / file.name)
        write_object(folder / CONFIG, config)
        if len(shards) > 1:
            write_object(folder / INDEX, index(shards))
        for name, shard in shards.items():
            write_tensors(folder / name, shard, metadata, progress)


def split(tensors: Sequence[Outgoing], shard_bytes: int) -> dict[str, list[Outgoing]]:
    """Tensors by file name: as few files as hold `shard_bytes` on average, equally full, in the given order."""
    total = sum(tensor.nbytes for tensor in tensors)
    count = max(1, -(-total // shard_bytes))
    shards: dict[int, list[Outgoing]] = {}
    done = 0
    for tensor in tensors:
        middle = 2 * done + tensor.nbytes  # of the tensor, in half bytes: the shard it falls into takes it
        shards.setdefault(min(count - 1, middle * count // max(1, 2 * total)), []).append(tensor)
        done += tensor.nbytes
    if len(shards) <= 1:
        return {WEIGHTS: list(tensors)}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards.values(), start=1)
    }


def index(shards: Mapping[str, Sequence[Outgoing]]) -> dict[str, Any]:
    """The index of shards, as the Hugging Face libraries write it."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards.values() for tensor in shard)},
        "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard},
    }


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file as people like to read it."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
