"""No numeral about results stands in a document unless a command wrote it.

What a command writes stands between <!-- begin NAME --> and <!-- end NAME -->, or is output of a chapter's cell. Of
the rest, prose and tables typed by hand, numerals are looked for that can be results:

    decimals             0.34, 21.1, 1.8x, 1e-14, 3·10⁻⁵
    with a unit          97 %, 36 s, 24 GB, 2× faster, 14 tokens/s
    counts of successes  460 of 471, 3774
    large numbers        that are no power of 2 or 10 and no multiple of 64, as widths are

What is no result is taken away first: code, links, formulas, and numbers that belong to a name (GLM-4.5, int4, sm_90,
torch 2.13, arXiv:2103.10360, chapter 3, a year). What is left and right stands in `ALLOWED`, each with its reason.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from docs import tables

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for folder, pattern in ((".", "*.md"), ("kernels", "**/*.md"), ("weights", "*.md"), ("docs", "**/*.md"))
    for path in (ROOT / folder).glob(pattern)
)
CHAPTERS = sorted((ROOT / "docs" / "chapters").glob("*.py")) + sorted((ROOT / "docs" / "load").glob("*.py"))


class Fact(NamedTuple):
    """A numeral that may stand where it does."""

    document: str
    text: str
    reason: str


ALLOWED = (
    Fact("docs/design.md", "compare at 1e-9", "the tolerance that `glm verify` is built for, not what it found"),
)

# -- what is no prose ------------------------------------------------------------------------------------------------

NOT_PROSE = (
    r"<!-- begin ([\w-]+) -->\n(?s:.*?)<!-- end \1 -->",  # written by a command
    r"<!--(?s:.*?)-->",
    r"^ *(`{3,})(?!\{(?:note|tip|warning|important|admonition|seealso)\})(?s:.*?)^ *\1`*$",  # fenced code
    r"(?:\A|(?<=\n\n))(?:(?: {4}|\t).*(?:\n|\Z))+",  # indented code
    r"`[^`\n]+`",
    r"\$\$(?s:.*?)\$\$|\$[^$\n]*[a-zA-Z\\][^$\n]*\$",  # formulas; one of numbers alone is none
    r"\]\([^)\n]*\)|https?://\S+",
)
NUMBERED = (  # numbers that belong to a name
    r"\b(?:arXiv:|doi:)\S+",
    r"\b(?:torch|PyTorch|Python|Triton|transformers|compressed-tensors|Sphinx|CUDA|Apache)[ -](?:≥ )?[\d.]*\d",
    r"\b(?:GLM|ChatGLM\d?|CodeGeeX\d?)[- ]?[\w.-]*\w(?: (?:to|and|or) \d[\d.]*\d?)?",
    r"\b(?:[Cc]hapters?|[Ss]ections?|[Ee]xercises?|[Ee]quations?|[Ll]ine|issue|file)s? \(?\d[\d.]*(?:[–-]\d[\d.]*)?",
    r"\b20[12]\d(?:-\d\d-\d\d)?\b",
    r"^#+ \d+(?:\.\d+)*\.? |^ *\d+[.)] ",  # headings and lists
    r"(?<![\w.])[A-Za-z_][\w.+-]*\d[\w.]*|\b\d+[A-Za-z_-]+[A-Z]\w*\b|\b\d-D\b",  # int4, sm_90, 2-D
)

# -- what can be a result --------------------------------------------------------------------------------------------

NUMBER = r"(?<![\w.,])[-−+~≈]?\d+(?:[ ,]\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
UNIT = (
    r"%|percent\b|×(?! ?\d)|x\b|times\b|(?:[kMGT]i?|)(?:B|FLOPs?|FLOP)(?:/\w+)?\b|bit/s|\w+/s(?:ec)?\b|"
    r"(?:[nµumk]?s|min|h|seconds?|minutes?|hours?|days?|W|kW|[MG]?Hz|°C)\b"
)
RESULT = re.compile(
    rf"(?P<power>\b10(?:\^[-−]?\d|[⁻⁰¹²³⁴-⁹]+))|(?P<of>{NUMBER} of {NUMBER})|(?P<unit>{NUMBER} ?(?:{UNIT}))|"
    rf"(?P<plain>{NUMBER})"
)


def innocent(number: str) -> bool:
    """Whether a number without a unit is a small count, a power of 2 or 10, or a width."""
    digits = re.sub(r"[ ,]", "", number).lstrip("-−+~≈")
    if not digits.isdigit() or number[0] in "~≈":
        return False
    value = int(digits)
    return value <= 100 or value % 64 == 0 or value.bit_count() == 1 or (set(digits[1:]) == {"0"} and digits[0] == "1")


def results(text: str) -> Iterator[tuple[int, str]]:
    """Numerals of a Markdown text that can be results, each with its line."""
    text = text.replace(r"\times", "×").replace(r"\cdot", "·").replace("^{", "^")
    for pattern in NOT_PROSE:
        text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.M)
    for pattern in NUMBERED:
        text = re.sub(pattern, "", text, flags=re.M)
    for match in RESULT.finditer(text):
        if match["plain"] is None or not innocent(match["plain"]):
            yield text.count("\n", 0, match.start()) + 1, match[0].strip()


def unexplained(path: Path, text: str) -> list[str]:
    """What stands in a document and neither a command wrote nor `ALLOWED` explains."""
    name = str(path.relative_to(ROOT))
    for fact in ALLOWED:
        if fact.document == name:
            text = text.replace(fact.text, "")
    return [f"{name}:{line}: {numeral}" for line, numeral in results(text)]


def markdown(path: Path) -> str:
    """A document, or the Markdown cells of a chapter with its lines where they were."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    lines, prose = [], False
    for line in text.splitlines():
        if line.startswith("# %%"):
            prose = "[markdown]" in line
            line = "#"
        lines.append(line.removeprefix("#").removeprefix(" ") if prose else "")
    return "\n".join(lines)


