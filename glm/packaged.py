"""Where tiny-glm lies, the small model that comes with this package."""

from pathlib import Path

from glm.errors import CheckpointError


def embedded() -> Path:
    """The folder of tiny-glm. Raises CheckpointError where it is missing."""
    beside = Path(__file__).parents[1]
    folders = [beside / "weights" / "tiny-glm", beside / "glm_weights" / "tiny-glm"]  # in a checkout, installed
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{folders[0]}: tiny-glm is missing; install the package again, or name a checkpoint folder")
