"""The engine is tried with the harness of the kernels it is made of."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
