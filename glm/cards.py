"""Which card a release fits: every published checkpoint with its sizes, and the memory that cards come with.

bf16   two bytes a parameter, everything
int4   as `glm info` has it: the matrices of the blocks in four bits with a bfloat16 scale for every 128 weights of
       a row, 0.516 bytes a weight; embedding, head, norms, biases and routers stay in bfloat16
fits   the smallest card of `CARDS` that holds weights, cache and working space of one sequence of `CONTEXT`
       tokens (or of all the release takes, if those are fewer) in 95 % of its memory; driver and allocator want
       the rest. Beyond the largest card: how many of them, a power of two, hold it together.
"""

from dataclasses import dataclass, replace

import torch

from glm.family import releases
from glm.family.generation import Release
from glm.info import (
    STORAGES,
    active_parameters,
    cache_bytes_per_token,
    parameters,
    weight_bytes,
    working_bytes,
)
from glm.linear import Dense

CONTEXT = 8192  # tokens that are to fit beside the weights
CARDS = (8, 12, 16, 24, 48, 80, 141)  # GiB of memory that cards are sold with
USABLE = 0.95
HEAD = (
    ("year", ""),
    ("params", "10⁹"),  # all/active
    ("bf16", "GB"),
    ("int4", "GB"),
    ("KV", "KiB"),  # of a token
    ("ctx", ""),  # the context, in tokens
    ("fits", "bf16"),  # a card of so many GiB, or so many cards
    ("fits", "int4"),
)


@dataclass(frozen=True)
class Sizes:
    """One line of the family table; bytes unless said otherwise."""

    release: Release
    parameters: int  # numbers the model has learnt
    active: int  # of these, what one token meets: all but the experts that are not chosen for it
    bf16: int
    int4: int
    per_token: int  # of the cache, in bfloat16
    card_bf16: str
    card_int4: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text, under `HEAD`."""
        learnt = billions(self.parameters)
        if self.active < self.parameters:
            learnt = "/".join(f"{count / 1e9:.{int(count < 1e10)}f}" for count in (self.parameters, self.active))
        return (
            str(self.release.year),
            learnt,
            billions(self.bf16),
            billions(self.int4),
            f"{self.per_token / 1024:.0f}",
            shortly(self.release.spec.context),
            self.card_bf16,
            self.card_int4,
        )


def family_table() -> list[Sizes]:
    """Every published release, in the order of the generations."""
    return [sizes(release) for release in releases().values()]


def sizes(release: Release) -> Sizes:
    """What one release takes."""
    spec = replace(release.spec, weights=Dense())
    brain = torch.bfloat16
    per_token = cache_bytes_per_token(spec, brain)
    tokens = min(CONTEXT, spec.context)
    beside = per_token * tokens + working_bytes(spec, brain, tokens)
    bf16, int4 = (
        weight_bytes(spec, brain),
        weight_bytes(replace(spec, weights=STORAGES["int4"][1], head=Dense()), brain),
    )
    return Sizes(
        release=release,
        parameters=parameters(spec),
        active=active_parameters(spec),
        bf16=bf16,
        int4=int4,
        per_token=per_token,
        card_bf16=card(bf16 + beside),
        card_int4=card(int4 + beside),
    )


def card(needed: float) -> str:
    """The smallest card that holds so many bytes, or how many of the largest."""
    for gibibytes in CARDS:
        if needed <= USABLE * (gibibytes << 30):
            return str(gibibytes)
    count = 2
    while needed > count * USABLE * (CARDS[-1] << 30):
        count *= 2
    return f"{count}×{CARDS[-1]}"


def billions(count: int) -> str:
    """A number in 10⁹ with three digits or more."""
    return f"{count / 1e9:.{2 if count < 1e10 else 1 if count < 1e11 else 0}f}"


def shortly(tokens: int) -> str:
    """A number of tokens, in k = 1024 where that goes."""
    return str(tokens) if tokens % 1024 else f"{tokens // 1024}k"
