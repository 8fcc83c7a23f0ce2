"""How Sphinx builds the book: chapters are percent-format Python files that are run while the book is built.

Everything written in Python, Markdown and pictures comes from this repository alone: nothing is fetched.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "kernels")]

project = "GLM, explained by running it"
author = "the authors of glm-torch"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["book.css"]
html_math_renderer = "mathml"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}
highlight_language = "none"  # of blocks that do not say what they are
exclude_patterns = ["*.py", "answers", "exercises", "results"]

source_suffix = {".md": "myst-nb", ".py": "myst-nb"}
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autoclass_content = "both"
add_module_names = False
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "ref.python",  # a type that is called like some attributes, `bytes`
]

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
settings.write_text(
    'c.InlineBackend.figure_formats = {"svg"}\nc.HistoryManager.enabled = False\nc.Application.log_level = 40\n',
    encoding="utf-8",
)


def missing_names(app: Any, env: Any) -> None:
    """Warn of public names that the reference lacks; a warning ends the build."""
    import glm_kernels
    from sphinx.util.logging import getLogger

    import glm

    objects = env.domaindata["py"]["objects"]
    for package in (glm, glm_kernels):
        for name in package.__all__:
            thing = getattr(package, name)
            if f"{thing.__module__}.{name}" not in objects:
                getLogger(__name__).warning("%s.%s is not in the reference", package.__name__, name)


def setup(app: Any) -> None:
    """Docstrings are plain text: docs/docstrings.py makes them what Sphinx reads. All public names must be there."""
    from docs.docstrings import process, skip
    from docs.formulas import display, inline

    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip)
    app.connect("env-check-consistency", missing_names)
