"""Exercises of chapter 14, kernel ladders. Replace what raises, then `python -m docs.check 14`."""

from torch import Tensor


def carried_softmax(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Exercise 14.1. Causal attention of one head, `block` keys at a time, without all scores at once.

    q, k, v   [T, K], the query not yet scaled by 1 / √K
    block     keys that are looked at at once; T need not be a multiple of it

    Returns `y` [T, K], and for each query `lse` [T], the logarithm of the sum of the exponentials of its scores.
    """
    raise NotImplementedError


def joined(m: Tensor, z: Tensor, a: Tensor) -> Tensor:
    """Exercise 14.2. What P splits of the keys found, made one.

    m   [P], the greatest score of each split; of an empty one the lowest finite number
    z   [P], Σ exp(s - m) over its keys
    a   [P, K], Σ exp(s - m) v over its keys

    Returns y [K], the attention over all keys. At least one split has keys. Large scores must not overflow.
    """
    raise NotImplementedError


def words(codes: Tensor) -> Tensor:
    """Exercise 14.3. Codes in the kernels' layout.

    codes   integers 0 to 15, [O, I], I a multiple of 128, dtype int32

    Returns int32 [I / 128, O, 32]: word j of row o in tile t has the codes of columns 128 t + 32 i + j, i = 0 to 3, the
    first in the lowest four bits.
    """
    raise NotImplementedError


def blocks_of_keys(first: int, rows: int, columns: int) -> tuple[int, int]:
    """Exercise 14.4. The blocks of `columns` keys that a block of `rows` queries, from query `first` on, visits.

    The mask is causal, query i sees keys 0 to i, and there are as many keys as the last query needs.

    Returns how many of the blocks are seen `whole` by all queries, and how many are `masked`: seen in part.
    """
    raise NotImplementedError
