"""Overlap: a kernel begins while the one before it in its stream still runs (programmatic dependent launch).

    with glm_kernels.overlapping():
        y = step(x)  # recorded as a CUDA graph or launched as it is

A decode step is a chain of hundreds of short kernels. Between two of them a device of compute capability 9.0 or later
drains and fills again, about a microsecond in which memory rests. Launched this way, a kernel's programs may begin as
soon as all programs of the kernel before it have said `release`, or have ended; they `fetch` the weights that they
will read first into the L2 cache, and `wait` before they touch anything else. Elsewhere, and outside of the context,
kernels are launched and compiled as ever: `ahead`, a compile-time value of theirs, is None, and nothing of this is in
the machine code. With `ahead` 0 or more, launches carry launch_pdl=True, and so many tiles of weights are fetched.

Why the results are the same. `wait` returns when the kernel before has ended, all of its programs, and what it wrote
can be seen (PTX ISA, griddepcontrol).

- Every kernel that is launched this way waits, in all of its programs, before it reads what a kernel may have written,
  and before it writes: what it overwrites may still be read, for memory of a tensor that is no longer needed is given
  to the next one while the kernel that reads it runs.
- It has waited for all kernels before the last one too. The last ended only after its own programs had waited for the
  kernel before it, and so on back to a kernel that was launched as usual, which began when everything before it had
  ended. The chain is as strong as its weakest kernel: one that did not wait could end before its predecessor, and
  whoever waited for it would read too early. That `release` comes before `wait`, so that three kernels and more may
  be on the device at once, changes nothing in this. Nor can they block each other: a program begins only when all
  programs of the kernel before have begun, so whoever is waited for has its place on the device.
- Kernels launched as usual, torch's own among them, copies and events begin or happen when all before has ended, so
  they may stand anywhere. Behind such a kernel, which never says `release`, a kernel of ours begins when all of its
  programs have ended, and the wait is short.
- Weights may be fetched before. A fetch moves no value into a register: it asks the L2 cache, which all programs
  share and which is coherent, to have a line. So no result depends on it, even if a kernel still wrote that weight.
  An ordinary load would need that no kernel of the stream writes weights. Addresses are held inside the tensor.

A kernel that takes part has a last compile-time argument, `ahead`, and begins

    if ahead is not None:
        release()
        fetch(weight + …)  # what it will read first; pointers to one element of each 32 bytes
        wait()

and its launch passes `ahead = tiles_ahead(x)` as that argument and `**launched(ahead)` beside its other options.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from glm_kernels.dispatch import Target, jit, target, tl, triton

TILES = 4  # of weights that a program fetches, 16 to 64 KiB: a processor's share of memory in 1 to 3 microseconds
AHEAD: ContextVar[int | None] = ContextVar("ahead", default=None)


@contextmanager
def overlapping(tiles: int = TILES) -> Iterator[None]:
    """Launches inside may begin before what stands before them has ended; see the top of this file.

    Their results are the same. On devices that cannot, CUDA devices before compute capability 9.0 and all others,
    launches are as ever. It holds for the thread that enters it. As a decorator, `overlapping()(function)`, it holds
    for every call. A CUDA graph that is captured inside keeps it when it is replayed anywhere.

    Args:
        tiles: Tiles of weights that every program fetches into the L2 cache while it waits, from 0.

    Raises:
        ValueError: `tiles` is below 0.
    """
    if tiles < 0:
        raise ValueError(f"tiles that are fetched ahead are 0 or more, not {tiles}")
    before = AHEAD.set(tiles)
    try:
        yield
    finally:
        AHEAD.reset(before)


def tiles_ahead(x: Tensor) -> int | None:
    """Tiles that a kernel on the device of x is to fetch before it waits; None where it is launched as usual."""
    ahead = AHEAD.get()
    return None if ahead is None or not can_overlap(x.device) else ahead


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether `overlapping` has an effect on kernels there."""
    return triton is not None and device.type == "cuda" and overlaps(target(torch.empty(0, device=device)))


def overlaps(device: Target) -> bool:
    """Whether kernels can begin early there: compute capability 9.0 and later."""
    return device.backend == "cuda" and isinstance(device.arch, int) and device.arch >= 90


def launched(ahead: int | None) -> dict[str, Any]:
    """The option of a launch that begins early; none otherwise."""
    return {} if ahead is None else {"launch_pdl": True}


@jit
def release():  # type: ignore[no-untyped-def]
    """The next kernel may begin, as soon as all programs of this one have come here or ended."""
    tl.extra.cuda.gdc_launch_dependents()


@jit
def wait():  # type: ignore[no-untyped-def]
    """Until the kernel before has ended and what it wrote can be seen."""
    tl.extra.cuda.gdc_wait()


@jit
def fetch(pointers):  # type: ignore[no-untyped-def]
    """Ask the L2 cache for the 32 bytes around each of some pointers to global memory."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
