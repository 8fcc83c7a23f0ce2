"""Solutions of chapter 9, right and wrong."""

import torch
from torch import Tensor

from glm.sparse_attention import SparseAttention


def chosen(q: Tensor, k: Tensor, w: Tensor, visible: Tensor, top: int) -> Tensor:
    scores = torch.einsum("tj,tjs->ts", w, torch.einsum("tjk,sk->tjs", q, k).relu())
    return scores.masked_fill(~visible, -torch.inf).topk(top).indices


def chosen_without_relu(q: Tensor, k: Tensor, w: Tensor, visible: Tensor, top: int) -> Tensor:
    scores = torch.einsum("tj,tjk,sk->ts", w, q, k)
    return scores.masked_fill(~visible, -torch.inf).topk(top).indices


def chosen_from_all(q: Tensor, k: Tensor, w: Tensor, visible: Tensor, top: int) -> Tensor:
    return chosen(q, k, w, torch.ones_like(visible), top)


def chosen_by_all_heads_alike(q: Tensor, k: Tensor, w: Tensor, visible: Tensor, top: int) -> Tensor:
    return chosen(q, k, torch.ones_like(w), visible, top)


def seen(chosen: Tensor, visible: Tensor) -> Tensor:
    result = torch.zeros_like(visible)
    for t, keys in enumerate(chosen.tolist()):
        result[t, keys] = visible[t, keys]
    return result


def seen_whatever_was_visible(chosen: Tensor, visible: Tensor) -> Tensor:
    return torch.zeros_like(visible).scatter(1, chosen, True)


def a_step(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    k, v = k[chosen], v[chosen]
    shares = (torch.einsum("hk,shk->hs", q, k) / q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("hs,shk->hk", shares, v)


def a_step_that_masks(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    others = torch.ones(len(k), dtype=torch.bool).scatter(0, chosen, False)
    scores = (torch.einsum("hk,shk->hs", q, k) / q.shape[1] ** 0.5).masked_fill(others, -torch.inf)
    return torch.einsum("hs,shk->hk", scores.softmax(-1), v)


def worth_it(mixer: SparseAttention) -> int:
    attention, indexer = mixer.attention, mixer.indexer
    assert indexer is not None
    a_key, index = 2 * attention.heads * (attention.rank + attention.rotary), indexer.heads * indexer.width
    return indexer.top * a_key // (a_key - index) + 1  # S index + top a_key < S a_key


def worth_it_at_once(mixer: SparseAttention) -> int:
    assert mixer.indexer is not None
    return mixer.indexer.top + 1


RIGHT = {"9.1": [chosen], "9.2": [seen], "9.3": [a_step], "9.4": [worth_it]}
WRONG = {
    "9.1": [(chosen_without_relu, "result"), (chosen_from_all, "result"), (chosen_by_all_heads_alike, "result")],
    "9.2": [(seen_whatever_was_visible, "result")],
    "9.3": [(a_step_that_masks, "result")],
    "9.4": [(worth_it_at_once, "result")],
}
