"""Exercises of chapter 8, latent attention. Replace what raises, then `python -m docs.check 8`."""

from collections.abc import Callable

from torch import Tensor

from glm.latent_attention import LatentAttention


def remembered(
    x: Tensor, down: Tensor, weight: Tensor, eps: float, rotary: int, turn: Callable[[Tensor], Tensor]
) -> Tensor:
    """Exercise 8.1. What a cache keeps of each token: the latent, then the key that all heads share.

    x        the stream [T, D]
    down     [R + P, D], its rows in this order
    weight   of the latent's RMSNorm [R]
    eps      of the same
    rotary   P
    turn     rotates vectors [T, P] by the tokens' positions

    Returns [T, R + P].
    """
    raise NotImplementedError


def naive(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> Tensor:
    """Exercise 8.2. Latent attention with keys and values written out; causal, all heads.

    q       queries, already turned: [H, T, N + P], those of the newest T tokens
    cache   latent and shared key of S ≥ T tokens [S, R + P]
    up      [H, N + V, R]: for each head the rows that make keys, then the rows that make values
    rank    R

    Returns what the heads found [H, T, V].
    """
    raise NotImplementedError


def absorbed(q: Tensor, cache: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Exercise 8.3. The same as exercise 8.2 without any key or value: all heads attend to the cache as it is.

    Returns (found, result): the weighted sums of latents [H, T, R], and what exercise 8.2 returns [H, T, V].
    """
    raise NotImplementedError


def break_even(mixer: LatentAttention, keys: int) -> int:
    """Exercise 8.4. The largest number of queries for which the absorbed form takes fewer products than the naive one.

    Each query meets all `keys` keys, S. Count as the chapter does, with 2 (R + P) products a pair for the absorbed
    form. A query is one of the keys, so that there are at most S.
    """
    raise NotImplementedError
