"""For every test: one thread, since the models are so small that a second one only waits for the first."""

from collections.abc import Iterator

import pytest
import torch
from browser import Page, opened


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """A tab of a real browser."""
    with opened() as page:
        yield page
