"""Rewriting a checkpoint with integer weights, in the compressed-tensors layout that other engines read as well.

The matrices of the blocks are quantised as they lie on disk, one at a time: groups are of input columns, so the rows of
a matrix know nothing of each other, and q, k and v come out the same whether they lie apart or together. All else, the
embedding, norms, biases and (unless asked for) the head, stays as it is.

By text (GPTQ) the model is run first, block by block, each with the inputs that the quantised blocks before it give.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm.checkpoint import Checkpoint, Stored, match, save
from glm.convert import cast, largest_file, texts
from glm.errors import GLMError
from glm.family.generation import Generation
from glm.gptq import gptq
from glm.grouped import Grouped, dequantize
from glm.hub import fetch
from glm.linear import Dense
from glm.model import GLM
from glm.pretrained import described
from glm.progress import progress_bar
from glm.quantization import METHODS, Integers, quantize
from glm.quantized_files import CONFIG, packed_zeros, shape_of, write_scheme
from glm.spec import Spec
from glm.tensor_file import Outgoing, Progress
from glm.texts import Text, read_texts
from glm.tokenizer import Tokenizer
from glm.walk import Stream, Walk

WAYS = (*METHODS, "gptq")
CALIBRATION_TEXTS = 128
CALIBRATION_LENGTH = 512

Moments = dict[tuple[str, *tuple[int, ...]], Tensor]  # by the module within its block, and the number of an expert


def compress(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    form: Grouped,
    *,
    method: str = "search",
    calibration: str | os.PathLike[str] | list[Text] | None = None,
    head: bool = False,
    revision: str | None = None,
    quiet: bool = False,
) -> None:
    """Writes the checkpoint `source` (a folder or hub id) with integer weights in the new folder `destination`.

    method       "nearest", "search" or, by `calibration` text, "gptq".
    calibration  a file of text (see `texts.py`), or texts.
    head         whether the head becomes integers too.

    Tokenizer files are copied. Memory stays within the result and one tensor; by text one block and the second moments
    of its inputs come on top. Raises GLMError: ConfigError where groups do not divide a matrix, CheckpointError for a
    source that is malformed.
    """
    if method not in WAYS:
        raise GLMError(f"there is no method {method!r}; choose one of {', '.join(WAYS)}")
    if (method == "gptq") != (calibration is not None):
        raise GLMError("gptq takes calibration text, and is the only method that does")
    if method == "gptq" and head:
        raise GLMError("gptq leaves the head dense; take another method for an integer head")
    folder = fetch(source, revision)
    checkpoint = Checkpoint.open(folder)
    generation, spec = described(checkpoint, Path(source).name)
    if spec.weights != Dense():
        raise GLMError(f"{source}: is quantised already; start from the original")
    if head and spec.tied:
        raise GLMError(f"{source}: its head is its embedding, which stays dense; leave out the integer head")
    places = matrices(generation, spec, checkpoint, form, head)

    found: dict[str, Integers] = {}
    if calibration is not None:
        if not isinstance(calibration, list):
            length = min(CALIBRATION_LENGTH, spec.context)
            calibration = read_texts(calibration, Tokenizer.from_pretrained(folder), length, CALIBRATION_TEXTS)
        total = sum(checkpoint.tensors[name].nbytes for name in places)
        with progress_bar("calibrating", total, quiet) as progress:
            found = by_text(Walk(checkpoint, Path(source).name), calibration, form, places, progress)

    def one(name: str) -> Integers:
        return found[name] if name in found else quantize(checkpoint.read(name), form, method)

    tensors: list[Outgoing] = []
    for name, info in checkpoint.tensors.items():
        if name in places:
            rows, columns = info.shape
            tensors += outgoing(name, rows, columns, info.dtype, form, partial(one, name))
        else:
            tensors.append(cast(Outgoing(name, info.dtype, info.shape, partial(checkpoint.read, name)), None))
    ignore = [] if head else [generation.file("head")]
    with progress_bar("quantising", sum(tensor.nbytes for tensor in tensors), quiet) as progress:
        save(
            destination,
            {**checkpoint.config, CONFIG: write_scheme(form, ignore)},
            tensors,
            shard_bytes=largest_file(checkpoint),
            copies=texts(folder),
            progress=progress,
        )


def matrices(
    generation: Generation, spec: Spec, checkpoint: Checkpoint, form: Grouped, head: bool = False
) -> dict[str, Stored]:
    """The tensors on disk that become integers: what the model has as `weight` if dense, as `weight_packed` if not.

    Raises CheckpointError where the checkpoint is not what its config.json calls for.
    """
    dense = GLM(spec, device="meta")
    table = generation.table(spec, checkpoint.config, dense.state_dict())
    match(dense, checkpoint, table, (*generation.ignorable, *generation.spare_head(spec)))
    integer = GLM(replace(spec, weights=form, head=form if head else Dense()), device="meta").state_dict()
    return {stored.name: stored for stored in table if f"{stored.parameter}_packed" in integer}


def outgoing(
    name: str, rows: int, columns: int, dtype: torch.dtype, form: Grouped, make: Callable[[], Integers]
) -> list[Outgoing]:
    """The tensors of one matrix, which is quantised when the first of them is due; the small ones wait for theirs."""
    groups = form.groups(columns)
    held: dict[str, Tensor] = {}

    def part(which: str) -> Tensor:
        if which not in held:
            made = make()._asdict()
            held.update({part: x for part, x in made.items() if x is not None})
        return held.pop(which)

    tensors = [
        Outgoing(f"{name}_packed", torch.int32, (rows, columns * form.bits // 32), partial(part, "packed")),
        Outgoing(f"{name}_scale", dtype, (rows, groups), partial(part, "scales")),
        shape_of(name, rows, columns),
    ]
    if not form.symmetric:
        zeros = Outgoing(f"{name}_zero_point", torch.int8, (rows, groups), partial(part, "zeros"))
        tensors.append(packed_zeros(zeros, form.bits))
    return tensors


# ----------------------------------------------------------------------------- by text


@torch.inference_mode()
def by_text(
    walk: Walk, calibration: list[Text], form: Grouped, places: Mapping[str, Stored], progress: Progress | None = None
) -> dict[str, Integers]:
    """Integers of every matrix in `places` by its name on disk, from one walk of the calibration texts."""
    found: dict[str, Integers] = {}
    streams = walk.start(text.ids for text in calibration)
    for i, block in enumerate(walk.blocks()):
        lines = [stored for stored in walk.lines(f"blocks.{i}") if stored.name in places]
        found |= quantize_block(walk.checkpoint, block, f"blocks.{i}", lines, streams, form, progress)
        for stream in streams:
            stream.x = stream.through(block)
    return found


def quantize_block(
    checkpoint: Checkpoint,
    block: nn.Module,
    name: str,
    lines: list[Stored],
    streams: list[Stream],
    form: Grouped,
    progress: Progress | None = None,
) -> dict[str, Integers]:
    """The block's matrices as integers, by the inputs that `streams` give them; the block goes on with those.

    An expert that no token visits is quantised without text.
    """
    found: dict[str, Integers] = {}
    state = block.state_dict()
    with moments(block) as seen:
        for stream in streams:
            stream.through(block)
    for stored in lines:
        parameter = stored.parameter.removeprefix(f"{name}.")
        hessian = seen.get((parameter.rpartition(".")[0], *(i for i in stored.index if isinstance(i, int))))
        weight = checkpoint.read(stored.name)
        made = quantize(weight, form) if hessian is None else gptq(weight, hessian, form)
        target = stored.on_disk(state[parameter])
        target.copy_(dequantize(*made, form, target.dtype).view(target.shape))
        found[stored.name] = made
        if progress is not None:
            progress(weight.nbytes)
    return found


@contextmanager
def moments(block: nn.Module) -> Iterator[Moments]:
    """Σ x xᵀ of the inputs of every matrix in a block, of all that passes through it meanwhile."""
    seen: Moments = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x, *which = inputs
            rows = x.flatten(0, -2).float()
            key = (name, *which)
            seen[key] = seen[key].addmm_(rows.T, rows) if key in seen else rows.T @ rows

        return look

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in block.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() >= 2
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
