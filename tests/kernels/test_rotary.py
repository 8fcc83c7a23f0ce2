"""Rotary positions of glm_kernels: on the CPU the reference, in Triton's interpreter and on a GPU the kernel."""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from glm_kernels import dispatch, rotary, rotary_append
from glm_kernels.rotary import (
    FORMS,
    HEADS,
    launch,
    launch_append,
    quantised,
    rotary_append_reference,
    rotary_reference,
)
from harness import (
    DEVICES,
    DTYPES,
    Guarded,
    amid,
    directly,
    judge,
    kernel,
    needs_triton,
    put_in,
    rerun,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm.cache import Slots
from glm.positions import Plain, Rotary

MODULE = import_module("glm_kernels.rotary")  # the package's own `rotary` is the function

# ----------------------------------------------------------------------------- one case, checked in every way


class Case(NamedTuple):
    """B rows of T tokens of H query heads and G groups of keys of K channels, `widths` of them turned."""

    B: int
    T: int
    H: int
    G: int
    widths: tuple[int, ...]
    rest: int
    pairing: str
    value_width: int
    slots: int
    at: tuple[int, ...]

    @property
    def channels(self) -> int:
        return sum(self.widths) + self.rest

    def draw(self, *shape: int) -> Tensor:
        """Numbers that depend on the case and the shape only."""
        seed = sum(prime * n for prime, n in zip((7, 11, 13, 17, 19), (*shape, self.channels, self.H), strict=False))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def turns(self, device: str) -> tuple[Tensor, Tensor]:
        """cos and sin amid NaN, in float32; not quite on the circle, so that each is known from the other."""
        cos, sin = self.draw(2, self.B, self.T, sum(self.widths) // 2).to(device).unbind()
        return amid(cos), amid(sin)

    def qkv(self, dtype: torch.dtype, device: str) -> Tensor:
        """Amid NaN; one head in three of zeros, so that scales of zero occur, and others greatest in what is passed."""
        qk = self.draw(self.B, self.T, self.H + self.G, self.channels)
        v = self.draw(self.B, self.T, self.G, self.value_width)
        qk[:, :, ::2, -1] *= 5
        qk[:, :, 2::3], v[:, :, 2::3] = 0, 0
        return amid(torch.cat((qk.flatten(2), v.flatten(2)), -1).to(device, dtype))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    B, T, slots = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    G = draw(st.sampled_from([1, 2, 5, HEADS + 1]))
    return Case(
        B,
        T,
        draw(st.sampled_from([1, 3, HEADS - 1, HEADS, HEADS + 1])),
        G,
        tuple(2 * half for half in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))),
        draw(st.integers(0, 9)),
        draw(st.sampled_from(["interleaved", "halves"])),
        draw(st.integers(1, 20)),
        slots,
        tuple(draw(st.integers(-T, slots + 1)) for _ in range(B)),
    )


def check_turn(case: Case, dtype: torch.dtype, device: str, inverse: bool) -> None:
    """`rotary` and its gradient: to the bit what plain torch computes."""
    how = {"widths": case.widths, "pairing": case.pairing, "inverse": inverse}
    x = amid(case.draw(case.B, case.T, case.H, case.channels).to(device, dtype))
    dy = amid(case.draw(case.B, case.T, case.H, case.channels + 1).to(device, dtype)[..., 1:])
    cos, sin = case.turns(device)
    leaf, again = x.detach().requires_grad_(), x.double().requires_grad_()
    plain = rotary_reference(leaf, cos, sin, **how)
    if dispatch.takes_kernel(x):  # first, since a broken kernel does no harm between guards
        out = Guarded(tuple(x.shape), x, margin=4)  # its strides are not those of x
        launch(x, cos, sin, out.out, case.widths, case.pairing, inverse)
        assert torch.equal(out.written(), plain)
    y = rotary(leaf, cos, sin, **how)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    truth = rotary_reference(again, cos.double(), sin.double(), **how)
    assert y.is_contiguous()
    assert torch.equal(y, plain)
    judge(y.detach(), plain.detach(), truth.detach())
    judge(dx, torch.autograd.grad(plain, leaf, dy)[0], torch.autograd.grad(truth, again, dy.double())[0])


