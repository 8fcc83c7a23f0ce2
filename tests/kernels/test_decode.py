"""Decode attention: on the CPU the reference, in Triton's interpreter and on a GPU the kernel."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from glm_kernels import counters, decode_attention, decode_latent_attention
from glm_kernels import decode as module
from glm_kernels.decode import Partial, Shape, decode_attention_reference, decode_latent_attention_reference
from harness import (
    DEVICES,
    DTYPES,
    GUARD,
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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

MARGIN = 8192  # around partial sums: more than one split of the trials, so that a fault does no harm
TINY = Shape(rows=16, block=16, stages=2, joins=2, warps=4, resident=2)

# ----------------------------------------------------------------------------- one case, checked in every way


@dataclass(frozen=True)
class Case:
    """A call; V = 0 is a latent, of whose channels `rest` are no values."""

    B: int = 2
    G: int = 2
    R: int = 3
    T: int = 1
    S: int = 40
    K: int = 8
    V: int = 8
    rest: int = 0
    length: tuple[int, ...] = (40, 17)
    start: tuple[int, ...] | None = None
    int8: bool = False
    splits: int = 2
    last: int = 16
    shape: Shape | None = TINY

    def rows(self, values: tuple[int, ...] | None) -> Tensor | None:
        """[B], or nothing."""
        return None if values is None else torch.tensor((values * self.B)[: self.B], dtype=torch.int32)


def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """What `decode_attention` takes, strided amid NaN, with NaN in the cache wherever nothing may be read."""
    generator = torch.Generator().manual_seed(case.S * 100 + case.K)
    length, start = case.rows(case.length), case.rows(case.start)
    assert length is not None
    K = case.K + case.rest
    j = torch.arange(case.S)
    unread = j >= length[:, None] if start is None else (j >= length[:, None]) | (j < start[:, None])

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) + 0.5

    def cached(width: int) -> tuple[Tensor, Tensor | None]:
        x = draw(case.B, case.G, case.S, width) + 3 * j[:, None] / case.S  # the maximum keeps rising
        if not case.int8:
            return amid(x.to(dtype).masked_fill(unread[:, None, :, None], torch.nan).to(device)), None
        scale = x.abs().amax(-1) / 127 * (2**-12 if width == case.V else 1)
        scale = scale.masked_fill(unread[:, None], torch.nan).to(device)
        whole = (x / x.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8).to(device)
        return amid(whole, 99), amid(scale)

    k, key_scale = cached(K)
    v, value_scale = cached(case.V) if case.V else (None, None)
    q = amid(draw(case.B, case.G * case.R, case.T, K).to(device, dtype))
    length, start = length.to(device), None if start is None else start.to(device)
    return {
        "q": q, "k": k, "v": v, "length": length, "start": start, "key_scale": key_scale, "value_scale": value_scale,
    }  # fmt: skip


def reference(case: Case, x: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Plain torch with all that is not whole numbers in `dtype`."""
    x = {key: value.to(dtype) if value is not None and value.is_floating_point() else value for key, value in x.items()}
    if case.V:
        return decode_attention_reference(**x, scale=0.4)
    return decode_latent_attention_reference(
        x["q"], x["k"][:, 0], x["length"], start=x["start"], value_width=case.K, scale=0.4
    )


def public(case: Case, x: dict[str, Any]) -> Tensor:
    """y as a user gets it."""
    if case.V:
        return decode_attention(**x, scale=0.4)
    return decode_latent_attention(x["q"], x["k"][:, 0], x["length"], start=x["start"], value_width=case.K, scale=0.4)


