"""What is right: the pure model in float64, a block at a time, and the check that a side must pass to get a figure.

A side passes when its logits of a prompt are off by at most twice the error of the pure model in the same dtype, as
everywhere here (`glm_kernels.bench.subject`); when so are its logits behind some steps, which are the path that is
timed, of the first row and the last; and when every token that it chose in those steps, in any row, is one that such an
error could have chosen: its logit in float64 is below the largest by no more than the errors of both together. In
float32 that leaves no choice.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from glm_kernels.bench.subject import FACTOR, Expected
from torch import Tensor
from torch.nn import functional as F

from glm.bench.sides import Prompts, Side
from glm.cache import Notes
from glm.model import GLM

ROWS = 16384  # of the head that are float64 at once


@torch.no_grad()
def exact(model: GLM, ids: Tensor, last: int = 0) -> Tensor:
    """Logits [B, T, V] in float64 of ids [B, T], or of so many `last` ones; one block at a time is in float64."""
    layout = model.layout(ids)
    always = 0 if model.spec.prefix is None else model.spec.prefix.length
    rotation, mask = model.spec.rotary.rotation(layout.positions, torch.float64), layout.mask(always)
    notes: Notes = {}
    x = model.embed(ids, layout.positions).double()
    for block, memory in zip(model.blocks, model.start(), strict=True):
        if model.spec.prefix is not None:
            memory.prefix = tuple(part.double() for part in memory.prefix)  # type: ignore[union-attr]
        memory.notes = notes
        x = deepcopy(block).double()(x, rotation, mask, memory)
    x = deepcopy(model.final_norm).double()(x[:, -last:])
    weight = model.head.dense(model.dtype)  # type: ignore[operator]
    return torch.cat([F.linear(x, part.double()) for part in weight.split(ROWS)], dim=-1)


@dataclass
class Truth:
    """What sides are held to: prompts, and what comes of them."""

    model: GLM
    prompts: Prompts
    steps: int
    known: dict[tuple[tuple[int, ...], ...], tuple[float, float]] = field(default_factory=dict)

    @torch.no_grad()
    def __post_init__(self) -> None:
        ids = torch.tensor([list(self.prompts[0])], device=self.model.device)
        plain, truth = self.model(ids)[0], exact(self.model, ids)[0]
        self.expected = Expected("logits", lambda y: y, plain, truth)

    def faults(self, side: Side) -> str:
        """What is wrong with a side, or nothing."""
        verdict = self.expected.verdict(side.logits(self.prompts[0]))
        if not verdict.ok:
            return str(verdict)
        side.start(self.prompts)
        while min(map(len, side.tokens())) < self.steps:
            side.step()
        texts = [[*p, *row] for p, row in zip(self.prompts, side.tokens(), strict=True)]
        written = [text[len(p) : len(p) + self.steps] for p, text in zip(self.prompts, texts, strict=True)]
        gap, most = self.gap(written)
        if gap > most:
            return f"tokens: one chosen is {gap:.3g} below the likeliest in float64, and errors explain {most:.3g}"
        verdict = self.behind(texts).verdict(side.next_logits())
        return "" if verdict.ok else str(verdict)

    @torch.no_grad()
    def behind(self, texts: Sequence[Sequence[int]]) -> Expected:
        """The logits behind texts, [2, V]: of the first and the last."""
        ends = [0, len(texts) - 1]
        ids = [torch.tensor([list(texts[row])], device=self.model.device) for row in ends]
        plain = torch.cat([self.model(one, last=True)[:, -1] for one in ids])
        truth = torch.cat([exact(self.model, one, 1)[:, -1] for one in ids])
        return Expected("logits behind steps", lambda y: y[ends], plain, truth)

    @torch.no_grad()
    def gap(self, written: Sequence[Sequence[int]]) -> tuple[float, float]:
        """By how much the worst of the chosen tokens is less likely than the likeliest, in logits, and what is allowed.

        The errors allowed for are those of the pure model on the same texts.
        """
        key = tuple(map(tuple, written))
        if key not in self.known:
            texts = [[*p, *row] for p, row in zip(self.prompts, written, strict=True)]
            ids = torch.tensor(texts, device=self.model.device)
            logits = exact(self.model, ids[:, :-1], self.steps)  # [B n V]
            picked = logits.gather(-1, ids[:, -self.steps :, None])[..., 0]
            plain = self.model(ids[:, :-1])[:, -self.steps :]
            self.known[key] = float((logits.amax(-1) - picked).max()), 2 * allowed(plain, logits)
        return self.known[key]


def allowed(plain: Tensor, truth: Tensor) -> float:
    """The error of a logit that the rule allows: twice the plain model's largest, or twice a rounding."""
    rounding = torch.finfo(plain.dtype).eps / 2 * float(truth.abs().max())
    return FACTOR * max(float((plain.double() - truth).abs().max()), rounding)
