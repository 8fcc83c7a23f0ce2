"""JSON from strangers: what is refused, and that the message says where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.errors import CheckpointError, ConfigError
from glm.fields import Fields, parse_object, read_object, shown

REFUSED = {
    "empty": b"",
    "a list": b"[1]",
    "a key twice": b'{"a": 1, "a": 1}',
    "a key twice, deeper": b'{"a": [{"b": 1, "b": 2}]}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a float that overflows": b'{"a": 1e999}',
    "an endless integer": b'{"a": ' + b"9" * 5000 + b"}",
    "nested lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a comma too many": b'{"a": 1,}',
    "a comment": b'{"a": 1} // one',
    "two objects": b"{}{}",
    "too many values": b'{"a": [' + b"[]," * 600_000 + b"1]}",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_json_that_readers_disagree_about_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^here: "):
        parse_object(data, "here")


def test_a_file_is_never_read_beyond_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    assert read_object(path, 200)["a"] == "x" * 100
    with pytest.raises(CheckpointError, match=r"config\.json: more than 100 bytes of JSON"):
        read_object(path, 100)
    with path.open("wb") as file:
        file.truncate(100 << 20)  # a hundred megabytes of nothing
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_object(path)
    for odd in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="no such file"):
            read_object(odd)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.text(), st.lists, max_leaves=20))
@settings(derandomize=True, max_examples=50)
def test_plain_json_is_read_as_json_reads_it(value: Any) -> None:
    assert parse_object(json.dumps({"a": value}).encode(), "here") == {"a": value}


def fields(**values: Any) -> Fields:
    return Fields(values, "config.json")


def test_values_within_their_bounds() -> None:
    f = fields(n=3, x=0.5, whole=2, yes=True, name="glm", one=7, many=[7, 8], none=None, deep={"n": 1})
    assert f.integer("n", 3, 3) == 3
    assert f.number("x", 0, 1) == 0.5
    assert f.number("whole", 0, 2) == 2.0
    assert type(f.number("whole", 0, 2)) is float
    assert f.flag("yes") is True
    assert f.text("name") == "glm"
    assert f.choice("name", ("gpt", "glm")) == "glm"
    assert f.ids("one") == (7,)
    assert f.ids("many") == (7, 8)
    assert f.ids("none") == ()
    deep = f.section("deep")
    assert deep is not None
    assert deep.integer("n", 0, 1) == 1
    assert f.section("none") is None
    assert "n" in f
    assert "none" not in f
    assert "absent" not in f


def test_defaults_stand_in_for_absent_and_null() -> None:
    f = fields(null=None)
    for name in ("null", "absent"):
        assert f.integer(name, 0, 9, default=9) == 9
        assert f.number(name, 0, 1, default=0.5) == 0.5
        assert f.flag(name, default=False) is False
        assert f.text(name, default="x") == "x"
        assert f.choice(name, ("a", "b"), default="b") == "b"
    with pytest.raises(ConfigError, match=r"config\.json: the field 'absent' is missing"):
        f.integer("absent", 0, 1)


WRONG: list[tuple[Any, Callable[[Fields], Any]]] = [
    *((value, lambda f: f.integer("a", 1, 1000)) for value in (0, 1001, 10**9, -1, 2.0, "2", True, [2], {}, 10**30)),
    *((value, lambda f: f.number("a", 0, 1)) for value in (-0.1, 1.5, "0.5", True, [0.5], 10**39)),
    *((value, lambda f: f.flag("a")) for value in (0, 1, "true", [], 0.0)),
    *((value, lambda f: f.text("a")) for value in (0, True, ["x"], {})),
    *((value, lambda f: f.choice("a", (0, 4, 8))) for value in (3, True, 4.0, "4", False)),
    *((value, lambda f: f.ids("a")) for value in (-1, True, 1.0, "1", [1, True], [[1]], {}, 2**31)),
    *((value, lambda f: f.section("a")) for value in (0, True, "x", [])),
]


@pytest.mark.parametrize(("value", "ask"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_values_of_another_type_or_out_of_bounds(value: Any, ask: Callable[[Fields], Any]) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: the field 'a' should be "):
        ask(fields(a=value))


def test_the_error_of_a_nested_field_says_where_it_is() -> None:
    section = fields(rope_scaling={"factor": "x"}).section("rope_scaling")
    assert section is not None
    with pytest.raises(ConfigError, match=r"config\.json: rope_scaling: the field 'factor'"):
        section.number("factor", 1, 100)


def test_fields_nobody_asked_for_can_be_listed() -> None:
    f = fields(a=1, b=2, null=None)
    f.integer("a", 0, 1)
    assert f.unread() == ["b"]


@pytest.mark.parametrize("value", ["x" * 10**6, "a\nb\x1b[31m\ud800", [[]] * 10**5, {"a": "b" * 10**5}, 10**39])
def test_what_a_message_shows_is_short_and_on_one_line(value: Any) -> None:
    text = shown(value)
    assert len(text) < 400
    assert text.isprintable()
    text.encode()


def test_nesting_just_within_the_parser_can_still_be_shown() -> None:
    values = parse_object(b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "here")
    with pytest.raises(ConfigError, match="should be a string"):
        Fields(values, "here").text("a")
