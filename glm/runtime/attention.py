"""Attention of the engine: product, attention, product; what attends also turns, and fills the cache.

A mixer is called with the stream, what the call says, and its layer's buffers; norm and sum are those of `wiring.py`.
Which kernel attends is a matter of the call: a prompt is many queries of one row, decoding a few of each.
"""

from typing import Any, Protocol

import torch
from glm_kernels import append_attention, attention, decode_latent_attention, rotary, rotary_append
from torch import Tensor, nn

from glm.attention import AttentionModule, HeadNorms
from glm.cache import Tensors
from glm.latent_attention import LatentAttentionModule
from glm.positions import Rotary, Unturned
from glm.runtime.call import Call, Turns
from glm.runtime.matrices import Store, known
from glm.runtime.norms import FusedNorm
from glm.runtime.slots import Appending, append


class FusedMixer(Protocol):
    """r + f(n(h)) for h [B, T, D], with the keys and values in `buffers`."""

    def __call__(
        self, h: Tensor, call: Call, buffers: Tensors, *, norm: FusedNorm | None, residual: Tensor | None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        ...


def fused_mixer(module: nn.Module, turns: Turns, store: Store) -> FusedMixer:
    """The engine's form of a mixer: the module itself where there is no other, or where it is changed."""
    if type(module) is AttentionModule and type(module.qk_norm) in (nn.Identity, HeadNorms):
        return FusedAttention(module, turns.rotary, store)
    if type(module) is LatentAttentionModule and known(module.up):
        return FusedLatentAttention(module, turns.rotary, store)
    return AsItIs(module, turns)


class FusedAttention:
    """Queries, keys and values from one product; keys and values go to the cache as they are turned."""

    def __init__(self, module: AttentionModule, rotary: Rotary | Unturned, store: Store) -> None:
        self.heads, self.groups, self.width = module.spec.heads, module.spec.groups, module.spec.head_width
        self.qkv, self.out = store.matrix(module.qkv), store.matrix(module.out)
        self.form: dict[str, Any] = {}  # of what is turned, if anything is
        if isinstance(rotary, Rotary):
            self.form = {"widths": rotary.widths, "pairing": rotary.pairing}
        self.norms: tuple[FusedNorm, FusedNorm] | None = None
        if type(module.qk_norm) is HeadNorms:
            self.norms = FusedNorm(module.qk_norm.q), FusedNorm(module.qk_norm.k)

    def __call__(
        self, h: Tensor, call: Call, buffers: Tensors, *, norm: FusedNorm | None, residual: Tensor | None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        k, v = buffers
        qkv = self.qkv(h, norm=norm)
        qkv = qkv if self.norms is None else self.normed(qkv)
        if call.prompt is None:
            cos, sin = call.turns or (None, None)
            y = append_attention(qkv, cos, sin, k, v, call.at, call.length, **self.form)  # [B T H K]
        else:
            q, keys = self.remembered(qkv, k, v, call).transpose(1, 2), slice(call.prompt.keys)  # [B H T K]
            y = attention(q, k[:, :, keys], v[:, :, keys], prefix=call.prompt.prefix).transpose(1, 2)
        return self.out(y.flatten(2), residual=residual)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, (H + 2G) K] -> q [B, T, H, K], k and v [B, T, G, K]."""
        q, k, v = qkv.unflatten(-1, (-1, self.width)).split((self.heads, self.groups, self.groups), dim=2)
        return q, k, v

    def normed(self, qkv: Tensor) -> Tensor:
        """The same with every query and key head normalised."""
        assert self.norms is not None
        q, k, v = self.split(qkv)
        return torch.cat((self.norms[0](q), self.norms[1](k), v), dim=2).flatten(2)

    def remembered(self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, call: Call) -> Tensor:
        """Queries [B, T, H, K], turned; keys and values are in the cache."""
        if call.turns is not None:
            return rotary_append(qkv, *call.turns, key_cache, value_cache, call.at, **self.form)
        q, k, v = self.split(qkv)
        append(key_cache, k, call.at)
        append(value_cache, v, call.at)
        return q


class FusedLatentAttention:
    """Naive for a prompt, absorbed for decoding; see `glm/latent_attention.py` for the two."""

    def __init__(self, module: LatentAttentionModule, rotary: Rotary | Unturned, store: Store) -> None:
        assert isinstance(rotary, Rotary)
        self.spec, self.rotary = module.spec, rotary
        self.query_down = None if module.spec.query_rank is None else store.matrix(module.query_down)
        self.query_norm = None if module.spec.query_rank is None else FusedNorm(module.query_norm)
        self.query = store.matrix(module.query if module.spec.query_rank is None else module.query_up)
        self.down, self.out = store.matrix(module.down), store.matrix(module.out)
        self.norm = FusedNorm(module.norm)
        N, V = self.spec.plain, self.spec.value
        self.up = module.up.dense(store.dtype)  # type: ignore[operator]
        self.into, self.from_ = self.up.unflatten(0, (-1, N + V)).split((N, V), dim=1)  # [H N R], [H V R]

    def __call__(
        self, h: Tensor, call: Call, buffers: Tensors, *, norm: FusedNorm | None, residual: Tensor | None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        (latents,) = buffers
        assert call.turns is not None
        h = h if norm is None else norm(h)  # two products read it
        N, P, R = self.spec.plain, self.spec.rotary, self.spec.rank
        q = h if self.query_down is None else self.query_down(h)
        plain, turned = (
            self.query(q, norm=self.query_norm).unflatten(-1, (-1, N + P)).split((N, P), dim=-1)
        )  # [B T H …]
        c, r = self.down(h).split((R, P), dim=-1)
        append(latents, torch.cat((self.norm(c)[:, :, None], self.turned(r[:, :, None], call)), dim=-1), call.at)
        decode = self.answer_prompt if call.prompt is not None else self.answer
        y = decode(plain, self.turned(turned, call), latents, call)  # [B T H V]
        return self.out(y.flatten(2), residual=residual)

    def turned(self, x: Tensor, call: Call) -> Tensor:
        """[B, T, heads, P], rotated."""
        assert call.turns is not None
        return rotary(x, *call.turns, widths=self.rotary.widths, pairing=self.rotary.pairing)

    def answer(self, plain: Tensor, turned: Tensor, latents: Tensor, call: Call) -> Tensor:
        """All heads attend to the latents themselves: -> [B, T, H, V]."""
        asked = torch.cat((torch.einsum("bthn,hnr->bthr", plain, self.into), turned), dim=-1)
        scale = (self.spec.plain + self.spec.rotary) ** -0.5
        found = decode_latent_attention(
            asked.transpose(1, 2), latents[:, 0], call.length, value_width=self.spec.rank, scale=scale
        )
        return torch.einsum("bhtr,hvr->bthv", found, self.from_)

    def answer_prompt(self, plain: Tensor, turned: Tensor, latents: Tensor, call: Call) -> Tensor:
        """Keys and values written out: -> [B, T, H, V]."""
        assert call.prompt is not None
        N, V, R, P = self.spec.plain, self.spec.value, self.spec.rank, self.spec.rotary
        c, r = latents[:, :, : call.prompt.keys].split((R, P), dim=-1)
        keys, v = (
            nn.functional.linear(c[:, 0], self.up).unflatten(-1, (-1, N + V)).transpose(1, 2).split((N, V), dim=-1)
        )
        k = torch.cat((keys, r.expand(-1, keys.shape[1], -1, -1)), dim=-1)  # [B H S N+P]
        q = torch.cat((plain, turned), dim=-1).transpose(1, 2)
        return attention(q, k, v, prefix=call.prompt.prefix).transpose(1, 2)


class AsItIs:
    """A mixer that has no fused form, on the engine's cache."""

    def __init__(self, module: nn.Module, turns: Turns) -> None:
        self.module, self.turns = module, turns

    def __call__(
        self, h: Tensor, call: Call, buffers: Tensors, *, norm: FusedNorm | None, residual: Tensor | None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        keys = None if call.prompt is None else call.prompt.keys
        memory = Appending(buffers, call.at, keys, call.notes)
        mask = call.mask(h.shape[1], buffers[0].shape[2] if keys is None else keys)
        y: Tensor = self.module(h if norm is None else norm(h), self.turns.rotation(call.turns), mask, memory)
        return y if residual is None else y + residual
