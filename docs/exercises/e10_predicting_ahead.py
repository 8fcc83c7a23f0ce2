"""Exercises of chapter 10, predicting ahead. Replace what raises, then `python -m docs.check 10`."""

from torch import Tensor

import glm


def found(text: list[int], guesses: int, longest: int) -> list[int]:
    """Exercise 10.1. What prompt lookup guesses comes after `text`.

    It looks for the last `longest` ids of the text where they stood before (at its latest place, which may overlap the
    end), else for the last `longest` - 1, and so on to the last one; what followed there is guessed.

    Returns `guesses` ids. Where too few followed, or nothing was found, the rest is the last id of the text.
    """
    raise NotImplementedError


def kept(guesses: list[int], logits: Tensor) -> list[int]:
    """Exercise 10.2. The new tokens that are certain after a pass over the last certain token and all guesses.

    guesses   n ids
    logits    [1 + n, V], behind the certain token and behind each guess

    Returns 1 to n + 1 ids: those that decoding greedily, one token a pass, would have given.
    """
    raise NotImplementedError


def tokens_a_pass(chances: list[float]) -> float:
    """Exercise 10.3. How many tokens a pass gives on average, where guess i is right with probability `chances[i]`
    if those before it are, and of no use if they are not.
    """
    raise NotImplementedError


def joined(model: glm.GLM, tokens: Tensor, token_norm: Tensor, stream_norm: Tensor, join: Tensor) -> Tensor:
    """Exercise 10.4. What the block behind the last reads, for every token but the last of a text.

    model         a causal model whose final norm is an RMSNorm; `model(ids, hidden=True)` gives its stream
    tokens        ids [B, T + 1]
    token_norm    weight [D] of the norm of embeddings, with the eps of the model's final norm
    stream_norm   weight [D] of the norm of the stream, likewise
    join          [D, 2 D], as it lies in a checkpoint

    Returns [B, T, D]; entry t is made from the stream of token t, after the final norm, and from token t + 1.
    """
    raise NotImplementedError
