"""Exercises of chapter 9, sparse attention. Replace what raises, then `python -m docs.check 9`."""

from torch import Tensor

from glm.sparse_attention import SparseAttention


def chosen(q: Tensor, k: Tensor, w: Tensor, visible: Tensor, top: int) -> Tensor:
    """Exercise 9.1. The keys that an indexer chooses for each query, the one with the highest score first.

    q         index queries [T, J, K], already rotated
    k         index keys [S, K], likewise
    w         what each head counts [T, J], as it comes from its matrix
    visible   bool [T, S]: who can see whom; at least `top` keys a query
    top       less than S

    Returns numbers of keys [T, top]. (Do you need the constant in front of the sum?)
    """
    raise NotImplementedError


def seen(chosen: Tensor, visible: Tensor) -> Tensor:
    """Exercise 9.2. Who sees whom in a layer with an indexer.

    chosen    numbers of keys [T, top]; where a query could see fewer than that, some of them are others
    visible   bool [T, S]: who could see whom without it

    Returns bool [T, S].
    """
    raise NotImplementedError


def a_step(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    """Exercise 9.3. Attention of one new token to those keys in a cache that were chosen for it.

    q        queries [H, K]
    k, v     of S tokens [S, H, K]; keys and values that were not chosen are NaN, as if nobody had read them
    chosen   numbers of keys [top]

    Returns [H, K]; scores are divided by √K.
    """
    raise NotImplementedError


def worth_it(mixer: SparseAttention) -> int:
    """Exercise 9.4. The shortest past, in tokens, for which a query does fewer products with the indexer than without.

    Attention does 2 H (R + P) products for each key it attends to, the indexer J K for each key there is.
    """
    raise NotImplementedError
