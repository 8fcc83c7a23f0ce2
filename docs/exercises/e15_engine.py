"""Exercises of chapter 15, the engine. Replace what raises, then `python -m docs.check 15`."""

from torch import Tensor


def remember(buffer: Tensor, x: Tensor, at: Tensor) -> Tensor:
    """Exercise 15.1. New keys in a static cache whose rows have lengths of their own.

    buffer   [B, G, S, K]
    x        the keys of T new tokens of each row, [B, T, G, K]
    at       [B], the place of the first of them; what would lie behind the last place S - 1 is written there

    Returns the buffer with them in place, [B, G, S, K]. In no case is more than one token written to the last place.
    """
    raise NotImplementedError


def choose(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, luck: Tensor) -> Tensor:
    """Exercise 15.2. The next token of each row, by the row's own rules.

    logits        [B, V], no two of a row alike
    temperature   [B]; 0 takes the likeliest token, and nothing else counts
    top_k         [B]; only so many of the likeliest; 0 is all
    top_p         [B]; of those the fewest whose probabilities add up to so much or more; 1 is all
    luck          [B], each from 0 up to 1: the token where the probabilities, added up in the order of the vocabulary,
                  pass `luck` of their sum

    The probabilities are those of logits / temperature. Returns ids [B].
    """
    raise NotImplementedError


def guess(text: list[int], guesses: int, longest: int) -> list[int]:
    """Exercise 15.3. What may come next, because it came next before.

    Find the longest of the last `longest`, …, 2, 1 ids of the text that stands in it at an earlier place too, and of
    those places the latest. Returns the `guesses` ids behind it; where there are not as many, or no such place, the
    last id of the text fills up. The text has at least one id.
    """
    raise NotImplementedError


def not_read_again(prompt: list[int], text: list[int]) -> int:
    """Exercise 15.4. How many tokens of a causal prompt need not be read.

    text   the ids whose keys and values are in a slot

    The last token of the prompt must be read in any case: its logits are wanted.
    """
    raise NotImplementedError
