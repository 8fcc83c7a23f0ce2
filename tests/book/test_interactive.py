"""The page on which a reader blanks a text by hand: its script computes what `glm` does, and it works in a browser."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from random import Random
from time import sleep
from typing import Any

import pytest
from browser import Page

import glm
from docs import vocabulary
from glm.infilling import Marks, Sample, plain, units

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "static" / "interactive"
PAGE = FOLDER / "index.html"

TOKENIZER = glm.Tokenizer.from_pretrained(glm.embedded())
MARKS = Marks(*(TOKENIZER.id(name) for name in ("[MASK]", "[gMASK]", "<sop>", "<eop>")))

WORDS = (
    *("Attention", "is", "a", "lookup", "that", "never", "quite", "decides", ".", "It's", "3,141", "…", "(don't)"),
    *("we'll", "naïve", "Ωmega", "e\u0301", "\ufeff", "空白", "填充", "让模型", "写回来", "。", "，“引号”", "ａｂｃ"),
    *("12万", "ﷺ", "🙂", "👩\u200d🚀", "한국어", "русский", "x_1", "[MASK]", "<sop>", "a\u200bb", "\u00a0", "\u3000"),
    *("\u2028", "\x1c", "\x85", "½", "²", "_", "--", "\t", "\n"),
)
SPACES = ("", " ", " ", "  ", "\n", "\t ", "\u3000")


def a_text(rng: Random) -> str:
    """Words and signs of any kind, with white space of any kind between some of them."""
    pieces = (
        rng.choice(WORDS) + rng.choice(("", " ", " ", "  ", "\n", "\t ", "\u3000")) for _ in range(rng.randint(0, 14))
    )
    return rng.choice(("", " ")) + "".join(pieces)


def a_case(rng: Random) -> dict[str, Any]:
    """A text, which of its units are blank, and the numbers of the blanks in the order of writing."""
    text = a_text(rng)
    count = len(units(text))
    chosen = sorted(rng.sample(range(count), rng.randint(0, count)))
    spans = sum(1 for i in chosen if i - 1 not in chosen)
    return {"text": text, "chosen": chosen, "order": rng.sample(range(spans), spans)}


CASES = [a_case(Random(seed)) for seed in range(1000)]


@cache
def expected() -> list[dict[str, Any]]:
    """What the package makes of them."""
    return [computed(case) for case in CASES]


def computed(case: dict[str, Any]) -> dict[str, Any]:
    """What the package makes of a case."""
    pieces, chosen = units(case["text"]), case["chosen"]
    starts = [i for i in chosen if i - 1 not in chosen]
    spans = [(start, next(i for i in range(start, len(pieces) + 1) if i not in chosen)) for start in starts]
    encode = plain(TOKENIZER)
    read: list[int] = []
    written: list[tuple[int, list[int]]] = []
    end = 0
    for start, stop in spans:
        read += encode("".join(pieces[end:start]).strip())
        written.append((len(read), encode("".join(pieces[start:stop]).strip())))
        read.append(MARKS.mask)
        end = stop
    read += encode("".join(pieces[end:]).strip())
    sample = Sample(read, [written[n] for n in case["order"]], MARKS)
    layout = sample.layout if len(sample) else None
    return {
        "units": pieces,
        "spans": [list(span) for span in spans],
        "ids": sample.ids,
        "targets": sample.targets,
        "place": [] if layout is None else layout.positions[0, :, 0].tolist(),
        "inside": [] if layout is None else layout.positions[0, :, 1].tolist(),
        "visible": [] if layout is None else layout.visible[0].int().tolist(),
        "pieces": [TOKENIZER.piece(id) for id in sample.ids],
    }


SCRIPT = """
const encode = layout.encoder(vocabulary), spell = layout.speller(vocabulary);
const [mask, sop, eop] = ["[MASK]", "<sop>", "<eop>"].map((name) => vocabulary.special[name]);
const out = cases.map(({ text, chosen, order }) => {
  const units = layout.units(text), spans = layout.spansOf(new Set(chosen));
  const row = layout.sample(units, spans, order, encode, { mask, sop, eop });
  const visible = row.ids.map((_, t) => row.ids.map((_, j) => Number(layout.sees(row, t, j))));
  const { ids, targets, place, inside } = row;
  return { units, spans, ids, targets, place, inside, visible, pieces: ids.map(spell) };
});
"""


def in_node(cases: list[dict[str, Any]], script: str) -> list[dict[str, Any]]:
    """What the page's script, the text `script`, makes of cases."""
    node = shutil.which("node")
    assert node is not None
    program = (
        f"{script}\n{(FOLDER / 'vocabulary.js').read_text(encoding='utf-8')}\n"
        f"const cases = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n{SCRIPT}\n"
        "process.stdout.write(JSON.stringify(out));"
    )
    done = subprocess.run(
        [node, "-e", program], input=json.dumps(cases), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def in_browser(page: Page, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, by the page as it is."""
    page.open(PAGE)
    found: list[dict[str, Any]] = json.loads(
        page.run(f"const cases = arguments[0]; {SCRIPT}; return JSON.stringify(out)", cases)
    )
    return found


def differing(found: list[dict[str, Any]], cases: list[dict[str, Any]]) -> list[str]:
    """What differs, and for which text."""
    return [
        f"{what} of {case['text']!r}: {mine[what]} != {its[what]}"
        for case, mine, its in zip(cases, found, expected(), strict=False)
        for what in its
        if mine[what] != its[what]
    ]


LAYOUT = (FOLDER / "layout.js").read_text(encoding="utf-8")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node is installed")


@needs_node
def test_the_script_computes_what_the_package_does() -> None:
    assert any(len(case["order"]) > 2 for case in CASES)
    assert differing(in_node(CASES, LAYOUT), CASES)[:3] == []


def test_the_page_computes_what_the_package_does(page: Page) -> None:
    assert differing(in_browser(page, CASES[:300]), CASES[:300])[:3] == []


BROKEN = {
    "a span counts from 0": ("row.inside.push(i + 1)", "row.inside.push(i)"),
    "places go on counting": ("row.place.push(places[n])", "row.place.push(places[n] + i)"),
    "the place of the first blank": ("row.place.push(places[n])", "row.place.push(places[0])"),
    "what is written sees all": ("j < row.read || j <= t", "j < row.read || t >= row.read"),
    "all is causal": ("j < row.read || j <= t", "j <= t"),
    "targets shifted": ("row.targets.push(...contents[n], marks.eop)", "row.targets.push(marks.sop, ...contents[n])"),
    "written in the order of the text": ("for (const n of order)", "for (const n of [...order].sort())"),
    "white space stays": ("text.replace(EDGES, \"\")", "text"),
    "neighbours are two blanks": ("spans[spans.length - 1][1] === i", "false"),
    "pairs joined from the left": ("r < best", "best === Infinity"),
    "Chinese is not cut apart": ("(?:(?![${CJK}])[${WORD}])+", "[${WORD}]+"),
}  # fmt: skip


@needs_node
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_script_is_found(fault: str) -> None:
    right, wrong = BROKEN[fault]
    assert LAYOUT.count(right) >= 1
    assert differing(in_node(CASES[:200], LAYOUT.replace(right, wrong)), CASES[:200])


def test_the_vocabulary_is_that_of_tiny_glm() -> None:
    check = [sys.executable, str(ROOT / "docs" / "vocabulary.py"), "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0
    assert vocabulary.script(glm.embedded() / "tokenizer.json") == vocabulary.FILE.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------- as a reader uses it


def mask(page: Page) -> list[str]:
    return page.run(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('#mask tr')].map((row) => "
        "[...row.querySelectorAll('td')].map((cell) => cell.className === 'seen' ? 'x' : '.').join(''))"
    )


def table(page: Page) -> list[list[str]]:
    return page.run(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('#row tr')].slice(1)"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def shown(found: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """The two tables as they must stand on the page."""
    spelt = [piece.replace(" ", "␣") for piece in found["pieces"]]
    targets = ["–" if id < 0 else TOKENIZER.piece(id).replace(" ", "␣") for id in found["targets"]]
    rows = [
        [str(t), *map(str, (spelt[t], found["ids"][t], found["place"][t], found["inside"][t])), targets[t]]
        for t in range(len(spelt))
    ]
    return rows, ["".join(".x"[seen] for seen in row) for row in found["visible"]]


def test_typing_blanking_and_reordering(page: Page) -> None:
    text = "A model reads both ways, 然后写回来。"
    page.open(PAGE)
    page.type("#text", text)
    assert page.texts("#units button") == [unit.strip() for unit in units(text)]
    while page.texts("#order li"):
        page.click("#units button[aria-pressed=true]")
    assert (table(page), mask(page)) == shown(computed({"text": text, "chosen": [], "order": []}))
    assert "choose a word" in page.texts("#message")[0]

    before = mask(page)
    page.click("#units button", 1)
    assert (table(page), mask(page)) == shown(computed({"text": text, "chosen": [1], "order": [0]}))
    assert mask(page) != before
    page.click("#units button", 4)
    page.click("#units button", 3)
    page.click("#units button", 7)
    chosen = {"text": text, "chosen": [1, 3, 4, 7]}
    assert page.texts("#order .what") == ["model", "both␣ways", "后"]
    assert (table(page), mask(page)) == shown(computed({**chosen, "order": [0, 1, 2]}))

    before = table(page)
    page.click("#order li:nth-child(3) button[aria-label=earlier]")
    page.click("#order li:nth-child(2) button[aria-label=earlier]")
    assert page.texts("#order .what") == ["后", "model", "both␣ways"]
    assert (table(page), mask(page)) == shown(computed({**chosen, "order": [2, 0, 1]}))
    assert table(page) != before

    page.click("#row tr", 12)
    assert page.texts("#row tr.chosen td")[0] == page.texts("#said")[0].split(",")[0].removeprefix("Token ") == "11"
    page.click("#units button", 7)
    assert page.texts("#order .what") == ["model", "both␣ways"], "those that stay keep their turns"
    assert page.faults() == []


TEXTS = {
    "nothing": "",
    "a few sentences": "One word more. " * 3,
    "Chinese": "长" * 60,
    "one long word": "Donaudampfschifffahrts" * 5,
    "too many tokens": "x " * 190,
}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_wider_than_the_window(page: Page, width: int, text: str) -> None:
    page.open(PAGE, width)
    assert page.run("return window.innerWidth") == width
    assert page.overflow() <= 0
    page.put("#text", TEXTS[text])
    if text != "nothing":
        page.click("#units button", 0)
    assert page.overflow() <= 0
    assert bool(table(page)) == (text not in ("nothing", "too many tokens"))
    assert ("shorten the text" in page.texts("#message")[0]) == (text == "too many tokens")
    assert page.faults() == []
    assert page.asked() == [], "nothing is fetched"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_book_shows_the_page_as_high_as_it_is(page: Page, tmp_path: Path, width: int) -> None:
    """As in docs/interactive.md, which includes the frame, beside the static files of the built book."""
    assert "static/interactive/frame.html" in (ROOT / "docs" / "interactive.md").read_text(encoding="utf-8")
    shutil.copytree(FOLDER, tmp_path / "_static" / "interactive")
    around = tmp_path / "interactive.html"
    around.write_text(
        "<!doctype html><meta name='viewport' content='width=device-width, initial-scale=1'>"
        + (FOLDER / "frame.html").read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    page.open(around, width)
    frame = page.driver.find_element("css selector", "iframe")
    page.run("arguments[0].scrollIntoView()", frame)
    page.driver.switch_to.frame(frame)
    try:
        for text in ("Short.", "长" * 50):
            page.put("#text", text)
            for _ in range(50):
                beyond = page.run("return document.scrollingElement.scrollHeight - innerHeight")
                spare = page.run("return innerHeight - document.querySelector('main').offsetHeight")
                if beyond <= 0 and spare <= 8:
                    break
                sleep(0.1)
            assert beyond <= 0
            assert 0 <= spare <= 8
    finally:
        page.driver.switch_to.default_content()
    assert page.overflow() <= 0
