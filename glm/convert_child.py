"""The child process of `glm convert`: the only place where a `.bin` file is opened.

A `.bin` file is a pickle inside a zip archive, and unpickling runs whatever it says. Here it is done with
torch.load(weights_only=True), whose interpreter knows tensors and containers and refuses every other call, in a
process that holds nothing else. Every tensor is first loaded onto the meta device, which reads no numbers, and
judged by what it claims to be.

    python -m glm.convert_child '["SOURCE", "DESTINATION", "bf16", false]'

says on stdout what is wrong and ends with status 1, or writes the folder and ends with 0.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from glm.checkpoint import CONFIG, CONFIG_BYTES, inside, read_shards, save, shard_names
from glm.convert import DTYPES, cast, in_dtype, texts
from glm.errors import CheckpointError, GLMError
from glm.fields import read_object, shown
from glm.progress import progress_bar
from glm.tensor_file import CODES, Outgoing, TensorInfo

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def main() -> None:
    """One request, from the command line."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    source, destination, dtype, quiet = json.loads(sys.argv[1])
    try:
        convert_bins(Path(source), Path(destination), DTYPES.get(dtype), quiet)
    except GLMError as error:
        print(error)
        sys.exit(1)


def end_with_parent() -> None:
    """The parent holds the other end of stdin: when it is gone there is nobody to write the folder for."""
    sys.stdin.read()
    os._exit(1)


def convert_bins(source: Path, destination: Path, dtype: torch.dtype | None, quiet: bool) -> None:
    """Writes the `.bin` files of `source` as safetensors under the same tensor names, one file at a time."""
    if TorchVersion(torch.__version__) < "2.10":
        raise GLMError(f"torch {torch.__version__} is too old to open .bin files safely; install torch 2.10 or newer")
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


def claims(path: Path) -> dict[str, TensorInfo]:
    """What the tensors of a `.bin` file claim to be.

    Raises CheckpointError for anything but a dictionary of ordinary tensors that fit into the file they come from.
    """

    def refuse(name: object, what: str) -> NoReturn:
        raise CheckpointError(f"{path}: {shown(name)} {what}")

    size, total = path.stat().st_size, 0
    found: dict[str, TensorInfo] = {}
    for name, tensor in load(path, "meta").items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            refuse(name, f"is a {type(tensor).__name__}, where a dictionary of names and tensors is wanted")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in CODES:
            refuse(name, f"is a tensor of a kind that safetensors cannot hold ({tensor.layout}, {tensor.dtype})")
        total += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes() or total > 2 * size:  # twice: a head tied to its embedding
            refuse(name, "claims more numbers than its file can hold")
        found[name] = TensorInfo(path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
    return found


def load(path: Path, device: str = "cpu") -> Mapping[str, Tensor]:
    """The tensors of a `.bin` file, mapped from it where its format allows. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            archive = file.read(2) == b"PK"  # else it was written before torch 1.6, and has to be read whole
        found = torch.load(path, map_location=device, weights_only=True, mmap=archive)
    except Exception as error:  # whatever a file made by a stranger brings about
        call = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to call {call[1]}" if call else next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: refused, since it is damaged or holds more than tensors: {reason}") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, where a dictionary of tensors is wanted")
    return found


if __name__ == "__main__":
    main()
