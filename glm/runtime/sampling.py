"""Sampling on the device: every row by its own rules, without waiting for the host.

A step is told the most that any of its rows asks for, and spares what none does: the vocabulary is sorted only where a
row asks for a nucleus. (Sums over the sorted probabilities say where that ends; without sorting they would be added up
in another order, and one rounding may tip a token.)

The same choice as `glm.generation.Sampler` makes, token by token: the dice are thrown on the host beforehand, one for
each token that may come.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from glm_kernels import likeliest
from torch import Tensor

from glm.generation import Sampler, sample
from glm.norms import wide

Choice = Literal["greedy", "sampled", "nucleus"]
"""What some rows ask for at most: nothing; temperatures and penalties; top_k or top_p as well."""


def choice_of(samplers: Collection[Sampler]) -> Choice:
    """What all of these rows together ask for."""
    if all(s.temperature == 0 and s.repetition_penalty == 1 for s in samplers):
        return "greedy"
    return "nucleus" if any(s.temperature > 0 and (s.top_k > 0 or s.top_p < 1) for s in samplers) else "sampled"


@dataclass(frozen=True)
class Rules:
    """What the sampler of each row is told, [B] each; `luck` [B, n] is what its dice show, `seen` [B, V] its ids."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    penalty: Tensor
    luck: Tensor
    seen: Tensor

    @classmethod
    def greedy(cls, rows: int, length: int, vocabulary: int, device: torch.device) -> "Rules":
        """Rules for greedy rows, with room for `length` dice each."""
        ones = torch.ones(rows, dtype=torch.float64, device=device)
        none = torch.zeros(rows, dtype=torch.long, device=device)
        luck = torch.zeros(rows, length, dtype=torch.float64, device=device)
        seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        return cls(torch.zeros_like(ones), none, ones, ones.clone(), luck, seen)

    def rows(self, rows: slice) -> "Rules":
        """The rules of some rows, as views."""
        return Rules(*(getattr(self, field.name)[rows] for field in fields(self)))


def chosen(logits: Tensor, tokens: Tensor, rules: Rules, count: Tensor, choice: Choice) -> Tensor:
    """Ids [B, T], by logits [B, T, V], of what follows tokens [B, T]; -1 where logits are not finite.

    count [B] is how many new tokens each row has. Behind a guess the ids are those to choose if it is right.
    """
    if choice == "greedy":
        return likeliest(logits)
    ids = []
    for i in range(tokens.shape[1]):
        if i > 0:
            rules = replace(rules, seen=rules.seen.scatter(1, tokens[:, i, None], True))
        ids.append(sampled(logits[:, i], rules, count + i, sort=choice == "nucleus"))
    return torch.stack(ids, dim=1)


def sampled(logits: Tensor, rules: Rules, count: Tensor, *, sort: bool) -> Tensor:
    """Logits [B, V] and how many tokens each row has already [B] -> ids [B]; without `sort` no row has a nucleus."""
    x = wide(logits)
    penalty = rules.penalty.to(x.dtype)[:, None]
    x = torch.where(rules.seen, torch.where(x > 0, x / penalty, x * penalty), x)
    best = likeliest(x)
    cold = rules.temperature == 0
    x = (x - x.amax(-1, keepdim=True)) / rules.temperature.masked_fill(cold, 1).to(x.dtype)[:, None]
    if sort:
        x = nucleus(x, rules.top_k, rules.top_p)
    luck = rules.luck.gather(1, count.clamp(max=rules.luck.shape[1] - 1)[:, None])[:, 0]
    return torch.where(cold | (best < 0), best, sample(x, luck))


def nucleus(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf for all but the k likeliest and, of those, the fewest of mass ≥ p; 0 and 1 are all. [B, V] -> [B, V]."""
    V = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    k = torch.where((top_k > 0) & (top_k < V), top_k, V)
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, k[:, None] - 1), -torch.inf)
    reached = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
    likelier = torch.nn.functional.pad(reached[..., :-1], (1, 0))
    p = top_p[:, None]
    ordered = ordered.masked_fill((p < 1) & (likelier >= p), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)
