"""What is right: the pure model in float64, a block at a time, and the check that a side must pass to get a figure.

A side passes when its logits of a prompt are off by at most twice the error of the pure model in the same dtype, as
everywhere here (`glm_kernels.bench.subject`); when so are its logits behind some steps, which are the path that is
timed, of the first row and the last; and when every token that it chose in those steps, in any row, is one that such an
error could have chosen: its logit in float64 is below the largest by no more than the errors of both together. In
float32 that leaves no choice. With experts, all three of them are the logits with those that the side chose, and its
choices have to be such as errors explain: `glm/bench/routes.py`.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from glm_kernels.bench.subject import FACTOR, Expected
from torch import Tensor
from torch.nn import functional as F

from glm.bench.routes import Routes, forced, routers, unexplained
from glm.bench.sides import EngineSide, Prompts, Side
from glm.cache import Notes
from glm.model import GLM
from glm.sparse_attention import IndexerModule

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


class Both(NamedTuple):
    """Logits of texts, [B, n, V], of the pure model in its dtype and in float64; what its errors do not explain."""

    plain: Tensor
    truth: Tensor
    unexplained: str = ""


class Said(NamedTuple):
    """What a side says.

    logits  [T, V] of the first prompt
    tokens  of every row
    behind  logits [2, V] behind those of the first row and the last
    prompt  the experts that it chose for the first prompt, [L, T, k], where they are seen
    rows    the same of every row
    """

    logits: Tensor
    tokens: list[list[int]]
    behind: Tensor
    prompt: list[Tensor] | None
    rows: list[Tensor] | None


@dataclass
class Truth:
    """What sides are held to: prompts, and what comes of them."""

    model: GLM
    prompts: Prompts
    steps: int
    known: dict[tuple[int, tuple[tuple[int, ...], ...]], Both] = field(default_factory=dict)

    def faults(self, side: Side) -> str:
        """What is wrong with a side, or nothing."""
        wrong = self.fault(side)
        if wrong and any(isinstance(module, IndexerModule) for module in self.model.modules()):
            return f"{wrong} (or a rounding chose other keys to attend to, which is not seen)"
        return wrong

    def fault(self, side: Side) -> str:
        """The same, without what cannot be told."""
        if not routers(self.model):
            return self.wrong(self.said(side, None))
        if not isinstance(side, EngineSide):
            wrong = self.wrong(self.said(side, None))
            return wrong and f"{wrong} (or a rounding chose other experts: which, cannot be seen of this side)"
        with side.routes() as routes:
            said = self.said(side, routes)
        if wrong := self.wrong(said):
            return wrong
        self.write(side)
        same = all(a[: self.steps] == b[: self.steps] for a, b in zip(said.tokens, side.tokens(), strict=True))
        return "" if same else "tokens: recorded steps choose others than the same steps without recordings"

    def said(self, side: Side, routes: Routes | None) -> Said:
        """What a side says, and which experts `routes` sees it choose."""
        logits = side.logits(self.prompts[0])
        prompt = None if routes is None else [routes.rows.popitem()[1]]
        if isinstance(side, EngineSide) and routes is not None:
            side.forget()
        self.write(side)
        tokens = side.tokens()
        behind = side.next_logits()[[0, -1]]
        rows = None
        if isinstance(side, EngineSide) and routes is not None:
            rows = [routes.rows[slot] for slot in side.slots()]
        return Said(logits, tokens, behind, prompt, rows)

    def wrong(self, said: Said) -> str:
        """What is wrong with that, or nothing."""
        both = self.both(self.prompts[:1], len(self.prompts[0]), together(said.prompt))
        verdict = Expected("logits", lambda y: y, both.plain[0], both.truth[0]).verdict(said.logits)
        if both.unexplained or not verdict.ok:
            return both.unexplained or str(verdict)

        written = [row[: self.steps] for row in said.tokens]
        texts = [[*p, *row[:-1]] for p, row in zip(self.prompts, written, strict=True)]
        both = self.both(texts, self.steps, together(said.rows, len(texts[0])))
        gap, most = gap_of(both, torch.tensor(written, device=self.model.device))
        if both.unexplained or gap > most:
            return both.unexplained or (
                f"tokens: one chosen is {gap:.3g} below the likeliest in float64, and errors explain {most:.3g}"
            )

        ends = [
            self.both([[*self.prompts[i], *said.tokens[i]]], 1, together(None if said.rows is None else [said.rows[i]]))
            for i in (0, -1)
        ]
        plain, truth = torch.cat([both.plain[:, 0] for both in ends]), torch.cat([both.truth[:, 0] for both in ends])
        verdict = Expected("logits behind steps", lambda y: y, plain, truth).verdict(said.behind)
        return ends[0].unexplained or ends[1].unexplained or ("" if verdict.ok else str(verdict))

    def write(self, side: Side) -> None:
        """Have a side continue all prompts."""
        side.start(self.prompts)
        while min(map(len, side.tokens())) < self.steps:
            side.step()

    @torch.no_grad()
    def both(self, texts: Sequence[Sequence[int]], last: int, chosen: Tensor | None) -> Both:
        """Logits behind the `last` tokens of texts, which are equally long; with the experts `chosen`, [L, B, T, k]."""
        key = last, tuple(map(tuple, texts))
        if chosen is None and key in self.known:
            return self.known[key]
        ids = torch.tensor([list(text) for text in texts], device=self.model.device)
        if chosen is None:
            self.known[key] = Both(self.model(ids)[:, -last:], exact(self.model, ids, last))
            return self.known[key]
        with forced(self.model, chosen) as ours:
            plain = self.model(ids)[:, -last:]
        with forced(self.model, chosen) as theirs:
            truth = exact(self.model, ids, last)
        return Both(plain, truth, unexplained(ours, theirs, self.model.dtype))


def together(rows: Sequence[Tensor] | None, length: int | None = None) -> Tensor | None:
    """The experts chosen in the first `length` tokens of rows, [L, T, k] each -> [L, B, T, k]; None if not seen."""
    return None if rows is None else torch.stack([row[:, :length] for row in rows], dim=1)


def gap_of(both: Both, picked: Tensor) -> tuple[float, float]:
    """By how much the worst of the tokens [B, n] is less likely than the likeliest, in logits, and what is allowed."""
    taken = both.truth.gather(-1, picked[..., None])[..., 0]
    return float((both.truth.amax(-1) - taken).max()), 2 * allowed(both.plain, both.truth)


def allowed(plain: Tensor, truth: Tensor) -> float:
    """The error of a logit that the rule allows: twice the plain model's largest, or twice a rounding."""
    rounding = torch.finfo(plain.dtype).eps / 2 * float(truth.abs().max())
    return FACTOR * max(float((plain.double() - truth).abs().max()), rounding)
