"""What is right in the exercises of chapter 0, by `glm` itself."""

from collections.abc import Iterator
from dataclasses import replace

import torch

import glm
from docs.check import Case, Exercise
from glm.changes import changes
from glm.info import cache_bytes_per_token
from glm.norms import RMSNorm
from glm.positions import Rotary
from glm.residual import Pre


def cache_cases() -> Iterator[Case]:
    """Many key heads, few, and fewer of another width."""
    for name in ("chatglm-6b", "chatglm2-6b", "glm-4-32b-0414", "glm-4.5"):
        spec = glm.release(name).spec
        yield Case({"spec": spec}, {"result": cache_bytes_per_token(spec, torch.bfloat16)})


def changed_cases() -> Iterator[Case]:
    """Two generations, two releases of one, and one beside itself."""
    for names in (("chatglm-6b", "chatglm2-6b"), ("chatglm3-6b", "chatglm3-6b-32k"), ("glm-4.6", "glm-4.6")):
        before, after = (glm.release(name).spec for name in names)
        paths = (change.field.removeprefix("len(") for change in changes(before, after))
        fields = dict.fromkeys(path.split(".")[0].split("[")[0].rstrip(")") for path in paths)
        yield Case({"before": before, "after": after}, {"result": list(fields)})


def broken_cases() -> Iterator[Case]:
    """A field of the model, one inside, and one of a single block."""
    spec = glm.release("chatglm3-6b").spec
    rotary, blocks = spec.rotary, list(spec.blocks)
    assert isinstance(rotary, Rotary)
    blocks[5] = replace(blocks[5], mixer=replace(blocks[5].mixer, groups=4))
    for broken in (
        replace(spec, rotary=replace(rotary, pairing="halves")),
        replace(spec, final_norm=RMSNorm(1e-6, weight_first=True)),
        replace(spec, tied=True),
        replace(spec, blocks=tuple(blocks)),
    ):
        [change] = changes(spec, broken)
        yield Case({"release": "chatglm3-6b", "spec": broken}, {"result": change.field})


def chatglm2_cases() -> Iterator[Case]:
    """The one there is."""
    after = glm.release("chatglm2-6b").spec
    [block] = set(after.blocks)
    assert block.wiring == Pre()
    parts = {name: getattr(block, name) for name in ("wiring", "norm", "mixer", "feed_forward")}
    yield Case({"spec": glm.release("chatglm-6b").spec}, {"reading": after.reading, "rotary": after.rotary, **parts})


EXERCISES = [
    Exercise("0.1", "cache_of_a_token", cache_cases),
    Exercise("0.2", "changed", changed_cases),
    Exercise("0.3", "broken_field", broken_cases),
    Exercise("0.4", "to_chatglm2", chatglm2_cases),
]
