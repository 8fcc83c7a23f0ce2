"""Solutions of chapter 1, right and wrong."""

from itertools import pairwise

import torch
from torch import Tensor

import glm
from glm.tracing import Trace


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    probabilities = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return scores, probabilities, probabilities @ v


def attend_unscaled(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attend(q * q.shape[-1] ** 0.5, k, v, visible)


def attend_to_alternating_groups(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    return attend(q, k, v, visible)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attend(q, k, v, visible.tril(k.shape[2] - q.shape[2]) & torch.ones_like(visible).tril())


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attend(q, k, v, torch.ones_like(visible))


def contributions(trace: Trace) -> Tensor:
    streams = [trace["stream"]]
    for i in range(len(trace.model.blocks)):
        streams += [trace[f"block {i} / stream between"], trace[f"block {i} / stream"]]
    return torch.stack([streams[0], *(after - before for before, after in pairwise(streams))])


def contributions_of_whole_blocks(trace: Trace) -> Tensor:
    parts = contributions(trace)
    return torch.cat((parts[:1], parts[1::2] + parts[2::2]))


def contributions_as_read(trace: Trace) -> Tensor:
    sublayers = [
        f"block {i} / {name}" for i in range(len(trace.model.blocks)) for name in ("attention", "feed-forward")
    ]
    return torch.stack([trace["stream"], *(trace[f"{name} / input"] for name in sublayers)])


def lens(model: glm.GLM, stream: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head(model.final_norm(stream)).softmax(-1)


def lens_without_norm(model: glm.GLM, stream: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head(stream).softmax(-1)


def lens_over_tokens(model: glm.GLM, stream: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head(model.final_norm(stream)).softmax(1)


def first_difference(one: Trace, other: Trace) -> str | None:
    for name in one:
        a, b = one[name], other[name]
        if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            return name
    return None


def first_difference_even_from_itself(one: Trace, other: Trace) -> str | None:
    return next((name for name in one if not torch.equal(one[name], other[name])), None)


def last_difference(one: Trace, other: Trace) -> str | None:
    return next((name for name in reversed(list(one)) if not torch.equal(one[name], other[name])), None)


FIELDS = {
    "rotation / axis 0 / cos": "rotary.base",
    "block 0 / attention / q": "rotary.pairing",
    "block 0 / attention / input": "norm.eps",
    "block 0 / stream between": "wiring.alpha",
    "block 0 / feed-forward / activated": "feed_forward.branches",
    "final norm": "final_norm.eps",
}


def broken_field(sound: Trace, broken: Trace) -> str:
    where = first_difference(sound, broken)
    assert where is not None
    return FIELDS[where]


def broken_field_by_its_last_step(sound: Trace, broken: Trace) -> str:
    return FIELDS.get(last_difference(sound, broken) or "", "norm.eps")


RIGHT = {
    "1.1": [attend],
    "1.2": [contributions],
    "1.3": [lens],
    "1.4": [first_difference],
    "1.5": [broken_field],
}
WRONG = {
    "1.1": [
        (attend_unscaled, "scores"),
        (attend_to_alternating_groups, "scores"),
        (attend_causally, "probabilities"),
        (attend_to_all, "probabilities"),
    ],
    "1.2": [(contributions_of_whole_blocks, "result"), (contributions_as_read, "result")],
    "1.3": [(lens_without_norm, "result"), (lens_over_tokens, "result")],
    "1.4": [(first_difference_even_from_itself, "result"), (last_difference, "result")],
    "1.5": [(broken_field_by_its_last_step, "result")],
}
