"""Where tiny-glm lies, the small model that comes with this package: in a checkout, or where it was installed."""

from importlib.resources import files
from pathlib import Path

from glm.errors import CheckpointError


def embedded() -> Path:
    """The folder of tiny-glm. Raises CheckpointError where the package was installed without it."""
    checkout = Path(__file__).parents[1] / "weights" / "tiny-glm"
    if (checkout / "config.json").is_file():
        return checkout
    try:
        installed = Path(str(files("glm_weights"))) / "tiny-glm"  # weights/ of the checkout, as it goes into a wheel
    except ModuleNotFoundError:
        installed = checkout
    if (installed / "config.json").is_file():
        return installed
    raise CheckpointError(f"{installed}: tiny-glm is not there; reinstall the package, or name a checkpoint folder")
