"""From a checkpoint folder to a model: recognise, describe, refuse what cannot fit, load.

config.json -> family -> spec -> GLM(spec) on the meta device -> filled tensor by tensor from the files
"""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from glm import family
from glm.checkpoint import Checkpoint, fill, match
from glm.drafting import NextToken
from glm.errors import CheckpointError, ConfigError
from glm.family.generation import Generation
from glm.hub import fetch
from glm.info import require_fit
from glm.model import GLM
from glm.spec import Spec
from glm.tensor_file import Progress

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PREFIX = "transformer.prefix_encoder."


def load(
    source: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    prefix: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    mesh: "DeviceMesh | None" = None,
) -> GLM:
    """The model of a local folder or hub id, ready to run.

    dtype     None keeps what the checkpoint is stored in; integer weights stay integers either way.
    device    None is torch's default.
    revision  of a hub id: branch, tag or commit.
    prefix    a P-Tuning v2 folder, whose files hold only the learned prefix of the model in `source`.
    progress  is told the bytes of each tensor read.
    mesh      of one dimension: the model is dealt out to its ranks, which read only their shares (`glm.parallel`).

    Raises ConfigError for a config.json that is no GLM's, CheckpointError for files that are not exactly what it
    calls for, MemoryFitError with the numbers when the model cannot fit, ParallelError when it cannot be dealt out to
    so many ranks. Nothing is left half loaded.
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
    ignorable = generation.unused(spec)
    match(model, checkpoint, table, ignorable)  # before memory: a config that does not fit its files is their error
    if mesh is not None:
        from glm.parallel import joined, narrow

        part, shares = narrow(spec, dtype, model.state_dict(), mesh)
        require_fit(part.spec, dtype, device, ranks=mesh.size())
        fill(
            model, checkpoint, table, ignorable,
            dtype=dtype, device=device, progress=progress, shares=shares, part=part,
        )  # fmt: skip
        return joined(part.train(False), mesh)
    require_fit(spec, dtype, device)
    fill(model, checkpoint, table, ignorable, dtype=dtype, device=device, progress=progress)
    return model.train(False)


def load_next(source: str | PathLike[str], model: GLM, *, guesses: int, revision: str | None = None) -> NextToken:
    """The block behind the last in the checkpoint that `model` was loaded from, in its dtype and on its device.

    Its embedding and head are the model's own, unless the files hold others for it.

    Raises ConfigError for a format without such a block, CheckpointError where the files do not hold it, or another's.
    """
    folder = fetch(source, revision)
    checkpoint = Checkpoint.open(folder)
    generation, spec = described(checkpoint, Path(source).name)
    if spec != model.spec:
        raise ConfigError(f"{folder}: describes another model than the one it is to make guesses for")
    drafter = NextToken(spec, guesses).to(model.dtype)
    shared = {"embedding": model.embedding, "head": model.head}
    table = generation.next_table(spec, checkpoint.config, drafter.state_dict())
    block = "".join(table[0].name.partition(f".{len(spec.blocks)}.")[:2])
    tensors = {name: info for name, info in checkpoint.tensors.items() if name.startswith(block)}
    if not tensors:
        raise CheckpointError(f"{checkpoint.listing}: holds no {block}*, the block that predicts one token further")
    for name in shared:
        [line] = [line for line in table if line.parameter == f"{name}.weight"]
        if line.name not in tensors:
            table.remove(line)
            delattr(drafter, name)
    fill(drafter, replace(checkpoint, tensors=tensors), table, device=model.device)
    for name, module in shared.items():
        own = getattr(drafter, name, None)
        if own is None or torch.equal(own.state_dict()["weight"], module.state_dict()["weight"]):  # mostly copies
            setattr(drafter, name, module)
    return drafter.train(False)


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
