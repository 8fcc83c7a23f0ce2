"""What integer weights cost: tiny-glm on its own texts, and a synthetic checkpoint of real widths.

    python kernels/bench/accuracy.py

Writes results/accuracy.json: error of the stream after every layer, KL of the logits, perplexity, and how often the
likeliest token is the same, for every method and group size (`glm accuracy` does the same for any checkpoint).
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from glm_kernels.bench.machine import ROOT, provenance, write

from glm import family
from glm.accuracy import measure, variants
from glm.curriculum import pairs
from glm.grouped import Grouped
from glm.synthesize import synthesize
from glm.texts import Text, conversations, random_texts, read_texts
from glm.tokenizer import Tokenizer

TINY = ROOT / "weights" / "tiny-glm"
METHODS = ("nearest", "search", "gptq")
SYNTHETIC = "glm-edge-1.5b-chat"


def texts(lines: str, most: int) -> list[Text]:
    """Conversations as texts."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        return read_texts(file.name, Tokenizer.from_pretrained(TINY), 256, most)


def rows(source: Path, read: list[Text], forms: list[Grouped], learnt: list[Text]) -> list[dict[str, Any]]:
    """Measure."""
    print(f"{source.name}: {len(read)} texts, {len(forms)} forms", file=sys.stderr)
    return [result.row() for result in measure(source, read, variants(forms, METHODS), learnt)]


def main() -> None:
    """Measure and write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    glossary = pairs((TINY / "glossary.md").read_text(encoding="utf-8"))
    asked, learnt = texts(conversations(glossary[::8]), 32), texts(conversations(glossary[1::8]), 32)
    passages = read_texts(TINY / "passages.md", Tokenizer.from_pretrained(TINY), 256, 16)
    groups = (32, 64, 128, None)
    forms = [Grouped(8, group, True) for group in groups]
    forms += [Grouped(4, group, symmetric) for symmetric in (True, False) for group in groups]
    cases = [
        {
            "what": "tiny-glm answering 32 questions of its glossary; GPTQ with 32 others:",
            "rows": rows(TINY, asked, forms, learnt),
        },
        {
            "what": "tiny-glm continuing its passages, learnt in another way (GPTQ reads 32 other questions):",
            "rows": rows(TINY, passages, forms, learnt),
        },
    ]
    with tempfile.TemporaryDirectory() as place:
        synthesize(SYNTHETIC, Path(place) / SYNTHETIC, layers=1)
        spec = replace(family.release(SYNTHETIC).spec, context=128)
        some = [Grouped(8, 128, True), Grouped(4, 128, True), Grouped(4, None, True)]
        read, other = random_texts(spec, 128, 2, seed=0), random_texts(spec, 128, 8, seed=1)
        what = f"`{SYNTHETIC}` with random weights, its first layer, on random ids; GPTQ with others:"
        cases.append({"what": what, "rows": rows(Path(place) / SYNTHETIC, read, some, other)})
    print(write("accuracy", provenance() | {"cases": cases}))


if __name__ == "__main__":
    main()
