"""A folder is complete or not there, whatever happens while it is written."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm.atomic import new_file, new_folder
from glm.errors import GLMError

SRC = str(Path(__file__).parents[1])


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not target.exists()
    assert {str(p.relative_to(target)) for p in target.rglob("*")} == {"a", "sub", "sub/b"}
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "a").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("taken", "file", "link"):
        with pytest.raises(GLMError, match=f"{name}: already exists"), new_folder(tmp_path / name):
            pytest.fail("should not have been entered")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert (tmp_path / "empty" / "a").exists()


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def overtaken() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "a").touch()
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "theirs").touch()

    with pytest.raises(GLMError, match="already exists"):
        overtaken()
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "theirs"]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new") as folder:
        (folder / "a").touch()
        with pytest.raises(GLMError, match="another process is writing"), new_folder(tmp_path / "new"):
            pytest.fail("should not have been entered")
        assert (folder / "a").exists()
    assert (tmp_path / "new" / "a").exists()


def test_leftovers_of_a_killed_run_go_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".new.partial"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "old").touch()
    (left / "link").symlink_to(tmp_path)
    with new_folder(tmp_path / "new") as folder:
        assert list(folder.iterdir()) == []
        (folder / "a").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "a"]


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GLMError, match="cannot be written"), new_folder(tmp_path / "file" / "new"):
        pytest.fail("should not have been entered")
    with pytest.raises(GLMError, match="cannot be written"), new_folder(tmp_path / "new") as folder:
        (folder / "none" / "a").write_text("into a folder that is not there")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_appears_at_the_end_in_the_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / ".file.partial").write_text("left by a killed run, and longer")
    with new_file(tmp_path / "file") as path:
        path.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
        with pytest.raises(GLMError, match="another process is writing"), new_file(tmp_path / "file"):
            pytest.fail("should not have been entered")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "new"}


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted(error: Exception) -> None:
        with new_file(tmp_path / "file") as path:
            path.write_text("half")
            raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        interrupted(ZeroDivisionError())
    with pytest.raises(GLMError, match=r"file: cannot be written .*the disk is full"):
        interrupted(OSError("the disk is full"))
    with pytest.raises(GLMError, match="cannot be written"), new_file(tmp_path / "none" / "file"):
        pytest.fail("should not have been entered")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


WRITER = """
import sys
from pathlib import Path
from glm.atomic import new_folder
print("ready", flush=True)
for i in range(10 ** 6):
    with new_folder(Path(sys.argv[1]) / str(i)) as folder:
        for name in "abcd":
            (folder / name).write_bytes(bytes(200_000))
"""


def test_a_kill_at_any_moment_leaves_complete_folders_only(tmp_path: Path) -> None:
    """One writer after the other is killed while it writes folder after folder into the same place."""
    moments, complete = random.Random(0), 0
    for round in range(8):
        place = tmp_path / str(round)
        place.mkdir()
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(place)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": SRC},
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(moments.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        for folder in place.iterdir():
            if not folder.name.startswith("."):
                assert [(p.name, p.stat().st_size) for p in sorted(folder.iterdir())] == [(n, 200_000) for n in "abcd"]
                complete += 1
    assert complete
