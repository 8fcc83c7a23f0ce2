"""Docstrings as reStructuredText: prose stays prose, and whatever is laid out by spaces stays as it is laid out.

Docstrings here are plain text. Paragraphs in which columns are aligned, and those that are indented, are equations,
tables or code: they become literal blocks. Of all else only the characters that reStructuredText would take for markup
are escaped, and names in `backticks` are set as code. Sections as "Args:" are left to napoleon.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
ITEM = re.compile(r"(-|\d+\.) ")
ALIGNED = re.compile(r"\S {2,}\S")


def restructured(lines: list[str]) -> list[str]:
    """A docstring's lines, dedented, as reStructuredText."""
    done: list[str] = []
    for paragraph in paragraphs(lines):
        if done and done[-1]:
            done.append("")
        head = paragraph[0]
        if SECTION.match(head):
            done += [head, *map(escaped, paragraph[1:])]
        elif ITEM.match(head):
            done += map(escaped, paragraph)
        elif laid_out(paragraph):
            done += ["::", "", *(f"    {line}".rstrip() for line in textwrap.dedent("\n".join(paragraph)).splitlines())]
        else:
            done += map(escaped, paragraph)
    return [*done, ""]


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without an empty one between; indented runs that follow each other, or a section, are one."""
    runs: list[list[str]] = []
    for line in lines:
        if not line.strip():
            runs.append([])
        elif runs:
            runs[-1].append(line)
        else:
            runs.append([line])
    joined: list[list[str]] = []
    for run in filter(None, runs):
        follows = (
            joined and run[0].startswith("    ") and (joined[-1][0].startswith("    ") or SECTION.match(joined[-1][0]))
        )
        if follows:
            joined[-1] += ["", *run]
        else:
            joined.append(run)
    yield from joined


def laid_out(paragraph: list[str]) -> bool:
    """Whether spaces mean something in a paragraph: its lines are indented, or have columns."""
    return any(line.startswith(" ") or ALIGNED.search(line) for line in paragraph)


def escaped(line: str) -> str:
    """A line of prose without accidental markup; names in `backticks` as code."""
    line = re.sub(r"^(\s*)\((?=\w+\))", r"\1\\(", line)  # no list begins with "(2)"
    parts = re.split(r"(`+[^`]+`+)", line)
    return "".join(
        f"``{part.strip('`')}``" if part.startswith("`") else re.sub(r"(\\(?!\()|[*|`]|_(?!\w))", r"\\\1", part)
        for part in parts
    )


def fields(owner: type) -> list[str]:
    """The fields of a dataclass or named tuple with the comments behind them, as a list; nothing for other classes."""
    if not (hasattr(owner, "__dataclass_fields__") or hasattr(owner, "_fields")):
        return []
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except (OSError, TypeError):
        return []
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    done = []
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            text = comments.get(node.end_lineno or 0, "")
            name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
            done.append(f"- ``{name}: {kind}``" + (f" – {escaped(text)}" if text else ""))
    return done


OF_NAMED_TUPLES = re.compile(r"Create new instance of |Alias for field number ")  # docstrings that Python makes up


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What Sphinx calls for every docstring, before napoleon; those of a class and of its `__init__` come in turn."""
    if lines and OF_NAMED_TUPLES.match(lines[0]):
        lines[:] = [""]
        return
    its_own = what == "class" and (obj.__doc__ or "").strip().startswith((lines or [""])[0].strip() or "\0")
    lines[:] = [*restructured(lines), *([*fields(obj), ""] if its_own else [])]


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which `fields` lists."""
    return True if OF_NAMED_TUPLES.match(getattr(obj, "__doc__", None) or "") else None
