"""Which experts tokens went through, so that a side is held to what it computed, not to where a rounding sent it.

What a model says jumps where a token goes through another expert, and where two experts suit it equally well, any
rounding decides which. So the error of a side is taken against float64 with the experts that the side chose, as is that
of the pure model; and each of these choices must be one that roundings can have made. An expert is chosen in the place
of a better one where the errors of both scores together exceed the distance of the scores. The rule allows errors of
FACTOR times those of the pure model, so a choice is explained where the best expert that was left out is better than
the worst that was chosen by at most 2 FACTOR times those. (Of several groups of experts only those are chosen from that
float64 chooses from: a group that was mistaken for another is not explained.)

Which keys an indexer chooses for sparse attention jumps in the same way, and is not seen: there a right side can be
refused, and `Truth` says so beside the refusal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from glm_kernels.bench.subject import FACTOR
from torch import Tensor, nn

from glm.experts import RouterModule


def routers(model: nn.Module) -> list[RouterModule]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, RouterModule)]


class Routes:
    """The choices that the routers of a side make, by the row of its cache: [L, T, k] for L layers with experts.

    What is replayed from a recording calls no module, and is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = routers(model)
        self.latest: list[Tensor] = []  # of one pass through the layers, [N k] each
        self.rows: dict[int, Tensor] = {}

    @contextmanager
    def seen(self) -> Iterator["Routes"]:
        """While this lasts."""

        def see(router: nn.Module, given: tuple[Tensor, ...], found: tuple[Tensor, Tensor]) -> None:
            self.latest.append(found[0].clone())

        hooks = [router.register_forward_hook(see) for router in self.routers]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def taken(self) -> Tensor:
        """The choices of the last pass, [L, N, k]. Raises RuntimeError where it was not seen."""
        latest, self.latest = self.latest, []
        if len(latest) != len(self.routers):
            raise RuntimeError(f"of {len(self.routers)} routers {len(latest)} were seen to choose")
        return torch.stack(latest)

    def read(self, row: int, start: int) -> None:
        """The last pass read tokens of one row, from this place on."""
        new = self.taken()
        before = self.rows.get(row, new)[:, :start]
        if before.shape[1] != start:
            raise RuntimeError(f"row {row} remembers tokens that were not seen")
        self.rows[row] = torch.cat((before, new), dim=1)

    def wrote(self, rows: list[int]) -> None:
        """The last pass read the newest token of each row from the first on; only these `rows` are in use."""
        new = self.taken()
        for row in rows:
            self.rows[row] = torch.cat((self.rows[row], new[:, row : row + 1]), dim=1)


@dataclass
class Forced:
    """What routers said while their choices were made for them, by layer: which experts, and s + b of all, [N, E]."""

    chosen: list[Tensor] = field(default_factory=list)
    suited: list[Tensor] = field(default_factory=list)


@contextmanager
def forced(model: nn.Module, chosen: Tensor) -> Iterator[Forced]:
    """Every token of the model's next pass goes through the experts `chosen` for it, [L, B, T, k].

    The hooks go with a copy of a block, as long as its routers have the same numbers.
    """
    said = Forced()

    def force(number: int, router: nn.Module, given: tuple[Tensor, ...], found: object) -> tuple[Tensor, Tensor]:
        assert isinstance(router, RouterModule)
        s = router.scores(*given)
        instead = chosen[number].flatten(0, -2)
        said.chosen.append(instead)
        said.suited.append(router.allowed(s + router.bias))
        return instead, router.weights(s, instead)

    hooks = [router.register_forward_hook(partial(force, i)) for i, router in enumerate(routers(model))]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


def unexplained(plain: Forced, truth: Forced, dtype: torch.dtype) -> str:
    """The choices that no rounding explains, or nothing: the errors of `plain`, which is in `dtype`, say which do."""
    rounding = torch.finfo(dtype).eps / 2
    for layer, (chosen, ours, exact) in enumerate(zip(truth.chosen, plain.suited, truth.suited, strict=True)):
        left = torch.ones_like(exact, dtype=torch.bool).scatter(-1, chosen, False)
        best = exact.masked_fill(~left, -torch.inf).amax(-1)
        short = float((best - exact.gather(-1, chosen).amin(-1)).max())
        both = exact.isfinite() & ours.isfinite()
        error = float((ours.double() - exact)[both].abs().max())
        most = 2 * FACTOR * max(error, rounding * float(exact[both].abs().max()))
        if short > most:
            return (
                f"experts: in layer {layer} of those with experts one was left out that suits better by {short:.3g} in "
                f"float64, and errors explain {most:.3g}"
            )
    return ""
