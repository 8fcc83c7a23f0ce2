"""Spec: what a model is made of, as a tree of frozen dataclasses.

A spec is complete: `print(spec)` describes a release, two specs can be compared field by field, and `GLM(spec)`
builds the model. Nothing that differs between releases is decided anywhere else.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from glm.layout import LayoutRule
from glm.linear import Dense, Weights
from glm.norms import Norm
from glm.positions import Learned, Rotary, Unturned
from glm.prefix import Prefix
from glm.residual import Wiring

Mixer = Any
"""A spec of `attention.py` or of a file like it. It has `build(width, weights)`, `remembers`, `working(width)`,
`looking(queries, keys, itemsize)`, and for several ranks `plan` and `share(rank, ranks)`; what else it has, only those
ask who chose it: a generation's file knows which mixer its blocks have."""

Transform = Any
"""A spec of `feed_forward.py` or of a file like it, with `build(width, weights)`, `working(width)`, `plan`, `share`."""


@dataclass(frozen=True)
class Block:
    """One layer: a mixer of tokens, then a feed-forward, each joined to the stream as `wiring` says."""

    wiring: Wiring
    norm: Norm
    mixer: Mixer
    feed_forward: Transform
    dense: tuple[str, ...] = ()  # of "mixer" and "feed_forward", whose matrices stay dense where others are integers

    def stored(self, sublayer: str, weights: Weights) -> Weights:
        """How the matrices of a sublayer are stored in a model of `weights`."""
        return Dense() if sublayer in self.dense else weights


@dataclass(frozen=True)
class Spec:
    """A whole model."""

    vocabulary: int  # V, rows of the embedding and of the head
    width: int  # D
    context: int  # tokens the release was trained or published for
    reading: LayoutRule  # ids -> positions and visibility
    rotary: Rotary | Unturned
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    tied: bool  # the head is the embedding
    prefix: Prefix | None
    weights: Weights  # how the matrices of the blocks are stored
    pad: int | None
    stop: tuple[int, ...]  # ids that end a text
    learned: Learned | None = None  # position tables added to the embedding; only the first generation has any
    head: Weights = Dense()  # how the head is stored, which every release leaves dense

    def __str__(self) -> str:
        """The tree, one field a line, equal neighbouring blocks written once."""
        return "\n".join(lines(self, "Spec"))


def lines(value: Any, head: str, indent: str = "") -> Iterator[str]:
    """A readable tree of nested dataclasses and tuples of them."""
    if not dataclasses.is_dataclass(value):
        yield f"{indent}{head}"
        return
    yield f"{indent}{head}"
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item) and dataclasses.fields(item):
            yield from lines(item, f"{field.name}: {type(item).__name__}", indent + "    ")
        elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            for same, run in groupby(item):
                count = len(list(run))
                yield from lines(same, f"{field.name}: {count} × {type(same).__name__}", indent + "    ")
        else:
            yield f"{indent}    {field.name} = {item!r}"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted path, value) of a spec, depth first: what two specs are compared by."""
    if dataclasses.is_dataclass(value) and dataclasses.fields(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, value
