"""Decoding: one step of many rows, from the newest token of each to the next ones, without a word from the host.

With guesses a row reads its newest token and n more, and the model's own choice behind each of them says how many were
right: r right guesses give r + 1 tokens, as many as each row is good for (Leviathan et al. 2023, arXiv:2211.17192).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glm.runtime.call import Call
from glm.runtime.composed import Composed
from glm.runtime.rows import Rows
from glm.runtime.sampling import chosen, greedy
from glm.runtime.slots import Slots


class Outcome(NamedTuple):
    """Of one step: ids [B, T], -1 where logits were not finite; how many of them count [B]; the stream [B, T, D]."""

    ids: Tensor
    kept: Tensor
    stream: Tensor


def advance(composed: Composed, slots: Slots, rows: Rows, count: int, plain: bool) -> Outcome:
    """The next tokens of the first `count` rows, all of them greedy if it is `plain`; the rows are moved on."""
    some = slice(count)
    tokens = torch.cat((rows.token[some, None], rows.guesses[some]), dim=1)  # [B T]
    stream = read(composed, slots, rows, tokens)
    logits = composed.logits(stream)  # [B T V]
    rules = rows.rules.rows(some)
    ids, right, kept = [], rows.busy[some], torch.zeros_like(rows.count[some])
    for i in range(tokens.shape[1]):
        new, finite = greedy(logits[:, i]) if plain else chosen(logits[:, i], rules, rows.count[some] + i)
        ids.append(torch.where(finite, new, -1))
        kept += right
        rows.token[some] = torch.where(right, new, rows.token[some])
        if not plain:
            rules.see(new, right)
        if i + 1 < tokens.shape[1]:
            right = right & finite & (new == tokens[:, i + 1])
    rows.count[some] += kept
    rows.at[some] += kept.to(torch.int32)
    rows.positions[some] += kept[:, None] * rows.steps[some]
    return Outcome(torch.stack(ids, dim=1), kept, stream)


def read(composed: Composed, slots: Slots, rows: Rows, tokens: Tensor) -> Tensor:
    """Tokens [B, T] of the first B rows, the newest of each and what may follow -> the stream [B, T, D]."""
    B, T = tokens.shape
    some = slice(B)
    at, ahead = rows.at[some], torch.arange(T, device=tokens.device)
    positions = rows.positions[some, None] + ahead[:, None] * rows.steps[some, None]
    length = torch.where(rows.busy[some], at + T, 0)
    call = Call(at, length, composed.turns.found(positions), None)
    return composed(tokens, positions, call, slots.of(some))
