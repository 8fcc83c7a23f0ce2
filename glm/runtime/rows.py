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

    tokens     [N, T] the newest token, which the model has not read yet, and guesses of what may follow it
    at         int32 [N] its place in the cache; `nowhere` in an idle row
    length     int32 [N] tokens in the cache when these are read, at + T; 0 in an idle row
    positions  [N, A] its position ids
    steps      [N, A] how positions go on
    count      [N] new tokens so far, this one among them
    rules      of the sampler
    """

    tokens: Tensor
    at: Tensor
    length: Tensor
    positions: Tensor
    steps: Tensor
    count: Tensor
    rules: Rules
    nowhere: int

    @classmethod
    def idle(
        cls, rows: int, *, axes: int, guesses: int, length: int, vocabulary: int, nowhere: int, device: torch.device
    ) -> "Rows":
        """All idle; `length` is how many dice a row can have."""

        def integers(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=torch.long, device=device)

        at = torch.full((rows,), nowhere, dtype=torch.int32, device=device)
        rules = Rules.greedy(rows, length, vocabulary, device)
        return cls(
            integers(1 + guesses), at, torch.zeros_like(at), integers(axes), integers(axes), integers(), rules, nowhere
        )

    @property
    def token(self) -> Tensor:
        """[N], the newest ones."""
        return self.tokens[:, 0]

    @property
    def guesses(self) -> Tensor:
        """[N, T - 1]."""
        return self.tokens[:, 1:]

    @property
    def busy(self) -> Tensor:
        """bool [N]."""
        return self.length > 0

    def first(self, count: int) -> "Rows":
        """The first rows, as views."""
        some = slice(count)
        return Rows(
            self.tokens[some], self.at[some], self.length[some], self.positions[some], self.steps[some],
            self.count[some], self.rules.rows(some), self.nowhere,
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

    def go_on(self, row: int, token: int, at: int, position: Tensor, step: Tensor) -> None:
        """The first new token is known: from now on the row takes part in every step."""
        self.rules.seen[row, token] = True
        self.token[row], self.count[row], self.at[row] = token, 1, at
        self.positions[row], self.steps[row] = position.to(self.token.device), step.to(self.token.device)
        self.length[row] = at + self.tokens.shape[1]

    def rest(self, row: int) -> None:
        """The row is idle."""
        for x in (self.tokens, self.length, self.positions, self.steps, self.count):
            x[row] = 0
        self.at[row] = self.nowhere
        self.rules.temperature[row], self.rules.top_k[row] = 0, 0
        self.rules.top_p[row], self.rules.penalty[row] = 1, 1