def check_append(case: Case, dtype: torch.dtype, device: str, int8: bool, position: torch.dtype = torch.int32) -> None:
    """`rotary_append`: queries, caches and scales as plain torch has them; what else is there stays as it was."""
    qkv, (cos, sin) = case.qkv(dtype, device), case.turns(device)
    at = torch.tensor(case.at, device=device, dtype=position)
    like = qkv.new_empty(0, dtype=torch.int8) if int8 else qkv

    def buffers() -> tuple[list[Guarded], list[Guarded]]:
        """(caches, scales)."""
        places = (case.B, case.G, case.slots)
        caches = [Guarded((*places, width), like) for width in (case.channels, case.value_width)]
        return caches, [Guarded(places, cos) for _ in range(2 * int8)]

    def outs(buffers: list[Guarded]) -> list[Tensor]:
        return [buffer.out for buffer in buffers]

    caches, scales = buffers()
    how = {"widths": case.widths, "pairing": case.pairing}
    named = dict(zip(("key_scale", "value_scale"), outs(scales), strict=False))
    q = rotary_append_reference(qkv, cos, sin, *outs(caches), at, **how, **named)
    expected = [buffer.partly_written() for buffer in caches + scales]

    def fill(ours: bool) -> tuple[Tensor, list[Guarded]]:
        """(queries, what was filled), by the kernel's launch or as a user does it."""
        caches, scales = buffers()
        key_scale, value_scale = outs(scales) if int8 else (None, None)
        if ours:
            queries, turns = Guarded((case.B, case.T, case.H, case.channels), qkv), (case.widths, case.pairing)
            launch_append(qkv, cos, sin, queries.out, *outs(caches), at, key_scale, value_scale, *turns)
            return queries.written(), caches + scales
        named = {"key_scale": key_scale, "value_scale": value_scale}
        return rotary_append(qkv, cos, sin, *outs(caches), at, **how, **named), caches + scales

    for ours in [True, False] if dispatch.takes_kernel(qkv) else [False]:  # between guards first
        found, kept = fill(ours)
        assert torch.equal(found, q)
        for buffer, wanted in zip(kept, expected, strict=True):
            assert torch.equal(buffer.partly_written().nan_to_num(-5555.0), wanted.nan_to_num(-5555.0))


