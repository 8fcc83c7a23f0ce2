"""Writes tiny-glm's vocabulary as the script that the interactive page reads: `python docs/vocabulary.py`.

With --check it only says whether the file there is what it would write. Of a byte-level vocabulary all is given by the
order of the bytes, the pairs in the order in which they are joined, and the special tokens.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import glm  # noqa: E402
from glm.vocabulary import BYTES  # noqa: E402

FILE = ROOT / "docs" / "static" / "interactive" / "vocabulary.js"


def script(tokenizer: Path) -> str:
    """The JavaScript for a tokenizer.json. Raises ValueError where ids are not bytes first, then pairs."""
    told = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids, merges = told["model"]["vocab"], told["model"]["merges"]
    names = {id: piece for piece, id in ids.items()}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in merges]
    if [names[256 + r] for r in range(len(pairs))] != ["".join(pair) for pair in pairs]:
        raise ValueError(f"{tokenizer}: pair r does not have id 256 + r")
    vocabulary = {
        "bytes": [BYTES[names[id]] for id in range(256)],
        "merges": [[ids[a], ids[b]] for a, b in pairs],
        "special": {token["content"]: token["id"] for token in told["added_tokens"]},
    }
    text = json.dumps(vocabulary, separators=(",", ":"))
    return (
        "/* tiny-glm's vocabulary; written by docs/vocabulary.py */\n"
        f'const vocabulary = {text};\nif (typeof module !== "undefined") module.exports = vocabulary;\n'
    )


def main() -> int:
    """Write the file, or compare it."""
    text = script(glm.embedded() / "tokenizer.json")
    if "--check" in sys.argv[1:]:
        current = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
        if current != text:
            print(f"{FILE} is not what docs/vocabulary.py writes: run it", file=sys.stderr)
        return int(current != text)
    temporary = FILE.with_suffix(".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