def launched(case: Case, x: dict[str, Any]) -> Tensor:
    """The kernel's y, written between guard bands, as are the partial sums."""
    q, V = x["q"], case.V or case.K
    y = Guarded((*q.shape[:3], V), q)
    shape = case.B * case.G, case.splits, case.R * case.T
    sizes = [math.prod(s) + 2 * MARGIN for s in ((*shape, V), shape, shape)]
    buffers = [q.new_full((size,), GUARD, dtype=torch.float32) for size in sizes]
    inner = [b[MARGIN:-MARGIN].fill_(torch.nan) for b in buffers]
    partial = Partial(inner[0].view(*shape, V), inner[1].view(shape), inner[2].view(shape))
    order = [x[name] for name in ("k", "v", "length", "start")]
    module.launch(
        q, *order, 0.4, x["key_scale"], x["value_scale"], y.out,
        shape=case.shape, splits=case.splits, last=case.last, partial=partial,
    )  # fmt: skip
    for buffer in buffers:
        assert (buffer[:MARGIN] == GUARD).all(), "written outside"
        assert (buffer[-MARGIN:] == GUARD).all(), "written outside"
    assert all((c == 0).all() for c in counters.kept.values()), "counters not set back"
    return y.written()


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    x = inputs(case, dtype, device)
    truth, plain = reference(case, x, torch.float64), reference(case, x, dtype)
    results = []
    if INTERPRETED or device != "cpu":
        results = [launched(case, x), launched(case, x)]
        assert torch.equal(*results), "not the same twice"
        alone = {n: v if v is None else v[:1] for n, v in x.items()}
        if case.B > 1 and case.S < 100:
            assert torch.equal(launched(replace(case, B=1), alone), results[0][:1]), "other rows make a difference"
    else:
        results = [public(case, x)]
    for y in results:
        judge(y, plain, truth)
        for b in range(case.B):  # a small one beside a large; so few values stray further than all of them
            judge(y[b], plain[b], truth[b], factor=4)


# ----------------------------------------------------------------------------- reference, interpreter, GPU

