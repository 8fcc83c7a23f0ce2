"""Sampling on the device: every row by its own rules, without waiting for the host.

The same choice as `glm.generation.Sampler` makes, token by token: the dice are thrown on the host beforehand, one for
each token that may come.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from glm.generation import sample
from glm.norms import wide


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

    def see(self, ids: Tensor, where: Tensor) -> None:
        """The ids [B] were chosen, in rows `where` [B] says so."""
        self.seen.scatter_(1, ids[:, None], self.seen.gather(1, ids[:, None]) | where[:, None])

    def rows(self, rows: slice) -> "Rules":
        """The rules of some rows, as views."""
        return Rules(*(getattr(self, field.name)[rows] for field in fields(self)))


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, V] -> the likeliest ids [B], and whether all logits of the row were finite."""
    x = wide(logits)
    return x.argmax(-1), x.isfinite().all(-1)


def chosen(logits: Tensor, rules: Rules, count: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, V] and how many tokens each row has already [B] -> ids [B], and whether its logits were finite."""
    x = wide(logits)
    penalty = rules.penalty.to(x.dtype)[:, None]
    x = torch.where(rules.seen, torch.where(x > 0, x / penalty, x * penalty), x)
    best, finite = greedy(x)
    cold = rules.temperature == 0
    x = (x - x.amax(-1, keepdim=True)) / rules.temperature.masked_fill(cold, 1).to(x.dtype)[:, None]
    luck = rules.luck.gather(1, count.clamp(max=rules.luck.shape[1] - 1)[:, None])[:, 0]
    return torch.where(cold, best, sample(nucleus(x, rules.top_k, rules.top_p), luck)), finite


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
