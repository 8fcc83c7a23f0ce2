"""Exercises of chapter 0, the family. Replace what raises, then `python -m docs.check 0`."""

from typing import Any

import glm


def cache_of_a_token(spec: glm.Spec) -> int:
    """Exercise 0.1. How many bytes one more token adds to the cache of a model, in bfloat16.

    Every block remembers a key and a value [G, K] of each token. The specs given have `glm.attention.Attention` as
    the mixer of every block: its fields say what G and K are.
    """
    raise NotImplementedError


def changed(before: glm.Spec, after: glm.Spec) -> list[str]:
    """Exercise 0.2. The names of the fields of `Spec` that differ between two models, in the order of the fields.

    Names of `Spec` itself ("rotary", "blocks"), not of what is inside.
    """
    raise NotImplementedError


def broken_field(release: str, spec: glm.Spec) -> str:
    """Exercise 0.3. A spec is that of `release`, except for one field: which one?

    As a path, "rotary.base"; for a field of a block, the path inside of it with the block's number before it,
    "blocks[3].norm.eps".
    """
    raise NotImplementedError


def to_chatglm2(spec: glm.Spec) -> dict[str, Any]:
    """Exercise 0.4. Make ChatGLM2-6B out of ChatGLM-6B: given the spec of the one, say what the other has instead.

    Return a dict with "reading", "rotary", "wiring", "norm", "mixer" and "feed_forward", each as `glm` writes it in
    the spec of the second; the last four are those of every block. Do not look the second one up.
    """
    raise NotImplementedError
