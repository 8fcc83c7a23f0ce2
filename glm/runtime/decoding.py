"""Decoding: one step of many rows, from the newest token of each to the next ones, without a word from the host.

With guesses a row reads its newest token and n more, and the model's own choice behind each of them says how many were
right: r right guesses give r + 1 tokens, as many as each row is good for (Leviathan et al. 2023, arXiv:2211.17192).
"""

from typing import NamedTuple

import torch
from glm_kernels import accept
from torch import Tensor

from glm.runtime.call import Call
from glm.runtime.composed import Composed
from glm.runtime.rows import Rows
from glm.runtime.sampling import Choice, chosen
from glm.runtime.slots import Slots


class Outcome(NamedTuple):
    """Of one step: ids [B, T], -1 where logits were not finite, `REJECTED` where one does not count; the stream
    [B, T, D].
    """

    ids: Tensor
    stream: Tensor


def advance(composed: Composed, slots: Slots, rows: Rows, count: int, choice: Choice) -> Outcome:
    """The next tokens of the first `count` rows, which ask for `choice` at most; the rows are moved on."""
    rows = rows.first(count)
    stream = read(composed, slots, rows, rows.tokens)
    ids = chosen(composed.logits(stream), rows.tokens, rows.rules, rows.count, choice)
    accept(ids, rows.tokens, rows.length, rows.at, rows.count, rows.positions, rows.steps, rows.rules.seen)
    return Outcome(ids, stream)


def read(composed: Composed, slots: Slots, rows: Rows, tokens: Tensor) -> Tensor:
    """Tokens [B, T] of the first B rows, the newest of each and what may follow -> the stream [B, T, D]."""
    B, T = tokens.shape
    some = slice(B)
    positions = rows.positions[some, None]  # [B 1 A]
    if T > 1:
        positions = positions + torch.arange(T, device=tokens.device)[:, None] * rows.steps[some, None]
    call = Call(rows.at[some], rows.length[some], composed.turns.found(positions), None)
    return composed(tokens, positions, call, slots.of(some))
