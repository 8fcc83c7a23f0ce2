"""The model: an embedding, blocks, a norm, a head. Everything particular to a release is in its spec."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from glm.cache import Cache, Memory, Notes, Passing
from glm.errors import LayoutError
from glm.layout import Layout, Mask
from glm.linear import Weights, empty_embedding
from glm.positions import Rotation
from glm.spec import Block, Spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class BlockModule(nn.Module):
    """One layer: mix tokens, then transform each."""

    def __init__(self, spec: Block, width: int, weights: Weights) -> None:
        super().__init__()
        self.wire_mixer = spec.wiring.build(spec.norm, width)
        self.mixer = spec.mixer.build(width, spec.stored("mixer", weights))
        self.wire_feed_forward = spec.wiring.build(spec.norm, width)
        self.feed_forward = spec.feed_forward.build(width, spec.stored("feed_forward", weights))

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, memory: Memory) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.wire_mixer(x, lambda h: self.mixer(h, rotation, mask, memory))
        x = self.wire_feed_forward(x, self.feed_forward)
        return x


class GLM(nn.Module):
    """A general language model: token ids in, logits out."""

    def __init__(
        self,
        spec: Spec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        """Random weights, N(0, 0.02²), drawn from `seed`; on the "meta" device none at all.

        Matrices stored as integers stay zero: they only come from a checkpoint.
        """
        super().__init__()
        self.spec = spec
        with torch.device("meta"):
            self.embedding = empty_embedding(spec.vocabulary, spec.width)
            self.places = None if spec.learned is None else spec.learned.build(spec.width)
            self.prefix = None
            if spec.prefix is not None:
                self.prefix = spec.prefix.build(len(spec.blocks), spec.blocks[0].mixer.remembers)
            self.blocks = nn.ModuleList(BlockModule(block, spec.width, spec.weights) for block in spec.blocks)
            self.final_norm = nn.Identity() if spec.final_norm is None else spec.final_norm.build(spec.width)
            self.head = spec.head.linear(spec.width, spec.vocabulary, bias=False)
        self.to(dtype or torch.get_default_dtype())
        device = torch.device(device or torch.get_default_device())
        if device.type != "meta":
            self.to_empty(device=device)
        if spec.tied:  # not earlier: to_empty would give each its own memory
            self.head.weight = self.embedding.weight
        if device.type != "meta":
            self.initialise(seed)

    def initialise(self, seed: int | None = None) -> None:
        """Draw matrices from N(0, 0.02²); biases 0, norm weights 1, integer matrices 0 with scale 1."""
        generator = torch.Generator(self.device)
        if seed is not None:
            generator.manual_seed(seed)
        with torch.no_grad():
            for name, x in self.state_dict().items():
                if not x.is_floating_point() or name.endswith("bias"):
                    x.zero_()
                elif name.endswith("weight_scale"):
                    x.fill_(1 if x.dim() == 1 else 0)  # packed integers of zero bits are -2^(bits-1)
                elif x.dim() == 1:
                    x.fill_(1)
                else:
                    x.normal_(0, 0.02, generator=generator)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        prefix: str | PathLike[str] | None = None,
        mesh: "DeviceMesh | None" = None,
    ) -> "GLM":
        """The model of a checkpoint folder or hub id; `prefix` is a P-Tuning folder. See `glm.pretrained.load`."""
        from glm.pretrained import load  # the way down to files and families starts here

        return load(source, dtype=dtype, device=device, revision=revision, prefix=prefix, mesh=mesh)

    @classmethod
    def from_release(
        cls,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> "GLM":
        """A published release by name (see `glm.releases()`), with random weights or none ("meta")."""
        from glm.family import release

        chosen = release(name)
        return cls(chosen.spec, device=device, dtype=dtype or chosen.dtype, seed=seed)

    @property
    def device(self) -> torch.device:
        """Where the embedding lies."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.embedding.weight.dtype

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, as far as the release goes."""
        return self.spec.context

    def layout(self, ids: Tensor, real: Tensor | None = None) -> Layout:
        """What the release makes of ids [B, T]; `real` bool [B, T] is False on padding."""
        return self.spec.reading.read(ids, real)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids [B, T] at positions [B, T, A] -> the stream before the first block, [B, T, D]."""
        x: Tensor = self.embedding(ids)
        return x if self.places is None else x + self.places(positions)

    def start(self) -> Sequence[Memory]:
        """One memory a layer for a pass without a cache: nothing, or the learned prefix."""
        prefixes = [None] * len(self.blocks) if self.prefix is None else self.prefix()
        notes: Notes = {}
        return [Passing(keys_and_values, notes) for keys_and_values in prefixes]

    def new_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens in each of `batch` rows, on the model's device and in its dtype."""
        return Cache(
            [block.mixer.remembers for block in self.spec.blocks],
            batch,
            length,
            dtype=self.dtype,
            device=self.device,
            prefix=None if self.prefix is None else self.prefix(),
        )

    @overload
    def forward(
        self,
        ids: Tensor,
        layout: Layout | None = None,
        cache: Cache | None = None,
        *,
        hidden: Literal[False] = False,
        last: bool = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        ids: Tensor,
        layout: Layout | None = None,
        cache: Cache | None = None,
        *,
        hidden: Literal[True],
        last: bool = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward(
        self,
        ids: Tensor,
        layout: Layout | None = None,
        cache: Cache | None = None,
        *,
        hidden: bool = False,
        last: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Ids [B, T] -> logits [B, T, V], or [B, 1, V] of the last token with `last`.

        layout  positions and visibility; None is what the release makes of these ids, or of the ids that
                follow those in the cache.
        cache   keys and values of earlier tokens; grows by T.
        hidden  also return the stream [B, T, D] before the first block, after each, and after the final norm.

        Raises LayoutError if the layout does not fit, CacheError if the cache is too short.
        """
        x, states = self.stream(ids, layout, cache, hidden=hidden)
        logits: Tensor = self.head(x[:, -1:] if last else x)  # [B T V]
        return (logits, [*states, x]) if hidden else logits

    def stream(
        self, ids: Tensor, layout: Layout | None = None, cache: Cache | None = None, *, hidden: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """What the head reads of ids [B, T], the stream [B, T, D] after the final norm, and for `hidden` all before it.

        The arguments are those of a call, and so are the errors.
        """
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise LayoutError(f"ids must be [B, T] with T ≥ 1, not {list(ids.shape)}")
        B, T = ids.shape
        if cache is not None:
            cache.room_for(B, T)
        if layout is None and cache is not None and cache.layout is not None:
            layout = self.spec.reading.following(cache.layout, T)
        elif layout is None:
            layout = self.layout(ids)
        earlier = 0 if cache is None else cache.filled
        if layout.positions.shape[:2] != (B, T) or layout.keys != earlier + T:
            raise LayoutError(
                f"the layout is for {list(layout.positions.shape[:2])} ids and {layout.keys} keys, "
                f"but there are {[B, T]} ids and {earlier + T} keys"
            )
        mask = layout.mask(always=0 if self.spec.prefix is None else self.spec.prefix.length)
        rotation = self.spec.rotary.rotation(layout.positions, self.dtype)
        memories = self.start() if cache is None else cache.memories()

        x = self.embed(ids, layout.positions)  # [B T D]
        states = [x] if hidden else []
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block(x, rotation, mask, memory)
            if hidden:
                states.append(x)
        if cache is not None:
            cache.advance(layout)
        return self.final_norm(x), states
