"""Overlap: when launches ask for it, and that no kernel touches what another may have written before it waits."""

import re
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import early
import pytest
import torch
from glm_kernels import (
    accept,
    append_attention,
    decode_attention,
    dense_matmul,
    gelu,
    int4_matmul,
    int4_prepack,
    layer_norm,
    likeliest,
    overlap,
    overlapping,
    rms_norm,
)
from glm_kernels.dispatch import Target
from glm_kernels.overlap import AHEAD, TILES, can_overlap, overlaps, tiles_ahead
from glm_kernels.variants import TARGETS, Variant, compile
from harness import directly, gpu, kernel, needs_triton, put_in, rerun
from torch import Tensor

HOPPER = TARGETS[2]
KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # file: its kernels, and which arguments are weights
    "acceptance": (("accept_kernel",), ()),
    "activations": (("activation_kernel",), ()),
    "choice": (("likeliest_part_kernel", "likeliest_join_kernel"), ()),
    "decode": (("decode_kernel",), ()),
    "norms": (("norm_kernel",), ("weight", "bias")),
    "dense_matmul": (("dense_kernel",), ("weight", "norm")),
    "packed_matmul": (("packed_kernel",), ("words", "scales", "zeros", "norm")),
}
MODULES: dict[str, Any] = {name: import_module(f"glm_kernels.{name}") for name in KERNELS}

# ----------------------------------------------------------------------------- the context


def test_the_context_ends() -> None:
    assert AHEAD.get() is None
    with overlapping(2):
        assert AHEAD.get() == 2
        with overlapping():
            assert AHEAD.get() == TILES
        assert AHEAD.get() == 2
    assert AHEAD.get() is None
    with pytest.raises(KeyError), overlapping():
        raise KeyError
    assert AHEAD.get() is None


def test_as_a_decorator_it_holds_for_every_call() -> None:
    inside = overlapping(3)(AHEAD.get)
    assert [inside(), AHEAD.get(), inside()] == [3, None, 3]


def test_it_holds_for_the_thread_that_enters_it() -> None:
    seen = []
    with overlapping():
        other = threading.Thread(target=lambda: seen.append(AHEAD.get()))
        other.start()
        other.join()
    assert seen == [None]


def test_fewer_tiles_than_none_are_refused() -> None:
    with pytest.raises(ValueError, match="0 or more, not -1"), overlapping(-1):
        pass


def test_only_devices_that_can() -> None:
    assert [target.arch for target in TARGETS if overlaps(target)] == [90, 100]
    assert overlaps(Target("cuda", 120))
    assert not overlaps(Target("hip", "gfx950"))
    assert not can_overlap(torch.device("cpu"))
    with overlapping():
        assert tiles_ahead(torch.ones(1)) is None


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_capability_decides(device: str) -> None:
    with overlapping(2):
        can = torch.cuda.get_device_capability() >= (9, 0) and torch.version.hip is None
        assert tiles_ahead(torch.ones(1, device=device)) == (2 if can else None)


# ----------------------------------------------------------------------------- launches


class Watched:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.names, self.launches = kernel.arg_names, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launched

    def launched(self, *given: Any, **options: Any) -> None:
        self.launches.append((dict(zip(self.names, given, strict=True)), options))


def everything() -> None:
    """A launch of every kernel: activation, norms, products of both kinds, attention, choice and acceptance."""
    x, w = torch.ones(2, 64, dtype=torch.float16), torch.ones(64, dtype=torch.float16)
    gelu(x, tanh=False)
    rms_norm(x, w, 1e-5, weight_first=True)
    layer_norm(x, w, w, 1e-5)
    dense_matmul(x, torch.ones(32, 64, dtype=torch.float16))
    packed, scales = torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 1, dtype=torch.float16)
    int4_matmul(x, *int4_prepack(packed, scales, None), group=64)
    cache, one = torch.ones(2, 1, 9, 16, dtype=torch.float16), torch.ones(2, dtype=torch.int32)
    append_attention(x[:, None], None, None, cache, cache.clone(), one, one)
    decode_attention(cache[:, :, :1], cache, cache, one)
    ids = likeliest(x)[:, None]
    accept(ids, ids.clone(), one, one.clone(), one.long(), ids.clone(), ids.clone(), x > 2)