# ----------------------------------------------------------------------------- reference, interpreter, GPU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inverse", [False, True], ids=["", "inverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(dtype: torch.dtype, inverse: bool, device: str) -> None:
    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(cases())
    def drawn(case: Case) -> None:
        check_turn(case, dtype, device, inverse)

    drawn()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_append(dtype: torch.dtype, int8: bool, device: str) -> None:
    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(cases())
    def drawn(case: Case) -> None:
        check_append(case, dtype, device, int8)

    drawn()
    case = Case(2, 3, 2, 2, (8,), 0, "halves", 8, 6, (1, 4))
    check_append(case, dtype, device, int8, torch.int64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_published_forms(form: str, device: str) -> None:
    widths, pairing, K = FORMS[form]
    case = Case(1, 2, 3, 1, widths, K - sum(widths), pairing, K, 4, (1,))
    check_turn(case, torch.float16, device, False)
    for int8 in (False, True):
        check_append(case, torch.float16, device, int8)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device: str) -> None:
    """Whatever the strides; one row of turns for all rows; no tokens."""
    wide = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(device)
    cos, sin = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(1)).to(device).unbind()
    packed = wide[..., 4:28].unflatten(-1, (-1, 6))
    for x in (packed, packed.flip(-1), wide[..., ::5][..., :6].unsqueeze(2), packed[:, :, 1:].mT.contiguous().mT):
        for pairing in ("halves", "interleaved"):
            for c, s in ((cos, sin), (cos, sin.mT.contiguous().mT), (cos.expand(2, -1, -1), sin)):
                y = rotary(x, c, s, widths=[4], pairing=pairing)
                assert torch.equal(y, rotary_reference(x, cos, sin, widths=[4], pairing=pairing))
                assert y.is_contiguous()
    assert rotary(packed[:0], cos[:0], sin[:0], widths=[4], pairing="halves").shape == (0, 3, 4, 6)
    caches = [torch.zeros(2, 1, 5, 6, device=device) for _ in range(2)]
    at = torch.tensor([0, 4, 1, 4], device=device)[::2] * 2
    q = rotary_append(wide[..., ::2][..., :18], cos, sin, *caches, at, widths=[4], pairing="halves")
    assert q.shape == (2, 3, 1, 6)
    assert [int(cache.abs().sum(-1).count_nonzero()) for cache in caches] == [6, 6]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_opcheck(int8: bool, device: str) -> None:
    case = Case(2, 3, 2, 1, (4, 2), 1, "halves", 5, 6, (0, 4))
    x, (cos, sin) = case.draw(2, 3, 2, 7).to(device), case.turns(device)
    torch.library.opcheck(MODULE.rotary_op, (x.requires_grad_(), cos, sin, [4, 2], "halves", False))
    kind = torch.int8 if int8 else torch.float32
    caches = [torch.zeros(2, 1, 6, width, dtype=kind, device=device) for width in (7, 5)]
    scales = [torch.zeros(2, 1, 6, device=device) if int8 else None for _ in range(2)]
    at = torch.tensor(case.at, device=device)
    arguments = (case.qkv(torch.float32, device), cos, sin, *caches, at, [4, 2], "halves", *scales)
    torch.library.opcheck(MODULE.rotary_append_op, arguments)


@kernel
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    turns = torch.ones(1, 1, 1)
    with pytest.raises(NotImplementedError, match="use float16"):
        rotary(torch.ones(1, 1, 1, 2).bfloat16(), turns, turns, widths=[2], pairing="halves")


TURNED, PAIRS, TURN, ROTARY = "turned", "put_pairs", "turn", "rotary_kernel"
APPEND, STEPS, INT8, PEAK = "rotary_append_kernel", "steps_of", "turn_quantised", "peak_of"
MUTANTS = {  # name: the kernel, what is replaced, by what
    "sign of sin": (TURNED, "return a * c - b * s, a * s + b * c", "return a * c + b * s, b * c - a * s"),
    "wrong pairing": (TURNED, "if interleaved:", "if not interleaved:"),
    "partner of another pair": (TURNED, "start + width // 2 + pair[None, :]", "start + width // 2 - 1 + pair[None, :]"),
    "axes share the first's angles": (TURNED, "cos + start // 2 + pair", "cos + pair"),
    "angles of all channels": (TURNED, "sin + start // 2 + pair", "sin + start + pair"),
    "pairs stored side by side": (PAIRS, "y + start + width // 2 + pair", "y + start + 1 + pair"),
    "tail of an axis overwrites": (PAIRS, "(pair < width // 2)", "(pair <= width // 2)"),
    "heads unmasked": (PAIRS, "there = inside & (pair", "there = (pair"),
    "axis not advanced": (TURN, "start += widths[axis]", "start += 0"),
    "pass-through lost": (TURN, "if rest > 0:", "if rest < 0:"),
    "pass-through too long": (TURN, "channel < rest", "channel <= rest"),
    "a head too many": (ROTARY, "head < heads", "head <= heads"),
    "output takes the input's stride": (ROTARY, "row * y_row + token * y_token", "row * x_row + token * x_token"),
    "turns of another row": (ROTARY, "turns = row * turn_row + token", "turns = token"),
    "never turned back": (ROTARY, "sin + turns, sign,", "sin + turns, 1.0,"),
    "cache position off by one": (APPEND, ".to(tl.int64) + token\n", ".to(tl.int64) + token + 1\n"),
    "all tokens to one slot": (APPEND, ".to(tl.int64) + token\n", ".to(tl.int64)\n"),
    "a slot past the end": (APPEND, "slot < slots", "slot <= slots"),
    "a slot before the first": (APPEND, "slot >= 0", "slot >= -1"),
    "keys of the query heads": (APPEND, "x += heads * key_width", "x += 0"),
    "values of the keys": (APPEND, "x + groups * key_width + group", "x + group"),
    "scales by value width": (APPEND, "group * value_scale_head", "group * value_head"),
    "rounded down": (STEPS, "x + 12582912.0 - 12582912.0", "tl.floor(x)"),
    "peak of one half": (INT8, "tl.max(tl.maximum(a, b), 1", "tl.max(a, 1"),
    "scale without what is passed": (INT8, "tl.maximum(peak, peak_of(x, inside, start, rest, rest_block))", "peak"),
    "peak signed": (PEAK, "tl.abs(values.to(tl.float32))", "values.to(tl.float32)"),
}


