"""Draws the pictures that stand in the repository; chapters draw theirs while the book is built.

python docs/figures.py            # draw them anew
python docs/figures.py --check    # exit 1 if one is not what would be drawn
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

import glm  # noqa: E402
from docs.drawing import Picture, draw_mask  # noqa: E402
from glm.layout import Blank  # noqa: E402

READ = ("A", "model", "fills", "[MASK]", "by", "writing")
WRITTEN = ("sop", "the", "blank")


def layout() -> Picture:
    """Positions and mask of a sample with one blank in ChatGLM-6B, and of the same tokens in ChatGLM2-6B."""
    first, second = (glm.release(name).spec.reading for name in ("chatglm-6b", "chatglm2-6b"))
    assert isinstance(first, Blank)
    special = {"[MASK]": first.masks[1], "sop": first.sop}
    words = [*READ, *WRITTEN]
    ids = torch.tensor([[special.get(word, i) for i, word in enumerate(words)]])
    picture = Picture(7.6, 3.5)
    left, right = picture.subplots(1, 2)
    draw_mask(left, first.read(ids), words)
    left.set_title("ChatGLM-6B: reads both ways, writes\nat the place of the blank", loc="left")
    draw_mask(right, second.read(ids), words)
    right.set_title("ChatGLM2-6B: the same tokens,\none after another", loc="left")
    return picture


FIGURES: dict[Path, Callable[[], Picture]] = {ROOT / "docs" / "static" / "layout.svg": layout}


def main() -> int:
    """Draw or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, draw in FIGURES.items():
        picture = draw().svg()
        if not path.exists() or path.read_text(encoding="utf-8") != picture:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(picture, encoding="utf-8")
    print(f"{'stale' if check else 'drawn anew'}: {', '.join(stale) or 'nothing'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
