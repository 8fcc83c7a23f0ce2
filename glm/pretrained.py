"""From a checkpoint folder to a model: recognise, describe, refuse what cannot fit, load.

config.json -> family -> spec -> GLM(spec) on the meta device -> filled tensor by tensor from the files
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glm import family
from glm.checkpoint import Checkpoint, Stored, fill, match, read_share
from glm.drafting import NextToken
from glm.errors import CheckpointError, ConfigError
from glm.family.generation import Generation
from glm.hub import fetch
from glm.info import require_fit
from glm.model import GLM
from glm.reading import read_tensor
from glm.shares import Share
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
    opened = Opened.of(source, dtype=dtype, revision=revision, prefix=prefix)
    return opened.filled(device, progress) if mesh is None else opened.dealt_out(mesh, device, progress)


@dataclass(frozen=True)
class Opened:
    """A checkpoint described and compared with its model, before any memory is taken.

    base        the files as they lie in their folder
    checkpoint  the same, with integers in the layouts of others seen as our own, and a learned prefix if one was given
    model       on the meta device
    table       which tensor of `checkpoint` is which part of the model
    ignorable   patterns of the names of tensors that may be there and are not used
    heads       the head's name, if the model's head is its embedding and the files hold one all the same
    dtype       what floating-point numbers become
    """

    base: Checkpoint
    checkpoint: Checkpoint
    model: GLM
    table: list[Stored]
    ignorable: tuple[str, ...]
    heads: tuple[str, ...]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        source: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        prefix: str | PathLike[str] | None = None,
    ) -> "Opened":
        """That of a folder or hub id; arguments and errors are those of `load`."""
        base = Checkpoint.open(fetch(source, revision))
        checkpoint = base if prefix is None else with_prefix(base, Checkpoint.open(fetch(prefix)))
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
        match(model, checkpoint, table, ignorable)  # a config that does not fit its files is their error, not memory's
        spare = generation.spare_head(spec)
        heads = tuple(name for name in checkpoint.tensors if any(re.fullmatch(head, name) for head in spare))
        return cls(base, checkpoint, model, table, ignorable, heads, dtype)

    @cached_property
    def lines(self) -> dict[str, list[Stored]]:
        """The lines of the table that make up each parameter."""
        return {name: list(lines) for name, lines in groupby(self.table, key=lambda line: line.parameter)}

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """What holds all parts of a parameter as they are stored."""
        return reduce(torch.promote_types, (self.checkpoint.tensors[line.name].dtype for line in self.lines[parameter]))

    def read(self, parameter: str, like: Tensor) -> Tensor:
        """One parameter, of the shape of `like`, as it is stored; on the CPU."""
        whole = torch.empty(like.shape, dtype=self.stored_dtype(parameter), device="cpu")
        for line in self.lines[parameter]:
            read_tensor(line.name, self.checkpoint.tensors[line.name], line.on_disk(whole))
        return whole

    def filled(self, device: torch.device | str | None = None, progress: Progress | None = None) -> GLM:
        """The model with its numbers, on `device`."""
        require_fit(self.model.spec, self.dtype, device)
        fill(
            self.model, self.checkpoint, self.table, self.ignorable,
            dtype=self.dtype, device=device, progress=progress,
        )  # fmt: skip
        self.require_one_head(self.model.embedding.weight.detach())
        return self.model.train(False)

    def require_one_head(self, embedding: Tensor, share: Share | None = None, mesh: "DeviceMesh | None" = None) -> None:
        """Raise CheckpointError where the files hold a head of their own for a model whose head is its embedding.

        `embedding` is what was loaded, or this rank's `share` of it; then the ranks of `mesh` all raise or none does.
        """
        from glm.parallel import summed

        whole = self.model.embedding.weight.shape
        for name in self.heads:
            info, head = self.checkpoint.tensors[name], torch.empty_like(embedding)
            fits = info.shape == tuple(whole)
            if fits and share is None:
                read_tensor(name, info, head)
            elif fits and share is not None:
                read_share(Stored(name, "embedding.weight"), info, share, whole, head)
            wrong = torch.tensor(int(not fits or not torch.equal(head, embedding)), device=embedding.device)
            if bool(summed(wrong, mesh)):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: config.json says that the head is the embedding, but {name} is "
                    "another: set tie_word_embeddings to false, or take that tensor out"
                )

    def dealt_out(self, mesh: "DeviceMesh", device: torch.device | str | None, progress: Progress | None) -> GLM:
        """The share of it that belongs to this rank, with its numbers."""
        from glm.parallel import joined, narrow

        part, shares = narrow(self.model.spec, self.dtype, self.model.state_dict(), mesh)
        require_fit(part.spec, self.dtype, device, ranks=mesh.size())
        fill(
            self.model, self.checkpoint, self.table, self.ignorable,
            dtype=self.dtype, device=device, progress=progress, shares=shares, part=part,
        )  # fmt: skip
        self.require_one_head(part.embedding.weight.detach(), shares["embedding.weight"], mesh)
        return joined(part.train(False), mesh)


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
