"""What changed between two models: their specs compared field by field.

    print(glm.diff(one, another))     # rotary.scaling: Plain() → Interpolation(factor=16.0)

Blocks are compared by their number. The same change in neighbouring blocks is one line, `blocks[1:46].feed_forward`
as Python would slice it; blocks that only one of the two has are said to be like the one before them where they are.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.markup import escape
from rich.table import Table

from glm.info import named
from glm.spec import Block, Spec


class Absent:
    """What stands on the side that has no such block."""

    def __repr__(self) -> str:
        return "none"


ABSENT = Absent()


@dataclass(frozen=True)
class Like:
    """`count` blocks equal to the block before them."""

    count: int
    block: int

    def __repr__(self) -> str:
        return f"{self.count} more like blocks[{self.block}]"


@dataclass(frozen=True)
class Change:
    """One field, by its dotted path in the spec, and its two values."""

    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before!r} → {self.after!r}"


@dataclass(frozen=True)
class Diff:
    """All changes from one spec to another; `print` shows them as lines, `rich.print` as a table."""

    before: str  # what the two are called
    after: str
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        """A line a change; a single one where there is none."""
        return "\n".join(map(str, self.changes)) or self.none

    @property
    def none(self) -> str:
        """What is said where nothing changed."""
        return f"no field differs: {self.before} and {self.after} are built alike"

    def __rich__(self) -> Table | str:
        """A row a change."""
        if not self.changes:
            return escape(self.none)
        table = Table(box=None, pad_edge=False)
        for column in ("field", self.before, self.after):
            table.add_column(escape(column), overflow="fold")
        for change in self.changes:
            table.add_row(*(escape(text) for text in (change.field, repr(change.before), repr(change.after))))
        return table


def diff(before: Spec | str | os.PathLike[str], after: Spec | str | os.PathLike[str]) -> Diff:
    """What differs between two models, each a spec, a release's name, a checkpoint folder or a hub id (its config).

    Raises CheckpointError for a name that no release or folder has, and for a folder or id that holds no GLM.
    """
    (one, a), (two, b) = (described(source, side) for source, side in ((before, "before"), (after, "after")))
    return Diff(one, two, tuple(changes(a, b)))


def described(source: Spec | str | os.PathLike[str], side: str) -> tuple[str, Spec]:
    """What to call a source (a spec is called by its `side`), and its spec."""
    return (side, source) if isinstance(source, Spec) else (os.fspath(source), named(source).spec)


def changes(before: Spec, after: Spec) -> Iterator[Change]:
    """From one spec to another, in the order of the fields."""
    for field in dataclasses.fields(Spec):
        a, b = getattr(before, field.name), getattr(after, field.name)
        yield from changes_of_blocks(a, b) if field.name == "blocks" else compared(field.name, a, b)


def compared(path: str, a: Any, b: Any) -> Iterator[Change]:
    """The fields in which two values differ: as deep as they are of one kind, and whole where they are not."""
    if a == b and type(a) is type(b):
        return
    if type(a) is type(b) and dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            yield from compared(f"{path}.{field.name}", getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and dataclasses.is_dataclass(a[0]):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from compared(f"{path}[{i}]", x, y)
    else:
        yield Change(path, a, b)


def changes_of_blocks(a: Sequence[Block], b: Sequence[Block]) -> Iterator[Change]:
    """Block by block, the same change in neighbouring blocks once; then the blocks that one side alone has."""
    if len(a) != len(b):
        yield Change("len(blocks)", len(a), len(b))
    both = min(len(a), len(b))
    where: dict[Change, list[int]] = {}  # the blocks in which a change is found
    for i in range(both):
        for change in compared("", a[i], b[i]):
            where.setdefault(change, []).append(i)
    for change, numbers in where.items():
        for start, end in runs(numbers):
            yield Change(f"blocks{sliced(start, end)}{change.field}", change.before, change.after)
    longer = max(a, b, key=len)
    starts = [i for i in range(both, len(longer)) if i in (0, both) or longer[i] != longer[i - 1]]
    for start, end in pairwise([*starts, len(longer)]):
        same = start > 0 and longer[start] == longer[start - 1]
        value = Like(end - start, start - 1) if same else longer[start]
        sides = (value, ABSENT) if longer is a else (ABSENT, value)
        yield Change(f"blocks{sliced(start, end)}", *sides)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as the half-open ranges they fill."""
    breaks = [i for i, (x, y) in enumerate(pairwise(numbers), 1) if y != x + 1]
    for start, end in pairwise([0, *breaks, len(numbers)]):
        yield numbers[start], numbers[end - 1] + 1


def sliced(start: int, end: int) -> str:
    """A range as an index: [3] or [1:46]."""
    return f"[{start}]" if end == start + 1 else f"[{start}:{end}]"
