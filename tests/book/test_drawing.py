"""The pictures of the book are drawn, show what they are given, and are the same whenever they are."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.text import Text

import glm
from docs import drawing

LAYOUT = glm.Layout.blanks(4, [(2, 3), (1, 2)])  # 4 tokens read, then spans of 3 and 2 tokens
LABELS = ["[gMASK]", "a", "[MASK]", "b", "sop", "c", "d", "sop", "e"]


def words(picture: drawing.Picture) -> list[str]:
    picture.svg()
    return [text.get_text() for text in picture.findobj(Text)]


def kinds(axes: Axes) -> torch.Tensor:
    """What is drawn of each cell: 0 not seen, 1 seen, 2 seen ahead."""
    [mesh] = axes.findobj(QuadMesh)
    array = mesh.get_array()
    assert array is not None
    return torch.tensor(array.tolist())


def test_a_mask_is_drawn_as_it_is() -> None:
    picture = drawing.mask(LAYOUT, LABELS)
    [axes] = picture.axes
    drawn = kinds(axes)
    assert torch.equal(drawn > 0, LAYOUT.visible[0])
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert torch.equal(drawn == 2, LAYOUT.visible[0] & future)
    assert bool((drawn == 2).any())
    assert [tick.get_text() for tick in axes.get_yticklabels()] == LABELS
    written = [text for text in axes.texts if text.get_text().isdigit()]
    assert len(written) == 2 * 9
    first, second = written[:9], written[9:]
    pairs = [[int(a.get_text()), int(b.get_text())] for a, b in zip(first, second, strict=True)]
    assert pairs == LAYOUT.positions[0].tolist()


def test_a_mask_with_a_cache_and_one_axis() -> None:
    layout = glm.Layout.causal(1, 5).following(2, (1,))
    picture = drawing.mask(layout, list("abcdefg"), title="two more")
    [axes] = picture.axes
    assert kinds(axes).shape == (2, 7)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["f", "g"]
    assert {"position", "two more", "5", "6"} <= set(words(picture))
    assert "sees ahead" not in words(picture)


def test_labels_must_be_as_many_as_keys() -> None:
    with pytest.raises(ValueError, match="9 keys want as many labels, not 2"):
        drawing.mask(LAYOUT, ["a", "b"])


def test_no_word_lies_on_another() -> None:
    """Words of a mask and of bars, as drawn, do not overlap."""
    names = ["ChatGLM-6B", "GLM-4-9B", "GLM-5"]
    for picture in (drawing.mask(LAYOUT, LABELS), drawing.bars(names, {"one": [1, 2, 3], "two": [3, 2, 1]})):
        picture.svg()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in picture.findobj(Text)
            if text.get_text() and text.get_visible()
        ]
        for i, (one, a) in enumerate(boxes):
            for other, b in boxes[:i]:
                across = min(a.x1, b.x1) - max(a.x0, b.x0)
                along = min(a.y1, b.y1) - max(a.y0, b.y0)
                assert across < 1 or along < 1, (one, other)


def test_bars_have_their_numbers() -> None:
    picture = drawing.bars(["a", "b"], {"GB": [1.5, 12.25]}, number="{:.1f}")
    assert {"a", "b", "1.5", "12.2", "GB"} <= set(words(picture))
    with pytest.raises(ValueError, match="every series wants 2 numbers"):
        drawing.bars(["a", "b"], {"GB": [1.0]})


def test_heat_shows_the_matrix() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    picture = drawing.heat(matrix, ["a", "b"], ["x", "y", "z"], title="t", label="l")
    assert torch.equal(kinds(picture.axes[0]), matrix)
    assert {"a", "b", "x", "y", "z", "t", "l"} <= set(words(picture))
    with pytest.raises(ValueError, match="a matrix with a name"):
        drawing.heat(matrix, ["a"])
    with pytest.raises(ValueError, match="a matrix with a name"):
        drawing.heat(matrix[0])


def test_the_same_picture_is_the_same_bytes(tmp_path: Path) -> None:
    one, two = (drawing.mask(LAYOUT, LABELS) for _ in range(2))
    assert one.svg() == two._repr_svg_()
    two.save(tmp_path / "mask.svg")
    root = ElementTree.fromstring((tmp_path / "mask.svg").read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    assert "date" not in two.svg()
