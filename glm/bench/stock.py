"""The honest best of PyTorch without kernels of its own: what gpt-fast does, for every GLM.

A static cache, a step as one compiled graph (`torch.compile` with fullgraph, CUDA graphs and the tuning that gpt-fast
turns on), attention over the whole cache with a mask, tinygemm for int4. The prompt is read without compiling, row by
row. Fused q | k | v and gate | up it shares with the model, whose modules it is made of.

github.com/pytorch-labs/gpt-fast has the idea; nothing is copied from there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from glm_kernels.bench.subject import MissingError
from torch import Tensor, nn
from torch.nn import functional as F

from glm.bench.sides import Prompts, Setting, shared_copy
from glm.cache import Notes, Slots, Tensors
from glm.grouped import GroupedLinear
from glm.layout import Mask
from glm.packing import unpack
from glm.positions import Rotary, Rotation

ROUND = 64  # places of the cache come in so many, as kernels that take a mask like it


class Placed:
    """The memory of one layer while decoding: the new token of every row goes to the same place."""

    def __init__(self, buffers: Tensors, at: Tensor, notes: Notes) -> None:
        self.buffers, self.at, self.notes = buffers, at, notes

    def extend(self, *new: Tensor) -> Tensors:
        """[B, heads, 1, width] each -> all places, [B, heads, S, width]."""
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer.index_copy_(2, self.at, x)
        return self.buffers


class Step(nn.Module):
    """Tokens [B, 1] at place `at` [1] of the cache -> the likeliest next ones [B, 1]."""

    every: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model, batch = setting.model, setting.case.batch
        if model.spec.prefix is not None:
            raise MissingError("has no learned prefix")
        self.spec = model.spec
        self.model = shared_copy(model)
        swap_integers(self.model)
        self.places = -(-setting.length // ROUND) * ROUND
        options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        self.shapes = [block.mixer.remembers for block in self.spec.blocks]
        for i, layer in enumerate(self.shapes):  # buffers of a module: their addresses may be part of a graph
            for j, (heads, width) in enumerate(layer):
                self.register_buffer(f"cache{i}_{j}", torch.zeros(batch, heads, self.places, width, **options))
        self.axes = 0
        if isinstance(self.spec.rotary, Rotary):
            self.axes = len(self.spec.rotary.widths)
            every = torch.arange(self.places, device=model.device)[None, :, None].expand(-1, -1, self.axes)
            for axis, turn in enumerate(self.spec.rotary.rotation(every, model.dtype).turns):
                for kind, table in zip(("cos", "sin"), turn, strict=True):
                    self.register_buffer(f"{kind}{axis}", table[0].clone())  # [S 1 w/2]
        self.register_buffer("every", torch.arange(self.places, device=model.device))

    def buffers_of(self, layer: int) -> Tensors:
        """What a layer remembers."""
        return tuple(getattr(self, f"cache{layer}_{j}") for j in range(len(self.shapes[layer])))

    def rotation(self, positions: Tensor) -> Rotation:
        """For positions [B, 1, A]."""
        if not self.axes:
            return Rotation((), (), "halves")
        assert isinstance(self.spec.rotary, Rotary)
        turns = [
            (getattr(self, f"cos{axis}")[positions[..., axis]], getattr(self, f"sin{axis}")[positions[..., axis]])
            for axis in range(self.axes)
        ]
        return Rotation(turns, self.spec.rotary.widths, self.spec.rotary.pairing)

    def forward(self, tokens: Tensor, at: Tensor, positions: Tensor) -> Tensor:
        """See the class."""
        return self.logits(tokens, at, positions).argmax(-1)

    def logits(self, tokens: Tensor, at: Tensor, positions: Tensor) -> Tensor:
        """[B, 1, V]."""
        model: Any = self.model
        x = F.embedding(tokens, model.embedding.weight)
        if model.places is not None:
            for axis, table in enumerate(model.places.tables):
                x = x + F.embedding(positions[..., axis], table.weight)
        mask = Mask((self.every <= at)[None, None, None], causal=False)
        rotation = self.rotation(positions)
        notes: Notes = {}
        for i, block in enumerate(model.blocks):
            x = block(x, rotation, mask, Placed(self.buffers_of(i), at, notes))
        found: Tensor = model.head(model.final_norm(x))
        return found


class Stock:
    """A side: see the top of this file."""

    def __init__(self, setting: Setting) -> None:
        self.module = Step(setting)
        self.device = setting.model.device
        self.call: Callable[..., Tensor] = self.module
        if self.device.type == "cuda":  # mode="reduce-overhead" is the first of these; gpt-fast adds the second
            options: dict[str, Any] = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
            torch._dynamo.reset()
            self.call = torch.compile(self.module, fullgraph=True, dynamic=False, options=options)
        self.chosen: list[Tensor] = []

    @torch.no_grad()
    def logits(self, prompt: Sequence[int]) -> Tensor:
        """[T, V]."""
        return self.module.model.head(self.read(prompt, 0))[0]  # type: ignore[operator, no-any-return]

    def read(self, prompt: Sequence[int], row: int) -> Tensor:
        """The stream [1, T, D] after the final norm; the prompt is in the cache of a row then."""
        model: Any = self.module.model
        ids = torch.tensor([list(prompt)], device=self.device)
        layout = model.layout(ids)
        rotation, mask = self.module.spec.rotary.rotation(layout.positions, model.dtype), layout.mask()
        notes: Notes = {}
        x = model.embed(ids, layout.positions)
        one = slice(row, row + 1)
        for i, block in enumerate(model.blocks):
            x = block(x, rotation, mask, Slots(tuple(b[one] for b in self.module.buffers_of(i)), 0, notes))
        step = self.module.spec.reading.step if layout.step is None else layout.step[0].tolist()
        self.moves = torch.tensor(step, device=self.device)
        self.last = layout.positions[:, -1:]
        stream: Tensor = model.final_norm(x)
        return stream

    @torch.no_grad()
    def start(self, prompts: Prompts) -> None:
        """All prompts are of the same length."""
        model: Any = self.module.model
        first = [model.head(self.read(p, row)[:, -1:]).argmax(-1) for row, p in enumerate(prompts)]
        self.chosen = [torch.cat(first)]
        self.at = torch.tensor([len(prompts[0])], device=self.device)
        self.positions = (self.last + self.moves).expand(len(prompts), -1, -1).clone()

    @torch.no_grad()
    def step(self) -> None:
        """One replay."""
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        self.chosen.append(self.call(self.chosen[-1], self.at, self.positions).clone())
        self.at += 1
        self.positions += self.moves

    def tokens(self) -> list[list[int]]:
        """By row."""
        rows: list[list[int]] = torch.cat(self.chosen, dim=1).tolist()
        return rows

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Not compiled, from the cache that compiled steps wrote."""
        return self.module.logits(self.chosen[-1], self.at, self.positions)[:, -1]

    def prefill(self, prompt: Sequence[int]) -> None:
        """Into the first row."""
        self.start([prompt])
        self.chosen[0].tolist()