@kernel
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, tmp_path, MODULE, *MUTANTS[name])

    def check_all() -> None:  # float16 is enough
        for pairing, rest in (("halves", 5), ("interleaved", 5), ("halves", 0)):
            case = Case(2, 2, 3, 4, (4, 6), rest, pairing, 5, 4, (3, -1))
            check_turn(case, torch.float16, "cpu", True)
            for int8 in (False, True):
                check_append(case, torch.float16, "cpu", int8)

    with pytest.raises(AssertionError):
        check_all()


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=8 + len(FORMS) + len(MUTANTS))


# ----------------------------------------------------------------------------- the reference, and around it


@directly
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_reference_is_what_the_model_does(form: str, dtype: torch.dtype) -> None:
    """To the bit, and so are the keys and values in its cache; float64 stays float64."""
    widths, pairing, K = FORMS[form]
    B, T, H, G, S, filled = 2, 3, 4, 2, 9, 5
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, (H + 2 * G) * K, generator=generator).to(dtype)
    positions = torch.randint(0, 30000, (B, T, len(widths)), generator=generator)
    rotation = Rotary(widths, pairing, 1e4, Plain(), None).rotation(positions, dtype)
    cos, sin = (torch.cat([turn[i][:, :, 0] for turn in rotation.turns], -1) for i in range(2))

    qk, v = qkv.unflatten(-1, (-1, K)).split((H + G, G), dim=2)
    turned = rotation(qk)
    y = rotary(qk, cos, sin, widths=widths, pairing=pairing)
    assert y.dtype == dtype
    assert torch.equal(y, turned)

    ours, theirs = ([torch.zeros(B, G, S, K, dtype=dtype) for _ in range(2)] for _ in range(2))
    q = rotary_append(qkv, cos, sin, *ours, torch.full((B,), filled), widths=widths, pairing=pairing)
    Slots(tuple(theirs), filled, {}).extend(turned[:, :, H:].transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(q, turned[:, :, :H])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@directly
def test_int8_is_within_half_a_step() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-3, 0, 1e4, 1e-44])[:, None]
    steps, scale = quantised(x)
    assert steps.dtype == torch.int8
    assert steps[:2].abs().amax(-1).tolist() == [127, 127]
    assert scale[2] == 0
    assert not steps[2].any()
    assert ((scale[:, None] * steps - x).abs() <= 0.5001 * scale[:, None])[:4].all()


@directly
@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
def test_gradients(pairing: str) -> None:
    case = Case(2, 3, 2, 1, (4, 2), 1, pairing, 5, 6, (0, 4))
    x, (cos, sin) = case.draw(2, 3, 2, 7).double().requires_grad_(), case.turns("cpu")
    for inverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, inverse=inverse: rotary(
                x, cos.double(), sin.double(), widths=[4, 2], pairing=pairing, inverse=inverse
            ),
            x,
        )


