"""Turn, append and attend in one launch: on the CPU the reference, in Triton's interpreter and on a GPU the kernel."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from glm_kernels import append_attention, counters, decode, decode_attention, dispatch, rotary_append
from glm_kernels.append_attention import append_attention_reference, launch_all
from glm_kernels.decode import Shape
from glm_kernels.rotary import FORMS, rotary_append_reference
from harness import (
    DEVICES,
    DTYPES,
    INTERPRETED,
    Guarded,
    amid,
    directly,
    gpu,
    judge,
    kernel,
    needs_triton,
    put_in,
    rerun,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

MODULE = import_module("glm_kernels.append_attention")  # the package's own is the function
TINY = Shape(rows=16, block=16, stages=2, joins=2, warps=4, resident=2)

# ----------------------------------------------------------------------------- one case, checked in every way


@dataclass(frozen=True)
class Case:
    """B rows of T tokens of G groups of R query heads; `length` 0 is an idle row, which writes into the last slot."""

    B: int = 2
    T: int = 1
    G: int = 2
    R: int = 3
    S: int = 40
    widths: tuple[int, ...] = (4, 2)
    rest: int = 3
    pairing: str = "halves"
    V: int = 8
    length: tuple[int, ...] = (40, 17)
    splits: int = 2
    last: int = 16
    shape: Shape | None = TINY

    @property
    def K(self) -> int:  # noqa: N802, the letter of the table
        return sum(self.widths) + self.rest


def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What `append_attention` takes; NaN where nothing may be read, where the new tokens are to go among it."""
    generator = torch.Generator().manual_seed(case.S * 100 + case.K)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    length = torch.tensor((case.length * case.B)[: case.B], dtype=torch.int32)
    at = torch.where(length > 0, length - case.T, case.S - 1).to(torch.int32)
    unread = torch.arange(case.S) >= (length - case.T)[:, None]
    keys, values = (
        draw(case.B, case.G, case.S, width).to(dtype).masked_fill(unread[:, None, :, None], torch.nan)
        for width in (case.K, case.V)
    )
    qkv = draw(case.B, case.T, case.G * case.R * case.K + case.G * (case.K + case.V)).to(device, dtype)
    angles, others = draw(2, case.B, case.T, sum(case.widths) // 2).to(device).unbind()
    cos, sin = angles.cos(), others.sin()  # not quite on the circle, so that neither is known from the other
    turns = (amid(cos), amid(sin)) if case.widths else (None, None)
    return {
        "qkv": amid(qkv), "cos": turns[0], "sin": turns[1], "key_cache": keys.to(device),
        "value_cache": values.to(device), "at": at.to(device), "length": length.to(device),
    }  # fmt: skip


def guarded(x: dict[str, Any]) -> list[Guarded]:
    """The caches between guard bands."""
    caches = [Guarded(tuple(x[name].shape), x[name]) for name in ("key_cache", "value_cache")]
    for cache, name in zip(caches, ("key_cache", "value_cache"), strict=True):
        cache.out.copy_(x[name])
    return caches


def run(case: Case, x: dict[str, Any], way: str) -> list[Tensor]:
    """[y, keys, values] of a way to compute them."""
    caches, how = guarded(x), {"widths": case.widths, "pairing": case.pairing, "scale": 0.4}
    given = {**x, "key_cache": caches[0].out, "value_cache": caches[1].out}
    if way == "launch":
        y = Guarded((case.B, case.T, case.G * case.R, case.V), x["qkv"])
        form = {"shape": case.shape, "splits": case.splits, "last": case.last}
        launch_all(**given, **how, y=y.out, **form)
        assert all((c == 0).all() for c in counters.kept.values()), "counters not set back"
        result = y.written()
    else:
        result = (append_attention if way == "public" else append_attention_reference)(**given, **how)
    return [result, *(cache.partly_written() for cache in caches)]


def others(case: Case, x: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """[y, keys, values] step by step, y in `dtype`; the keys are rounded as in the cache, which all ways attend to."""
    turns = (x["qkv"], x["qkv"]) if x["cos"] is None else (x["cos"], x["sin"])
    caches = [cache.out for cache in guarded(x)]
    how = {"widths": case.widths, "pairing": case.pairing}
    q = rotary_append_reference(x["qkv"], *turns, *caches, x["at"], **how)
    last = x["length"][:, None] - case.T + torch.arange(case.T, device=q.device)
    seen = torch.arange(case.S, device=q.device) <= last[:, :, None]  # [B T S]
    k, v = (cache.to(dtype).nan_to_num(0.0) for cache in caches)
    scores = torch.einsum("btgrk,bgsk->bgrts", q.to(dtype).unflatten(2, (case.G, case.R)), k) * 0.4
    p = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return [torch.einsum("bgrts,bgsv->btgrv", p, v).flatten(2, 3), *caches]


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """y by the rule of two, what is turned into the cache to a rounding, and all else in it as it was."""
    x = inputs(case, dtype, device)
    truth, plain = others(case, x, torch.float64), run(case, x, "reference")
    ways = [plain[0], others(case, x, dtype)[0]]  # in float32 the order of one sum of products makes twice the error
    for way in ["launch", "launch", "public"] if dispatch.takes_kernel(x["qkv"]) else ["public"]:
        y, *caches = run(case, x, way)
        judge(y, ways, truth[0])
        for b in range(case.B):
            judge(y[b], [way[b] for way in ways], truth[0][b], factor=4)
        for found, wanted, before in zip(caches, plain[1:], (x["key_cache"], x["value_cache"]), strict=True):
            new = ~torch.eq(wanted, before) & ~wanted.isnan()
            rest = [t.masked_fill(new, 0).nan_to_num(-5555.0) for t in (found, before)]
            assert torch.equal(*rest), "something else in the cache was changed"
            if INTERPRETED or device == "cpu":
                assert torch.equal(found.nan_to_num(-5555.0), wanted.nan_to_num(-5555.0)), "written wrongly"
            else:  # a product and a sum may be one operation, before the one rounding
                torch.testing.assert_close(found, wanted, equal_nan=True, rtol=torch.finfo(dtype).eps, atol=1e-6)


# ----------------------------------------------------------------------------- reference, interpreter, GPU

EDGES = {
    "one of everything": Case(B=1, G=1, R=1, S=1, widths=(2,), rest=0, V=1, length=(1,), splits=1),
    "nothing but the new": Case(T=3, length=(3,), splits=3),
    "idle rows": Case(B=4, T=2, length=(0, 9, 0, 31)),
    "a block and the new": Case(length=(17, 18)),
    "a full cache": Case(T=4, length=(40,)),
    "sixteen new": Case(T=16, R=1, length=(40, 16)),
    "more than sixteen new": Case(T=19, R=1, length=(40, 19, 0), B=3),
    "several tiles of rows": Case(T=3, R=11, splits=3),
    "in two steps": Case(S=140, T=2, length=(139, 70), splits=9, last=1),
    "nothing turned": Case(widths=(), rest=8, T=2),
    "interleaved": Case(widths=(8,), rest=8, pairing="interleaved", T=2),
    "interleaved axes": Case(widths=(4, 6), rest=1, pairing="interleaved"),
    "whole heads": Case(widths=(16,), rest=0, V=24),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, dtype: torch.dtype, device: str) -> None:
    check(EDGES[name], dtype, device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small call."""
    B, T, S = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([4, 15, 16, 17, 33, 50, 64]))
    length = st.sampled_from([0, T, min(T + 1, S), (S + T) // 2, S])
    widths = tuple(2 * half for half in draw(st.lists(st.integers(1, 9), max_size=3)))
    return Case(
        B=B, T=T, G=draw(st.integers(1, 3)), R=draw(st.sampled_from([1, 2, 5, 8, 16])), S=S, widths=widths,
        rest=draw(st.integers(0 if widths else 1, 9)), pairing=draw(st.sampled_from(["interleaved", "halves"])),
        V=draw(st.sampled_from([1, 16, 24])), length=draw(st.tuples(*[length] * B)), splits=draw(st.integers(1, 6)),
        last=draw(st.sampled_from([1, 16])),
    )  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=cases(), dtype=st.sampled_from([torch.float16, torch.float32]))
def test_drawn(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [*FORMS, "none"])
def test_published_forms(form: str, device: str) -> None:
    """As a launch chooses its own shape."""
    widths, pairing, K = FORMS[form] if form != "none" else ((), "halves", 64)
    case = Case(1, 2, 1, 3, 70, widths, K - sum(widths), pairing, K, (69,), splits=2, shape=None)
    check(case, torch.float16, device)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_user_calls(device: str) -> None:
    """The same as the two calls it stands for; positions may have 64 bits, cos and sin one row for all."""
    case = Case(T=2, widths=(4,), rest=4)
    x = inputs(case, torch.float16, device)
    x["cos"], x["sin"] = x["cos"][:1], x["sin"][:1]
    first = [cache.out for cache in guarded(x)]
    how = {"widths": case.widths, "pairing": case.pairing}
    q = rotary_append(x["qkv"], x["cos"], x["sin"], *first, x["at"], **how)
    y = decode_attention(q.transpose(1, 2), *first, x["length"]).transpose(1, 2)
    second = [cache.out for cache in guarded(x)]
    longs = {name: x[name].long() for name in ("at", "length")}
    got = append_attention(x["qkv"], x["cos"], x["sin"], *second, **longs, **how)
    assert got.is_contiguous()
    torch.testing.assert_close(got, y, rtol=2e-3, atol=2e-3)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-3, atol=1e-6)
    none = {name: x[name][:0] for name in ("qkv", "cos", "sin", "key_cache", "value_cache", "at", "length")}
    assert append_attention(**none, **how).shape == (0, 2, 6, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["interleaved", "nothing turned"])
def test_opcheck(name: str, device: str) -> None:
    case = EDGES[name]
    x = inputs(case, torch.float32, device)
    x |= {name: x[name].nan_to_num(0.0) for name in ("key_cache", "value_cache")}
    torch.library.opcheck(MODULE.append_attention_op, (*x.values(), list(case.widths), case.pairing, 0.4))


# ----------------------------------------------------------------------------- broken on purpose

MUTANTS = {  # kernel: {name: what is replaced, by what, how often it stands there}
    "decode_kernel": {
        "new tokens by every split": ("if split == busy - 1:", "if split <= busy - 1:"),
        "new tokens read from the cache too": ("tl.minimum(count if new_k is None else count - T, S)", "count"),
        "the last old key left out": ("count if new_k is None else count - T", "count - T - 1"),
        "a token more": ("t < T)", "t < T + 1)", 2),
        "new tokens of idle rows seen": ("(t < T) & (j >= 0)", "(t < T)"),
        "new tokens see what comes after": ("S))[None, :] & (j[None, :] <= last_seen[:, None])", "S))[None, :]"),
        "keys of another group": ("new_k + new + g * K", "new_k + new"),
        "values of another group": ("new_v + new + g * V", "new_v + new"),
        "keys of another token": ("new = b * q_row + t[:, None] * q_token", "new = b * q_row + 0 * t[:, None]"),
        "keys of another row": ("new = b * q_row +", "new = 0 * b +"),
        "angles of another token": ("turn = b * turn_row + t * turn_token", "turn = b * turn_row + 0 * t"),
        "angles of another row": ("angles = b * turn_row +", "angles = 0 * b +"),
        "another slot": ("tl.load(at + b).to(tl.int64) + t", "tl.load(at + b).to(tl.int64) + t + 1"),
        "slot of another row": ("tl.load(at + b).to", "tl.load(at).to"),
        "past the last slot": ("(slot >= 0) & (slot < S)", "(slot >= 0)"),
        "sum not rescaled": ("total = total * keep + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
        "accumulator not rescaled": ("acc * keep[:, None], input", "acc, input"),
    },
    "turned_heads": {
        "the wrong way round": ("tl.where(before, -sines, sines)", "tl.where(before, sines, -sines)"),
        "the rest turned": ("there = inside & (c < start)", "there = inside"),
        "pairs of the other kind": ("start + (i ^ 1)", "start + i"),
        "halves of the head": ("start + (i + width // 2) % width", "start + (i + width // 2) % (2 * width)"),
        "every axis by the first angles": ("start // 2 + pair", "pair"),
    },
}  # fmt: skip
TRIALS = [
    Case(B=3, T=2, length=(39, 17, 0), splits=2, S=40),
    Case(B=1, T=3, R=2, widths=(8,), pairing="interleaved", rest=3, length=(3,), splits=1, S=5),
    Case(B=2, T=2, S=33, length=(33, 32), splits=3),
    Case(B=2, T=3, R=1, S=4, length=(4, 0), splits=1),
]


@kernel
@pytest.mark.parametrize(("which", "name"), [(which, name) for which, faults in MUTANTS.items() for name in faults])
def test_mutant_is_caught(which: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, *times = MUTANTS[which][name]
    monkeypatch.setattr(counters, "kept", {})
    put_in(monkeypatch, tmp_path, decode, which, right, wrong, *times)

    def check_all() -> None:
        for trial in TRIALS:
            check(trial, torch.float16)

    with pytest.raises(AssertionError):
        check_all()


@kernel
def test_trials_pass_unbroken() -> None:
    for trial in TRIALS:
        check(trial, torch.float16)


# ----------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_in_a_graph(device: str) -> None:
    """Captured once; then token after token comes, and every one is found in the cache by the next."""
    case = Case(B=2, widths=(32,), rest=32, V=64, S=300, length=(1, 200))
    x = inputs(case, torch.float16, device)
    x |= {name: x[name].nan_to_num(0.0) for name in ("key_cache", "value_cache")}
    how = {"widths": case.widths, "pairing": case.pairing}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        append_attention(**x, **how)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = append_attention(**x, **how)
    for _ in range(90):
        x["at"] += 1
        x["length"] += 1
        x["qkv"].normal_()
        graph.replay()
        torch.cuda.synchronize()
        plain = append_attention_reference(**x, **how)  # it writes the same once more
        judge(
            y,
            plain,
            append_attention_reference(**{n: v.double() if v.is_floating_point() else v for n, v in x.items()}, **how),
        )


@directly
def test_torch_compile_takes_it_whole() -> None:
    case = EDGES["interleaved"]
    x = inputs(case, torch.float32, "cpu")
    x |= {name: x[name].nan_to_num(0.0) for name in ("key_cache", "value_cache")}

    def block(**x: Any) -> Tensor:
        return append_attention(**x, widths=case.widths, pairing=case.pairing) * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    caches = [{name: x[name].clone() for name in ("key_cache", "value_cache")} for _ in range(2)]
    torch.testing.assert_close(compiled(**x | caches[0]), block(**x | caches[1]))
    for name, cache in caches[0].items():
        torch.testing.assert_close(cache, caches[1][name])


@directly
def test_tensors_that_do_not_fit_are_named() -> None:
    case = EDGES["interleaved"]
    good = inputs(case, torch.float32, "cpu") | {"widths": case.widths, "pairing": case.pairing}
    for fault, change in {
        r"length must be \[2\] int32 or int64": {"length": good["length"].float()},
        "belong together": {"widths": ()},
        "cos, sin and widths": {"sin": None},
        r"at must be \[2\]": {"at": good["at"][:1]},
        "key_cache must be torch.float32": {"key_cache": good["key_cache"].half()},
        "cos must be": {"cos": good["cos"][..., :-1]},
        "leave no queries": {"qkv": good["qkv"][..., :-1]},
    }.items():
        with pytest.raises(ValueError, match=fault):
            append_attention(**{**good, **change})


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=sum(map(len, MUTANTS.values())) + 2 * len(EDGES))
