"""Batches for a model that fills blanks: contexts side by side, and behind them what is asked, taught or compared.

    ask      context, pad … | <sop>                         and room for what will be written
    teach    context, pad … | <sop> x1 x2 …, pad            targets x1 x2 … <eop>, not shifted: what comes after each
    compare  context, pad … | <sop> a1 a2 | <sop> b1 b2 …   candidates that see the context and themselves

Shorter contexts are padded on the right, inside the row, as the official tokenizers do it; places go on
counting over the padding, and nobody sees it. A candidate is scored by the sum of its tokens' log-probabilities, all
candidates in one pass over one row: each stands at the same place and none sees another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from glm.errors import GLMError, PromptError
from glm.infilling import IGNORED, plain
from glm.layout import Blank, Layout
from glm.model import GLM
from glm.norms import wide
from glm.tokenizer import Tokenizer

Ids = Sequence[int]
FILLER = 0  # the id behind the shorter rows of a comparison


@dataclass(frozen=True)
class Rows:
    """Ids [B, T], their layout, and where there are any, targets [B, T] or the places of candidates in each row.

    For `ask` the layout is longer than the ids: it has room for what will be written.
    """

    ids: Tensor
    layout: Layout
    targets: Tensor | None = None
    candidates: tuple[tuple[range, ...], ...] = ()


def ask(reading: Blank, contexts: Sequence[Ids], pad: int, room: int) -> Rows:
    """What to give a model that is to write up to `room` tokens (<sop> among them) behind each context."""
    ids = padded(contexts, pad)
    positions, visible = laid_out(reading, contexts, [[reading.sop] + [pad] * (room - 1)] * len(contexts))
    start = torch.full((len(contexts), 1), reading.sop)
    return Rows(torch.cat((ids, start), dim=1), Layout(positions, visible))


def teach(
    reading: Blank, contexts: Sequence[Ids], targets: Sequence[Ids], *, eop: int, pad: int, longest: int | None = None
) -> Rows:
    """Contexts with what belongs in their first blank; targets of more than `longest` tokens, <eop> included, are cut.

    Ids of the shorter rows end with <eop> and padding, from which nothing is learnt.
    """
    wanted = [[*target, eop][:longest] for target in targets]
    length = max(map(len, wanted))
    behind = [([reading.sop, *target] + [pad] * length)[:length] for target in wanted]
    positions, visible = laid_out(reading, contexts, behind)
    ids = torch.cat((padded(contexts, pad), torch.tensor(behind)), dim=1)
    taught = torch.full_like(ids, IGNORED)
    for row, target in enumerate(wanted):
        first = ids.shape[1] - length
        taught[row, first : first + len(target)] = torch.tensor(target)
    return Rows(ids, Layout(positions, visible), taught)


def compare(reading: Blank, contexts: Sequence[Ids], candidates: Sequence[Sequence[Ids]], pad: int) -> Rows:
    """Contexts with the candidates for their first blank side by side. Raises PromptError for one without tokens."""
    if not all(choices and all(choices) for choices in candidates):
        raise PromptError("there is nothing to compare: give each context candidates of at least one token")
    first = max(map(len, contexts))
    ids, positions, visible, places = [], [], [], []
    for context, choices in zip(contexts, candidates, strict=True):
        line, ends = list(context) + [pad] * (first - len(context)), [first]
        place = [torch.stack([torch.arange(first), torch.zeros(first, dtype=torch.long)], -1)[:, : reading.axes]]
        sees = [torch.zeros(first, first, dtype=torch.bool)]
        for choice in choices:
            written = [reading.sop, *choice[:-1]]
            line += written
            place.append(reading.row([*context, *written])[0][len(context) :])
            sees.append(torch.ones(len(choice), len(choice), dtype=torch.bool).tril())
            ends.append(len(line))
        seen = torch.block_diag(*sees)
        seen[:, : len(context)] = True
        ids.append(torch.tensor(line))
        positions.append(torch.cat(place))
        visible.append(seen)
        places.append(tuple(range(start, end) for start, end in pairwise(ends)))
    longest = max(map(len, ids))
    for row, (at, seen) in enumerate(zip(positions, visible, strict=True)):
        more = longest - len(at)
        positions[row] = torch.cat((at, at[-1:].expand(more, -1)))
        visible[row] = torch.nn.functional.pad(seen, (0, more, 0, more))
    layout = Layout(torch.stack(positions), torch.stack(visible))
    return Rows(pad_sequence(ids, batch_first=True, padding_value=FILLER), layout, candidates=tuple(places))


def padded(contexts: Sequence[Ids], pad: int) -> Tensor:
    """Contexts as [B, C], with `pad` behind the shorter ones."""
    return pad_sequence([torch.tensor(list(context)) for context in contexts], batch_first=True, padding_value=pad)


def laid_out(reading: Blank, contexts: Sequence[Ids], behind: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Positions [B, T, A] and visibility [B, T, T] of padded contexts with one span `behind` each.

    Raises LayoutError for a context without a blank.
    """
    C, n = max(map(len, contexts)), len(behind[0])
    visible = torch.ones(C + n, C + n, dtype=torch.bool).tril().repeat(len(contexts), 1, 1)
    positions = torch.zeros(len(contexts), C + n, reading.axes, dtype=torch.long)
    positions[:, :, 0] = torch.arange(C + n)
    for row, (context, span) in enumerate(zip(contexts, behind, strict=True)):
        positions[row, C:] = reading.row([*context, *span])[0][len(context) :]
        visible[row, :, : len(context)] = True
        visible[row, :, len(context) : C] = False
    return positions, visible


@torch.inference_mode()
def score(model: GLM, tokenizer: Tokenizer, text: str, candidates: Sequence[str]) -> list[float]:
    """How likely the model finds each of `candidates` in the first blank of `text`: log-probabilities, in nats.

    Each is the sum over the candidate's tokens, without the one that would end it, as the official code has it.
    Raises PromptError for a text without a blank or a candidate without text, GLMError for a model that fills none.
    """
    reading = model.spec.reading
    if not isinstance(reading, Blank):
        raise GLMError("this model fills no blanks: take one that reads both ways, such as tiny-glm")
    context, encode = tokenizer.infill(text)[:-1], plain(tokenizer)
    choices = [encode(candidate) for candidate in candidates]
    rows = compare(reading, [context], [choices], tokenizer.pad)
    layout = Layout(rows.layout.positions.to(model.device), rows.layout.visible.to(model.device))
    logits = wide(model(rows.ids.to(model.device), layout))[0].log_softmax(-1)
    return [
        float(sum(logits[at, id] for at, id in zip(where, choice, strict=True)))
        for where, choice in zip(rows.candidates[0], choices, strict=True)
    ]