@directly
@needs_triton
@pytest.mark.parametrize("can", [False, True])
def test_launches_say_so(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the context, on a device that can, and nowhere else."""
    monkeypatch.setattr(overlap, "can_overlap", lambda device: can)
    watched = []
    for name, (kernels, _) in KERNELS.items():
        for its in kernels:
            stand_in = Watched(getattr(MODULES[name], its))
            watched.append(stand_in)
            monkeypatch.setattr(MODULES[name], its, stand_in)
        monkeypatch.setattr(MODULES[name], "takes_kernel", lambda x: True)
    monkeypatch.setattr(import_module("glm_kernels.append_attention"), "takes_kernel", lambda x: True)
    everything()
    with overlapping(3):
        everything()
    everything()
    for stand_in in watched:
        per = len(stand_in.launches) // 3
        assert per >= 1
        for number, (given, options) in enumerate(stand_in.launches):
            inside = can and number // per == 1
            assert given["ahead"] == (3 if inside else None)
            assert options.get("launch_pdl", "not said") == (True if inside else "not said")
            assert options["num_warps"] >= 1


# ----------------------------------------------------------------------------- machine code


def overlapped(name: str) -> list[Variant]:
    """The variants of a file that overlap, of those tried here."""
    return [one for one in MODULES[name].variants(HOPPER) if one.values.get("ahead") is not None]


def faults(name: str, variant: Variant) -> list[str]:
    """What the variant does too early, in PTX and in the machine code."""
    built = compile(variant, HOPPER)
    arguments = [argument for argument in variant.kernel.arg_names if argument in variant.types]
    pointers = [argument for argument, kind in variant.types.items() if kind.startswith("*")]
    wrong = early.faults(built.ptx, arguments, pointers, KERNELS[name][1])
    order = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", built.text, re.MULTILINE)
    before = order[: order.index("ACQBULK")] if "ACQBULK" in order else order  # the wait
    touched = r"(LDG|LDL|LD|STG|STL|ST|LDGSTS|ATOM|ATOMG|RED|UBLKCP|BRA|EXIT)(\.|$)"
    wrong += [f"{each} stands before the wait" for each in before if re.match(touched, each)]
    if built.spilled:
        wrong.append("registers spill")
    return wrong


@directly
@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_touched_before_the_wait(name: str) -> None:
    variants = overlapped(name)
    assert variants
    for variant in variants:
        assert faults(name, variant) == [], variant.name
        assert variant.options["launch_pdl"]


@directly
@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_weights_are_fetched_before_the_wait(name: str) -> None:
    """Of experts nothing: whose matrix it is, stands in what a kernel before wrote."""
    for variant in overlapped(name):
        before = compile(variant, HOPPER).ptx.partition(early.WAIT)[0]
        wanted = KERNELS[name][1] and not variant.values.get("experts")
        assert bool(before.count("prefetch.global.L2")) == bool(wanted), variant.name


@directly
@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_of_it_is_left_where_it_is_off(name: str) -> None:
    for variant in MODULES[name].variants(HOPPER)[:2]:
        assert variant.values["ahead"] is None
        assert "launch_pdl" not in variant.options
        ptx = compile(variant, HOPPER).ptx
        assert "griddepcontrol" not in ptx
        assert "prefetch" not in ptx


# ----------------------------------------------------------------------------- what is fetched


def fetched(module: Any, call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, set[int]]:
    """The result of a call in the interpreter that fetches two tiles ahead, and the addresses it fetches."""
    addresses: set[int] = set()
    with monkeypatch.context() as patched:
        patched.setattr(module, "tiles_ahead", lambda x: 2)
        patched.setattr(module, "launched", lambda ahead: {})
        patched.setattr(module, "release", lambda: None)
        patched.setattr(module, "wait", lambda: None)
        patched.setattr(module, "fetch", lambda pointers: addresses.update(pointers.handle.data.flatten().tolist()))
        return call(), addresses


def sectors(x: Tensor, some: Any = slice(None), each: int = 16) -> set[int]:
    """The addresses of every 16th column, in all rows of a part of x."""
    place = torch.arange(x.untyped_storage().nbytes() // x.element_size()).as_strided(x.shape, x.stride())
    assert x.storage_offset() == 0
    return {x.data_ptr() + x.element_size() * int(n) for n in place[some][..., ::each].flatten()}


@kernel
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_product_fetches_what_it_reads_first(rows: int, swiglu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row of the matrix, of the norm, and nothing outside, at odd sizes; the result stays the same."""
    x, norm = torch.randn(rows, 2100).half(), torch.randn(2100).half()
    w = torch.randn(10, 2150).half()[:, :2100]
    call = partial(dense_matmul, x, w, norm=norm, eps=1e-5, swiglu=swiglu)
    y, found = fetched(MODULES["dense_matmul"], call, monkeypatch)
    width, begins = (512, (0,)) if rows == 1 else (128, (0, 9))  # of 17 tiles, in two splits
    wanted = set()
    for first in begins:
        some = slice(first * width, (first + 2) * width)
        wanted |= sectors(w, (slice(None), some)) | sectors(norm, some)
    assert found >= wanted
    assert found <= sectors(w, each=1) | sectors(norm, each=1)
    assert len(found - wanted) <= 11 + 1, "no more than the last column of each row"
    assert torch.equal(y, call())


@kernel
@pytest.mark.parametrize("group", [64, 640])
@pytest.mark.parametrize("swiglu", [False, True])
def test_integers_are_fetched_with_their_scales(group: int, swiglu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, norm = torch.randn(3, 640).half(), torch.randn(640).half()
    codes, scale = torch.randint(0, 256, (22, 320), dtype=torch.uint8), torch.rand(22, 640 // group).half()
    words, scales, zeros = int4_prepack(codes, scale, torch.randint(-8, 8, scale.shape, dtype=torch.int8))
    call = partial(int4_matmul, x, words, scales, zeros, group=group, norm=norm, eps=1e-5, swiglu=swiglu)
    y, found = fetched(MODULES["packed_matmul"], call, monkeypatch)
    rows = 128 // group if group < 128 else 1
    of_scales = sectors(scales, slice(0, 2 * rows, rows), 1) | sectors(zeros, slice(0, 2 * rows, rows), 1)
    wanted = sectors(words, slice(0, 2)) | of_scales | sectors(norm, slice(0, 256))
    assert found >= wanted
    assert found <= wanted | sectors(words) | sectors(scales, each=1) | sectors(zeros, each=1) | sectors(norm)
    assert torch.equal(y, call())


@kernel
@pytest.mark.parametrize("width", [1, 9, 100])
def test_a_norm_fetches_its_weights(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(3, width), torch.randn(width), torch.randn(width)
    call = partial(layer_norm, x, weight, bias, 1e-5)
    y, found = fetched(MODULES["norms"], call, monkeypatch)
    assert found >= sectors(weight, each=8) | sectors(bias, each=8)
    assert found <= sectors(weight, each=1) | sectors(bias, each=1)
    assert torch.equal(y, call())


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=11)


# ----------------------------------------------------------------------------- faults on purpose

FIRST_LOAD = "    h = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)\n"
LATE = "    if ahead is not None:\n        wait()\n"
MUTANTS = {  # name: file, what overlaps, kernel, what is replaced, by what, what is found
    "no wait": ("norms", 0, "norm_kernel", "        wait()\n", "", "wait stands there 0 times"),
    "the wait behind the first load": (
        "norms", 0, "norm_kernel", f"        wait()\n\n{FIRST_LOAD}", f"\n{FIRST_LOAD}{LATE}", "of x stands before",
    ),
    "the wait behind a store": (
        "activations", 0, "activation_kernel", "        wait()\n",
        "        tl.store(y + row * y_row + column, 0.0, mask=inside)\n        wait()\n", "of y stands before",
    ),
    "the wait in a branch": (
        "norms", 0, "norm_kernel", "        wait()\n", "        if row > 0:\n            wait()\n", "bra",
    ),
    "no release": ("norms", 0, "norm_kernel", "        release()\n", "", "launch_dependents stands there 0 times"),
    "a length read too early": (
        "decode", 0, "decode_kernel", "        release()\n",
        "        release()\n        program += tl.load(length)\n", "of length stands before",
    ),
    "parts joined too early": (
        "choice", -1, "likeliest_join_kernel", "        release()\n        wait()\n", "        release()\n",
        "wait stands there 0 times",
    ),
    "another tensor fetched": ("norms", 0, "norm_kernel", "fetch(weight +", "fetch(x +", "of x stands before"),
    "x fetched by a product": (
        "dense_matmul", 0, "dense_kernel", "fetch_tiles(weight,", "fetch_tiles(x,", "of x stands before",
    ),
    "an expert looked up too early": (
        "dense_matmul", -1, "dense_kernel", "        release()\n",
        "        release()\n        block += tl.load(offsets)\n", "of offsets stands before",
    ),
    "an expert of integers looked up too early": (
        "packed_matmul", 5, "packed_kernel", "        release()\n",
        "        release()\n        block += tl.load(offsets)\n", "of offsets stands before",
    ),
}  # fmt: skip


@directly
@needs_triton
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, number, its, right, wrong, found = MUTANTS[name]
    module: ModuleType = MODULES[file]
    put_in(monkeypatch, tmp_path, module, its, right, wrong)
    assert found in "; ".join(faults(file, overlapped(file)[number]))
