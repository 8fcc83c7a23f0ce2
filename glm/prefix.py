"""A learned prefix: keys and values that stand before the first token of every layer.

P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602) trains only these and leaves the model alone. They are not rotated,
take up no positions and are seen by every token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from glm.cache import Shape
from glm.errors import ConfigError
from glm.linear import empty_embedding
from glm.shares import Cut, Run, columns, rows


@dataclass(frozen=True)
class Prefix:
    """`length` learned tokens, embedded as they are or `projected`: (width of the embedding, of the hidden layer)."""

    length: int
    projected: tuple[int, int] | None

    def build(self, layers: int, remembered: tuple[Shape, ...]) -> nn.Module:
        """A module that returns, called with nothing, the (k, v) of each layer.

        `remembered` is what a layer remembers of a token. Raises ConfigError where that is not a key and a value.
        """
        if len(remembered) != 2 or remembered[0] != remembered[1]:
            raise ConfigError(
                "a learned prefix is made of keys and values, and this attention remembers something else"
            )
        return PrefixModule(self, layers, *remembered[0])

    def plan(self, layers: int, remembered: tuple[Shape, ...]) -> Mapping[str, Cut]:
        """How it is dealt out to ranks: the key heads of every layer's keys and values."""
        runs = [Run("key heads", *heads, repeated=True) for heads in remembered] * layers
        return {"embedding": columns(*runs)} if self.projected is None else {"project.2": rows(*runs)}


class PrefixModule(nn.Module):
    """An embedding of `length` rows, projected if the spec says so, cut into keys and values of all layers."""

    def __init__(self, spec: Prefix, layers: int, groups: int, head_width: int) -> None:
        super().__init__()
        self.shape = (layers, 2, groups, head_width)
        outputs = 2 * layers * groups * head_width
        self.project: nn.Module = nn.Identity()
        embedded = outputs
        if spec.projected is not None:
            embedded, hidden = spec.projected
            self.project = nn.Sequential(nn.Linear(embedded, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
        self.embedding = empty_embedding(spec.length, embedded)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Of each layer (k, v), each [1, G, p, K]."""
        layers = self.project(self.embedding.weight).unflatten(-1, self.shape).permute(1, 2, 3, 0, 4)
        return [(k[None], v[None]) for k, v in layers]  # [1 G p K]
