"""Solutions of chapter 2, right and wrong."""

import torch
from torch import Tensor


def cut_out(
    text: list[int], spans: list[tuple[int, int]], order: list[int], mask: int, sop: int, eop: int
) -> tuple[list[int], list[int]]:
    read, end = list[int](), 0
    for start, stop in spans:
        read += [*text[end:start], mask]
        end = stop
    read += text[end:]
    pieces = [text[slice(*spans[number])] for number in order]
    ids = read + [id for piece in pieces for id in (sop, *piece)]
    targets = [-100] * len(read) + [id for piece in pieces for id in (*piece, eop)]
    return ids, targets


def in_order_of_the_text(
    text: list[int], spans: list[tuple[int, int]], order: list[int], mask: int, sop: int, eop: int
) -> tuple[list[int], list[int]]:
    return cut_out(text, spans, sorted(order), mask, sop, eop)


def shifted_targets(
    text: list[int], spans: list[tuple[int, int]], order: list[int], mask: int, sop: int, eop: int
) -> tuple[list[int], list[int]]:
    ids, targets = cut_out(text, spans, order, mask, sop, eop)
    return ids, [*targets[1:], -100]


def infilling_layout(ids: list[int], order: list[int], mask: int, sop: int) -> tuple[Tensor, Tensor]:
    T, read = len(ids), ids.index(sop)
    blanks = [i for i, id in enumerate(ids[:read]) if id == mask]
    positions = torch.zeros(1, T, 2, dtype=torch.long)
    span = -1
    for t, id in enumerate(ids):
        if t < read:
            positions[0, t, 0] = t
            continue
        if id == sop:
            span, start = span + 1, t
        positions[0, t] = torch.tensor((blanks[order[span]], t - start + 1))
    return positions, sees(T, read)


def sees(T: int, read: int) -> Tensor:
    j = torch.arange(T)
    return ((j < read) | (j <= j[:, None]))[None]


def blanks_from_the_left(ids: list[int], order: list[int], mask: int, sop: int) -> tuple[Tensor, Tensor]:
    return infilling_layout(ids, list(range(len(order))), mask, sop)


def start_is_not_written(ids: list[int], order: list[int], mask: int, sop: int) -> tuple[Tensor, Tensor]:
    positions, visible = infilling_layout(ids, order, mask, sop)
    positions[..., 1] = (positions[..., 1] - 1).clamp(min=0)
    return positions, visible


def spans_apart(ids: list[int], order: list[int], mask: int, sop: int) -> tuple[Tensor, Tensor]:
    """Spans that do not see each other."""
    positions, visible = infilling_layout(ids, order, mask, sop)
    span = torch.tensor([id == sop for id in ids]).cumsum(0)
    other = (span != span[:, None]) & (span > 0)
    return positions, visible & ~other


def chatglm_layout(ids: Tensor, gmask: int, mask: int, sop: int) -> tuple[Tensor, Tensor]:
    tokens = ids[0].tolist()
    T, read = len(tokens), tokens.index(sop)
    blank = tokens.index(gmask if gmask in tokens else mask)
    place = torch.arange(T)
    place[read:] = blank
    inside = (torch.arange(T) - read + 1).clamp(min=0)
    return torch.stack((place, inside), -1)[None], sees(T, read)


def first_blank_first(ids: Tensor, gmask: int, mask: int, sop: int) -> tuple[Tensor, Tensor]:
    positions, visible = chatglm_layout(ids, gmask, mask, sop)
    tokens = ids[0].tolist()
    positions[0, tokens.index(sop) :, 0] = min(tokens.index(id) for id in (gmask, mask) if id in tokens)
    return positions, visible


def start_is_read(ids: Tensor, gmask: int, mask: int, sop: int) -> tuple[Tensor, Tensor]:
    """With `sop` among what is seen in both directions."""
    positions, _ = chatglm_layout(ids, gmask, mask, sop)
    return positions, sees(ids.shape[1], ids[0].tolist().index(sop) + 1)


def only_causal(ids: Tensor, gmask: int, mask: int, sop: int) -> tuple[Tensor, Tensor]:
    positions, _ = chatglm_layout(ids, gmask, mask, sop)
    return positions, sees(ids.shape[1], 0)


def place_goes_on(ids: Tensor, gmask: int, mask: int, sop: int) -> tuple[Tensor, Tensor]:
    positions, visible = chatglm_layout(ids, gmask, mask, sop)
    positions[..., 0] = torch.arange(ids.shape[1])
    return positions, visible


def next_token(positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    following = positions[:, -1:] + torch.tensor([0, 1])
    return following, torch.cat((visible[:, -1:], torch.ones_like(visible[:, -1:, :1])), dim=-1)


def next_place(positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    return next_token(positions, visible)[0] + torch.tensor([1, -1]), next_token(positions, visible)[1]


def sees_padding(positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    following, seen = next_token(positions, visible)
    return following, torch.ones_like(seen)


def chatglm2_layout(text: list[int], answer: list[int], gmask: int, sop: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[gmask, sop, *text, *answer]])
    T = ids.shape[1]
    return ids, torch.arange(T)[None, :, None], torch.ones(1, T, T, dtype=torch.bool).tril()


def as_chatglm(text: list[int], answer: list[int], gmask: int, sop: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[*text, gmask, sop, *answer]])
    return ids, *chatglm_layout(ids, gmask, -1, sop)


def two_axes_still(text: list[int], answer: list[int], gmask: int, sop: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, positions, visible = chatglm2_layout(text, answer, gmask, sop)
    return ids, torch.cat((positions, torch.zeros_like(positions)), -1), visible


def prompt_read_both_ways(text: list[int], answer: list[int], gmask: int, sop: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, positions, _ = chatglm2_layout(text, answer, gmask, sop)
    return ids, positions, sees(ids.shape[1], 2 + len(text))


RIGHT = {
    "2.1": [cut_out],
    "2.2": [infilling_layout],
    "2.3": [chatglm_layout],
    "2.4": [next_token],
    "2.5": [chatglm2_layout],
}
WRONG = {
    "2.1": [(in_order_of_the_text, "ids"), (shifted_targets, "targets")],
    "2.2": [(blanks_from_the_left, "positions"), (start_is_not_written, "positions"), (spans_apart, "visible")],
    "2.3": [
        (first_blank_first, "positions"),
        (start_is_read, "visible"),
        (only_causal, "visible"),
        (place_goes_on, "positions"),
    ],
    "2.4": [(next_place, "positions"), (sees_padding, "visible")],
    "2.5": [(as_chatglm, "ids"), (two_axes_still, "positions"), (prompt_read_both_ways, "visible")],
}
