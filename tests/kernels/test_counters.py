"""Counters of a stream: kept between calls, and never memory that belongs to a captured graph."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from glm_kernels import counters
from glm_kernels.counters import COUNTERS, counters_for


@pytest.fixture(autouse=True)
def none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "kept", {})


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A tensor that says it is on a GPU, with `stream` and `capturing` to set."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("meta"), stream=1, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=x.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: x.capturing)
    return x


def test_they_are_zeros_and_the_same_at_every_call() -> None:
    x = torch.ones(1)
    found = counters_for(x, 3)
    assert found.dtype == torch.int32
    assert found.numel() >= 3
    assert not found.any()
    assert counters_for(x, COUNTERS) is found


def test_more_than_are_kept_are_made_for_the_call() -> None:
    x = torch.ones(1)
    many = counters_for(x, COUNTERS + 1)
    assert many.numel() == COUNTERS + 1
    assert not many.any()
    assert not counters.kept


def test_every_stream_has_its_own(card: Any) -> None:
    first = counters_for(card, 1)
    card.stream = 2
    assert counters_for(card, 1) is not first
    card.stream = 1
    assert counters_for(card, 1) is first


def test_what_is_made_during_a_capture_is_the_graphs(card: Any) -> None:
    card.capturing = True
    once = counters_for(card, 5)
    assert once.numel() == 5
    assert not counters.kept
    card.capturing = False
    kept = counters_for(card, 5)
    card.capturing = True
    assert counters_for(card, 5) is kept
