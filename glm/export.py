"""The way back: a model, random weights, or another format's files, as a checkpoint in an official layout.

All three are the same walk over a generation's table; they differ only in where a parameter's numbers come from.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm import family
from glm.checkpoint import SHARD_BYTES, Checkpoint, Stored, export, match, save
from glm.errors import ConfigError, ParallelError
from glm.family.generation import Generation
from glm.grouped import Grouped
from glm.model import GLM
from glm.norms import RMSNorm
from glm.quantized_files import as_published
from glm.reading import read_tensor
from glm.spec import Spec, leaves
from glm.tensor_file import Outgoing, Progress

Numbers = Callable[[Stored], Tensor]  # a tensor on disk -> its numbers, in the order of the disk


def save_pretrained(
    model: GLM,
    folder: str | PathLike[str],
    *,
    generation: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    copies: Iterable[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write `model` in the official layout of its generation (or of another whose format can hold it).

    dtype   of the floating-point tensors; None is the model's own.
    copies  files to take along, such as the tokenizer's.

    Raises ConfigError when no such format can hold the model, ParallelError when it is dealt out to several processes,
    GLMError when the folder is taken or cannot be written.
    """
    state = model.state_dict()
    if any(hasattr(x, "full_tensor") for x in state.values()):
        raise ParallelError("this process holds only its share of the model: save one that a single process has loaded")
    target = chosen(model.spec, generation)
    config, tensors = exported(
        target,
        model.spec,
        state,
        lambda stored: stored.on_disk(state[stored.parameter]),
        lambda _: dtype or model.dtype,
    )
    save(folder, config, tensors, shard_bytes=shard_bytes, copies=copies, progress=progress)


def exported(
    generation: Generation,
    spec: Spec,
    shapes: Mapping[str, Tensor],
    numbers: Numbers,
    dtype: Callable[[str], torch.dtype],
) -> tuple[dict[str, Any], list[Outgoing]]:
    """The config.json and the tensors of a model in the format of `generation`.

    `shapes` are the model's tensors by name, possibly on the meta device; `numbers` gives a tensor of the disk when
    its turn comes, and `dtype` says what a parameter's floating-point numbers are stored as.
    """
    config = generation.write(spec) | {"torch_dtype": str(dtype(next(iter(shapes)))).removeprefix("torch.")}
    tensors = export(generation.table(spec, config, shapes), shapes, numbers, dtype)
    return config, as_published(tensors, spec.weights.bits) if isinstance(spec.weights, Grouped) else tensors


def chosen(spec: Spec, name: str | None) -> Generation:
    """The generation called `name`, or the one whose format says exactly this spec. Raises ConfigError."""
    known = {generation.name: generation for generation in family.GENERATIONS}
    if name is None:
        for generation in known.values():
            if read_back(generation, spec) == spec:
                return generation
        raise ConfigError(f"none of the formats {', '.join(known)} can hold this model")
    if name not in known:
        raise ConfigError(f"the format {name!r} is none of {', '.join(known)}")
    again = read_back(known[name], spec)
    wanted, got = dict(leaves(mathematics(spec))), dict(leaves(mathematics(again))) if again else {}
    if lost := [field for field in wanted | got if wanted.get(field) != got.get(field)]:
        raise ConfigError(f"the format {name} cannot hold this model: {lost[0]} is lost")
    return known[name]


def read_back(generation: Generation, spec: Spec) -> Spec | None:
    """What the config.json that this generation writes for `spec` reads as; None where it has no words for it."""
    try:
        return generation.read(generation.write(spec), "")
    except (ConfigError, AttributeError, AssertionError, TypeError, ValueError):
        return None


def mathematics(spec: Spec) -> Spec:
    """`spec` without the order in which RMSNorm rounds: formats differ in it, and only half precision can tell."""

    def exact(norm: Any) -> Any:
        return replace(norm, weight_first=True) if isinstance(norm, RMSNorm) else norm

    blocks = tuple(replace(block, norm=exact(block.norm)) for block in spec.blocks)
    return replace(spec, blocks=blocks, final_norm=exact(spec.final_norm))


def renamed(checkpoint: Checkpoint, name: str, generation: str) -> tuple[dict[str, Any], list[Outgoing]]:
    """A checkpoint's config.json and tensors in the format of another generation, tensors read when their turn comes.

    `name` is the checkpoint's own, as for `Generation.spec`. Raises ConfigError where the format cannot hold it.
    """
    source = family.recognise(checkpoint.config)
    spec = source.read(checkpoint.config, name)
    checkpoint = source.ours(checkpoint)
    model = GLM(spec, device="meta")
    shapes = model.state_dict()
    table = source.table(spec, checkpoint.config, shapes)
    match(model, checkpoint, table, source.unused(spec))
    parts: dict[str, list[Stored]] = {}
    for stored in table:
        parts.setdefault(stored.parameter, []).append(stored)

    def dtype(parameter: str) -> torch.dtype:
        return checkpoint.tensors[parts[parameter][0].name].dtype

    @lru_cache(maxsize=1)  # q, k and v are parts of one parameter, asked for one after the other
    def parameter_of(parameter: str) -> Tensor:
        whole = torch.empty(shapes[parameter].shape, dtype=dtype(parameter), device="cpu")
        for stored in parts[parameter]:
            read_tensor(stored.name, checkpoint.tensors[stored.name], stored.on_disk(whole))
        return whole

    return exported(
        chosen(spec, generation), spec, shapes, lambda stored: stored.on_disk(parameter_of(stored.parameter)), dtype
    )
