"""How Sphinx builds the book: chapters are percent-format Python files that are run while the book is built."""

project = "GLM, explained by running it"
author = "the authors of glm-torch"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
exclude_patterns = ["conf.py", "tables.py", "parity.py", "check.py", "drawing.py", "exercises", "results"]

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
