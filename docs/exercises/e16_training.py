"""Exercises of chapter 16, training. Replace what raises, then `python -m docs.check 16`."""

from torch import Tensor

from glm.infilling import Marks


def training_row(
    text: list[int], spans: list[tuple[int, int]], order: list[int], marks: Marks
) -> tuple[list[int], list[int]]:
    """Exercise 16.1. What a model is given, and what it should say after each token.

    text    ids
    spans   what becomes blanks: (first id, one past the last) of each, from left to right, apart from each other
    order   the numbers of the spans in the order in which they are written
    marks   `mask` stands for a blank, `sop` starts what is written, `eop` ends it

    Returns (ids, targets), lists of the same length; a target is -100 where nothing is to be said.
    """
    raise NotImplementedError


def infilling_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Exercise 16.2. Mean cross-entropy, in nats, of the tokens that are to be written.

    logits    [B, T, V]
    targets   [B, T], -100 where nothing is to be said

    Returns a tensor [].
    """
    raise NotImplementedError


def learning_rate(step: int, steps: int, top: float, warm_up: int) -> float:
    """Exercise 16.3. The learning rate of a step, counted from 0, of so many.

    It goes up in a line, so that step `warm_up` - 1 is the first without reduction, and is at all steps multiplied by
    half a cosine, which is 1 at step 0 and would be 0 at step `steps`. There may be no warm-up at all.
    """
    raise NotImplementedError


def adamw(
    x: Tensor, gradients: list[Tensor], rate: float, beta1: float, beta2: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Exercise 16.4. A parameter after several steps of AdamW, with ε = 1e-8.

    x           before the first step
    gradients   one for each step

    Returns (x, m, v): the parameter, and both averages as they are kept (not yet divided by 1 - βⁿ).
    """
    raise NotImplementedError