@pytest.mark.parametrize("path", [*DOCUMENTS, *CHAPTERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_numeral_about_results_is_typed_by_hand(path: Path) -> None:
    found = unexplained(path, markdown(path))
    assert not found, (
        "let docs/tables.py or a cell write these, or say in ALLOWED why they are no results: " + "; ".join(found)
    )


def test_what_is_allowed_stands_there_and_has_a_reason() -> None:
    for fact in ALLOWED:
        assert fact.text in markdown(ROOT / fact.document), fact
        assert list(results(fact.text)), f"{fact.text!r} would pass anyway"
        assert len(fact.reason) > 20, fact


def test_documents_are_all_looked_at() -> None:
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "kernels/README.md", "kernels/ladders/README.md", "docs/design.md", "docs/index.md"} <= names
    assert ROOT / "docs" / "chapters" / "00_family.py" in CHAPTERS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_pretends_to_be_a_command(path: Path) -> None:
    """Every block between markers is one that docs/tables.py writes and checks in this document, or a ladder's."""
    blocks = re.findall(r"<!-- begin ([\w-]+) -->", path.read_text(encoding="utf-8"))
    if path == ROOT / "kernels" / "ladders" / "README.md":
        assert all((path.parent / block).is_dir() for block in blocks)  # kernels/ladders/ladder.py writes it
    else:
        assert set(blocks) <= set(tables.BLOCKS)
        assert not blocks or str(path.relative_to(ROOT)) in tables.DOCUMENTS


@pytest.mark.parametrize(
    "text",
    [
        "It decodes 21.1 tok/s here.",
        "It decodes 21 tokens/s here.",
        "That is 1.8x faster than before.",
        "That is 2x faster than before, or 3 times.",
        "Twice: **1.84×** of it, 2× the rest.",
        "It peaks at 0.34 GB.",
        "It peaks at 24 GB, or 7 GiB.",
        "Logits agree to 1e-14.",
        "Logits agree to 10⁻¹⁴, or 10^-14.",
        "Logits agree to $10^{-14}$.",
        "Logits agree to $3 \\cdot 10^{-14}$.",
        "A speedup of $1.8\\times$.",
        "97 % of the answers are right.",
        "97% of the answers are right.",
        "It answers 460 of 471 questions.",
        "3774 passed.",
        "3,774 passed.",
        "It took 36 s, or 12 minutes.",
        "It runs in 5 µs at 3 TB/s.",
        "It reaches 600 TFLOP/s.",
        "| chatglm-6b | 13.4 |",
        "| `F.linear` | 26 GB/s |",
        "```{note}\nIt took 36 s.\n```",
        "- a point\n    that takes 36 s",
        "GLM-4.5 decodes 30.3 tokens a second.",
        "On torch 2.13 it takes 0.5 s.",
        "The loss is 0.124 after 1000 steps.",
        "about ~300 lines",
        "<!-- begin releases -->\n13.4 GB\n<!-- end releases -->\nand 13.4 GB",
    ],
)
def test_planted_results_are_found(text: str) -> None:
    assert list(results(text))


@pytest.mark.parametrize(
    "text",
    [
        "GLM-4.5 to 4.7, GLM-4-9B, ChatGLM2-6B-32k, GLM-4-0414 and GLM-Z1.",
        "In 2021, on 2026-11-24, arXiv:2103.10360 said so.",
        "int4, int8, bf16, float64, sm_90, fp16, P-Tuning v2, 2-D, UTF-8.",
        "torch 2.13, Python 3.11, Python ≥ 3.11, Triton 3.7.1 and transformers 5.23.",
        "Chapter 3, section 4.2, Exercise 3.2, equations (1) to (9).",
        "## 3.2 Positions\n\n1. one\n2. two",
        "Positions 0, 1, 2 …, groups of 128, widths 4096 and 13696, a base of 10000, 4 or 8 devices.",
        "`glm info --context 8192 --memory 24.5` and `0.34 GB`",
        "    $ glm chat --temperature 0.95\n",
        "```\n21.1 tok/s\n```",
        "[a picture](results/H100-1.5.png) at https://example.org/2.13.4",
        "$x = 0.5 y$ and $$\ny = 0.044715 x^3\n$$",
        "<!-- begin releases -->\n| 13.4 GB |\n<!-- end releases -->",
        "[B, 1, T, S] and 16 × 16 tiles",
    ],
)
def test_what_is_no_result_is_let_through(text: str) -> None:
    assert list(results(text)) == []


def test_cells_of_code_are_not_prose() -> None:
    chapter = ROOT / "docs" / "chapters" / "00_family.py"
    assert markdown(chapter).splitlines()[:2] == ["", "# The family"]
    assert "import glm" not in markdown(chapter)
