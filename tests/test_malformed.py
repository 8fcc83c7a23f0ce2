"""Malformed checkpoints, each refused with one CheckpointError: fast, cheaply, and saying where.

None may be accepted and none may crash. What was asked for is not paid for: a refusal takes less than a second of
processor time and 256 MiB.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from corpus import CASES, GOLDENS, INTEGER, NATIVE, PER_HEAD, SPLIT, WEIGHTS, Case, assemble, parts, sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import glm
from glm.errors import CheckpointError

SECONDS, BYTES = 1.0, 256 << 20


def load(folder: Path) -> glm.GLM:
    """What every case goes through."""
    return glm.GLM.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Loads every base folder as it is, and one with a prefix: they are well-formed, and torch has started."""
    for base in (NATIVE, PER_HEAD, INTEGER, SPLIT, "chatglm3-ptuning-noproj"):
        load(GOLDENS / base)


class Peak:
    """The highest resident memory of this process since it was made, in bytes above what it was then (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.kilobytes("VmRSS")

    def above(self) -> int:
        return (self.kilobytes("VmHWM") - self.before) * 1024

    @staticmethod
    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])


def peak() -> Peak | None:
    try:
        return Peak()
    except OSError:
        return None


@pytest.mark.parametrize("case", CASES, ids=[case.name[:100] for case in CASES])
def test_a_malformed_checkpoint_is_refused(case: Case, tmp_path: Path) -> None:
    case.make(tmp_path / "folder")
    memory, started = peak(), time.process_time()
    with pytest.raises(CheckpointError) as refusal:
        load(tmp_path / "folder")
    assert time.process_time() - started < SECONDS
    assert memory is None or memory.above() < BYTES
    message = str(refusal.value)
    assert case.says in message
    assert len(message) < 1000
    assert message.isprintable()


def test_the_corpus_is_large_and_every_case_is_another(tmp_path: Path) -> None:
    small = [case for case in CASES if "MB" not in case.name]
    seen = set()
    for case in small:
        case.make(tmp_path / "folder")
        seen.add(fingerprint(tmp_path / "folder"))
        remove(tmp_path / "folder")
    assert len(seen) == len(small) >= 300


def fingerprint(folder: Path) -> str:
    """What a folder holds, links and odd files included."""
    lines = [f"link {folder.is_symlink()}, folder {folder.is_dir()}, file {folder.is_file()}"]
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            kind = os.readlink(path) if path.is_symlink() else path.lstat().st_mode
            data = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
            lines.append(f"{path.name} {kind} {data}")
    return "\n".join(lines)


def remove(path: Path) -> None:
    """A folder, or whatever stands in its place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- fuzz ----------------------------------------------------------------------------------------------------------

BASE = GOLDENS / NATIVE
fuzz = settings(derandomize=True, deadline=None, max_examples=200)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-2, 400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def good() -> dict[str, Tensor]:
    return load(BASE).state_dict()


def refused_or_the_same(folder: Path, good: dict[str, Tensor]) -> None:
    """What a change to anything but the numbers may lead to."""
    try:
        loaded = load(folder).state_dict()
    except CheckpointError:
        return
    assert loaded.keys() == good.keys()
    assert all(torch.equal(loaded[name], good[name]) for name in good)


@contextmanager
def changed() -> Iterator[Path]:
    """A copy of the base folder."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        Case("unspoilt", NATIVE, lambda folder: None).make(folder)
        yield folder


@given(st.data())
@fuzz
def test_any_edit_of_the_header(good: dict[str, Tensor], data: st.DataObject) -> None:
    header, numbers = parts(BASE / WEIGHTS)
    text = bytearray(json.dumps(header).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 3))
        printable = st.binary(max_size=3) | st.sampled_from(
            [b"0", b"1", b"9", b"-", b".", b",", b'"', b"[", b"{", b"}"]
        )
        text[at : at + length] = data.draw(printable)
    with changed() as folder:
        assemble(folder / WEIGHTS, bytes(text), numbers)
        refused_or_the_same(folder, good)


@given(st.data())
@fuzz
def test_any_value_in_the_config(good: dict[str, Tensor], data: st.DataObject) -> None:
    config = json.loads((BASE / "config.json").read_text())
    fields = [*config, "rope_ratio", "quantization_bit", "pre_seq_len", "prefix_projection", "inner_hidden_size"]
    fields.append("quantization_config")
    for name in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3)):
        config[name] = data.draw(anything)
    with changed() as folder:
        (folder / "config.json").write_text(json.dumps(config))
        refused_or_the_same(folder, good)


@given(st.data())
@fuzz
def test_any_change_of_the_index(good: dict[str, Tensor], data: st.DataObject) -> None:
    def change(folder: Path, index: dict[str, Any]) -> None:
        names = index["weight_map"]
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(names)) | st.text(max_size=8))
            names[name] = data.draw(st.sampled_from([*dict.fromkeys(map(str, names.values()))]) | anything)
        index[data.draw(st.sampled_from(["metadata", "weight_map", "x"]) | st.text(max_size=4))] = data.draw(
            st.just(names) | anything
        )

    with changed() as folder:
        sharded(change)(folder)
        refused_or_the_same(folder, good)


@given(st.binary(max_size=300), st.sampled_from(["config.json", WEIGHTS]))
@fuzz
def test_any_bytes_in_place_of_a_file(good: dict[str, Tensor], data: bytes, name: str) -> None:
    with changed() as folder:
        (folder / name).write_bytes(data)
        refused_or_the_same(folder, good)
