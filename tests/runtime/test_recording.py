"""Recordings without a GPU: torch's part is played by what only remembers the order of things."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_generation import model_of, native_spec

import glm
from glm import Engine
from glm.runtime import recording
from glm.runtime.recording import Recording

CUDA = torch.device("cuda")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of torch.cuda, in order."""
    asked: list[str] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            asked.append("wait")

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    @contextmanager
    def on_stream(stream: Any) -> Any:
        asked.append("on a stream")
        yield

    @contextmanager
    def capture(graph: Any, pool: Any = None, stream: Any = None) -> Any:
        assert stream is not None
        asked.append(f"capture into {pool}")
        yield

    fakes = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "stream": on_stream, "graph": capture}
    for name, fake in fakes.items():
        monkeypatch.setattr(recording.torch.cuda, name, fake)
    return asked


def test_recorded_once_behind_a_warm_up_and_replayed_ever_after(log: list[str]) -> None:
    def function() -> list[int]:
        log.append("run")
        return [len(log)]

    def warm_up(run: Any) -> None:
        log.append("warm up")
        run()

    recorded = Recording(function, warm_up, CUDA, "the pool")
    first = recorded()
    before = ["wait", "on a stream", "warm up", "run", "wait", "capture into the pool", "run", "replay"]
    assert log == before
    assert recorded() is first
    assert log == [*before, "replay"]


def test_on_the_cpu_it_is_a_call(log: list[str]) -> None:
    recorded = Recording(lambda: len(log), lambda run: None, torch.device("cpu"))
    log.append("x")
    assert recorded() == 1
    log.append("y")
    assert recorded() == 2


def test_warming_up_leaves_nothing_behind(log: list[str]) -> None:
    """Before every step of an engine, whatever its rows are about: the tokens are the same."""
    pure = model_of(native_spec(), 3)
    engine = Engine(pure, max_batch=3, max_length=40)
    whole = engine.launch

    def launch(writers: Any) -> Any:
        for recorded in engine.recordings.values():
            recorded.warm_up(recorded.function)
        return whole(writers)

    engine.launch = launch  # type: ignore[method-assign]
    prompts = [[3, 4, 5], [6], [7, 8]]
    for how in ({}, {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 2}):
        new = engine.generate(prompts, max_new_tokens=9, stop=(), **how)
        assert new == glm.generate(pure, prompts, max_new_tokens=9, stop=(), **how)
    assert engine.recordings
