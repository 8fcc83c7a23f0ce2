"""What is measured: subjects of cases, cases of sides, and how right each side has to be."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Call = Callable[[], Any]
Inputs = Mapping[str, Any]


class MissingError(Exception):
    """Why a side cannot be measured here: not installed, or nothing it can do."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one model.

    model       whose shape it is
    dtype       as the model is published, by torch's name
    importance  0 is measured first; the last ones fall to the budget of minutes
    """

    model: str
    dtype: str
    importance: int = field(default=1, compare=False)

    @property
    def fields(self) -> dict[str, Any]:
        """What tells it from other cases."""
        return {name: value for name, value in asdict(self).items() if name != "importance"}

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Work:
    """What a case cannot do without: bytes read and written at least once, and flops that count."""

    bytes: float
    flops: float

    def floor(self, read: float, multiply: float) -> tuple[float, str]:
        """Least seconds, at so many bytes and flops a second, and which of the two roofs says so: R or C."""
        seconds = {"R": self.bytes / read, "C": self.flops / multiply}
        bound = max(seconds, key=lambda roof: seconds[roof])
        return seconds[bound], bound


@dataclass(frozen=True)
class Expected:
    """A part of what a case gives.

    pick   takes this part from what a side returned
    plain  the same from plain torch in the dtype of the case
    truth  the same in float64
    """

    name: str
    pick: Callable[[Any], Tensor]
    plain: Tensor
    truth: Tensor

    def verdict(self, output: Any) -> "Verdict":
        """How far `output` is off, against the project's rule."""
        ours = self.pick(output).double()
        if ours.shape != self.truth.shape:
            shapes = f"shape {list(ours.shape)}, expected {list(self.truth.shape)}"
            return Verdict(self.name, math.inf, math.inf, shapes)
        worst: dict[str, float] = {}
        rounding = torch.finfo(self.plain.dtype).eps / 2
        for name, order in (("rms", 2), ("max", math.inf)):
            mine, theirs, size = (
                torch.linalg.vector_norm(v.double().flatten(), order).item()
                for v in (ours - self.truth, self.plain.double() - self.truth, self.truth)
            )
            worst[name] = mine / max(theirs, size * rounding, torch.finfo(torch.float64).tiny)
        rms, most = (math.inf if math.isnan(value) else value for value in worst.values())
        return Verdict(self.name, rms, most)


@dataclass(frozen=True)
class Side:
    """A way to compute a case: `prepare` takes inputs and gives the call that is timed.

    `prepare` raises MissingError, with the reason, where the side cannot be had. What it does is not timed: laying out,
    planning, building a mask. `steady` says that a call gives the same every time, which one that writes over its
    inputs does not. `expected` is for a side that cannot hold the case's numbers, but has others in their place: what
    its outputs ought to be with those.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    steady: bool = True
    expected: Callable[[Inputs], Sequence[Expected]] | None = None


FACTOR = 2.0  # the project's rule: at most twice the error of plain torch, or of one rounding


@dataclass(frozen=True)
class Verdict:
    """Error against float64, in errors of plain torch: of the root mean square, and of the worst element."""

    name: str
    rms: float
    max: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Within the rule."""
        return max(self.rms, self.max) <= FACTOR

    def __str__(self) -> str:
        return f"{self.name}: {self.note or f'error {self.rms:.3g}× (rms), {self.max:.3g}× (max) of plain torch'}"


C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Subject(Generic[C]):
    """A kernel to be measured.

    name      as on the command line
    title     of its table
    cases     all of them, in any order
    inputs    (case, device, seed) -> tensors by name; on the device "meta" it tells how large they are
    outputs   bytes of what a call gives back, which is kept for every copy of the inputs
    work      what is counted for the roofs
    sides     ours first
    expected  (case, inputs) -> what the outputs ought to be
    label     a case in a few words, without the size that `axis` names
    axis      the size that the plot has along x
    """

    name: str
    title: str
    cases: Callable[[], Sequence[C]]
    inputs: Callable[[C, torch.device, int], Inputs]
    outputs: Callable[[C], float]
    work: Callable[[C], Work]
    sides: Callable[[C], Sequence[Side]]
    expected: Callable[[C, Inputs], Sequence[Expected]]
    label: Callable[[C], str]
    axis: Callable[[C], tuple[str, int]]


def nbytes(inputs: Inputs) -> int:
    """Bytes of all tensors."""
    return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))


def sample(count: int, most: int) -> Tensor:
    """At most so many of `count` places, ascending: the first and last two, the others anywhere.

    Not at equal distances: those would be at the same place in every tile of a kernel.
    """
    edges = torch.tensor([0, 1, count - 2, count - 1]).clamp(0, count - 1)
    others = torch.randperm(count, generator=torch.Generator().manual_seed(count))[: max(0, most - len(edges))]
    places: Tensor = torch.cat([edges, others]).unique()
    return places


def generator(device: torch.device, seed: int) -> torch.Generator | None:
    """Random numbers for `device`; none are drawn on the meta device."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
