"""For every test: one thread, since the models are so small that a second one only waits for the first."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
