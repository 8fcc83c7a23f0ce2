"""From a checkpoint folder to a model: recognise, describe, refuse what cannot fit, load.

config.json -> family -> spec -> GLM(spec) on the meta device -> filled tensor by tensor from the files
"""

from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from glm import family
from glm.checkpoint import Checkpoint, fill, match
from glm.errors import CheckpointError
from glm.family.generation import Generation
from glm.hub import fetch
from glm.info import require_fit
from glm.model import GLM
from glm.spec import Spec
from glm.tensor_file import Progress

PREFIX = "transformer.prefix_encoder."


def load(
    source: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    prefix: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> GLM:
    """The model of a local folder or hub id, ready to run.

    dtype     None keeps what the checkpoint is stored in; integer weights stay integers either way.
    device    None is torch's default.
    revision  of a hub id: branch, tag or commit.
    prefix    a P-Tuning v2 folder, whose files hold only the learned prefix of the model in `source`.
    progress  is told the bytes of each tensor read.

    Raises ConfigError for a config.json that is no GLM's, CheckpointError for files that are not exactly what it
    calls for, MemoryFitError with the numbers when the model cannot fit. Nothing is left half loaded.
    """
    folder = fetch(source, revision)
    checkpoint = Checkpoint.open(folder)
    if prefix is not None:
        checkpoint = with_prefix(checkpoint, Checkpoint.open(fetch(prefix)))
    generation, spec = described(checkpoint, Path(source).name)
    checkpoint = generation.ours(checkpoint)
    if len(spec.blocks) > len(checkpoint.tensors):  # said before a thousand blocks are built to find it out
        count = len(checkpoint.tensors)
        raise CheckpointError(f"{checkpoint.listing}: has {count} tensors for {len(spec.blocks)} layers")
    model = GLM(spec, device="meta")
    table = generation.table(spec, checkpoint.config, model.state_dict())
    if dtype is None:
        stored = checkpoint.tensors.get(table[0].name)
        dtype = stored.dtype if stored is not None and stored.dtype.is_floating_point else torch.float32
    ignorable = (*generation.ignorable, *generation.spare_head(spec))
    match(model, checkpoint, table, ignorable)  # before memory: a config that does not fit its files is their error
    require_fit(spec, dtype, device)
    fill(model, checkpoint, table, ignorable, dtype=dtype, device=device, progress=progress)
    return model.train(False)


def described(checkpoint: Checkpoint, name: str) -> tuple[Generation, Spec]:
    """The generation of a checkpoint and its spec; errors name its config.json."""
    generation = family.recognise(checkpoint.config)
    return generation, generation.read(checkpoint.config, name)


def with_prefix(base: Checkpoint, addition: Checkpoint) -> Checkpoint:
    """A checkpoint with the learned prefix of another folder, which holds nothing else."""
    others = [name for name in addition.tensors if not name.startswith(PREFIX)]
    if others or not addition.tensors:
        raise CheckpointError(f"{addition.folder}: should hold only {PREFIX}* tensors, not {others[:1]}")
    if twice := [name for name in addition.tensors if name in base.tensors]:
        raise CheckpointError(f"{base.folder}: already has the learned prefix {twice[0]}")
    fields = {key: addition.config.get(key) for key in ("pre_seq_len", "prefix_projection")}
    return replace(base, config=base.config | fields, tensors=base.tensors | addition.tensors)
