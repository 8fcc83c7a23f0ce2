"""What is installed where nobody has a checkout: the code, and tiny-glm with it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def test_every_package_is_packaged() -> None:
    settings = SETTINGS["tool"]["setuptools"]
    moved = settings["package-dir"]
    found = {".".join(path.parent.relative_to(PROJECT).parts) for path in PROJECT.glob("glm/**/__init__.py")}
    kernels = PROJECT / "kernels"
    found |= {".".join(path.parent.relative_to(kernels).parts) for path in kernels.glob("**/__init__.py")}
    assert {name for name in settings["packages"] if not moved.get(name, "").startswith("weights")} == found
    assert all((PROJECT / folder).is_dir() for folder in moved.values())


def test_constraints_pin_whatever_is_asked_for() -> None:
    project = SETTINGS["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    lines = [line for line in (PROJECT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in map(Requirement, asked):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1"), "they belong together"


def test_make_lists_its_targets() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    phony = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert listed == phony[1].split()


def test_an_old_python_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    shutil.copy(PROJECT / "Makefile", tmp_path)
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    old = tmp_path / "python3.9"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 1, \'final\', 0); exec(sys.argv[1])" "$2"\n')  # fmt: skip  # noqa: E501
    old.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_the_wheel_works_without_a_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "tests", "docs", "__pycache__", "unfinished", "build")
    shutil.copytree(PROJECT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    [wheel] = tmp_path.glob("*.whl")
    place = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--target", place, wheel], check=True)
    shutil.rmtree(source)
    elsewhere = os.environ | {"PYTHONPATH": os.pathsep.join((str(place), sysconfig.get_path("purelib")))}
    done = subprocess.run(
        [sys.executable, "-S", place / "bin" / "glm", "chat"],
        input="What is blank infilling?\n", cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Blank infilling removes spans")
