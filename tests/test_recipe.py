"""Every bad recipe is one ConfigError that names the field."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm.errors import ConfigError
from glm.recipe import Objective, Recipe

RECIPE: dict[str, dict[str, Any]] = {
    "": {"name": "toy", "out": "done", "seed": 5},
    "tokenizer": {"vocabulary": 400},
    "model": {"layers": 2, "width": 32, "inner": 64, "heads": 2, "context": 128},
    "training": {
        "steps": 6,
        "tokens": 256,
        "learning_rate": 3e-3,
        "warm_up": 2,
        "beta1": 0.9,
        "beta2": 0.98,
        "weight_decay": 0.01,
        "clip": 1.0,
        "checkpoint_every": 2,
        "threads": 1,
        "exam": 20,
    },
    "objective": {"kind": "chat", "text": "glossary.md", "share": 1, "history": 0.5},
}


def toml(**changes: Any) -> str:
    """The recipe above; `training__steps=3` changes a field, `None` takes it out."""
    tables = {name: dict(fields) for name, fields in RECIPE.items()}
    for change, value in changes.items():
        table, _, field = change.rpartition("__")
        tables[table][field] = value
    lines = []
    for name, fields in tables.items():
        lines += [f"[[{name}]]" if name == "objective" else f"[{name}]"] if name else []
        lines += [
            f"{field} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
            for field, value in fields.items()
            if value is not None
        ]
    return "\n".join(lines)


def read(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return Recipe.read(path)


def test_a_recipe_is_what_it_says(tmp_path: Path) -> None:
    recipe = read(tmp_path, toml())
    assert (recipe.folder, recipe.name, recipe.vocabulary, recipe.width, recipe.steps) == (tmp_path, "toy", 400, 32, 6)
    assert (recipe.learning_rate, recipe.precision, recipe.exam) == (3e-3, "float32", 20)
    assert recipe.objectives == (Objective("chat", "glossary.md", 1.0, 0.5, 0.0, 0.0),)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("name", None),
        ("name", 3),
        ("seed", -1),
        ("tokenizer__vocabulary", 200),
        ("tokenizer__vocabulary", 400.5),
        ("model__layers", 0),
        ("model__width", True),
        ("model__heads", None),
        ("training__steps", 0),
        ("training__steps", "6"),
        ("training__learning_rate", -0.1),
        ("training__learning_rate", float("nan")),
        ("training__beta2", 1.0),
        ("training__precision", "float16"),
        ("training__checkpoint_every", 0),
        ("training__momentum", 0.9),
        ("objective__kind", "chats"),
        ("objective__text", None),
        ("objective__share", 0),
        ("objective__history", 1.5),
        ("objective__color", "red"),
        ("colour", "red"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, change: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=change.rpartition("__")[2]) as caught:
        read(tmp_path, toml(**{change: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "not TOML"),
        (toml().replace("[model]", "[models]"), r"\[model\] is missing"),
        (toml().replace("[model]", "[[model]]"), "model"),
        (toml().replace("[[objective]]", "[objective]"), "objective"),
        (toml().partition("[[objective]]")[0], "objective"),
        (toml() + "\n[extra]\nx = 1", "extra"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        Recipe.read(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        Recipe.read(tmp_path / "binary.toml")
    recipe = read(tmp_path, toml())
    with pytest.raises(ConfigError, match=r"glossary\.md"):
        recipe.text(recipe.objectives[0])


def test_the_fingerprint_is_of_all_that_matters(tmp_path: Path) -> None:
    (tmp_path / "glossary.md").write_text("Q: a\nA: b\n")
    recipe = read(tmp_path, toml())
    assert replace(recipe, out="elsewhere").fingerprint() == recipe.fingerprint()
    assert replace(recipe, learning_rate=4e-3).fingerprint() != recipe.fingerprint()
    before = recipe.fingerprint()
    (tmp_path / "glossary.md").write_text("Q: a\nA: c\n")
    assert recipe.fingerprint() != before
