"""A checkpoint run layer by layer: one block's weights in memory at a time, however large the model.

    walk = Walk(checkpoint, name)
    streams = walk.start(texts)
    for block in walk.blocks():
        for stream in streams:
            stream.x = stream.through(block)
    logits = walk.tail()(stream.x)

What quantising by text (`compress.py`) and measuring what integers cost (`accuracy.py`) have in common. Each text is a
row of its own, read from its beginning without a cache.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from glm.cache import Notes, Passing
from glm.checkpoint import Checkpoint, Stored, match
from glm.errors import GLMError
from glm.layout import Mask
from glm.model import GLM
from glm.positions import Rotation
from glm.pretrained import described
from glm.reading import read_tensor


@dataclass
class Stream:
    """One text on its way through the layers."""

    ids: Tensor  # [1, T]
    x: Tensor  # [1, T, D], before the block that is next
    rotation: Rotation
    mask: Mask
    notes: Notes = field(default_factory=dict)  # what blocks leave for those above them

    def through(self, block: nn.Module, x: Tensor | None = None) -> Tensor:
        """What the block makes of the stream, or of another `x` at the same place."""
        y: Tensor = block(self.x if x is None else x, self.rotation, self.mask, Passing(None, self.notes))
        return y


class Walk:
    """Raises what loading does: CheckpointError for files that are not what config.json calls for."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> None:
        """`name` is the checkpoint's, as for `Generation.spec`; computed is in `dtype`."""
        self.generation, self.spec = described(checkpoint, name)
        self.checkpoint = self.generation.ours(checkpoint)
        self.dtype = dtype
        self.model = GLM(self.spec, device="meta", dtype=dtype)
        self.table = self.generation.table(self.spec, checkpoint.config, self.model.state_dict())
        match(self.model, self.checkpoint, self.table, self.generation.unused(self.spec))

    def start(self, texts: Iterable[list[int]]) -> list[Stream]:
        """The streams before the first block, laid out as the release lays out such ids."""
        if self.spec.prefix is not None:
            raise GLMError("a model with a learned prefix is not run layer by layer; take the one it was learnt for")
        tables = [self.filled(self.model.embedding, "embedding")]
        if self.model.places is not None:
            tables.append(self.filled(self.model.places, "places"))
        streams = []
        for ids in (torch.tensor([text]) for text in texts):
            layout = self.model.layout(ids)
            rotation = self.spec.rotary.rotation(layout.positions, self.dtype)
            streams.append(Stream(ids, self.model.embed(ids, layout.positions), rotation, layout.mask()))
        for table in tables:
            table.to("meta")
        return streams

    def blocks(self) -> Iterator[nn.Module]:
        """Each block with its weights, which go when the next one comes."""
        for i, block in enumerate(self.model.blocks):
            yield self.filled(block, f"blocks.{i}")
            block.to("meta")

    def tail(self) -> Callable[[Tensor], Tensor]:
        """The end of the model, final norm and head: a stream [1, T, D] past all blocks -> logits [1, T, V]."""
        norm = self.filled(self.model.final_norm, "final_norm")
        head = self.filled(self.model.head, "embedding" if self.spec.tied else "head")
        return lambda x: head(norm(x))

    def filled(self, module: nn.Module, name: str) -> nn.Module:
        """The module called `name` with its numbers from the files."""
        module.to_empty(device="cpu")
        state = module.state_dict()
        for stored in self.lines(name):
            target = state[stored.parameter.removeprefix(f"{name}.")]
            read_tensor(stored.name, self.checkpoint.tensors[stored.name], stored.on_disk(target))
        return module.train(False)

    def lines(self, name: str) -> list[Stored]:
        """The lines of the table that belong to the module `name`."""
        return [stored for stored in self.table if stored.parameter.startswith(f"{name}.")]
