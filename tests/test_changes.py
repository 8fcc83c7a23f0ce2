"""What `glm diff` says: exactly the fields that differ, each once, whatever the number of blocks."""

import dataclasses
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden_folders import HERE
from rich.console import Console

import glm
from glm.changes import ABSENT, Change, Like, changes, diff
from glm.errors import CheckpointError, ConfigError
from glm.family import release
from glm.norms import LayerNorm
from glm.residual import Sandwich
from glm.spec import Spec, leaves

PAIRS = [
    ("chatglm-6b", "chatglm2-6b"), ("chatglm2-6b", "chatglm2-6b-32k"), ("chatglm3-6b", "glm-4-9b"),
    ("glm-4-9b", "glm-4-9b-hf"), ("glm-4-32b-0414", "glm-4.5-air"), ("glm-4.5-air", "glm-4.5"),
    ("glm-4.5", "glm-4.7-flash"), ("glm-4.7-flash", "glm-5"),
]  # fmt: skip


def lines(before: Spec, after: Spec) -> list[str]:
    return [str(change) for change in changes(before, after)]


LITTLE = {
    ("chatglm2-6b", "chatglm2-6b-32k"): "rotary.scaling: Plain() → Interpolation(factor=16.0)",
    ("chatglm3-6b", "chatglm3-6b-128k"): "context: 8192 → 131072\nrotary.base: 10000.0 → 5000000.0",
    ("chatglm2-6b", "chatglm2-6b-int4"): "weights: Dense() → RowScaled(bits=4)",
}


@pytest.mark.parametrize("pair", LITTLE, ids="-".join)
def test_releases_that_differ_in_little(pair: tuple[str, str]) -> None:
    assert str(diff(*pair)) == LITTLE[pair]


def patched(spec: Spec, found: list[Change]) -> dict[str, Any]:
    """The leaves of `spec` after the changes were applied to it."""
    blocks = list(spec.blocks)
    top: dict[str, Any] = {}
    for change in found:
        if change.field == "len(blocks)":
            assert change.before == len(spec.blocks)
            blocks = (blocks + [None] * change.after)[: change.after]
        elif change.field.startswith("blocks["):
            where, _, path = change.field.removeprefix("blocks[").partition("]")
            first, _, last = where.partition(":")
            for i in range(int(first), int(last or int(first) + 1)):
                if change.after is ABSENT:
                    assert i >= len(blocks)
                elif isinstance(change.after, Like):
                    blocks[i] = blocks[change.after.block]
                else:
                    blocks[i] = put(blocks[i], path.removeprefix("."), change.before, change.after)
        else:
            top[change.field] = change
    changed = replace(spec, blocks=tuple(blocks))
    for field, change in top.items():
        changed = put(changed, field, change.before, change.after)
    return dict(leaves(changed))


def put(value: Any, path: str, before: Any, after: Any) -> Any:
    """`value` with `after` at a dotted path, where it has `before`."""
    if not path:
        assert value == before or before is ABSENT
        return after
    name, _, rest = path.partition(".")
    return replace(value, **{name: put(getattr(value, name), rest, before, after)})


@pytest.mark.parametrize("pair", [*PAIRS, *(pair[::-1] for pair in PAIRS)], ids="-".join)
def test_the_changes_make_one_spec_of_the_other(pair: tuple[str, str]) -> None:
    a, b = (release(name).spec for name in pair)
    found = list(changes(a, b))
    assert patched(a, found) == dict(leaves(b))
    assert len({change.field for change in found}) == len(found)
    assert len(found) < 40, "neighbouring blocks are one line"


def test_every_field_is_seen() -> None:
    spec = release("chatglm3-6b").spec
    for field in dataclasses.fields(spec):
        if field.name != "blocks":
            (change,) = changes(spec, replace(spec, **{field.name: "another"}))
            assert (change.field, change.after) == (field.name, "another")
    for field in dataclasses.fields(spec.blocks[3]):
        other = (*spec.blocks[:3], replace(spec.blocks[3], **{field.name: "another"}), *spec.blocks[4:])
        (change,) = changes(spec, replace(spec, blocks=other))
        assert (change.field, change.after) == (f"blocks[3].{field.name}", "another")


def test_a_sublayer_of_another_kind_is_one_line() -> None:
    said = lines(release("glm-4-32b-0414").spec, release("glm-4.5-air").spec)
    (experts,) = [line for line in said if "Experts(" in line]
    assert experts.startswith("blocks[1:46].feed_forward: FeedForward(inner=23040")
    assert " → Experts(expert=FeedForward(inner=1408" in experts
    assert "len(blocks): 61 → 46" in said
    assert "blocks[46:61]: 15 more like blocks[45] → none" in said


def test_blocks_of_one_side_alone() -> None:
    spec = release("glm-edge-1.5b-chat").spec
    block = spec.blocks[0]
    other = replace(block, wiring=Sandwich())
    short, long = replace(spec, blocks=(block,)), replace(spec, blocks=(block, block, other, other))
    found = list(changes(short, long))
    assert [(change.field, change.before, change.after) for change in found] == [
        ("len(blocks)", 1, 4),
        ("blocks[1]", ABSENT, Like(1, 0)),
        ("blocks[2:4]", ABSENT, other),
    ]
    assert str(found[1]) == "blocks[1]: none → 1 more like blocks[0]"


def test_the_same_change_in_blocks_apart_is_a_line_each() -> None:
    spec = release("glm-edge-1.5b-chat").spec
    norm = LayerNorm(1e-3)
    blocks = tuple(replace(block, norm=norm) if i in (0, 4, 5) else block for i, block in enumerate(spec.blocks))
    assert [change.field for change in changes(spec, replace(spec, blocks=blocks))] == [
        "blocks[0].norm",
        "blocks[4:6].norm",
    ]


def test_the_same_spec_is_said_to_be() -> None:
    same = diff("glm-4-9b-0414", "GLM-Z1-9B-0414")
    assert same.changes == ()
    assert str(same) == "no field differs: glm-4-9b-0414 and GLM-Z1-9B-0414 are built alike"
    assert str(diff(release("glm-4-9b").spec, release("glm-4-9b").spec)).endswith("before and after are built alike")


def test_folders_are_as_good_as_names() -> None:
    folder = HERE[0]
    assert diff(folder, folder).changes == ()
    found = diff(str(folder), "chatglm-6b")
    assert found.after == "chatglm-6b"
    assert "vocabulary: 320 → 130528" in str(found)


@pytest.mark.parametrize("name", ["chatglm9-6b", "/nowhere", ""])
def test_unknown_names_are_an_error(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        diff("chatglm-6b", name)


def test_a_folder_of_something_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="llama"):
        diff(tmp_path, "chatglm-6b")


def test_shown_as_a_table() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(glm.diff("chatglm2-6b", "chatglm2-6b-32k"))
    text = console.export_text()
    assert [line.split() for line in text.splitlines()][:2] == [
        ["field", "chatglm2-6b", "chatglm2-6b-32k"],
        ["rotary.scaling", "Plain()", "Interpolation(factor=16.0)"],
    ]
