"""Rows: where every request is, kept on the device, so that a step can be recorded once and replayed.

A row without a request is idle: it reads the first id of the vocabulary, sees nothing, and writes where nobody reads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glm.generation import Sampler
from glm.runtime.sampling import Rules


@dataclass(frozen=True)
class Rows:
    """Of N rows, all of it written in place.

    token      [N] the newest token, which the model has not read yet
    guesses    [N, n] what may follow it
    at         int32 [N] its place in the cache; `nowhere` in an idle row
    positions  [N, A] its position ids
    steps      [N, A] how positions go on
    count      [N] new tokens so far, this one among them
    busy       bool [N]
    rules      of the sampler
    """

    token: Tensor
    guesses: Tensor
    at: Tensor
    positions: Tensor
    steps: Tensor
    count: Tensor
    busy: Tensor
    rules: Rules
    nowhere: int

    @classmethod
    def idle(
        cls, rows: int, *, axes: int, guesses: int, length: int, vocabulary: int, nowhere: int, device: torch.device
    ) -> "Rows":
        """All idle; `length` is how many dice a row can have."""

        def integers(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=torch.long, device=device)

        return cls(
            integers(), integers(guesses), torch.full((rows,), nowhere, dtype=torch.int32, device=device),
            integers(axes), integers(axes), integers(), torch.zeros(rows, dtype=torch.bool, device=device),
            Rules.greedy(rows, length, vocabulary, device), nowhere,
        )  # fmt: skip

    def begin(self, row: int, sampler: Sampler, luck: list[float], prompt: list[int]) -> None:
        """The rules for a new request, whose dice show `luck`. It has no tokens yet."""
        rules, device = self.rules, self.token.device
        rules.temperature[row], rules.top_k[row] = sampler.temperature, sampler.top_k
        rules.top_p[row], rules.penalty[row] = sampler.top_p, sampler.repetition_penalty
        rules.luck[row, : len(luck)] = torch.tensor(luck, dtype=torch.float64, device=device)
        rules.seen[row] = False
        rules.seen[row, torch.tensor(prompt, device=device)] = True
        self.count[row] = 0

    def go_on(self, row: int, token: Tensor, at: int, position: Tensor, step: Tensor) -> None:
        """The first new token [] is known: from now on the row takes part in every step."""
        self.rules.seen[row, token] = True
        self.token[row], self.count[row], self.at[row] = token, 1, at
        self.positions[row], self.steps[row] = position.to(self.token.device), step.to(self.token.device)
        self.busy[row] = True

    def rest(self, row: int) -> None:
        """The row is idle."""
        for x in (self.token, self.positions, self.steps, self.count, self.busy):
            x[row] = 0
        self.at[row] = self.nowhere
        self.rules.temperature[row], self.rules.top_k[row] = 0, 0
        self.rules.top_p[row], self.rules.penalty[row] = 1, 1
