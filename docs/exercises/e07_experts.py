"""Exercises of chapter 7, experts. Replace what raises, then `python -m docs.check 7`."""

from collections.abc import Callable

from torch import Tensor

import glm


def route(x: Tensor, weight: Tensor, bias: Tensor, top: int, scale: float) -> tuple[Tensor, Tensor]:
    """Exercise 7.1. Which experts each token visits, and with which weights, as GLM-4.5 has it.

    x        tokens [N, D]
    weight   the router's matrix [E, D]
    bias     what balances the experts [E]
    top      k
    scale    c, what the weights of a token add up to

    Returns (chosen, weights), [N, k] each: the numbers of the experts in descending order of what chose them.
    """
    raise NotImplementedError


def mixture(x: Tensor, chosen: Tensor, weights: Tensor, experts: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """Exercise 7.2. The weighted sum of the experts that each token visits, each expert called at most once.

    x         tokens [N, D]
    chosen    numbers of experts [N, k], no two alike in a row
    weights   [N, k]
    experts   E functions [n, D] -> [n, D], which count their calls and do not like n = 0

    Returns [N, D].
    """
    raise NotImplementedError


def experts_read(spec: glm.Spec, tokens: int, bytes_each: int) -> float:
    """Exercise 7.3. How many bytes of routed experts a step that decodes `tokens` tokens reads, on average.

    Tokens choose evenly and independently, in every block that has experts (`glm.experts.Experts`), and an expert that
    any token chose is read once, whole: its matrices are up [2 F, D] and down [D, F]. `bytes_each` is the size of a
    number. The shared expert and the rest of the model do not count.
    """
    raise NotImplementedError


def rebalanced(bias: Tensor, chosen: Tensor, step: float) -> Tensor:
    """Exercise 7.4. The bias after a batch of training in which tokens went to the experts `chosen`.

    bias     [E]
    chosen   [N, k]
    step     by which the bias of an expert goes up if it had less than its fair share of the visits, down if it had
             more; if it had just that, it stays

    Returns the new bias [E].
    """
    raise NotImplementedError


def which_field(
    right: glm.Spec, broken: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor
) -> str:
    """Exercise 7.5. A router is wrong in one field. Which?

    right    the spec as it should be; the last block has experts, in several groups
    broken   the router as it is: called with tokens [N, D] it returns (chosen, weights), as in exercise 7.1
    weight   its matrix [E, D]
    bias     [E]

    What may have happened: weights are not divided by their sum, another scale, all groups can be chosen from, one more
    expert a token. Returns the path inside of `Experts`, such as "router.scale".
    """
    raise NotImplementedError
