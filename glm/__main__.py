"""`python -m glm` is `glm`."""

import sys

from glm.cli import main

sys.exit(main())
