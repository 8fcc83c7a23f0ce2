"""Formulas as MathML, which browsers show by themselves: the pages need no script and nothing from elsewhere.

docutils knows how to write it; here it is told of a few more commands, and what it does not know ends the build.
"""

import re
from html import escape
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml

OTHERWISE = {r"\dots": r"\ldots", r"\big": "", r"\Big": "", r"\tfrac": r"\frac", r"\dfrac": r"\frac"}


def mathml(tex: str, block: bool = False) -> str:
    """A formula in TeX's notation as MathML. Raises MathError for a command that is not known."""
    known = re.sub(r"\\[a-zA-Z]+", lambda match: OTHERWISE.get(match[0], match[0]), tex)
    made: str = tex2mathml(known, as_block=block)
    return made


def written(writer: Any, node: nodes.Element, block: bool) -> str:
    """The formula of a node; a warning, which ends the build, where it cannot be written."""
    try:
        return mathml(node.astext(), block)
    except MathError as error:
        from sphinx.util.logging import getLogger

        getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        return f"<code>{escape(node.astext())}</code>"


def inline(writer: Any, node: nodes.Element) -> None:
    """What Sphinx calls for a formula in a line."""
    writer.body.append(written(writer, node, block=False))
    raise nodes.SkipNode


def display(writer: Any, node: nodes.Element) -> None:
    """What Sphinx calls for a formula of its own."""
    writer.body.append(f'<div class="math-block">{written(writer, node, block=True)}</div>\n')
    raise nodes.SkipNode
