"""Every exercise of the book: nobody has written it, whoever solves it is right, and whoever does not is told where.

Solutions stand in solutions/sNN_name.py, beside exercises/eNN_name.py and answers/aNN_name.py of docs/. Each has
`RIGHT`, a list of functions for each number, and `WRONG`, a list of functions with the name of the first value that
each gets wrong.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from docs import check

ROOT = Path(__file__).parents[2]
SOLUTIONS = Path(__file__).parent / "solutions"
EXERCISES = {exercise.number: exercise for exercise in check.exercises()}
SOLVED = {path.stem[1:]: check.load(path) for path in sorted(SOLUTIONS.glob("s*.py"))}  # by chapter, "00_family"
RIGHT = [
    (number, function) for module in SOLVED.values() for number in module.RIGHT for function in module.RIGHT[number]
]
WRONG = [(number, *wrong) for module in SOLVED.values() for number in module.WRONG for wrong in module.WRONG[number]]


def name(value: object) -> str:
    return value.__name__ if inspect.isfunction(value) else str(value)


def test_every_chapter_has_stubs_answers_and_solutions() -> None:
    chapters = {path.stem for path in (ROOT / "docs" / "chapters").glob("[0-9]*.py")}
    stubs, answers = ({path.stem[1:] for path in folder.glob("[ea]*.py")} for folder in (check.STUBS, check.ANSWERS))
    assert stubs == answers == set(SOLVED) == chapters
    for chapter in chapters:
        numbers = [number for number, exercise in EXERCISES.items() if exercise.chapter == chapter[:2]]
        assert 3 <= len(numbers) <= 5, chapter
        assert numbers == [f"{int(chapter[:2])}.{i}" for i in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_says_what_is_wanted(number: str) -> None:
    exercise = EXERCISES[number]
    function = check.function_of(exercise, check.stub(exercise))
    assert (function.__doc__ or "").startswith(f"Exercise {number}. ")
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())
    cases = list(exercise.cases())
    assert cases
    for case in cases:
        signature.bind(**case.arguments)
        assert case.expected


@pytest.mark.parametrize("number", EXERCISES)
def test_nobody_has_written_it(number: str) -> None:
    exercise = EXERCISES[number]
    assert check.judge(exercise, check.function_of(exercise, check.stub(exercise))) == check.UNWRITTEN


@pytest.mark.parametrize("number", EXERCISES)
def test_it_has_right_and_wrong_solutions(number: str) -> None:
    assert any(number == solved for solved, _ in RIGHT)
    assert any(number == solved for solved, _, _ in WRONG)


@pytest.mark.parametrize(("number", "function"), RIGHT, ids=name)
def test_a_right_solution_passes(number: str, function: Callable[..., Any]) -> None:
    assert check.judge(EXERCISES[number], function) == check.RIGHT


@pytest.mark.parametrize(("number", "function", "where"), WRONG, ids=name)
def test_a_wrong_solution_is_told_where(number: str, function: Callable[..., Any], where: str) -> None:
    said = check.judge(EXERCISES[number], function)
    assert re.match(rf"case \d+: `{re.escape(where)}` ", said), said


# -- the checking itself ---------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    key: torch.Tensor
    value: torch.Tensor


def exercise(**expected: Any) -> check.Exercise:
    return check.Exercise("9.9", "f", lambda: [check.Case({"x": torch.arange(3.0)}, expected)])


@pytest.mark.parametrize(
    ("expected", "returned"),
    [
        ({"result": torch.arange(3.0)}, torch.arange(3)),  # whatever dtype
        ({"result": torch.arange(3.0)}, torch.arange(3.0) + 1e-13),
        ({"result": torch.tensor([1.0, float("-inf")])}, torch.tensor([1.0, float("-inf")])),
        ({"result": 4}, torch.tensor(4)),
        ({"result": [1, 2]}, (1, 2)),
        ({"result": 0.5}, 0.5 + 1e-14),
        ({"result": {"a": 1}}, {"a": 1}),
        ({"key": torch.zeros(2), "value": torch.ones(2)}, Pair(torch.zeros(2), torch.ones(2))),
        ({"key": torch.zeros(2), "value": torch.ones(2)}, {"value": torch.ones(2), "key": torch.zeros(2)}),
        ({"result": [torch.zeros(2), torch.ones(1)]}, [torch.zeros(2), torch.ones(1)]),
    ],
)
def test_what_is_right(expected: dict[str, Any], returned: Any) -> None:
    assert check.judge(exercise(**expected), lambda x: returned) == check.RIGHT


@pytest.mark.parametrize(
    ("expected", "returned", "message"),
    [
        ({"result": torch.zeros(2, 3)}, torch.zeros(3, 2), r"`result` has the shape \[3, 2\], and must have \[2, 3\]"),
        ({"result": torch.zeros(2)}, torch.tensor([0, 1e-11]), r"`result` \[2\]: 1 of 2 differ, first at \[1\]: "),
        ({"result": torch.arange(9)}, torch.arange(9).double() + 1e-9, r"9 of 9 differ, first at \[0\]: 1e-09,"),
        ({"result": torch.ones(2)}, torch.tensor([1.0, float("nan")]), r"1 of 2 differ, first at \[1\]: nan"),
        ({"result": torch.tensor([float("-inf")])}, torch.tensor([-1e4]), "-10000, and must be -inf"),
        ({"result": torch.ones(1)}, 1.0, r"`result` must be a tensor \[1\], and is a float"),
        ({"result": 4}, 5, "`result` is 5, and must be 4"),
        ({"result": 0.5}, float("nan"), "`result` is nan, and must be 0.5"),
        ({"result": "rotary"}, None, "`result` is None, and must be 'rotary'"),
        ({"result": [1, 2]}, [1], r"`result` is \[1\], and must be \[1, 2\]"),
        ({"result": [torch.ones(1)]}, torch.ones(1), r"`result` must be 1 tensors, and is a tensor \[1\]"),
        ({"result": [torch.ones(1)] * 2}, [torch.ones(1), torch.zeros(1)], r"`result` \[1\] \[1\]: it differs"),
        ({"key": torch.zeros(2), "value": torch.ones(2)}, Pair(torch.zeros(2), torch.zeros(2)), "`value` "),
        ({"key": torch.zeros(2), "value": torch.ones(2)}, (torch.zeros(2),), "`value` is missing: 2 values are wanted"),
        ({"key": 1, "value": 2}, {"key": 1, "value": 2, "more": 3}, "`more` is not asked for"),
    ],
)  # fmt: skip
def test_what_is_wrong(expected: dict[str, Any], returned: Any, message: str) -> None:
    said = check.judge(exercise(**expected), lambda x: returned)
    assert said.startswith("case 1: ")
    assert re.search(message, said), said


def test_an_error_is_told_with_its_line() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return x[7]

    assert re.match(r"case 1: IndexError: .*\(test_exercises.py, line \d+\)", check.judge(exercise(result=1), broken))


def test_a_case_is_not_spoilt_by_who_writes_into_it() -> None:
    given = torch.arange(3.0)
    spoilt = check.Exercise("9.9", "f", lambda: [check.Case({"x": given}, {"result": given + 1})] * 2)
    assert check.judge(spoilt, lambda x: x.add_(1)) == check.RIGHT


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(number)} .*{check.UNWRITTEN}", printed, re.M) for number in EXERCISES)
    assert printed.splitlines()[-1] == f"0 of {len(EXERCISES)} right"

    assert check.main(["0.2"]) == 1
    assert capsys.readouterr().out.startswith("0.2  changed  not written yet  docs/exercises/e00_family.py")
    assert check.main(["0.2", "--file", str(SOLUTIONS / "s00_family.py")]) == 0
    assert "right" in capsys.readouterr().out
    assert check.main(["0", "--file", str(SOLUTIONS / "s00_family.py")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4

    mine = tmp_path / "mine.py"
    mine.write_text("def changed(before, after):\n    return ['rotary']\n")
    assert check.main(["0.2", "--file", str(mine)]) == 1
    assert "case 1: `result` is ['rotary'], and must be ['vocabulary', " in capsys.readouterr().out

    assert check.main(["99.1"]) == 2
    assert capsys.readouterr().err == "docs.check: there is no exercise 99.1; `python -m docs.check` lists them all\n"
    assert check.main(["0.1", "--file", str(mine)]) == 2
    assert "no function `cache_of_a_token`" in capsys.readouterr().err
    assert check.main(["0.1", "--file", str(tmp_path / "none.py")]) == 2
    assert "no such Python file" in capsys.readouterr().err
