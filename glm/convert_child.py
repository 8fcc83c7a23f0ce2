"""The child process of `glm convert`: the only place where a `.bin` or `.pt` file is opened.

Such a file is a pickle inside a zip archive, and unpickling runs whatever it says. Here it is done with
torch.load(weights_only=True), whose interpreter knows tensors and containers and refuses every other call, in a
process that holds nothing else. Every tensor is first loaded onto the meta device, which reads no numbers, and
judged by what it claims to be.

A training run's own checkpoint (`mp_rank_0k_model_states.pt`, one for each device) has its model under `module`,
and beside it what the run was doing: arguments, random states. Whatever makes those up stands for `Inert` here.
Its parts are mapped, merged tensor by tensor, and let go again before they add up to more than the largest tensor.

    python -m glm.convert_child '["SOURCE", "DESTINATION", "bf16", false]'

says on stdout what is wrong and ends with status 1, or writes the folder and ends with 0.
"""

import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from glm.checkpoint import CONFIG, CONFIG_BYTES, inside, read_shards, save, shard_names
from glm.convert import DTYPES, cast, in_dtype, texts
from glm.errors import CheckpointError, ConfigError, GLMError
from glm.family import GENERATIONS, recognise
from glm.family.generation import Generation
from glm.fields import read_object, shown
from glm.linear import RowScaled, unpack_int4
from glm.parts import cut_of, part_files, same_everywhere
from glm.progress import progress_bar
from glm.tensor_file import CODES, Outgoing, TensorInfo

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def main() -> None:
    """One request, from the command line."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    source, destination, dtype, quiet = json.loads(sys.argv[1])
    try:
        convert = convert_parts if part_files(Path(source)) else convert_bins
        convert(Path(source), Path(destination), DTYPES.get(dtype), quiet)
    except GLMError as error:
        print(error)
        sys.exit(1)


def end_with_parent() -> None:
    """The parent holds the other end of stdin: when it is gone there is nobody to write the folder for."""
    sys.stdin.read()
    os._exit(1)


def convert_bins(source: Path, destination: Path, dtype: torch.dtype | None, quiet: bool) -> None:
    """Writes the `.bin` files of `source` as safetensors under the same tensor names, one file at a time."""
    safe()
    config = read_object(inside(source, CONFIG), CONFIG_BYTES)
    if (source / INDEX).is_file():
        claimed = read_shards(source, shard_names(source, INDEX), claims)
    else:
        claimed = claims(inside(source, WEIGHTS))
    opened = Opened()
    tensors = [
        cast(Outgoing(name, info.dtype, info.shape, partial(opened.read, info.file, name)), dtype)
        for name, info in claimed.items()
    ]
    total, files = sum(tensor.nbytes for tensor in tensors), len({info.file for info in claimed.values()})
    with progress_bar("converting", total, quiet) as progress:
        save(
            destination,
            in_dtype(config, dtype),
            tensors,
            shard_bytes=max(1, -(-total // files)),
            copies=texts(source),
            progress=progress,
        )


def safe() -> None:
    """Raises GLMError for a torch whose loader had holes."""
    if TorchVersion(torch.__version__) < "2.10":
        raise GLMError(f"torch {torch.__version__} is too old to open .bin files safely; install torch 2.10 or newer")


class Opened:
    """The `.bin` file read last: tensors are asked for file by file, and two files are never held at once."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.tensors: Mapping[str, Tensor] = {}

    def read(self, file: Path, name: str) -> Tensor:
        """One tensor of a file."""
        if file != self.file:
            self.file, self.tensors = None, {}  # let go of the last one first
            self.tensors = load(file)
            self.file = file
        return self.tensors[name]


