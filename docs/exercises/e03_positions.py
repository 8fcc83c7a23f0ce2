"""Exercises of chapter 3, positions. Replace what raises, then `python -m docs.check 3`."""

from collections.abc import Callable

from torch import Tensor

import glm


def learned_places(tables: list[Tensor], positions: Tensor) -> Tensor:
    """Exercise 3.1. What the learned tables of GLM-10B add to the embeddings of tokens.

    tables      one for each axis, [length, D]
    positions   position ids [B, T, A]

    Returns [B, T, D].
    """
    raise NotImplementedError


def half_rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Exercise 3.2. Queries or keys turned as ChatGLM2 does it: half of the channels of a head, in interleaved pairs.

    x           [B, T, heads, K], K a multiple of 4
    positions   position ids [B, T], any integers

    Returns [B, T, heads, K].
    """
    raise NotImplementedError


def rotary_2d(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Exercise 3.3. Queries or keys turned as ChatGLM-6B does it: half of each head by each axis, pairs in halves.

    x           [B, T, heads, K], K a multiple of 4
    positions   position ids [B, T, 2]

    The frequencies are 1 / base^(2i/w) computed in float32 and rounded to float16; all after that is float64.
    Returns [B, T, heads, K].
    """
    raise NotImplementedError


def stretched(release: str, width: int, ratio: float) -> Tensor:
    """Exercise 3.4. The frequencies of a release whose config.json has `rope_ratio` = `ratio`, without looking it up.

    release   its name; think of what the field means there. Without a ratio all of them have the base 10000.
    width     channels of a head that are turned, w

    Returns what a position is multiplied by to get the angle of each pair, [w/2].
    """
    raise NotImplementedError


def which_field(right: glm.GLM, broken: Callable[[Tensor], Tensor], ids: Tensor) -> str:
    """Exercise 3.5. A model's rotation is wrong in one field. Which?

    right    the model as it should be: its spec and its weights are there to be used
    broken   the same weights under another spec, to be called with ids [B, T] for logits [B, T, V]; more you cannot see
    ids      [B, T] to begin with

    What may have happened: another width of the turned part (a whole head), the other pairing, a base 50 times as
    large, positions divided by 8, frequencies rounded to float16. Returns the path of the field as `glm.diff` names it,
    such as "rotary.base". (Models of other specs can be built: `dataclasses.replace`, `glm.GLM`, `load_state_dict`.)
    """
    raise NotImplementedError
