"""One safetensors file: its header read strictly, its tensors read in pieces, and a new one written.

    8 bytes    length n of the header, little-endian
    n bytes    JSON: {name: {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, …}, padded with spaces
    the rest   the tensors' numbers, row by row, little-endian, without gaps

(https://huggingface.co/docs/safetensors). The header is parsed here and not by the safetensors library because a
stranger's header decides what is read: every offset is checked against the file's true size before any use.

Tensors are read with plain reads and not through a memory map. A file that shrinks while it is mapped kills the
process with a bus error, where a short read is an error one can name; and mapped pages count as resident memory
until the kernel takes them back, where a read goes through one small buffer.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from glm.errors import CheckpointError
from glm.fields import JSON_BYTES, parse_object, shown

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES: Final[Mapping[torch.dtype, str]] = {dtype: code for code, dtype in DTYPES.items()}
PIECE = 4 << 20  # bytes read at a time: large enough for full speed, small beside any layer
METADATA = "__metadata__"

Progress = Callable[[int], object]  # told the bytes done since its last call


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's numbers lie: bytes `begin` to `end` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Derived(TensorInfo):
    """A tensor that no file holds as it is wanted: made, when its turn comes, of what lies at `begin` to `end`."""

    make: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to be written: what it will be, and how to get it when its turn has come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, in the order of their numbers. Raises what `read_file` does."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their numbers, and the metadata of its writer.

    Raises CheckpointError unless the header describes this file exactly: every byte after it belongs to one
    tensor, and every tensor has a known dtype, sensible dimensions and as many bytes as these ask for.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes cannot hold a header of {length}")
            if length > JSON_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes, more than the {JSON_BYTES} ever needed")
            text = file.read(length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: its header is not JSON: this is no safetensors file")
    entries = parse_object(text, f"{path}: header")
    metadata = entries.pop(METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise CheckpointError(f"{path}: {METADATA} should hold strings")
    infos = {name: read_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    tensors = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    filled = 8 + length
    for name, info in tensors.items():
        if info.begin != filled:
            what = "overlaps the one before" if info.begin < filled else "leaves a gap before it"
            raise CheckpointError(f"{path}: the tensor {shown(name)} {what}")
        filled = info.end
    if filled != size:
        what = "truncated" if filled > size else "too long"
        raise CheckpointError(f"{path}: {what}: its tensors end at byte {filled} and the file at {size}")
    return tensors, metadata


def read_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One line of the header; `start` is the byte its offsets are counted from."""

    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(x) is int and 0 <= x < 1 << 48 for x in values)

    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise CheckpointError(f"{path}: the tensor {shown(name)} should have dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(code, str) and code in DTYPES):
        raise CheckpointError(f"{path}: the tensor {shown(name)} has the unknown dtype {shown(code)}")
    if not (whole(shape) and len(shape) <= 8):
        raise CheckpointError(f"{path}: the tensor {shown(name)} has the impossible shape {shown(shape)}")
    if not (whole(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: the tensor {shown(name)} has the impossible offsets {shown(offsets)}")
    dtype, (begin, end) = DTYPES[code], offsets
    if end - begin != (needed := math.prod(shape) * dtype.itemsize):
        raise CheckpointError(
            f"{path}: the tensor {shown(name)} {shown(shape)} of {code} needs {needed} bytes, not {end - begin}"
        )
    if begin % dtype.itemsize:
        raise CheckpointError(f"{path}: the tensor {shown(name)} of {code} begins at the odd byte {begin}")
    return TensorInfo(path, dtype, tuple(shape), start + begin, start + end)


def pieces(
    name: str, info: TensorInfo, shape: Sequence[int], wanted: Callable[[slice], bool] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """A tensor, seen as `shape`, in runs of rows: (first row, rows). Each run overwrites the one before.

    Runs of which no row is `wanted` are not read. What is derived comes in one run.
    """
    if not math.prod(shape):
        return
    if isinstance(info, Derived):
        yield 0, info.make().view(shape)
        return
    rows = max(1, PIECE // (math.prod(shape[1:]) * info.dtype.itemsize))
    buffer = torch.empty(min(rows, shape[0]), *shape[1:], dtype=info.dtype, device="cpu")
    try:
        with info.file.open("rb", buffering=0) as file:
            for start in range(0, shape[0], rows):
                piece = buffer[: shape[0] - start]
                if wanted is None or wanted(slice(start, start + len(piece))):
                    read_exactly(file.fileno(), info.begin + start * piece[0].nbytes, piece)
                    yield start, piece
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{info.file}: the tensor {shown(name)} cannot be read ({error})") from None


def read_exactly(file: int, begin: int, piece: Tensor) -> None:
    """Fills a contiguous tensor with the bytes of an open file from `begin` on. Raises EOFError for too few."""
    space: memoryview = piece.reshape(-1).view(torch.uint8).numpy().data
    while space:
        if not (count := os.preadv(file, [space], begin)):
            raise EOFError("the file has become shorter")
        space, begin = space[count:], begin + count


def finite(x: Tensor) -> bool:
    """Whether no element is NaN or Inf. The extremes tell, at the speed of memory and without a second tensor."""
    if not (x.is_floating_point() and x.numel()):
        return True
    return all(math.isfinite(extreme) for extreme in (x.float() if x.dtype.itemsize == 1 else x).aminmax())


def unfit(name: str, info: TensorInfo, piece: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with numbers that were not finite when they had `dtype`."""
    if finite(piece):
        return (
            f"{info.file}: the tensor {shown(name)} has numbers too large for {str(dtype).removeprefix('torch.')}; "
            "take bfloat16 or float32"
        )
    return f"{info.file}: the tensor {shown(name)} has NaN or Inf in it"


def write_tensors(
    path: Path, tensors: Sequence[Outgoing], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Writes a new safetensors file, holding one tensor at a time. Wider dtypes come first, so that all are aligned.

    Raises ValueError for a tensor that is not what its line promised.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            made = tensor.make().detach()
            if made.dtype != tensor.dtype or tuple(made.shape) != tensor.shape:
                raise ValueError(f"{tensor.name}: {made.dtype} {list(made.shape)} is not what was to be written")
            file.write(made.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(tensor.nbytes)
