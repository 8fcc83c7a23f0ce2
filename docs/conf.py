"""How Sphinx builds the book: chapters are percent-format Python files that are run while the book is built.

Everything written in Python, Markdown and pictures comes from this repository alone: nothing is fetched.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "kernels")]

project = "GLM, explained by running it"
author = "the authors of glm-torch"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
exclude_patterns = ["*.py", "answers", "exercises", "results"]

source_suffix = {".md": "myst-nb", ".py": "myst-nb"}
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
suppress_warnings = ["mystnb.unknown_mime_type"]

# -- the processes that run the cells --------------------------------------------------------------------------------

sys.path[:0] = PATHS  # for autodoc
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # chapters are small, and run side by side
    os.environ[name] = "1"
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of a progress bar that nobody asked for
os.environ["SOURCE_DATE_EPOCH"] = "0"  # pictures say when they were drawn: let them be the same each time

# Pictures drawn with pyplot come out as SVG too, as those of docs/drawing.py do.
KERNELS = ROOT / "build" / "ipython"
os.environ["IPYTHONDIR"] = str(KERNELS)
settings = KERNELS / "profile_default" / "ipython_kernel_config.py"
settings.parent.mkdir(parents=True, exist_ok=True)
settings.write_text('c.InlineBackend.figure_formats = {"svg"}\nc.HistoryManager.enabled = False\n', encoding="utf-8")
