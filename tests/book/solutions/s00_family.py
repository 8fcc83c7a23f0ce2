"""Solutions of chapter 0, right and wrong."""

import dataclasses
from dataclasses import replace
from typing import Any

import glm
from glm.feed_forward import FeedForward
from glm.layout import Causal
from glm.norms import RMSNorm
from glm.positions import Plain, Rotary
from glm.residual import Pre
from glm.spec import leaves


def cache_of_a_token(spec: glm.Spec) -> int:
    return sum(2 * block.mixer.groups * block.mixer.head_width * 2 for block in spec.blocks)


def cache_of_all_heads(spec: glm.Spec) -> int:
    return sum(2 * block.mixer.heads * block.mixer.head_width * 2 for block in spec.blocks)


def cache_of_keys(spec: glm.Spec) -> int:
    return cache_of_a_token(spec) // 2


def changed(before: glm.Spec, after: glm.Spec) -> list[str]:
    names = [field.name for field in dataclasses.fields(glm.Spec)]
    return [name for name in names if getattr(before, name) != getattr(after, name)]


def changed_in_alphabetical_order(before: glm.Spec, after: glm.Spec) -> list[str]:
    return sorted(changed(before, after))


def broken_field(release: str, spec: glm.Spec) -> str:
    sound = dict(leaves(glm.release(release).spec))
    [path] = [path for path, value in leaves(spec) if sound[path] != value]
    return path


def broken_top(release: str, spec: glm.Spec) -> str:
    [name] = changed(glm.release(release).spec, spec)
    return name


def to_chatglm2(spec: glm.Spec) -> dict[str, Any]:
    return {
        "reading": Causal(),
        "rotary": Rotary((64,), "interleaved", 10000.0, Plain(), None),
        "wiring": Pre(),
        "norm": RMSNorm(1e-5, weight_first=True),
        "mixer": replace(spec.blocks[0].mixer, groups=2, out_bias=False),
        "feed_forward": FeedForward(13696, ("silu", "identity"), bias=False),
    }


def still_turning_two_axes(spec: glm.Spec) -> dict[str, Any]:
    return to_chatglm2(spec) | {"rotary": spec.rotary}


def still_with_all_key_heads(spec: glm.Spec) -> dict[str, Any]:
    return to_chatglm2(spec) | {"mixer": replace(spec.blocks[0].mixer, out_bias=False)}


RIGHT = {"0.1": [cache_of_a_token], "0.2": [changed], "0.3": [broken_field], "0.4": [to_chatglm2]}
WRONG = {
    "0.1": [(cache_of_all_heads, "result"), (cache_of_keys, "result")],
    "0.2": [(changed_in_alphabetical_order, "result")],
    "0.3": [(broken_top, "result")],
    "0.4": [(still_turning_two_axes, "rotary"), (still_with_all_key_heads, "mixer")],
}