def swap_integers(module: nn.Module) -> None:
    """Every int4 matrix as tinygemm takes it."""
    for name, child in module.named_children():
        if isinstance(child, GroupedLinear) and child.form.bits == 4:
            setattr(module, name, TinyLinear(child))
        else:
            swap_integers(child)


class TinyLinear(nn.Module):
    """y = W x + b by torch's own int4 product; W[o, i] = (code - 8) s."""

    def __init__(self, stored: GroupedLinear) -> None:
        super().__init__()
        words, scales = stored.weight_packed, stored.weight_scale
        if stored.form.group not in (32, 64, 128, 256):
            raise MissingError("tinygemm takes groups of 32, 64, 128 or 256")
        self.group, self.outputs = stored.form.group, words.shape[0]
        if words.is_cuda:  # bytes with the even column in the high nibble
            codes = words.view(torch.uint8)
            self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack((codes >> 4) | (codes << 4), 8))
        else:
            codes = unpack(words, 4, stored.inputs).int() + 8
            self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("pairs", torch.stack((scales.mT, torch.zeros_like(scales.mT)), dim=-1).contiguous())
        self.bias = stored.bias
        self.product = (
            torch.ops.aten._weight_int4pack_mm if words.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        y: Tensor = self.product(x.flatten(0, -2), self.weight, self.group, self.pairs)
        y = y.view(*x.shape[:-1], self.outputs)
        return y if self.bias is None else y + self.bias
