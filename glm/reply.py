"""Reading an answer while it is written: thoughts, what is said, and calls of tools, told apart as soon as they can be.

    reader = tokenizer.reader(prompt)
    for piece in pieces:
        for part in reader.put(piece): ...        # Said("content", "It is"), Said("reasoning", "…"), Called(…)
    for part in reader.end(): ...
    reader.message                                 # what has come so far, as the assistant's message

What comes out does not depend on how the text was cut into pieces: a piece that ends in what may be the beginning of a
mark, or in white space that may be the end of a part, is held back until that is decided.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["reasoning", "content"]


@dataclass(frozen=True)
class Said:
    """More of the thoughts ("reasoning") or of what is said ("content")."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Called:
    """A complete call of a tool."""

    name: str
    arguments: Mapping[str, Any]


Part = Said | Called


@dataclass(frozen=True)
class Marks:
    """The marks around thoughts and around calls, and what a call between its marks means (None: it is no call)."""

    thought: tuple[str, str]
    call: tuple[str, str]
    called: Callable[[str], Called | None]


@dataclass
class Reader:
    """Reads one answer. `thinking` says that it begins within a thought, its first mark being in the prompt."""

    marks: Marks
    thinking: bool = False
    texts: dict[Kind, str] = field(default_factory=lambda: {"reasoning": "", "content": ""})
    calls: list[Called] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Where the reading stands: in a thought, in a call, or in what is said."""
        self.place: str = "reasoning" if self.thinking else "content"
        self.rest = ""  # not decided yet
        self.space: dict[Kind, str] = {"reasoning": "", "content": ""}  # white space that may be the last of its part

    def put(self, piece: str) -> list[Part]:
        """The parts that are certain once `piece` has come."""
        self.rest += piece
        parts: list[Part] = []
        while True:
            marks = self.expected()
            found = [(at, mark) for mark in marks if (at := self.rest.find(mark)) >= 0]
            if not found:
                break
            at, mark = min(found)
            before, self.rest = self.rest[:at], self.rest[at + len(mark) :]
            parts += self.passed(before, mark)
        if self.place != "call":
            certain = len(self.rest) - self.beginning(marks)
            parts += self.said(self.rest[:certain])
            self.rest = self.rest[certain:]
        return joined(parts)

    def end(self) -> list[Part]:
        """The parts that are certain once nothing more comes; of a call that was not completed, its text."""
        rest = self.marks.call[0] + self.rest if self.place == "call" else self.rest
        self.place, self.rest = self.place.replace("call", "content"), ""
        return self.said(rest)

    @property
    def message(self) -> dict[str, Any]:
        """What has come so far, as the assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.texts["content"]}
        if self.texts["reasoning"]:
            message["reasoning_content"] = self.texts["reasoning"]
        if self.calls:
            functions = ({"name": call.name, "arguments": dict(call.arguments)} for call in self.calls)
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message

    def expected(self) -> tuple[str, ...]:
        """The marks that mean something where the reading stands."""
        if self.place == "call":
            return self.marks.call[1:]
        return self.marks.thought[1:] if self.place == "reasoning" else (*self.marks.thought, self.marks.call[0])

    def beginning(self, marks: tuple[str, ...]) -> int:
        """How many of the last characters may be the beginning of a mark."""
        longest = min(max(map(len, marks)) - 1, len(self.rest))
        return next((n for n in range(longest, 0, -1) if any(m.startswith(self.rest[-n:]) for m in marks)), 0)

    def passed(self, before: str, mark: str) -> list[Part]:
        """The parts that end with a mark, and where the reading stands behind it."""
        if self.place == "call":
            self.place = "content"
            called = self.marks.called(before)
            if called is None:
                return self.said(self.marks.call[0] + before + mark)
            self.calls.append(called)
            return [called]
        parts = self.said(before)
        self.place = {self.marks.thought[0]: "reasoning", self.marks.call[0]: "call"}.get(mark, "content")
        return parts

    def said(self, text: str) -> list[Part]:
        """`text` as part of a thought or of what is said, without white space at either end of the whole."""
        kind: Kind = "reasoning" if self.place == "reasoning" else "content"
        text = self.space[kind] + text if self.texts[kind] else text.lstrip()
        said = text.rstrip()
        self.space[kind] = text[len(said) :] if said or self.texts[kind] else ""
        self.texts[kind] += said
        return [Said(kind, said)] if said else []


def joined(parts: Iterable[Part]) -> list[Part]:
    """The parts, neighbours of one kind as one."""
    together: list[Part] = []
    for part in parts:
        last = together[-1] if together else None
        if isinstance(part, Said) and isinstance(last, Said) and part.kind == last.kind:
            together[-1] = Said(part.kind, last.text + part.text)
        else:
            together.append(part)
    return together


def value_of(text: str, kind: str | None = None) -> Any:
    """An argument as a call spells it: a text where `kind` says "string", otherwise JSON where it is that."""
    if kind == "string":
        return text
    try:
        return json.loads(text, parse_constant=lambda name: text)
    except (ValueError, RecursionError):
        return text


def kinds_of(tools: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """The JSON type of every argument of every tool that says one, by the names of both."""
    kinds = {}
    for tool in tools:
        function = tool.get("function", tool)
        properties = (function.get("parameters") or {}).get("properties") or {}
        for name, schema in properties.items():
            if isinstance(schema, Mapping) and isinstance(schema.get("type"), str):
                kinds[str(function.get("name")), str(name)] = schema["type"]
    return kinds


def pairs(text: str, key: str, value: str) -> list[tuple[str, str]]:
    """What stands between `<key>` … `</key>` and the `<value>` … `</value>` behind it, for all such pairs."""
    pattern = rf"<{key}>(.*?)</{key}>\s*<{value}>(.*?)</{value}>"
    return [(str(k), str(v)) for k, v in re.findall(pattern, text, re.DOTALL)]