@directly
def test_torch_compile_takes_it_whole() -> None:
    def block(x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
        y = rotary(2 * x, cos, sin, widths=[4], pairing="halves")
        q = rotary_append(y.flatten(2), cos, sin, keys, values, at + 1, widths=[4], pairing="interleaved")
        return q + keys.sum()

    generator = torch.Generator().manual_seed(0)
    x, (cos, sin) = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 2, 3, 2, generator=generator)
    at = torch.tensor([0, 2])
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        caches = [torch.zeros(2, 1, 6, 5) for _ in range(2)]
        results.append([function(x, cos, sin, *caches, at), *caches])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    x.requires_grad_()
    compiled = torch.compile(
        lambda x: rotary(x, cos, sin, widths=[4], pairing="halves"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sin().sum(), x)[0].shape, x.shape)


@directly
def test_tensors_that_do_not_fit_are_named() -> None:
    x, cos = torch.ones(2, 3, 1, 6), torch.ones(2, 3, 2)
    caches, at = [torch.ones(2, 1, 5, 6) for _ in range(2)], torch.zeros(2, dtype=torch.int32)
    good = {"x": x, "cos": cos, "sin": cos, "widths": [4], "pairing": "halves"}
    for fault, other in {
        "pairing must be one of interleaved, halves": {"pairing": "thirds"},
        "widths must be even": {"widths": [3]},
        "together at most a head's 6": {"widths": [4, 4]},
        r"cos must be \[2, 3, 2\] \(or 1 for 2\) torch.float32": {"cos": cos.double()},
        r"sin must be \[2, 3, 2\]": {"sin": cos[:, :2]},
        r"x must be \[B, T, heads, K\]": {"x": x[0]},
        "must be floating": {"x": x.int()},
    }.items():
        with pytest.raises(ValueError, match=fault):
            rotary(**{**good, **other})
    good = {
        "qkv": x.expand(-1, -1, 4, -1).flatten(2), "cos": cos, "sin": cos, "key_cache": caches[0],
        "value_cache": caches[1], "at": at, "widths": [4], "pairing": "halves",
    }  # fmt: skip
    for fault, other in {
        "leave no queries of 6": {"qkv": torch.ones(2, 3, 25)},
        "the 2 rows of qkv": {"key_cache": caches[0][:1]},
        r"at must be \[2\] int32 or int64": {"at": at.float()},
        "key_cache must be torch.int8 with key_scale": {"key_scale": torch.ones(2, 1, 5)},
        "value_cache must be torch.float32 without value_scale": {"value_cache": caches[1].to(torch.int8)},
        r"key_scale must be \[2, 1, 5\] torch.float32": {
            "key_cache": caches[0].to(torch.int8),
            "key_scale": torch.ones(2, 1, 4),
        },
        "channels side by side": {"key_cache": torch.ones(2, 1, 6, 5).mT},
        r"qkv must be \[B, T": {"qkv": x},
    }.items():
        with pytest.raises(ValueError, match=fault):
            rotary_append(**{**good, **other})


# ----------------------------------------------------------------------------- compiled ahead of time


@directly
@needs_triton
@pytest.mark.parametrize("form", ["two axes of 128", "interleaved half of 128"])
def test_reads_and_writes_sixteen_bytes_at_a_time(form: str) -> None:
    """But for the length of the row, and it needs no shared memory: a pair lies in one thread."""
    from glm_kernels.variants import Target, compile

    built = compile(MODULE.variant(form, torch.bfloat16, False), Target("cuda", 90))
    assert built.count(r"LDG\.") == built.count(r"LDG\..*\.128") + 1
    assert built.count(r"STG\.") == built.count(r"STG\..*\.128") >= 4
    assert built.shared == 0
