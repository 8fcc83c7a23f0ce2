"""Latent attention: its two forms are one function, and a cache holds nothing but the latent."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glm.cache import Passing
from glm.errors import ConfigError
from glm.family import release
from glm.info import cache_bytes_per_token
from glm.latent_attention import LatentAttention, LatentAttentionModule
from glm.layout import EVERYTHING, Layout, Mask
from glm.linear import Dense
from glm.norms import LayerNorm, RMSNorm
from glm.positions import Plain, Rotary, Rotation
from glm.sparse_attention import Indexer, SparseAttention, only

SPEC = LatentAttention(4, 24, 20, 12, 8, 16, RMSNorm(1e-6, weight_first=False), bias=True)
ROTARY = Rotary((8,), "interleaved", 1e4, Plain(), None)


def drawn(module: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for x in module.state_dict().values():
        x.copy_(torch.randn(x.shape, generator=generator))
    return module


def inputs(B: int, T: int, start: int = 0) -> tuple[Tensor, Rotation]:
    x = torch.randn(B, T, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
    return x, ROTARY.rotation(torch.arange(start, start + T).expand(B, -1)[..., None], torch.float64)


MASKS = {
    "causal": Mask(None, causal=True),
    "everything": EVERYTHING,
    "padded": Layout.rule(torch.arange(9).expand(2, -1)[..., None], start=torch.tensor([0, 4])).mask(),
}


@torch.no_grad()
@pytest.mark.parametrize("query_rank", [24, None])
@pytest.mark.parametrize("mask", MASKS)
def test_both_forms_are_equal(query_rank: int | None, mask: str) -> None:
    module: LatentAttentionModule = drawn(LatentAttentionModule(replace(SPEC, query_rank=query_rank), 32, Dense()))
    x, rotation = inputs(2, 9)
    results = []
    for module.absorbed in (False, True):
        results.append(module(x, rotation, MASKS[mask], Passing(None, {})))
    naive, absorbed = results
    assert (naive - absorbed).abs().max() <= 1e-12 * naive.abs().max()
    assert naive.abs().max() > 1


@torch.no_grad()
def test_the_equation_one_head_at_a_time() -> None:
    module: LatentAttentionModule = drawn(LatentAttentionModule(SPEC, 32, Dense()))
    x, rotation = inputs(1, 7)
    turn = lambda v: rotation(v[None, :, None])[0, :, 0]  # noqa: E731 (the equation's own word)
    q = module.query_up(module.query_norm(module.query_down(x[0]))).view(7, 4, 20)
    c, r = module.down(x[0]).split((20, 8), dim=-1)
    up = module.norm(c) @ module.up.weight.T
    heads = []
    for h, kv in enumerate(up.view(7, 4, 28).unbind(1)):
        k, a = torch.cat((kv[:, :12], turn(r)), -1), torch.cat((q[:, h, :12], turn(q[:, h, 12:])), -1)
        scores = (a @ k.T / 20**0.5).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ kv[:, 12:])
    expected = module.out(torch.cat(heads, -1))
    torch.testing.assert_close(module(x, rotation, MASKS["causal"], Passing(None, {}))[0], expected)


def test_the_form_with_fewer_products_is_chosen() -> None:
    flash = release("glm-4.7-flash").spec.blocks[0].mixer
    assert flash.absorbing_is_cheaper(1, 1000)
    assert flash.absorbing_is_cheaper(5, 1000)
    assert not flash.absorbing_is_cheaper(1000, 1000)
    assert not flash.absorbing_is_cheaper(1, 1)


@pytest.mark.parametrize(("name", "numbers"), [("glm-4.7-flash", 47 * 576), ("glm-5", 78 * (576 + 128))])
def test_a_cache_holds_the_latent_and_the_rotary_key(name: str, numbers: int) -> None:
    assert cache_bytes_per_token(release(name).spec, torch.bfloat16) == 2 * numbers


# --- sparse -----------------------------------------------------------------------------------------------------------

SPARSE = SparseAttention(SPEC, Indexer(heads=3, width=10, top=4, norm=LayerNorm(1e-6)))


@torch.no_grad()
def test_the_indexer_chooses_by_its_equation_and_its_eps() -> None:
    module = drawn(SPARSE.build(32, Dense()))
    indexer = module.indexer
    indexer.down.weight.mul_(1e-3)  # so small that the eps of the norm of keys is seen
    x, rotation = inputs(1, 9)
    asked = module.attention.bottleneck(x)
    keys = indexer.key(x, rotation)
    k = x[0] @ indexer.down.weight.T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    k = rotation((k * indexer.norm.weight + indexer.norm.bias)[None, :, None])[0, :, 0]
    torch.testing.assert_close(keys[0, 0], k, rtol=1e-12, atol=1e-12)
    q = rotation((asked @ indexer.query.weight.T).view(1, 9, 3, 10))[0]
    w = x[0] @ indexer.weigh.weight.T
    scores = torch.einsum("tj,tjs->ts", w, torch.einsum("tjk,sk->tjs", q, k).relu()) / 30**0.5
    for t, chosen in enumerate(indexer(x, asked, keys, rotation, MASKS["causal"])[0].tolist()):
        best = scores[t, : t + 1].argsort(descending=True)[:4].tolist()
        assert set(best) <= set(chosen)
        assert t < 4 or set(best) == set(chosen)


@torch.no_grad()
def test_one_query_reads_only_what_was_chosen() -> None:
    latents = torch.randn(2, 1, 9, 28)
    chosen = torch.tensor([[[0, 3, 8]], [[5, 6, 7]]])
    allowed = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    allowed[0, ..., 3] = False
    read, mask = only(chosen, latents, Mask(allowed, causal=False))
    assert torch.equal(read, torch.stack((latents[0][:, [0, 3, 8]], latents[1][:, [5, 6, 7]])))
    assert mask.allowed is not None
    assert mask.allowed[:, 0, 0].tolist() == [[True, False, True], [True, True, True]]


def test_an_indexer_needs_a_bottleneck() -> None:
    with pytest.raises(ConfigError, match="bottleneck"):
        replace(SPARSE, attention=replace(SPEC, query_rank=None)).build(32, Dense())
