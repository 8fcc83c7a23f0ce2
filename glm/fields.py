"""JSON written by strangers: read strictly, then field by field, every value within bounds.

A `config.json`, an index of shards and a safetensors header decide how much memory is asked for and which
files are opened, so none of them is believed. `read_object` bounds what parsing may cost (bytes, values,
nesting) and refuses what JSON readers disagree about: keys given twice, NaN and Infinity, numbers too big.
`Fields` then hands out one value at a time, of one type, within bounds, or raises a ConfigError that names
file and field.

    f = Fields(read_object(folder / "config.json"), "config.json")
    f.integer("num_layers", 1, 1000)
    f.number("layernorm_epsilon", 0, 1, default=1e-5)
"""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from glm.errors import CheckpointError, ConfigError

JSON_BYTES = 16 << 20  # the largest published index (GLM-4.5, 45 000 tensors) has 5 MB
JSON_VALUES = 1_000_000  # an empty list is two bytes on disk and 64 in memory
DIGITS = 40

T = TypeVar("T")

BRIEF: Final = reprlib.Repr()
BRIEF.maxstring = BRIEF.maxother = 100


def shown(value: object) -> str:
    """`value` as it may stand in an error message: quoted, on one line, printable and short."""
    return BRIEF.repr(value)


def read_object(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`, at most `limit` bytes long; anything else is a CheckpointError."""
    try:
        if not path.is_file():  # a missing file, a folder, a pipe that would never end
            raise CheckpointError(f"{path}: there is no such file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return parse_object(data, str(path), limit)


def parse_object(data: bytes, source: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object that `data` spells in UTF-8; anything else is a CheckpointError that names `source`."""

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"{source}: {why}")

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
            refuse(f"the key {shown(name)} stands there twice")
        return found

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= DIGITS else refuse(f"the number {shown(digits)} is too big")

    def real(digits: str) -> float:
        return x if math.isfinite(x := float(digits)) else refuse(f"the number {shown(digits)} overflows")

    if len(data) > limit:
        refuse(f"more than {limit} bytes of JSON, which is more than ever needed")
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > JSON_VALUES:
        refuse(f"{values} values of JSON, more than the {JSON_VALUES} ever needed")
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=distinct,
            parse_int=whole,
            parse_float=real,
            parse_constant=lambda name: refuse(f"{name} is not a number of JSON"),
        )
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 text (byte {error.start})")
    except json.JSONDecodeError as error:
        refuse(f"not JSON: {error}")
    except RecursionError:
        refuse("JSON nested too deeply")
    return found if isinstance(found, dict) else refuse(f"a JSON object is wanted, not {shown(found)}")


class Required:
    """The default of a field that has none."""


REQUIRED: Final = Required()


class Fields:
    """The fields of one JSON object. An absent or null one takes its default; without one it is an error."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, low: int, high: int, default: int | Required = REQUIRED) -> int:
        """A whole number, low <= x <= high."""
        value = self._take(name, default)
        if type(value) is not int:
            self.refuse(name, "a whole number", value)
        return value if low <= value <= high else self.refuse(name, f"between {low} and {high}", value)

    def number(self, name: str, low: float, high: float, default: float | Required = REQUIRED) -> float:
        """A real number, low <= x <= high."""
        value = self._take(name, default)
        if type(value) not in (int, float):
            self.refuse(name, "a number", value)
        return float(value) if low <= value <= high else self.refuse(name, f"between {low} and {high}", value)

    def flag(self, name: str, default: bool | Required = REQUIRED) -> bool:
        """True or false."""
        value = self._take(name, default)
        return value if type(value) is bool else self.refuse(name, "true or false", value)

    def text(self, name: str, default: str | Required = REQUIRED) -> str:
        """A string."""
        value = self._take(name, default)
        return value if type(value) is str else self.refuse(name, "a string", value)

    def choice(self, name: str, options: Iterable[T], default: T | Required = REQUIRED) -> T:
        """One of `options`; with a single option, the only value this package can compute."""
        value = self._take(name, default)
        for option in options:
            if type(value) is type(option) and value == option:
                return option
        return self.refuse(name, "one of " + ", ".join(map(shown, options)), value)

    def ids(self, name: str, default: tuple[int, ...] | Required = ()) -> tuple[int, ...]:
        """Token ids: the field holds one, a list of them, or null for none."""
        value = self._take(name, default)
        many = list(value) if isinstance(value, (list, tuple)) else [value]
        if any(type(one) is not int or not 0 <= one < 1 << 31 for one in many):
            self.refuse(name, "a token id or a list of them", value)
        return tuple(many)

    def section(self, name: str) -> "Fields | None":
        """The fields of a nested object; None where it is absent or null."""
        value = self._take(name, None)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "an object", value)
        return None if value is None else Fields(value, f"{self.source}: {name}")

    def unread(self) -> list[str]:
        """Fields that are set and were never asked for."""
        return [name for name, value in self.values.items() if value is not None and name not in self.read]

    def refuse(self, name: str, wanted: str, value: object) -> NoReturn:
        """Raise the ConfigError for a field that is not as `wanted`."""
        raise ConfigError(f"{self.source}: the field {shown(name)} should be {wanted}, not {shown(value)}")

    def _take(self, name: str, default: object) -> Any:
        self.read.add(name)
        value = self.values.get(name)
        if value is None and isinstance(default, Required):
            raise ConfigError(f"{self.source}: the field {shown(name)} is missing")
        return default if value is None else value
