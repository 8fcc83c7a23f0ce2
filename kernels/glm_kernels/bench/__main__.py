"""The command `python -m glm_kernels.bench`."""

import sys

from glm_kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
