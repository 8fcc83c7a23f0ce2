"""Requests: what the engine is asked to continue, and how far it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glm.generation import Row, Sampler
from glm.layout import Layout

State = Literal["waiting", "reading", "writing", "done", "cancelled", "failed"]


@dataclass(eq=False)
class Request:
    """A prompt to be continued, made by `Engine.submit`.

    ids     the new ids so far, each as soon as it is certain.
    state   "waiting" for a slot, "reading" the prompt, "writing", then "done", "cancelled" or "failed".
    error   why it failed.
    reused  tokens of the prompt that were in the cache already.
    """

    prompt: list[int]
    sampler: Sampler
    luck: list[float]
    row: Row
    max_new_tokens: int
    layout: Layout
    ids: list[int] = field(default_factory=list)
    state: State = "waiting"
    error: Exception | None = None
    reused: int = 0
    read: int = 0  # tokens of the prompt in the cache
    guess: Callable[[Tensor, Tensor, Layout], Tensor] | None = None
    told: int = 0  # tokens that `guess` knows
    stream: list[Tensor] = field(default_factory=list)  # what `guess` is to be told of the prompt

    @property
    def active(self) -> bool:
        """Whether anything is still to come."""
        return self.state in ("waiting", "reading", "writing")

    @property
    def text(self) -> list[int]:
        """Prompt and everything chosen since, those ids too that are not handed out yet."""
        return self.prompt + self.row.ids

    @property
    def step(self) -> Tensor:
        """How positions go on, [A]."""
        assert self.layout.step is not None
        return self.layout.step[0]

    def positions(self, start: int, count: int) -> Tensor:
        """Position ids [1, count, A] of the tokens from `start` on, on the CPU."""
        known = self.layout.positions[:, start : start + count]
        further = torch.arange(start + known.shape[1], start + count) - len(self.prompt) + 1
        return torch.cat((known, self.layout.positions[:, -1:] + further[None, :, None] * self.step), dim=1)

    @property
    def prefix(self) -> int:
        """Tokens at the beginning that all see each other."""
        return 0 if self.layout.prefix_length is None else int(self.layout.prefix_length[0])
