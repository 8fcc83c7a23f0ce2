"""The reference has every module once and every public name, each documented with shapes, errors and source."""

import ast
import importlib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import glm_kernels
import pytest
import torch

import glm
from docs.docstrings import fields, restructured

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
ENTRY = re.compile(r"^\.\. automodule:: (\S+)\n((?:   :.*\n)*)", re.M)
LISTED = [
    (name, re.search(r"^   :members:(.*)$", options, re.M))
    for page in PAGES
    for name, options in ENTRY.findall(page.read_text(encoding="utf-8"))
]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "glm").rglob("*.py")
)
NO_REFERENCE = {
    "glm": "its names are documented where they are defined",
    "glm.__main__": "calls the command line",
    "glm.cli": "documented by --help",
    "glm.convert_child": "a program of its own, run by glm.convert",
}
PUBLIC = [(package, name) for package in (glm, glm_kernels) for name in package.__all__]


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, and every method with a public name of a public class."""
    for package, name in PUBLIC:
        thing = getattr(package, name)
        if inspect.isfunction(thing):
            yield name, thing
            continue
        for inner, method in vars(thing).items():
            method = getattr(method, "__func__", getattr(method, "fget", method))
            if inspect.isfunction(method) and not inner.startswith("_"):
                yield f"{name}.{inner}", method


CALLABLES = dict(callables())


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of the errors that a function raises by itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def test_every_module_is_in_the_reference_once() -> None:
    names = [name for name, _ in LISTED if name.split(".")[0] == "glm"]
    assert sorted(names) == [name for name in MODULES if name not in NO_REFERENCE]
    assert max(Counter(name for name, _ in LISTED).values()) == 1
    assert set(NO_REFERENCE) <= set(MODULES)


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    contents = re.search(r"```\{toctree\}(.*?)```", index, re.S)
    assert contents is not None
    assert {page.stem for page in PAGES} - {"index"} == set(re.findall(r"^(\w+)$", contents[1], re.M))


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_every_public_name_is_in_the_reference(package: ModuleType, name: str) -> None:
    thing = getattr(package, name)
    members = dict(LISTED)[thing.__module__]
    assert members is not None, f"{thing.__module__} is listed without :members:"
    assert not members[1].strip() or name in re.split(r",\s*", members[1].strip())
    assert len((thing.__doc__ or "").strip()) > 10


@pytest.mark.parametrize(
    ("name", "function"), list(callables()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_docstrings_have_shapes_and_errors(name: str, function: Callable[..., Any]) -> None:
    text = function.__doc__ or ""
    assert text, "no docstring"
    if elsewhere := re.match(r"See `(\w+)`", text):
        text += getattr(getattr(importlib.import_module(function.__module__), elsewhere[1]), function.__name__).__doc__
    if "Tensor" in str(inspect.signature(function)):
        assert re.search(r"\[[^\]]+\]", text), "tensors without a shape"
    assert [error for error in raised(function) if error not in text] == []


@pytest.mark.parametrize("name", [name for name, _ in LISTED])
def test_every_module_says_what_it_is(name: str) -> None:
    assert len((importlib.import_module(name).__doc__ or "").strip()) > 20


def test_modules_of_ideas_name_their_source() -> None:
    """What was published by somebody has its paper beside the equation."""
    ours = {"linear", "layout"}  # how a product is computed; the mask of the paper that infilling.py names
    for name in ("attention", "latent_attention", "sparse_attention", "feed_forward", "experts", "norms", "residual",
                 "positions", "prefix", "drafting", "infilling", "gptq", "linear", "layout"):  # fmt: skip
        text = inspect.getsource(importlib.import_module(f"glm.{name}"))
        assert name in ours or re.search(r"arXiv:\d{4}\.\d{5}", text), name


# -- docstrings as reStructuredText ----------------------------------------------------------------------------------


def documented() -> Iterator[tuple[str, str]]:
    """Every docstring of the modules in the reference."""
    for name, _ in LISTED:
        tree = ast.parse(inspect.getsource(importlib.import_module(name)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{name}.{getattr(node, 'name', '')}", text


def test_docstrings_are_valid_and_lose_nothing() -> None:
    core = pytest.importorskip("docutils.core")
    count = 0
    for name, text in documented():
        if re.search(r"^(Args|Returns|Raises|Yields):$", text, re.M):
            continue  # napoleon turns those into fields; the build holds them to be valid
        source = "\n".join(restructured(text.splitlines()))
        settings = {"report_level": 1, "halt_level": 5, "warning_stream": False}
        document = core.publish_doctree(source, settings_overrides=settings)
        messages = [node.astext() for node in document.findall(lambda node: node.tagname == "system_message")]
        assert not messages, (name, messages, source)
        assert re.sub(r"\W", "", document.astext()) == re.sub(r"\W", "", text), name
        count += 1
    assert count > 500


def test_what_is_laid_out_stays_so() -> None:
    text = [
        "An equation:",
        "",
        "    y = a * b",
        "",
        "    z = c",
        "",
        "bf16   two bytes",
        "int4   half of one",
        "",
        "End of `it` *.",
    ]
    assert restructured(text) == [
        "An equation:", "", "::", "", "    y = a * b", "", "    z = c", "",
        "::", "", "    bf16   two bytes", "    int4   half of one", "", r"End of ``it`` \*.", "",
    ]  # fmt: skip


def test_lists_and_sections_stay_what_they_are() -> None:
    text = ["- one_", "- two", "", "Args:", "    x: [B, T] *", "", "    y: more", "", "Raises:", "    E: never"]
    assert restructured(text) == [
        r"- one\_", "- two", "", "Args:", r"    x: [B, T] \*", "", "    y: more", "", "Raises:", "    E: never", "",
    ]  # fmt: skip


class Point(NamedTuple):
    """Two numbers."""

    x: int  # across
    y: torch.Tensor


def test_fields_are_listed_with_their_comments() -> None:
    assert fields(Point) == ["- ``x: int`` – across", "- ``y: torch.Tensor``"]
    assert fields(int) == []
