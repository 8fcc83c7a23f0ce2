"""Rewriting a checkpoint: `.bin` and `.pt` files to safetensors, another dtype, another release's tensor names.

`.bin` and `.pt` files are programs for a stack machine. They are opened by one child process
(`glm/convert_child.py`) and nowhere else in this package, with the loader that accepts tensors and refuses the rest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, inside, save
from glm.errors import CheckpointError, GLMError
from glm.export import renamed
from glm.hub import TEXTS, fetch
from glm.parts import part_files
from glm.progress import progress_bar
from glm.tensor_file import Outgoing, finite

DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"chatglm": "chatglm2", "hf": "glm4"}
# A release depends on the very rounding of these.
FIXED = (
    "*.inv_freq",
    "*.weight_scale",
    "*.scales",
    "*.e_score_correction_bias",
)  # a release depends on their very rounding


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    names: str | None = None,
    revision: str | None = None,
    quiet: bool = False,
) -> None:
    """Writes the checkpoint `source` (a folder or hub id) anew as safetensors in the new folder `destination`.

    dtype   "float32", "fp16" or "bf16": what floating-point tensors become; None keeps them.
    names   "hf" or "chatglm": the tensor names and config of GLM-4-9B's two formats; None keeps the official ones.

    Tokenizer files are copied. Memory stays at about one `.bin` file, or a few tensors where the source is
    safetensors or the parts of a training run, `mp_rank_0k_model_states.pt`, which are merged. Raises GLMError:
    CheckpointError for a source that is malformed or holds more than tensors.
    """
    if dtype is not None and dtype not in DTYPES:
        raise GLMError(f"weights cannot be converted to {dtype!r}; choose one of {', '.join(DTYPES)}")
    if names is not None and names not in FORMATS:
        raise GLMError(f"there are no names called {names!r}; choose one of {', '.join(FORMATS)}")
    folder = fetch(source, revision, bin=True)
    ready = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    if not ready and part_files(folder):
        if names is not None:
            raise GLMError(f"{source}: the tensors of tensor-parallel parts have only one set of names")
        in_child(folder, Path(destination), dtype, quiet)
        return
    if any(folder.glob("*.bin")) and not ready:
        if names is not None:
            raise GLMError(
                f"{source}: names cannot be changed in .bin files; run `glm convert {source} STEP` first, "
                f"then `glm convert STEP {destination} --names {names}`"
            )
        in_child(folder, Path(destination), dtype, quiet)
        return
    checkpoint = Checkpoint.open(folder)
    if names is None:
        config, tensors = as_they_are(checkpoint)
    else:
        config, tensors = renamed(checkpoint, Path(source).name, FORMATS[names])
    final = None if dtype is None else DTYPES[dtype]
    tensors = [cast(tensor, final) for tensor in tensors]
    with progress_bar("converting", sum(tensor.nbytes for tensor in tensors), quiet) as progress:
        save(
            Path(destination),
            in_dtype(config, final),
            tensors,
            shard_bytes=largest_file(checkpoint),
            copies=texts(folder),
            progress=progress,
        )


def in_child(folder: Path, destination: Path, dtype: str | None, quiet: bool) -> None:
    """Has the child process do it. It ends when this process does, and whatever ends it is one CheckpointError."""
    request = json.dumps([str(folder), str(destination), dtype, quiet])
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "glm.convert_child", request],
        stdin=subprocess.PIPE,  # never written to: it closes when this process ends
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as child:
        assert child.stdout is not None
        try:
            said = child.stdout.read()
            status = child.wait()
        finally:
            child.kill()
    if status:
        raise CheckpointError(said.strip() or f"{folder}: the process converting it ended with status {status}")


def texts(folder: Path) -> list[Path]:
    """The files beside the weights that go along: vocabularies, prompts, licences."""
    return [
        inside(folder, path.name)
        for path in sorted(folder.iterdir())
        if path.name != CONFIG and any(fnmatchcase(path.name, pattern) for pattern in TEXTS)
    ]


def largest_file(checkpoint: Checkpoint) -> int:
    """Bytes of the largest weight file: the new ones are to be about as large."""
    files: dict[Path, int] = {}
    for info in checkpoint.tensors.values():
        files[info.file] = files.get(info.file, 0) + info.nbytes
    return max(1, *files.values())


def as_they_are(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], list[Outgoing]]:
    """The same config and tensors, for another dtype or other shards."""
    tensors = [
        Outgoing(name, info.dtype, info.shape, partial(checkpoint.read, name))
        for name, info in checkpoint.tensors.items()
    ]
    return checkpoint.config, tensors


def cast(tensor: Outgoing, dtype: torch.dtype | None) -> Outgoing:
    """The same tensor in the dtype asked for, checked for NaN, Inf and overflow when it is made."""
    fixed = not tensor.dtype.is_floating_point or any(fnmatchcase(tensor.name, pattern) for pattern in FIXED)
    final = tensor.dtype if dtype is None or fixed else dtype

    def made() -> Tensor:
        result = tensor.make().to(final)
        if not finite(result):
            raise CheckpointError(f"the tensor {tensor.name!r} has NaN or Inf in it, or numbers too large for {final}")
        return result

    return Outgoing(tensor.name, final, tensor.shape, made)


def in_dtype(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The config, saying that its weights are `dtype` if one is given."""
    if dtype is None:
        return dict(config)
    return {**config, "dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")}