def convert_parts(source: Path, destination: Path, dtype: torch.dtype | None, quiet: bool) -> None:
    """Merges the tensor-parallel parts in `source` into safetensors of the whole tensors, one at a time.

    Integers of a matrix cut by its inputs can only be put side by side where all parts scale its rows alike; where
    they do not, all integer matrices are written out as floating-point numbers.
    """
    safe()
    parts = Parts(part_files(source))
    given = read_object(inside(source, CONFIG), CONFIG_BYTES) if (source / CONFIG).is_file() else None
    generation = recognise(given) if given is not None else maker(parts.names, source)
    wholes = {name: whole(generation, name, parts) for name in parts.names}
    config = given
    if config is None:
        assert generation.original is not None
        try:
            config = generation.original({name: info.shape for name, info in wholes.items()})
        except (KeyError, ValueError, IndexError, ConfigError) as error:
            raise CheckpointError(f"{source}: these are no parts of a whole {generation.name}: {error}") from None
    parts.most = max(info.nbytes for info in wholes.values())
    weights = generation.spec(config, source.name).weights
    bits = weights.bits if isinstance(weights, RowScaled) else 0
    if bits and not scaled_alike(generation, parts):
        config = {key: value for key, value in config.items() if key != "quantization_bit"}
        wholes = {name: written_out(name, wholes, bits) for name in wholes if not name.endswith(SCALE)}
    else:
        bits = 0
    if "torch_dtype" not in config:
        floating = next(info.dtype for info in wholes.values() if info.dtype.is_floating_point)
        config = config | {"torch_dtype": str(floating).removeprefix("torch.")}

    def made(name: str) -> Tensor:
        cut = cut_of(name, generation.cuts)
        read = parts.read(name)
        if bits and wholes[name].dtype != read[0].dtype:
            read = [dense(q, s, bits) for q, s in zip(read, parts.read(scale_of(name)), strict=True)]
        tensor = same_everywhere(name, read) if cut is None else cut.merge(read)
        return tensor if generation.mended is None else generation.mended(config, name, tensor)

    tensors = [
        cast(Outgoing(name, info.dtype, info.shape, partial(made, name)), dtype) for name, info in wholes.items()
    ]
    with progress_bar("merging", sum(tensor.nbytes for tensor in tensors), quiet) as progress:
        save(destination, in_dtype(config, dtype), tensors, copies=texts(source), progress=progress)


def maker(names: Iterable[str], source: Path) -> Generation:
    """The generation whose training code named its tensors like this. Raises CheckpointError."""
    for generation in GENERATIONS:
        if generation.original is not None and f"{generation.names[0].file}.weight" in names:
            return generation
    raise CheckpointError(f"{source}: there is no {CONFIG}, and the names of the tensors are no GLM's")


def whole(generation: Generation, name: str, parts: "Parts") -> TensorInfo:
    """What the tensor `name` is when it is put together. Raises CheckpointError where its parts do not fit."""
    first, *others = [claimed[name] for claimed in parts.claimed]
    for info in others:
        if (info.dtype, info.shape) != (first.dtype, first.shape):
            raise CheckpointError(f"{info.file}: {shown(name)} is not as in {first.file.name}: {list(info.shape)}")
    cut = cut_of(name, generation.cuts)
    shape = first.shape if cut is None else cut.whole(first.shape, len(parts.files))
    if cut is not None and (cut.axis >= len(shape) or first.shape[cut.axis] % cut.blocks):
        raise CheckpointError(f"{first.file}: {shown(name)} of {list(first.shape)} is no part of a larger tensor")
    return TensorInfo(first.file, first.dtype, shape, 0, math.prod(shape) * first.dtype.itemsize)


SCALE = ".weight_scale"


def scale_of(name: str) -> str:
    """The scale that belongs to the integers `name`."""
    return name.removesuffix(".weight") + SCALE


def scaled_alike(generation: Generation, parts: "Parts") -> bool:
    """Whether the parts of every matrix that is cut by its inputs have the same scales."""
    for name in parts.names:
        cut = cut_of(name, generation.cuts)
        if cut is not None and cut.axis == 1 and scale_of(name) in parts.names:
            first, *others = parts.read(scale_of(name))
            if not all(torch.equal(first, other) for other in others):
                return False
    return True


