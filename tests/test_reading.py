"""Tensors read by several threads: every number in its place, one error at most, and memory within its bound."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glm import reading
from glm.errors import CheckpointError
from glm.reading import Arrival, Buffer, Queue, in_threads, read_all, read_from
from glm.tensor_file import PIECE, Derived, TensorInfo, read_header

THREADS = 5
SIZE = 1000  # bytes of a piece, so that there are many


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(123, 45),
        "half": torch.randn(77, 9).half(),
        "brain": torch.randn(1, 3000).bfloat16(),  # a row of more than a piece
        "integers": torch.randint(-128, 128, (4000,), dtype=torch.int8),
        "scalar": torch.tensor(0.5),
        "nothing": torch.empty(0, 3),
        "stack": torch.randn(3, 50, 7),
    }


def files(folder: Path, numbers: dict[str, Tensor]) -> dict[str, TensorInfo]:
    """Two files."""
    infos = {}
    for i in range(2):
        path = folder / f"{i}.safetensors"
        save_file(dict(list(numbers.items())[i::2]), path)
        infos |= read_header(path)
    return infos


def by_threads(arrivals: list[Arrival], count: int = THREADS, done: list[int] | None = None) -> Queue:
    """What `read_all` does for a GPU, for the CPU."""
    pieces = (piece for arrival in arrivals for piece in arrival.pieces(SIZE))
    with Queue(pieces, None if done is None else done.append) as queue:
        in_threads(count, queue, lambda: read_from(queue, Buffer(pinned=False)))
    return queue


@pytest.mark.parametrize("threads", [0, 1, THREADS])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_every_number_arrives(threads: int, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Straight into a place, and through a buffer into one of another dtype or order; 0 threads are the caller's."""
    numbers = tensors()
    infos = files(tmp_path, numbers)
    whole = {
        name: torch.full(x.shape, 99).to(dtype if dtype and x.is_floating_point() else x.dtype)
        for name, x in numbers.items()
    }
    turned = torch.empty(45, 123).T
    arrivals = [Arrival(name, infos[name], place) for name, place in whole.items()]
    arrivals += [Arrival("matrix", infos["matrix"], turned), Arrival("half", infos["half"], None)]
    done: list[int] = []
    if threads:
        by_threads(arrivals, threads, done)
        assert len(done) > 50
    else:
        read_all(arrivals, torch.device("cpu"), done.append)
    assert sum(done) == sum(arrival.info.nbytes for arrival in arrivals)
    for name, x in numbers.items():
        assert torch.equal(whole[name], x.to(whole[name].dtype)), name
    assert torch.equal(turned, numbers["matrix"])


def test_places_of_inference_mode(tmp_path: Path) -> None:
    """Such a tensor can be written in inference mode alone, which is a matter of the thread."""
    infos = files(tmp_path, {"a": torch.randn(100, 30), "b": torch.zeros(1)})
    with torch.inference_mode():
        place = torch.empty(100, 30, dtype=torch.float64)
        by_threads([Arrival("a", infos["a"], place)])
    assert place.isfinite().all()


def test_the_first_error_ends_it(tmp_path: Path) -> None:
    numbers = {str(i): torch.randn(40, 25) for i in range(40)}
    numbers["3"][7, 7] = torch.inf
    infos = files(tmp_path, numbers)
    done: list[int] = []
    arrivals = [Arrival(name, infos[name], torch.empty_like(x)) for name, x in numbers.items()]
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="the tensor '3' has NaN or Inf"):
        by_threads(arrivals, done=done)
    assert threading.active_count() == before
    assert sum(done) < sum(x.nbytes for x in numbers.values()) / 2


def test_a_file_that_ends_early_and_one_that_is_gone(tmp_path: Path) -> None:
    infos = files(tmp_path, tensors())
    arrivals = [Arrival(name, info, None) for name, info in infos.items()]
    path = tmp_path / "0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"0\.safetensors: the tensor .* cannot be read"):
        by_threads(arrivals)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"0\.safetensors: the tensor .* cannot be read .*No such file"):
        by_threads(arrivals)


def test_what_is_derived_is_made_one_at_a_time(tmp_path: Path) -> None:
    now, most = 0, 0

    def make() -> Tensor:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.01)
        now -= 1
        return torch.ones(3, 4)

    infos = [Derived(tmp_path, torch.float32, (3, 4), 0, 48, make) for _ in range(8)]
    places = [torch.empty(2, 6) for _ in infos]
    by_threads([Arrival(str(i), info, place) for i, (info, place) in enumerate(zip(infos, places, strict=True))])
    assert all(torch.equal(place, torch.ones(2, 6)) for place in places)
    assert most == 1


def test_several_threads_read_at_a_time(tmp_path: Path) -> None:
    """Each waits in its first piece until all the others have one."""
    infos = files(tmp_path, {str(i): torch.randn(10, 25) for i in range(THREADS)})
    together = threading.Barrier(THREADS, timeout=30)

    def arrivals() -> Iterator[Arrival]:
        yield from (Arrival(name, info, None) for name, info in infos.items())

    with Queue(arrivals(), None) as queue:

        def work() -> None:
            piece = queue.take()
            assert piece is not None
            together.wait()
            assert queue.file(piece.info.file) > 2

        in_threads(THREADS, queue, work)
        assert len(queue.files) == 2


def test_an_interrupt_waits_for_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files are closed behind them; nothing more is read."""
    infos = files(tmp_path, {str(i): torch.randn(40, 25) for i in range(40)})
    interrupted: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            if not interrupted:
                interrupted.append(self)
                raise KeyboardInterrupt
            super().join(timeout)

    monkeypatch.setattr(reading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        by_threads([Arrival(name, info, None) for name, info in infos.items()])
    assert not interrupted[0].is_alive()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_buffer_for_what_cannot_be_read_in_place(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at all where dtype and order agree; else one of a piece, however large the tensor."""
    x = torch.randn(3 * PIECE // 4000, 1000)
    save_file({"x": x}, tmp_path / "x.safetensors")
    largest = 0

    class Watched(Buffer):
        def of(self, info: TensorInfo) -> Tensor:
            nonlocal largest
            found = super().of(info)
            largest = max(largest, self.bytes.nbytes)
            return found

    monkeypatch.setattr(reading, "Buffer", Watched)
    place = torch.empty(x.shape, dtype=dtype)
    read_all([Arrival("x", read_header(tmp_path / "x.safetensors")["x"], place)], torch.device("cpu"))
    assert torch.equal(place, x.to(dtype))
    assert largest == (0 if dtype == torch.float32 else PIECE // 4000 * 4000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_a_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(5 * reading.GPU_PIECE // 4000, 1000)
    save_file({"x": x}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["x"]
    place, turned = torch.empty(x.shape, dtype=dtype, device="cuda"), torch.empty(x.T.shape, device="cuda").T
    read_all([Arrival("x", info, place), Arrival("x", info, turned)], place.device)
    assert torch.equal(place.cpu(), x.to(dtype))
    assert torch.equal(turned.cpu(), x)
