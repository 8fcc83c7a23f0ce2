"""The whole model composed a second time: the parameters of a `GLM`, the steps of the engine."""

from collections.abc import Iterator
from functools import partial
from types import NoneType

from torch import Tensor, nn

from glm.cache import Tensors
from glm.errors import ConfigError
from glm.grouped import Grouped
from glm.model import GLM, BlockModule
from glm.positions import LearnedModule
from glm.runtime.attention import fused_mixer
from glm.runtime.call import Call, Turns
from glm.runtime.feed_forward import fused_feed_forward
from glm.runtime.matrices import Store
from glm.runtime.norms import fused_norm
from glm.runtime.wiring import wire


class FusedBlock:
    """One layer."""

    def __init__(self, module: BlockModule, turns: Turns, store: Store) -> None:
        self.wire_mixer, self.wire_feed_forward = wire(module.wire_mixer), wire(module.wire_feed_forward)
        self.mixer = fused_mixer(module.mixer, turns, store)
        self.feed_forward = fused_feed_forward(module.feed_forward, store)

    def steps(self, x: Tensor, call: Call, buffers: Tensors) -> Iterator[tuple[str, Tensor]]:
        """The stream [B, T, D] after the mixer and after the feed-forward, and what each is called."""
        x = self.wire_mixer(x, partial(self.mixer, call=call, buffers=buffers))
        yield "attention", x
        yield "feed-forward", self.wire_feed_forward(x, self.feed_forward)


class Composed:
    """Token ids and positions in, the stream out; logits are asked for by themselves."""

    def __init__(self, model: GLM, positions: int, form: Grouped | None, *, release: bool = False) -> None:
        """For positions up to so many; `form` is what dense matrices of the blocks become.

        With `release` the model's blocks are let go one by one as they are composed: it cannot be used afterwards, and
        memory never holds more than one block twice.

        Raises ConfigError for a model that is dealt out to several processes, integers that are to become others, or
        an embedding that is no table.
        """
        if any(type(x) not in (Tensor, nn.Parameter) for x in model.state_dict(keep_vars=True).values()):
            raise ConfigError("the engine runs a model on one device, and this one is dealt out to several processes")
        if type(model.embedding) is not nn.Embedding or type(model.places) not in (NoneType, LearnedModule):
            raise ConfigError("the engine knows no other embedding than tables: use glm.generate for this model")
        self.spec = model.spec
        self.turns = Turns(model.spec.rotary, positions, model.dtype, model.device)
        self.embedding = model.embedding.weight
        self.tables = [] if model.places is None else list(model.places.parameters())
        self.prefix = None if model.prefix is None else model.prefix()
        store = Store(form, model.dtype, model.device)
        self.blocks = []
        for i, block in enumerate(model.blocks):
            assert isinstance(block, BlockModule)
            self.blocks.append(FusedBlock(block, self.turns, store))
            if release:
                model.blocks[i] = nn.Identity()
            del block
        self.final_norm = fused_norm(model.final_norm)
        self.head = Store(None, model.dtype, model.device).matrix(model.head)

    def steps(
        self, tokens: Tensor, positions: Tensor, call: Call, memory: list[Tensors]
    ) -> Iterator[tuple[str, Tensor]]:
        """The stream [B, T, D] of tokens [B, T] at positions [B, T, A] after every sublayer, and the name of that."""
        x = nn.functional.embedding(tokens, self.embedding)
        for axis, table in enumerate(self.tables):
            x = x + nn.functional.embedding(positions[..., axis], table)
        yield "the embedding", x
        for number, (block, buffers) in enumerate(zip(self.blocks, memory, strict=True)):
            stream = x
            for name, x in block.steps(stream, call, buffers):
                yield f"the {name} of block {number}", x

    def __call__(self, tokens: Tensor, positions: Tensor, call: Call, memory: list[Tensors]) -> Tensor:
        """Tokens [B, T] at positions [B, T, A] -> the stream [B, T, D] before the final norm."""
        for _, x in self.steps(tokens, positions, call, memory):  # noqa: B007, none but the last is kept
            pass
        return x

    def final(self, x: Tensor) -> Tensor:
        """The stream after the final norm, [B, T, D]: what a drafter reads."""
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]."""
        return self.head(x, norm=self.final_norm)
