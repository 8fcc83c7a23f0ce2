"""Nothing in `glm/` can run what a checkpoint says; only the child process of `glm convert` opens `.bin` files.

The words are looked for in the whole text, comments included, so that one grep shows the same.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "glm"
FILES = sorted(PACKAGE.rglob("*.py"))
CHILD = PACKAGE / "convert_child.py"
WORDS = re.compile(
    r"\b(eval|exec|c?pickle|unpickler|torch\.load|trust_remote_code|__import__)\b|(?<!\.)\bcompile\(", re.I
)
MODULES = {
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "code", "ctypes", "cffi",
    "transformers",
}  # fmt: skip


def imported(text: str) -> Iterator[str]:
    """The top-level modules that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def faults(path: Path, text: str) -> list[str]:
    """What stands in a file of the package and should not."""
    found = [] if path == CHILD else [match[0] for match in WORDS.finditer(text)]
    return found + [module for module in imported(text) if module in MODULES]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_no_file_can_run_what_it_reads(path: Path) -> None:
    assert faults(path, path.read_text(encoding="utf-8")) == []


def test_the_child_loads_tensors_only() -> None:
    """Every call of the loader there says weights_only=True in so many words."""
    calls = [
        node
        for node in ast.walk(ast.parse(CHILD.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    assert {ast.unparse(k.value) for call in calls for k in call.keywords if k.arg == "weights_only"} == {"True"}


def test_nothing_else_imports_the_child() -> None:
    importers = [
        p.name for p in FILES if re.search(r"import.*convert_child|convert_child import", p.read_text("utf-8"))
    ]
    assert importers == []


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "# never exec this",
        "import pickle",
        "from pickle import loads",
        "def f():\n    import transformers.models",
        "torch.load(path)",
        "AutoModel(trust_remote_code=False)",
        "compile('1', '', 'exec')",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert faults(PACKAGE / "somewhere.py", text)


@pytest.mark.parametrize(
    "text", ["evaluate = executor", "re.compile('a')", "torch.compile(model)", "import json, code_"]
)
def test_the_search_finds_nothing_else(text: str) -> None:
    assert not faults(PACKAGE / "somewhere.py", text)