EDGES = {
    "one of everything": Case(B=1, G=1, R=1, S=1, K=1, V=1, length=(1,), splits=1),
    "a block and one key": Case(S=33, length=(17, 33), splits=1),
    "a block less one": Case(S=31, length=(15, 31), splits=2),
    "nothing cached": Case(length=(0, 5)),
    "fewer cached than asked": Case(T=4, length=(2, 5)),
    "start at and after the end": Case(B=4, length=(20,), start=(19, 20, 25, -3)),
    "longer than the cache": Case(B=2, T=2, S=20, length=(21, 20)),
    "more splits than blocks": Case(length=(40, 3), splits=7),
    "joined in two steps": Case(S=80, length=(80, 33, 3), B=3, splits=5, last=1, T=2),
    "in two steps, the last part shorter": Case(B=1, G=1, R=1, V=256, S=140, length=(140,), splits=9, last=2),
    "more splits than the length needs": Case(S=140, length=(17, 16), splits=9, last=2),
    "group of 32": Case(B=1, R=32, T=3, splits=3),
    "one head a group": Case(G=5, R=1, T=2),
    "several tiles of rows": Case(R=6, T=3, splits=3, K=16, V=24),
    "key and value of different width": Case(K=24, V=40),
    "latent": Case(G=1, R=5, K=32, V=0, rest=8, start=(3, 0)),
    "latent without rest": Case(G=1, R=5, K=16, V=0, T=2),
    "int8": Case(int8=True, T=2, start=(0, 5), K=24, V=40),
    "int8, in two steps": Case(int8=True, S=70, length=(70, 64), splits=5, last=0, R=1, K=24, V=40),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, dtype: torch.dtype, device: str) -> None:
    check(EDGES[name], dtype, device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small call."""

    def below(limit: int) -> st.SearchStrategy[int]:
        return st.integers(1, limit)

    B, G, S = draw(below(3)), draw(below(3)), draw(st.sampled_from([1, 2, 15, 16, 17, 31, 33, 50, 64]))
    edges = st.sampled_from([0, 1, 2, S // 2, max(S - 1, 0), S])
    row = st.tuples(*[edges] * B)
    latent = draw(st.booleans())
    return Case(
        B=B, G=1 if latent else G, R=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 32])), T=draw(below(4)), S=S,
        K=draw(st.sampled_from([1, 8, 16, 17, 40])), V=0 if latent else draw(st.sampled_from([1, 16, 24, 33])),
        rest=draw(st.sampled_from([0, 1, 16, 20])) if latent else 0,
        length=draw(row), start=draw(st.none() | row), int8=not latent and draw(st.booleans()),
        splits=draw(below(5)), last=draw(st.sampled_from([0, 16])),
    )  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(), dtype=st.sampled_from([torch.float16, torch.float32]))
@example(case=Case(S=1, length=(1, 0), T=3), dtype=torch.float16)
def test_drawn(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(B=1, G=2, R=4, S=70, K=K, V=K, length=(69,), splits=1, shape=None) for K in (64, 80, 96, 128, 192, 256)),
        Case(B=1, G=1, R=20, S=40, K=512, V=0, rest=64, length=(37,), shape=None),
        Case(B=1, G=1, R=16, S=140, K=128, V=128, length=(139,), int8=True, shape=None, T=2),
    ],
    ids=lambda case: f"{case.K + case.rest}{' int8' if case.int8 else ''}",
)
def test_real_shapes(case: Case, device: str) -> None:
    """Of a launch, and of heads."""
    check(case, torch.float16, device)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_user_calls(device: str) -> None:
    """The public line chooses its own launch; y is contiguous, in the dtype of q; lengths may have 64 bits."""
    for case in (EDGES["start at and after the end"], EDGES["latent"], EDGES["int8"]):
        x = inputs(case, torch.float16, device)
        y = public(case, x)
        assert y.is_contiguous()
        assert y.dtype == torch.float16
        judge(y, reference(case, x, torch.float16), reference(case, x, torch.float64))
        longs = {n: v.long() if n in ("length", "start") and v is not None else v for n, v in x.items()}
        assert torch.equal(public(case, longs), y)
    q = torch.randn(2, 4, 1, 8).to(device).transpose(1, 3).contiguous().transpose(1, 3)
    k, length = torch.randn(2, 2, 9, 8).to(device), torch.tensor([9, 4], device=device)
    torch.testing.assert_close(decode_attention(q, k, k, length), decode_attention_reference(q, k, k, length))
    assert decode_attention(q[:0], k[:0], k[:0], length[:0]).shape == (0, 4, 1, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["start at and after the end", "latent", "int8"])
def test_opcheck(name: str, device: str) -> None:
    x = inputs(EDGES[name], torch.float32, device)
    v = x["v"]
    width = EDGES[name].K if v is None else v.shape[3]
    arguments = x["q"], x["k"], v, x["length"], x["start"], 0.4, x["key_scale"], x["value_scale"], width
    torch.library.opcheck(module.decode, arguments)


@kernel
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    x = torch.ones(1, 1, 1, 8).bfloat16()
    with pytest.raises(NotImplementedError, match="use float16"):
        decode_attention(x, x, x, torch.ones(1, dtype=torch.int32))


# ----------------------------------------------------------------------------- broken on purpose

MUTANTS = {  # kernel: {name: what is replaced, by what}
    "decode_kernel": {
        "keys of another group": ("k += b * k_row + g * k_group", "k += b * k_row + g * v_group"),
        "values of another group": ("v += b * v_row + g * v_group", "v += b * v_row"),
        "length of another row": ("tl.load(length + b)", "tl.load(length + b * 0)"),
        "start of another row": ("tl.load(start + b)", "tl.load(start + b * 0)"),
        "mask one too wide": ("last_seen = count - T + token", "last_seen = count - T + token + 1"),
        "mask one too narrow": ("last_seen = count - T + token", "last_seen = count - T + token - 1"),
        "the token's place forgotten": ("last_seen = count - T + token", "last_seen = count - T + 0 * token"),
        "keys past the split": ("there = j < end", "there = j < S"),
        "the last key left out": ("there = j < end", "there = j < end - 1"),
        "read past the cache": ("end = tl.minimum(count if new_k is None else count - T, S)", "end = count"),
        "unwritten values read": ("mask=there[:, None] & (d < V), other=0)", "mask=d < V, other=0)"),
        "sum not rescaled": ("parts * keep[:, None] + p", "parts + p"),
        "accumulator not rescaled": ("acc *= keep[:, None]", "pass"),
        "splits not in their own place": ("first_row + split * (R * T)", "first_row + (split + 1) * (R * T)"),
        "a split without keys counts": ("if split >= busy:", "if split > busy:"),
        "a split with keys does not count": ("if split >= busy:", "if split >= busy - 1:"),
        "joined too early": ("== members - 1", "== members - 2"),
        "joined too early in the second step": ("== parted - 1", "== parted - 2"),
        "the last part taken for a whole one": ("tl.minimum(near, busy - part * near)", "near"),
        "counter not set back": ("tl.store(arrived + 1 + part, 0)", "pass"),
        "counter of parts not set back": ("tl.store(arrived, 0)", "pass"),
        "parts one beside the other": ("step = near * R * T", "step = R * T"),
        "first part of all joined": ("its = first_row + part * near * (R * T)", "its = first_row"),
        "rows past the end stored": (
            "inside = real_row[:, None] & (d < V)",
            "inside = (real_row | True)[:, None] & (d < V)",
        ),
        "channels past the end stored": (
            "inside = real_row[:, None] & (d < V)",
            "inside = real_row[:, None] & (d < V + 1)",
        ),
        "scales swapped": ("tl.load(key_scale + place", "tl.load(value_scale + place"),
        "value scale of another token": ("tl.load(value_scale + place * vs_token", "tl.load(value_scale + place * 0"),
        "products of scales underflow": ("largest = tl.maximum(tl.max(tl.abs(w)), 1e-37)", "largest = 1.0"),
        "rest of the latent left out": (
            "x = tl.dot(x_rest, tl.trans(others), x,",
            "x += 0 * tl.dot(x_rest, tl.trans(others), x,",
        ),
    },
    "real": {
        "int8 without its sign": ("^ 0x80", "^ 0x00"),
    },
    "put_result": {
        "empty rows divided": ("tl.where(total > 0, total, 1.0)", "total"),
    },
    "joined": {
        "accumulator not rescaled": ("acc * keep[:, None] +", "acc +"),
        "sum not rescaled": ("total * keep +", "total +"),
        "split not rescaled": (
            "keep, add = tl.exp2(top - higher), tl.exp2(its_top - higher)",
            "keep, add = tl.exp2(top - higher), 1 + 0 * top",
        ),
        "one split left out": ("tl.range(0, count, num_stages=stages)", "tl.range(1, count, num_stages=stages)"),
    },
}
TRIALS = [  # small cases that together find every one of them
    Case(T=2, R=2, V=12, length=(39, 17), start=(1, 20), splits=3),
    Case(B=3, T=2, S=18, length=(20, 0, 5), splits=2),
    Case(B=1, G=1, R=3, K=16, V=0, rest=8, length=(37,), splits=1),
    Case(B=1, int8=True, K=24, V=16, length=(37,), splits=3),
    Case(R=1, T=3, V=12, S=140, length=(139, 70), splits=9, last=1),
]


@kernel
@pytest.mark.parametrize(("which", "name"), [(which, name) for which, faults in MUTANTS.items() for name in faults])
def test_mutant_is_caught(which: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MUTANTS[which][name]
    put_in(monkeypatch, tmp_path, module, which, right, wrong)
    monkeypatch.setattr(counters, "kept", {})

    def check_all() -> None:
        for trial in TRIALS:
            check(trial, torch.float16)

    with pytest.raises(AssertionError):
        check_all()


@kernel
def test_trials_pass_unbroken() -> None:
    for trial in TRIALS:
        check(trial, torch.float16)


# ----------------------------------------------------------------------------- the launch


@directly
def test_splits_fill_the_device() -> None:
    """Every split has a block, waves are nearly full, and the same shapes give the same number."""
    for programs, S, block in [
        (1, 1, 64),
        (2, 1024, 64),
        (2, 1 << 17, 64),
        (16, 4096, 32),
        (300, 4096, 64),
        (9999, 99, 16),
    ]:
        splits = module.splits_of_launch(programs, S, block, 264)
        assert 1 <= splits <= max(1, math.ceil(S / block))
        if S >= 4096:
            assert programs * splits >= 0.9 * 264 * math.ceil(programs * splits / 264)
    assert module.splits_of_launch(2, 1024, 64, 264) == 16 <= module.LAST, "a short cache is joined at once"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("last", [0, 16])
def test_a_graph_stays_valid_while_lengths_grow(device: str, last: int) -> None:
    """Captured once; then tokens are written and lengths raised on the device, up to the full cache."""
    q, k, v = (torch.randn(2, h, s, 64, device=device, dtype=torch.float16) for h, s in ((8, 1), (2, 500), (2, 500)))
    length, y = torch.tensor([1, 300], dtype=torch.int32, device=device), torch.empty_like(q)

    def step() -> None:
        module.launch(q, k, v, length, None, 0.125, None, None, y, splits=4, last=last)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    for grown in ([1, 300], [2, 301], [64, 400], [129, 499], [500, 500], [0, 1]):
        length.copy_(torch.tensor(grown))
        q.normal_()
        graph.replay()
        torch.cuda.synchronize()
        plain = decode_attention_reference(q, k, v, length)
        judge(y, plain, decode_attention_reference(q.double(), k.double(), v.double(), length))


@directly
def test_torch_compile_takes_it_whole() -> None:
    x = inputs(EDGES["int8"], torch.float32, "cpu")
    latent = inputs(EDGES["latent"], torch.float32, "cpu")

    def block(x: dict[str, Any], latent: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return public(EDGES["int8"], x) * 2, public(EDGES["latent"], latent) * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, latent), block(x, latent))


@directly
def test_a_gradient_is_refused() -> None:
    q, k = torch.ones(1, 1, 1, 8, requires_grad=True), torch.ones(1, 1, 4, 8)
    y = decode_attention(q, k, k, torch.tensor([4]))
    with pytest.raises(NotImplementedError, match="no backward pass"):
        y.sum().backward()


@directly
def test_tensors_that_do_not_fit_are_named() -> None:
    q, k, length = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 9, 8), torch.ones(2, dtype=torch.int32)
    scale, int8 = torch.ones(2, 2, 9), torch.ones(2, 2, 9, 8, dtype=torch.int8)
    good: dict[str, Any] = {"q": q, "k": k, "v": k, "length": length}
    for fault, change in {
        r"q must be \[batch, heads": {"q": q[0]},
        r"k must be \[2, groups, tokens, 8\]": {"k": k[..., :7]},
        r"v must be \[2, 2, 9, channels\]": {"v": k[:, :, :8]},
        "k must be torch.float32 as q is": {"k": k.half()},
        "v must be torch.float32 as q is": {"v": int8},
        "k must be torch.int8, since there are scales": {"key_scale": scale, "value_scale": scale},
        "belong together": {"k": int8, "key_scale": scale},
        r"value_scale must be \[2, 2, 9\]": {"k": int8, "v": int8, "key_scale": scale, "value_scale": scale[:, :1]},
        "k must have its channels side by side": {"k": torch.ones(2, 2, 8, 9).transpose(2, 3)},
        "multiple of the 2 groups": {"q": q[:, :3]},
        r"length must be \[2\], int32 or int64": {"length": length.float()},
        r"start must be \[2\]": {"start": length[:1]},
        "v must be .* on cpu; it is .* on meta": {"v": k.to("meta")},
    }.items():
        with pytest.raises(ValueError, match=fault):
            decode_attention(**{**good, **change})
    with pytest.raises(ValueError, match="latent must be"):
        decode_latent_attention(q, k, length, value_width=4, scale=1.0)
    with pytest.raises(ValueError, match="value_width must be"):
        decode_latent_attention(q, k[:, 0], length, value_width=9, scale=1.0)


# ----------------------------------------------------------------------------- compiled ahead of time


@directly
@needs_triton
def test_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On an H100: loads of 16 bytes ahead of time, tensor cores, nothing in local memory, and a count that orders."""
    from glm_kernels.variants import Target, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = Target("cuda", 90)
    built = [
        (module.variant(target, torch.bfloat16, 128, 128, 16), "HMMA"),
        (module.variant(target, torch.bfloat16, 128, 128, 64), "HGMMA"),
        (module.variant(target, torch.bfloat16, 128, 128, 16, int8=True), "HMMA"),
        (module.variant(target, torch.bfloat16, 576, 0, 32), "HMMA"),
    ]
    for variant, product in built:
        code = compile(variant, target)
        assert code.count(product) > 0, variant.name
        assert code.count("LDL|STL") == 0, variant.name
        assert code.count(r"I2F\.") <= 7, "int8 is converted by the slow pipe"
        shape, e = variant.values, 1 if "int8" in variant.label else 2
        channels = shape["KB"] + (shape["RB"] if shape["rest"] else shape["VB"])
        step = shape["block"] * channels * e // (16 * 32 * variant.options["num_warps"])  # loads of a thread and block
        assert code.count(r"LDGSTS\.E\.BYPASS.*128") >= shape["stages"] * step, variant.name
        assert code.count(r"LDG\.E\.(U8|U16|S8)") == 0, variant.name
        assert code.count(r"MEMBAR.*GPU") > 0, variant.name
        assert code.count(r"CCTL\.IVALL") > 0, variant.name
        assert code.count(r"ATOM") == 2, variant.name


@directly
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100, "gfx942"])
def test_every_launch_fits_the_device(arch: int | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All head sizes, numbers of rows, dtypes and ways to store a cache: shared memory within the limit."""
    from glm_kernels.variants import TARGETS, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (target,) = (t for t in TARGETS if t.arch == arch)
    for dtype in (torch.float16, torch.float32):  # bfloat16 takes what float16 does
        for K in (64, 80, 96, 128, 192, 256, 576):
            for rows in (16, 32, 64):
                for int8 in (False, True) if K != 576 else (False,):
                    variant = module.variant(target, dtype, K, 0 if K == 576 else K, rows, int8=int8, started=True)
                    assert compile(variant, target).shared <= target.shared, variant.name


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=sum(map(len, MUTANTS.values())) + 2 * len(EDGES))
