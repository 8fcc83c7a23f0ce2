"""Recordings: a step of the engine as one CUDA graph, so that hundreds of kernels cost the host a single launch."""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


class Recording(Generic[Result]):
    """A function without arguments that reads and writes tensors which stay where they are.

    On a GPU it is recorded at its first call and replayed from then on, and its result is the same tensors each time;
    they are to be read before another recording of the same `pool` of memory is replayed. `warm_up` is to run the
    function without any lasting effect: what compiles or allocates at its first call must not do so while recording.

    On the CPU the function is simply called. So it is where it waits for the device, which no graph can: experts in
    float32 do, and modules that are not of this package may.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        warm_up: Callable[[Callable[[], Result]], None],
        device: torch.device,
        pool: Any = None,
    ) -> None:
        self.function, self.warm_up, self.device, self.pool = function, warm_up, device, pool
        self.recordable = device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result | None = None

    def __call__(self) -> Result:
        """What the function gives."""
        if self.recordable and self.graph is None:
            self.record()
        if not self.recordable:
            return self.function()
        assert self.graph is not None
        assert self.result is not None
        self.graph.replay()
        return self.result

    def record(self) -> None:
        """Capture the function, on the stream that it was warmed up on: kernels that count have counters there."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.warm_up(self.function)
            self.recordable = not waits(partial(self.warm_up, self.function))
        torch.cuda.current_stream(self.device).wait_stream(stream)
        if not self.recordable:
            return
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool, stream=stream):
            self.result = self.function()


def waits(function: Callable[[], None]) -> bool:
    """Whether a function waits for the device; it is cut short there. As far as torch knows: its own operators do."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False
