"""What the goldens hold, text by text, as the engine reads it: without padding, one row at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from golden_folders import ELSEWHERE, GOLDENS, folders

from glm.layout import Layout
from glm.verify import Golden

ALL = {folder.name: folder for folder in (*folders(ELSEWHERE), *folders(GOLDENS))}  # the project's own copy comes last


def texts(folder: Path) -> Iterator[tuple[list[int], Layout | None]]:
    """Ids and, where they are not laid out as the release itself does, their layout; prompt and decoded tokens."""
    for scenario in Golden(folder, torch.float32).scenarios:
        for b, real in enumerate(scenario.real):
            ids = scenario.ids[b, real].tolist()
            if scenario.natural:
                yield ids + scenario.tokens[b].tolist(), None
            else:
                assert scenario.positions is not None
                visible = scenario.visible[b : b + 1, real][:, :, real]
                yield ids, Layout(scenario.positions[b : b + 1, real], visible)
