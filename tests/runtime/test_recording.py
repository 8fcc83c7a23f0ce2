"""Recordings without a GPU: torch's part is played by what only remembers the order of things.

What may not stand in a recorded step is looked for on the CPU, operator by operator.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_generation import model_of, native_spec
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import TOYS, made
from two_processes import prompts as toy_prompts

import glm
from glm import Engine, PromptLookup
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

    def set_sync(mode: Any) -> None:
        asked.append(f"waiting is {'an error' if mode == 'error' else 'allowed'}")

    monkeypatch.setattr(recording.torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(recording.torch.cuda, "set_sync_debug_mode", set_sync)
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
    watched = ["waiting is an error", "warm up", "run", "waiting is allowed"]
    before = ["wait", "on a stream", "warm up", "run", *watched, "wait", "capture into the pool", "run", "replay"]
    assert log == before
    assert recorded() is first
    assert log == [*before, "replay"]


def test_what_waits_is_called_each_time(log: list[str]) -> None:
    """As torch says it when it is told that waiting is an error."""

    def function() -> int:
        log.append("run")
        if log.count("waiting is an error") > log.count("waiting is allowed"):
            raise RuntimeError("called a synchronizing CUDA operation")
        return log.count("run")

    recorded = Recording(function, lambda run: run() and None, CUDA)
    assert recorded() == 3
    assert recorded() == 4
    assert recorded.graph is None
    assert not any(entry.startswith("capture") for entry in log)


def test_another_error_is_not_taken_for_waiting(log: list[str]) -> None:
    def function() -> None:
        if log[-1] == "waiting is an error":
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Recording(function, lambda run: run(), CUDA)()
    assert log[-1] == "waiting is allowed"


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


# ----------------------------------------------------------------------------- nothing waits for the host

WAITING = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "bincount",
        "_unique2", "unique_dim", "unique_consecutive", "lift_fresh",
    )
}  # fmt: skip
"""Operators that on a GPU wait for the device; `lift_fresh` is numbers of Python's, which would have to be copied."""


class WaitError(Exception):
    """Something would have waited."""


class Watch(TorchDispatchMode):
    """Raises WaitError where a GPU would have been waited for, in the kernels' references too.

    Not in the reference of a product with offsets: in half precision a kernel computes it, else nothing is recorded.
    Nor in that of `accept`, whose kernel takes all that lies on a GPU.
    """

    hidden = True

    def __enter__(self) -> "Watch":
        self.hidden = False
        return super().__enter__()

    def __exit__(self, *why: Any) -> None:
        self.hidden = True
        super().__exit__(*why)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if name.startswith("glm_kernels::"):
            given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
            try:
                if given.get("offsets") is None and name != "glm_kernels::accept":
                    with self:
                        return OPDEFS[name]._init_fn(*args)
                self.hidden = True
                return func(*args)
            finally:
                self.hidden = False
        masked = name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masked or name in WAITING:
            raise WaitError(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """`tolist` and `numpy` are no operators: they are refused by themselves."""
    mode = Watch()

    def watched(plain: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def call(x: Tensor) -> Any:
            if not mode.hidden:
                raise WaitError("tolist or numpy")
            return plain(x)

        return call

    monkeypatch.setattr(Tensor, "tolist", watched(Tensor.tolist))
    monkeypatch.setattr(Tensor, "numpy", watched(Tensor.numpy))
    return mode


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x[0].item(), lambda x: int(x[0]), lambda x: bool((x > 0).any()), lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1)[x > 0].sum(), lambda x: x.nonzero(), lambda x: x.nonzero(as_tuple=True),
        lambda x: torch.tensor([1.0, 2.0]) + x, lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x.unique(),
        lambda x: x.index_put_((x > 0,), x[:1]), lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_the_watch_sees_what_waits(waiting: Callable[[Tensor], Any], watch: Watch) -> None:
    x = torch.ones(2)
    with watch, pytest.raises(WaitError):
        waiting(x)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("name", TOYS)
def test_a_step_never_waits_for_the_host(name: str, draft: bool, watch: Watch) -> None:
    """So that it can be recorded: greedy, sampled, and with guesses; of every kind of model."""
    pure = made(TOYS[name])
    engine = Engine(pure, max_batch=2, max_length=64, draft=PromptLookup(2) if draft else None)
    for how in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "seed": 5}):
        requests = [engine.submit(p, max_new_tokens=40, stop=(), **how) for p in toy_prompts(pure.spec)]
        for _ in range(3):
            engine.step()
        assert len(engine.seats.writing()) == 2
        with torch.inference_mode(), watch:
            for recorded in engine.recordings.values():
                recorded.function()
        for request in requests:
            engine.cancel(request)
    assert len({choice for _, choice in engine.recordings}) == 2
