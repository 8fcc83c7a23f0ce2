"""Folders and files that appear complete or not at all.

Everything is written to a hidden sibling first, forced to the disk, and given its name by one rename: a process
killed at any moment, or a machine that loses power, leaves either nothing under that name or the whole folder.
The hidden sibling of a killed run is emptied by the next run with the same destination.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm.errors import GLMError


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yields a temporary folder to write into; on leaving without an error it becomes `destination`.

    `destination` must not exist, or be an empty folder; missing parents are created. Raises GLMError
    where that is not so, where another process is writing the same folder, or where the disk is full or refuses.
    """
    destination = Path(os.path.abspath(destination))
    vacant(destination)
    temporary = destination.parent / f".{destination.name}.partial"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise GLMError(f"{destination}: cannot be written ({error})") from None
    try:
        claim(lock, temporary, destination)
        empty(temporary)
        try:
            yield temporary
            vacant(destination)
            for path in (*temporary.rglob("*"), temporary):
                flush(path)
            temporary.rename(destination)
            flush(destination.parent)
        except OSError as error:
            raise GLMError(f"{destination}: cannot be written ({error})") from error
        finally:
            if ours(lock, temporary):
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """Yields a temporary file to write; on leaving without an error it becomes `destination`, in the place of any.

    Raises GLMError where another process is writing the same file, or where the disk is full or refuses.
    """
    destination = Path(os.path.abspath(destination))
    temporary = destination.parent / f".{destination.name}.partial"
    try:
        lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise GLMError(f"{destination}: cannot be written ({error})") from None
    try:
        claim(lock, temporary, destination)
        try:
            yield temporary
            flush(temporary)
            temporary.replace(destination)
            flush(destination.parent)
        except OSError as error:
            raise GLMError(f"{destination}: cannot be written ({error})") from error
        finally:
            if ours(lock, temporary):
                temporary.unlink()
    finally:
        os.close(lock)


def vacant(destination: Path) -> None:
    """Raises GLMError unless `destination` is free or an empty folder."""
    if destination.is_symlink() or destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise GLMError(f"{destination}: already exists; name a new folder, or move this one away")


def claim(lock: int, temporary: Path, destination: Path) -> None:
    """Locks the open temporary folder or file: the lock goes when the process does, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise GLMError(f"{destination}: another process is writing it now") from None
    if not ours(lock, temporary):  # it was renamed by its writer between our open and our lock
        raise GLMError(f"{destination}: another process has just written it")


def ours(lock: int, temporary: Path) -> bool:
    """Whether the name `temporary` still belongs to what was locked."""
    return temporary.exists() and os.path.samestat(os.fstat(lock), temporary.stat())


def empty(folder: Path) -> None:
    """Removes whatever a killed run left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def flush(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
