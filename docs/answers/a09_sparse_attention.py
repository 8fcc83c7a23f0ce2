"""What is right in the exercises of chapter 9, by `glm` itself."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

import glm
from docs.check import Case, Exercise
from glm.attention import attend
from glm.layout import EVERYTHING, Layout, Mask
from glm.linear import Dense
from glm.norms import LayerNorm
from glm.positions import Unturned
from glm.sparse_attention import Indexer, IndexerModule, SparseAttention, only


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen_cases() -> Iterator[Case]:
    """The newest tokens of a text, a step, and everybody sees everybody; no scores that are both 0."""
    for seed, (T, S, causal) in enumerate(((6, 20, True), (1, 30, True), (9, 9, False))):
        J, K, top = 12, 8, 5
        q, k, w = random(T, J, K, seed=seed), random(S, K, seed=seed + 30), random(T, J, seed=seed + 60)
        indexer = IndexerModule(Indexer(J, K, top, LayerNorm(1e-6)), J * K, J, Dense()).double().requires_grad_(False)
        for part in (indexer.query, indexer.weigh):  # so that it gets q and w as they are
            weight = part.get_parameter("weight")
            weight.copy_(torch.eye(len(weight)))
        layout = Layout.rule(torch.arange(S - T, S)[None, :, None], S)
        mask = Mask(layout.visible[:, None], causal=False) if causal else EVERYTHING
        visible = layout.visible[0] if causal else torch.ones(T, S, dtype=torch.bool)
        rotation = Unturned().rotation(layout.positions, q.dtype)
        result = indexer(w[None], q.flatten(1)[None], k[None, None], rotation, mask)[0]
        yield Case({"q": q, "k": k, "w": w, "visible": visible, "top": top}, {"result": result})


def seen_cases() -> Iterator[Case]:
    """A prompt from its beginning, and one behind padding."""
    for seed, (T, top, start) in enumerate(((7, 3, 0), (8, 4, 2))):
        layout = Layout.rule(torch.arange(T)[None, :, None], start=torch.tensor([start]))
        visible = layout.visible[0]
        scores = random(T, T, seed=seed).masked_fill(~visible, -torch.inf)
        chosen = scores.topk(top).indices
        _, mask = only(chosen[None], random(1, 1, T, 2, seed=seed), Mask(visible[None, None], causal=False))
        assert mask.allowed is not None
        yield Case({"chosen": chosen, "visible": visible}, {"result": mask.allowed[0, 0]})


def a_step_cases() -> Iterator[Case]:
    """Some of many, and one."""
    for seed, (S, H, K, top) in enumerate(((40, 3, 4, 6), (9, 1, 8, 1))):
        q, k, v = random(H, K, seed=seed), random(S, H, K, seed=seed + 30), random(S, H, K, seed=seed + 60)
        chosen = random(S, seed=seed + 90).topk(top).indices
        keys, values = (
            only(chosen[None, None], x.flatten(1)[None, None], EVERYTHING)[0].view(1, top, H, K).transpose(1, 2)
            for x in (k, v)
        )
        result = attend(q[None, :, None], keys, values, EVERYTHING)[0, :, 0]
        others = torch.ones(S, dtype=torch.bool).scatter(0, chosen, False)[:, None, None]
        k, v = (x.masked_fill(others, torch.nan) for x in (k, v))
        yield Case({"q": q, "k": k, "v": v, "chosen": chosen}, {"result": result})


def worth_it_cases() -> Iterator[Case]:
    """The release, and two with more of one thing and less of the other."""
    published = glm.release("glm-5").spec.blocks[0].mixer
    assert isinstance(published, SparseAttention)
    assert published.indexer is not None
    for indexer in (published.indexer, replace(published.indexer, top=64), replace(published.indexer, heads=300)):
        mixer = replace(published, indexer=indexer)
        attention = 2 * mixer.attention.heads * sum(width for _, width in mixer.attention.remembers)
        index = indexer.heads * sum(width for _, width in mixer.remembers[1:])
        first = next(S for S in range(1, 1 << 20) if S * index + min(S, indexer.top) * attention < S * attention)
        yield Case({"mixer": mixer}, {"result": first})


EXERCISES = [
    Exercise("9.1", "chosen", chosen_cases),
    Exercise("9.2", "seen", seen_cases),
    Exercise("9.3", "a_step", a_step_cases),
    Exercise("9.4", "worth_it", worth_it_cases),
]
