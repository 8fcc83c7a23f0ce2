"""Acceptance of guesses: on the CPU the reference, in Triton's interpreter and on a GPU the kernel."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glm_kernels import accept
from glm_kernels import acceptance as module
from glm_kernels.acceptance import REJECTED, accept_reference
from harness import DEVICES, INTERPRETED, amid, directly, kernel, needs_triton, put_in, rerun
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

State = dict[str, Tensor]
GUARD = 77  # around what is read and written; around what was seen it is False
VOCABULARY = 5

# ----------------------------------------------------------------------------- one case, checked in every way


def state_of(ids: list[list[int]], tokens: list[list[int]], length: list[int], axes: int = 1) -> State:
    """Rows of some lengths, which read `tokens` and chose `ids`; the other numbers differ from row to row."""
    row = torch.arange(len(ids))
    seen = torch.zeros(len(ids), VOCABULARY, dtype=torch.bool)
    seen[row, row % VOCABULARY] = True
    return {
        "ids": torch.tensor(ids), "tokens": torch.tensor(tokens), "length": torch.tensor(length, dtype=torch.int32),
        "at": (50 - row).int(), "count": 3 * row + 1, "positions": 10 * row[:, None] + torch.arange(axes),
        "steps": (row[:, None] + torch.arange(axes)) % 3, "seen": seen,
    }  # fmt: skip


def by_hand(state: State) -> dict[str, list[Any]]:
    """The equation, row by row and guess by guess."""
    rows = {name: x.tolist() for name, x in state.items()}
    for b, ids in enumerate(rows["ids"]):
        tokens, kept = rows["tokens"][b], 0
        while rows["length"][b] > 0 and kept < len(ids) and (kept == 0 or ids[kept - 1] == tokens[kept]):
            kept += 1
        if kept > 0:
            tokens[0] = max(ids[kept - 1], 0)
        for id in ids[:kept]:
            if id >= 0:
                rows["seen"][b][id] = True
        rows["ids"][b] = ids[:kept] + [REJECTED] * (len(ids) - kept)
        for name in ("length", "at", "count"):
            rows[name][b] += kept
        steps = zip(rows["positions"][b], rows["steps"][b], strict=True)
        rows["positions"][b] = [position + kept * step for position, step in steps]
    return rows


def guard_of(x: Tensor) -> int:
    """What stands around x."""
    return 0 if x.dtype == torch.bool else GUARD


def guarded(state: State, device: str) -> tuple[State, State]:
    """The same numbers within guard bands, and the buffers they are parts of."""
    buffers, inner = {}, {}
    for name, x in state.items():
        if name in ("ids", "tokens", "seen"):  # at any stride
            inner[name] = amid(x.to(device), guard_of(x), margin=12)
            buffers[name] = inner[name]._base
        else:
            buffers[name] = x.new_full((x.numel() + 80,), GUARD, device=device)
            inner[name] = buffers[name][40:-40].view(x.shape).copy_(x)
    return inner, buffers


def untouched(inner: State, buffers: State) -> None:
    """Nothing around what was to be written was written."""
    for name, buffer in buffers.items():
        frame = buffer.clone()
        part = torch.as_strided(frame, inner[name].shape, inner[name].stride(), inner[name].storage_offset())
        part.fill_(guard_of(frame))
        assert (frame == guard_of(frame)).all(), f"{name} is written outside"


def check(state: State, device: str = "cpu") -> None:
    truth = by_hand(state)
    calls = [accept, accept_reference] + ([module.launch] if INTERPRETED or device != "cpu" else [])
    for call in calls:
        inner, buffers = guarded(state, device)
        call(**inner)
        assert {name: x.tolist() for name, x in inner.items()} == truth
        untouched(inner, buffers)


# ----------------------------------------------------------------------------- reference, interpreter, GPU

EDGES: dict[str, tuple[list[list[int]], list[list[int]], list[int]]] = {
    "without guesses": ([[2], [4], [0]], [[1], [1], [1]], [7, 1, 12]),
    "an idle row": ([[2], [4], [0]], [[1], [1], [1]], [7, 0, 12]),
    "none right": ([[2, 3, 4]], [[1, 0, 0]], [5]),
    "all right": ([[2, 3, 4]], [[1, 2, 3]], [5]),
    "one right": ([[2, 3, 4]], [[1, 2, 4]], [5]),
    "right again behind a wrong one": ([[2, 3, 4]], [[1, 1, 3]], [5]),
    "right in an idle row": ([[2, 3, 4], [2, 3, 4]], [[1, 2, 3], [1, 2, 3]], [0, 5]),
    "rows apart": ([[2, 3], [1, 1], [0, 4]], [[3, 2], [3, 2], [3, 0]], [3, 4, 5]),
    "not finite": ([[-1], [2]], [[3], [3]], [3, 4]),
    "not finite behind a right one": ([[2, -1, 3], [-1, 2, 3]], [[1, 2, 0], [1, 0, 2]], [3, 4]),
    "not finite behind a wrong one": ([[2, -1, 3]], [[1, 4, 1]], [3]),
    "the same id twice": ([[2, 2, 2], [0, 0, 0]], [[2, 2, 2], [0, 0, 1]], [3, 4]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, axes: int, device: str) -> None:
    check(state_of(*EDGES[name], axes), device)


@st.composite
def states(draw: st.DrawFn) -> State:
    """Few ids, so that guesses are often right."""
    B, T, axes = draw(st.sampled_from([1, 2, 31, 32, 33, 70])), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids, tokens = (torch.randint(low, 2, (B, T), generator=random) for low in (-1, 0))
    length = torch.randint(0, 3, (B,), generator=random)
    return state_of(ids.tolist(), tokens.tolist(), length.tolist(), axes)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(states())
def test_drawn(state: State) -> None:
    check(state)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_user_calls(device: str) -> None:
    """The first rows of more, as the engine has them; those behind stay as they are. None is nothing to do."""
    whole = {name: x.to(device) for name, x in state_of(*EDGES["rows apart"]).items()}
    before = {name: x.clone() for name, x in whole.items()}
    accept(**{name: x[:2] for name, x in whole.items()})
    truth = by_hand({name: x[:2] for name, x in before.items()})
    assert {name: x[:2].tolist() for name, x in whole.items()} == truth
    assert all(torch.equal(x[2:], before[name][2:]) for name, x in whole.items())
    accept(**{name: x[:0] for name, x in whole.items()})


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    state = {name: x.to(device) for name, x in state_of(*EDGES["one right"]).items()}
    torch.library.opcheck(module.accept_op, tuple(state.values()))


# ----------------------------------------------------------------------------- broken on purpose

MUTANTS = {  # {name: what is replaced, by what}
    "an idle row moves on": ("counts = cached > 0", "counts = cached >= 0"),
    "rows past the end": ("there = row < B", "there = row < B + 1"),
    "the last row left out": ("there = row < B", "there = row < B - 1"),
    "every guess is right": ("counts & (new == guess)", "counts"),
    "right again behind a wrong one": ("counts & (new == guess)", "(cached > 0) & (new == guess)"),
    "a guess one too early": ("tokens_row + i + 1, mask", "tokens_row + i, mask"),
    "the first choice is the newest": ("tl.where(counts, new, newest)", "tl.where(i == 0, new, newest)"),
    "the last choice is the newest": ("tl.where(counts, new, newest)", "new"),
    "what does not count is left": ("tl.where(counts, new, rejected)", "new"),
    "not finite is a token": ("tl.maximum(newest, 0)", "newest"),
    "not finite was seen": ("mask=counts & (new >= 0)", "mask=counts"),
    "what does not count was seen": ("mask=counts & (new >= 0)", "mask=there & (new >= 0)"),
    "seen by another row": ("seen + row * seen_row + new", "seen + 0 * row + new"),
    "ids of another row": ("tl.load(ids + row * ids_row + i", "tl.load(ids + row * tokens_row * 0 + i"),
    "length by one": ("tl.store(length + row, cached + kept", "tl.store(length + row, cached + 1"),
    "place by one": ("tl.load(at + row, mask=busy) + kept", "tl.load(at + row, mask=busy) + 1"),
    "count by one": ("tl.load(count + row, mask=busy) + kept", "tl.load(count + row, mask=busy) + 1"),
    "positions by one step": ("position + kept * step", "position + step"),
    "axes of another row": ("place = row * A + axis", "place = row + axis"),
}  # fmt: skip


def check_all() -> None:
    for edge in EDGES.values():
        for axes in (1, 2):
            check(state_of(*edge, axes))


@kernel
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, tmp_path, module, "accept_kernel", *MUTANTS[name])
    monkeypatch.setattr(module, "ROWS", 4)  # few rows that are not there, so that a fault does no harm
    with pytest.raises(AssertionError):
        check_all()


# ----------------------------------------------------------------------------- the call


@directly
def test_torch_compile_takes_it_whole() -> None:
    compiled = torch.compile(lambda state: accept(**state), fullgraph=True, backend="aot_eager")
    state = state_of(*EDGES["one right"])
    truth = by_hand(state)
    compiled(state)
    assert {name: x.tolist() for name, x in state.items()} == truth


@directly
def test_tensors_that_do_not_fit_are_named() -> None:
    good = state_of(*EDGES["rows apart"], 2)
    apart = {name: good[name].mT.contiguous().mT for name in ("tokens", "positions")}
    for fault, change in {
        r"ids must be \[B, T\]": {"ids": good["ids"][0]},
        r"tokens must be torch.int64 \[3, 2\] on cpu": {"tokens": good["tokens"][:, :1]},
        "length must be torch.int32": {"length": good["length"].long()},
        r"at must be torch.int32 \[3\]": {"at": good["at"][:2]},
        "count must be torch.int64": {"count": good["count"].int()},
        r"positions must be torch.int64 \[3, 2\] .* with strides \(1, 3\)": {"positions": apart["positions"]},
        r"positions must be torch.int64 \[3, 1\]": {"steps": good["steps"][:, :1].contiguous()},
        r"seen must be torch.bool \[3, 5\]": {"seen": good["seen"].int()},
        r"seen must be .* on cpu, .* on meta": {"seen": good["seen"].to("meta")},
        r"tokens must be .* with strides \(1, 3\)": {"tokens": apart["tokens"]},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            accept(**{**good, **change})


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=len(MUTANTS) + 2 * len(EDGES))
