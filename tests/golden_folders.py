"""Where the reference outputs lie: a lean copy in tests/goldens, and possibly all of them outside the project."""

import json
import os
from pathlib import Path

from glm.errors import ConfigError
from glm.family import recognise

PROJECT = Path(__file__).parents[1]
GOLDENS = PROJECT / "tests" / "goldens"
ELSEWHERE = Path(os.environ.get("GLM_GOLDENS", PROJECT.parent / "shared" / "goldens"))


def folders(root: Path) -> list[Path]:
    """The golden folders in `root` of generations that this package knows."""
    return sorted(path.parent for path in root.glob("*/config.json") if known(path))


def known(config: Path) -> bool:
    """Whether a config.json is one of ours."""
    try:
        recognise(json.loads(config.read_text()))
    except ConfigError:
        return False
    return True


HERE = folders(GOLDENS)