def written_out(name: str, wholes: Mapping[str, TensorInfo], bits: int) -> TensorInfo:
    """What a tensor is when integers become numbers of their scale's dtype; others stay."""
    info = wholes[name]
    if scale_of(name) not in wholes:
        return info
    dtype, shape = wholes[scale_of(name)].dtype, (info.shape[0], info.shape[1] * 8 // bits)
    return TensorInfo(info.file, dtype, shape, 0, math.prod(shape) * dtype.itemsize)


def dense(integers: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The numbers that integers and the scale of each row stand for, in the scale's dtype."""
    return (unpack_int4(integers) if bits == 4 else integers).to(scale.dtype) * scale[:, None]


class Parts:
    """The files of all parts, mapped; let go, and mapped anew, when more than `most` bytes were read from them."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises CheckpointError where they do not hold the same tensors."""
        files = [inside(file.parent, file.name) for file in files]
        self.files = files
        self.claimed = [claims(file, "module") for file in files]
        self.names = list(self.claimed[0])
        for file, claimed in zip(files, self.claimed, strict=True):
            if different := claimed.keys() ^ self.claimed[0].keys():
                raise CheckpointError(f"{file}: the tensor {shown(min(different))} is not in all parts")
        self.mappable = all(archive(file) for file in files)  # else reading them again would take as long as all
        self.most, self.held = 0, 0
        self.tensors: list[Mapping[str, Tensor]] = []

    def read(self, name: str) -> list[Tensor]:
        """One tensor of each part, mapped for as long as it is kept."""
        self.held += sum(claimed[name].nbytes for claimed in self.claimed)
        if self.mappable and self.held > self.most:
            self.tensors, self.held = [], sum(claimed[name].nbytes for claimed in self.claimed)
        if not self.tensors:
            self.tensors = [load(file, key="module") for file in self.files]
        return [tensors[name] for tensors in self.tensors]


def claims(path: Path, key: str | None = None) -> dict[str, TensorInfo]:
    """What the tensors of a `.bin` file, or under `key` in a `.pt` file, claim to be.

    Raises CheckpointError for anything but a dictionary of ordinary tensors that fit into the file they come from.
    """

    def refuse(name: object, what: str) -> NoReturn:
        raise CheckpointError(f"{path}: {shown(name)} {what}")

    size, total = path.stat().st_size, 0
    found: dict[str, TensorInfo] = {}
    for name, tensor in load(path, "meta", key).items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            refuse(name, f"is a {type(tensor).__name__}, where a dictionary of names and tensors is wanted")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in CODES:
            refuse(name, f"is a tensor of a kind that safetensors cannot hold ({tensor.layout}, {tensor.dtype})")
        total += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes() or total > 2 * size:  # twice: a head tied to its embedding
            refuse(name, "claims more numbers than its file can hold")
        found[name] = TensorInfo(path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
    return found


class Inert:
    """What a training run's checkpoint holds beside tensors: can be made of anything, and does nothing."""

    def __init__(self, *arguments: object) -> None:
        """Forgets its arguments."""

    def __setstate__(self, state: object) -> None:
        """Forgets its state."""


INERT = (
    "argparse.Namespace",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)


def archive(path: Path) -> bool:
    """Whether a file is a zip archive; else it was written before torch 1.6, and has to be read whole."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def load(path: Path, device: str = "cpu", key: str | None = None) -> Mapping[str, Tensor]:
    """The tensors of a `.bin` file, or under `key` in a `.pt` file, mapped where its format allows.

    Raises CheckpointError.
    """
    try:
        inert: list[Any] = [] if key is None else [(Inert, name) for name in INERT]
        with torch.serialization.safe_globals(inert):
            found = torch.load(path, map_location=device, weights_only=True, mmap=archive(path))
    except Exception as error:  # whatever a file made by a stranger brings about
        call = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to call {call[1]}" if call else next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: refused, since it is damaged or holds more than tensors: {reason}") from None
    if key is not None and isinstance(found, Mapping):
        found = found.get(key)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, where a dictionary of tensors is wanted")
    return found


if __name__ == "__main__":
    main()
