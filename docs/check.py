"""Checks the exercises of the book.

    python -m docs.check               # every exercise, and how far you are
    python -m docs.check 3.2           # one of them
    python -m docs.check 3             # those of a chapter
    python -m docs.check 3.2 --file F  # with your function in a file of your own

What to write stands in docs/exercises/eNN_name.py, a function an exercise. What is right is computed by `glm` itself,
in docs/answers/aNN_name.py: cases, each with arguments and the named values that must come out. An answer is right
if every value is that, in shape and in numbers; else the first that differs is named.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

DOCS = Path(__file__).resolve().parent
STUBS, ANSWERS = DOCS / "exercises", DOCS / "answers"
RIGHT, UNWRITTEN = "right", "not written yet"


@dataclass(frozen=True)
class Case:
    """Arguments by name, and what must come out, by name in the order returned.

    One thing returned has one name, usually "result". Floating-point tensors may differ by `tolerance` times the rms
    of what is expected, whatever their dtype; floats by as much of themselves; everything else must be equal.
    """

    arguments: dict[str, Any]
    expected: dict[str, Any]
    tolerance: float = 1e-12


@dataclass(frozen=True)
class Exercise:
    """One exercise: its number, as "3.2", the name of the function to write, and what makes its cases."""

    number: str
    function: str
    cases: Callable[[], Iterable[Case]]

    @property
    def chapter(self) -> str:
        """As in file names, "03"."""
        return f"{int(self.number.split('.')[0]):02}"


class ExerciseError(Exception):
    """An exercise that does not exist, or a file without its function."""


# -- where things are ------------------------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    """The module in a file, run anew. Raises ExerciseError where there is none."""
    spec = spec_from_file_location(f"docs_{path.parent.name}_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ExerciseError(f"{path}: no such Python file")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stub(exercise: Exercise) -> Path:
    """The file of the book to write an exercise in."""
    [path] = STUBS.glob(f"e{exercise.chapter}_*.py")
    return path


def function_of(exercise: Exercise, path: Path) -> Callable[..., Any]:
    """The function to be checked, from a file. Raises ExerciseError."""
    function = getattr(load(path), exercise.function, None)
    if not callable(function):
        raise ExerciseError(f"{path}: no function `{exercise.function}`, which exercise {exercise.number} asks for")
    return function  # type: ignore[no-any-return]


def exercises(which: str = "") -> list[Exercise]:
    """All of them in order; those of one chapter, or a single one by its number. Raises ExerciseError for none."""
    every = [exercise for path in sorted(ANSWERS.glob("a*.py")) for exercise in load(path).EXERCISES]
    found = [exercise for exercise in every if which in ("", exercise.number, exercise.number.split(".")[0])]
    if not found:
        raise ExerciseError(f"there is no exercise {which}; `python -m docs.check` lists them all")
    return found


# -- what is right ---------------------------------------------------------------------------------------------------


def judge(exercise: Exercise, function: Callable[..., Any]) -> str:
    """RIGHT, UNWRITTEN, or what the first case that differs says."""
    for number, case in enumerate(exercise.cases(), start=1):
        try:
            given = function(**{name: copied(value) for name, value in case.arguments.items()})
        except NotImplementedError:
            return UNWRITTEN
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            return f"case {number}: {type(error).__name__}: {error} ({Path(line.filename).name}, line {line.lineno})"
        fault = next(faults(named(given, list(case.expected)), case.expected, case.tolerance), None)
        if fault is not None:
            return f"case {number}: {fault}"
    return RIGHT


def copied(value: Any) -> Any:
    """An argument that may be written to without harm to the case."""
    return value.clone() if isinstance(value, Tensor) else value


def named(given: Any, names: list[str]) -> dict[str, Any]:
    """What a function returned, by name: a dict as it is, a tuple in order, anything else alone."""
    if len(names) == 1 and not (isinstance(given, dict) and list(given) == names):
        return {names[0]: given}
    if isinstance(given, dict):
        return given
    return dict(zip(names, given, strict=False)) if isinstance(given, tuple | list) else {names[0]: given}


def faults(given: dict[str, Any], expected: dict[str, Any], tolerance: float) -> Iterator[str]:
    """What is wrong with the values returned, in order."""
    for name, value in expected.items():
        if name not in given:
            yield f"`{name}` is missing: {len(expected)} values are wanted, {', '.join(expected)}"
        elif (fault := difference(given[name], value, tolerance)) is not None:
            yield f"`{name}` {fault}"
    yield from (f"`{name}` is not asked for" for name in given if name not in expected)


def difference(given: Any, wanted: Any, tolerance: float) -> str | None:
    """How a value differs from the one wanted; None if it does not."""
    if isinstance(wanted, Tensor):
        return tensor_difference(given, wanted, tolerance)
    if isinstance(wanted, list | tuple) and any(isinstance(value, Tensor) for value in wanted):
        if not isinstance(given, list | tuple) or len(given) != len(wanted):
            return f"must be {len(wanted)} tensors, and is {kind(given)}"
        parts = (difference(mine, its, tolerance) for mine, its in zip(given, wanted, strict=True))
        return next((f"[{i}] {fault}" for i, fault in enumerate(parts) if fault is not None), None)
    if isinstance(given, Tensor) and given.numel() == 1:
        given = given.item()
    if isinstance(wanted, float) and isinstance(given, int | float):
        return None if abs(given - wanted) <= tolerance * abs(wanted) else f"is {given:.12g}, and must be {wanted:.12g}"
    same = list(given) == list(wanted) if isinstance(wanted, list | tuple) and isinstance(given, list | tuple) else None
    return None if (given == wanted if same is None else same) else f"is {shown(given)}, and must be {shown(wanted)}"


def tensor_difference(given: Any, wanted: Tensor, tolerance: float) -> str | None:
    """How a tensor differs from the one wanted: in kind, in shape, or first at an index."""
    if not isinstance(given, Tensor):
        return f"must be a tensor {list(wanted.shape)}, and is {kind(given)}"
    if given.shape != wanted.shape:
        return f"has the shape {list(given.shape)}, and must have {list(wanted.shape)}"
    mine, its = given.detach().double(), wanted.detach().double()
    allowed = 0.0
    if wanted.is_floating_point():
        finite = its[its.isfinite()]
        allowed = tolerance * (float(finite.square().mean().sqrt()) if finite.numel() else 0.0)
    differs = ~((mine == its) | ((mine - its).abs() <= allowed))
    if not differs.any():
        return None
    index = differs.nonzero()[0].tolist()
    mine_there, its_there = (x[tuple(index)].item() for x in (given, wanted))
    count = f"{int(differs.sum())} of {wanted.numel()} differ" if wanted.numel() > 1 else "it differs"
    return f"{list(wanted.shape)}: {count}, first at {index}: {shown(mine_there)}, and must be {shown(its_there)}"


def kind(value: Any) -> str:
    """What a value is, in words."""
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}{size}"


def shown(value: Any) -> str:
    """A value, shortly."""
    text = f"{value:.12g}" if isinstance(value, float) else kind(value) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


# -- the command -----------------------------------------------------------------------------------------------------

COLOURS = {RIGHT: "green", UNWRITTEN: "dim"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and return 0 if all that was asked for is right, 1 if not, 2 if there is no such exercise."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", nargs="?", default="", help="as 3.2, or 3 for a chapter; all of them if left out")
    parser.add_argument("--file", type=Path, help="where your function is, instead of docs/exercises")
    asked = parser.parse_args(arguments)
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    torch.set_num_threads(1)
    try:
        found = exercises(asked.number)
        said = [judge(each, function_of(each, asked.file or stub(each))) for each in found]
    except ExerciseError as error:
        print("docs.check:", error, file=sys.stderr)
        return 2
    table = Table(box=None, pad_edge=False, show_header=False)
    for exercise, state in zip(found, said, strict=True):
        where = (asked.file or stub(exercise)).resolve()
        place = where.relative_to(DOCS.parent) if where.is_relative_to(DOCS.parent) else where
        table.add_row(
            exercise.number, exercise.function, f"[{COLOURS.get(state, 'red')}]{escape(state)}[/]", str(place)
        )
    screen.print(table)
    if not asked.number:
        screen.print(f"{said.count(RIGHT)} of {len(said)} right")
        return 0
    return 0 if all(state == RIGHT for state in said) else 1


if __name__ == "__main__":
    from docs import check  # under its own name, which the answers import it by

    sys.path.append(str(DOCS.parent / "kernels"))
    sys.exit(check.main())
