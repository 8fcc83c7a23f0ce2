"""Tensors from files to their places, by as many threads as that takes.

A thread reads a piece of some tensor, brings it to its place, looks whether its numbers are finite, and takes the next
piece. Beyond the tensors themselves memory holds a buffer a thread; none where a piece is read straight into its place.

A GPU gets 8 threads and pieces of 16 MiB. One thread reads some 5 to 10 GB/s out of the page cache, and PCIe 5 takes
50: while one piece is copied, others are read. Buffers are pinned, for otherwise the driver copies everything once
more; each thread has a stream, so that no copy waits for another thread's check; and a piece takes longer than what
Python has to say about it, which only one thread can say at a time.

The CPU gets the caller's thread and pieces of 4 MiB, which are still in the processor's cache when they are looked at.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread

import torch
from torch import Tensor

from glm.errors import CheckpointError
from glm.fields import shown
from glm.tensor_file import PIECE, Derived, Progress, TensorInfo, finite, read_exactly, unfit

GPU_THREADS = 8
GPU_PIECE = 16 << 20  # bytes


@dataclass(frozen=True)
class Arrival:
    """A tensor on disk and its place: a view of any strides, device and dtype, or None where it is only looked at."""

    name: str
    info: TensorInfo
    place: Tensor | None

    @property
    def takes_bytes(self) -> bool:
        """Whether it can be read straight into its place."""
        place = self.place
        if place is None or place.dtype != self.info.dtype or place.device.type != "cpu":
            return False
        return place.is_contiguous()

    def pieces(self, size: int) -> Iterator["Arrival"]:
        """The same in runs of rows, of about `size` bytes each. What is derived comes in one piece, as it is made."""
        info = self.info
        place = self.place if self.place is None or self.place.dim() else self.place[None]
        shape = (math.prod(info.shape),) if place is None else place.shape
        if not math.prod(shape):
            return
        if isinstance(info, Derived):
            yield Arrival(self.name, info, place)
            return
        row = math.prod(shape[1:]) * info.dtype.itemsize
        rows = max(1, size // row)
        for start in range(0, shape[0], rows):
            end = min(start + rows, shape[0])
            piece = TensorInfo(
                info.file, info.dtype, (end - start, *shape[1:]), info.begin + start * row, info.begin + end * row
            )
            yield Arrival(self.name, piece, None if place is None else place[start:end])


def read_all(arrivals: Iterable[Arrival], device: torch.device, progress: Progress | None = None) -> None:
    """Reads every tensor to its place on `device`. `progress` is told bytes read.

    Raises CheckpointError for a file that ends early, and where a tensor has NaN or Inf in it or in its place.
    """
    gpu = device.type == "cuda"
    pieces = (piece for arrival in arrivals for piece in arrival.pieces(GPU_PIECE if gpu else PIECE))
    with Queue(pieces, progress) as queue:
        if gpu:
            to_gpu(queue, device)
        else:
            read_from(queue, Buffer(pinned=False))


def read_tensor(name: str, info: TensorInfo, place: Tensor) -> None:
    """Reads one tensor to its place. Raises what `read_all` does."""
    read_all([Arrival(name, info, place)], place.device)


class Queue:
    """Pieces that threads take, until there are none or a thread failed. Closes the files at the end."""

    def __init__(self, pieces: Iterator[Arrival], progress: Progress | None) -> None:
        self.pieces, self.progress = pieces, progress
        self.files: dict[Path, int] = {}
        self.taking, self.making = Lock(), Lock()
        self.errors: list[BaseException] = []

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            os.close(file)

    def take(self) -> Arrival | None:
        """The next piece."""
        with self.taking:
            return None if self.errors else next(self.pieces, None)

    def file(self, path: Path) -> int:
        """The descriptor of a file, opened when it is first asked for."""
        with self.taking:
            if path not in self.files:
                self.files[path] = os.open(path, os.O_RDONLY)
            return self.files[path]

    def done(self, piece: Arrival) -> None:
        """A piece is in its place."""
        if self.progress is not None:
            with self.taking:
                self.progress(piece.info.nbytes)


class Buffer:
    """Memory for one piece after the other, as large as the largest so far."""

    def __init__(self, pinned: bool) -> None:
        self.pinned, self.bytes = pinned, torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, info: TensorInfo) -> Tensor:
        """Room for what `info` describes."""
        if self.bytes.nbytes < info.nbytes:
            self.bytes = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        return self.bytes[: info.nbytes].view(info.dtype).view(info.shape)


def to_gpu(queue: Queue, device: torch.device) -> None:
    """Empty the queue in threads that have a pinned buffer and a stream each."""

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            read_from(queue, Buffer(pinned=True))

    torch.cuda.synchronize(device)  # a place may be memory that something queued before still uses
    in_threads(GPU_THREADS, queue, work)
    torch.cuda.empty_cache()  # numbers of another dtype were converted in memory of those streams


def in_threads(count: int, queue: Queue, work: Callable[[], None]) -> None:
    """Do the same work in `count` threads; raises the first error of any, after which the queue gives no more."""
    inference = torch.is_inference_mode_enabled()  # a thread does not inherit it

    def attempt() -> None:
        try:
            with torch.inference_mode(inference):
                work()
        except BaseException as error:
            queue.errors.append(error)

    threads = [Thread(target=attempt) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: the threads end with their piece, which must not lose its file before
        queue.errors.insert(0, error)
        for thread in threads:
            thread.join()
    if queue.errors:
        raise queue.errors[0]


def read_from(queue: Queue, buffer: Buffer) -> None:
    """Read piece after piece, until the queue gives none."""
    while (piece := queue.take()) is not None:
        if isinstance(piece.info, Derived):
            with queue.making:  # one at a time, for it may be large
                bring(piece, piece.info.make())
        else:
            numbers = piece.place if piece.takes_bytes else buffer.of(piece.info)
            assert numbers is not None
            try:
                read_exactly(queue.file(piece.info.file), piece.info.begin, numbers)
            except (OSError, EOFError) as error:
                raise CheckpointError(
                    f"{piece.info.file}: the tensor {shown(piece.name)} cannot be read ({error})"
                ) from None
            bring(piece, numbers)
        queue.done(piece)


def bring(piece: Arrival, numbers: Tensor) -> None:
    """Copy numbers to the place of a piece, unless they are there, and look whether all are finite."""
    place = numbers if piece.place is None else piece.place
    if place is not numbers:
        gpu = place.device.type == "cuda"
        place.copy_(numbers.view(place.shape), non_blocking=gpu)  # which has the GPU convert, not the CPU
        if gpu:
            torch.cuda.current_stream(place.device).synchronize()
    if not finite(place):
        raise CheckpointError(unfit(piece.name, piece.info, numbers, place.dtype))
