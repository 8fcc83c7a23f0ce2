"""Exercises of chapter 2, blank infilling. Replace what raises, then `python -m docs.check 2`.

Ids are numbers, and the special ones are given. Position ids are int64, masks are bool with True for what is seen.
"""

from torch import Tensor


def cut_out(
    text: list[int], spans: list[tuple[int, int]], order: list[int], mask: int, sop: int, eop: int
) -> tuple[list[int], list[int]]:
    """Exercise 2.1. A text with its spans cut out, and the spans behind it.

    text    ids of the whole text
    spans   first token and one past the last of each span, in the order of the text, none touching another
    order   in which order they are written: order[0] is the number of the span written first
    mask    the id put in the place of each span; sop starts what is written for one; eop ends it

    Returns `ids`, what the model is given, and `targets`, what it should say after each of them, with -100 where it
    only reads. Both have the same length T.
    """
    raise NotImplementedError


def infilling_layout(ids: list[int], order: list[int], mask: int, sop: int) -> tuple[Tensor, Tensor]:
    """Exercise 2.2. Position ids and mask of such a sample.

    ids     text with several blanks `mask`, and behind it one span after another, each started by `sop`
    order   which blank each is written for: the first span belongs in blank number order[0], counted from the left

    Returns `positions` [1, T, 2] (place, inside) and `visible` [1, T, T]: visible[0, i, j], whether token i sees j.
    """
    raise NotImplementedError


def chatglm_layout(ids: Tensor, gmask: int, mask: int, sop: int) -> tuple[Tensor, Tensor]:
    """Exercise 2.3. Position ids and mask that ChatGLM-6B makes of a prompt, and of as much of an answer as follows.

    ids     [1, T]: a text with at least one blank, `gmask` or `mask`, maybe both; then `sop`; then any tokens written

    Returns `positions` [1, T, 2] and `visible` [1, T, T].
    """
    raise NotImplementedError


def next_token(positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 2.4. Where ChatGLM-6B's next token stands and what it sees, given all tokens so far.

    positions   [B, T, 2] of rows that all end in something written, padded on the left where rows differ in length
    visible     [B, T, T]

    Returns `positions` [B, 1, 2] and `visible` [B, 1, T + 1] of the one new token.
    """
    raise NotImplementedError


def chatglm2_layout(text: list[int], answer: list[int], gmask: int, sop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exercise 2.5. The same prompt and answer for ChatGLM2-6B.

    text     ids of what the user wrote, without special tokens
    answer   ids of what was written so far
    gmask    [gMASK] and sop: the special tokens of ChatGLM2's vocabulary

    Returns `ids` [1, T], `positions` [1, T, A] with as many axes A as ChatGLM2 has, and `visible` [1, T, T].
    """
    raise NotImplementedError
