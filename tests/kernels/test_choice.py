"""The likeliest token: on the CPU the reference, in Triton's interpreter and on a GPU the kernels."""

import math
from pathlib import Path

import pytest
import torch
from glm_kernels import choice as module
from glm_kernels import likeliest
from glm_kernels.choice import BLOCK, likeliest_reference
from harness import (
    DEVICES,
    DTYPES,
    INTERPRETED,
    Guarded,
    amid,
    directly,
    kernel,
    needs_triton,
    put_in,
    rerun,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

INF, NAN = math.inf, math.nan
SMALL = 16  # logits of a part in most tests

# ----------------------------------------------------------------------------- one case, checked in every way


def by_hand(logits: Tensor) -> list[int]:
    """The equation, row by row."""
    return [row.index(max(row)) if all(map(math.isfinite, row)) else -1 for row in logits.tolist()]


def launched(logits: Tensor, block: int) -> Tensor:
    """The kernels' ids [R], and what the parts came to, between guard bands."""
    R, parts = len(logits), -(-logits.shape[1] // block)
    ids = Guarded((R,), torch.empty(0, dtype=torch.long, device=logits.device))
    tops = Guarded((R * parts,), torch.empty(0, device=logits.device))
    leaders = Guarded((R * parts,), torch.empty(0, dtype=torch.int32, device=logits.device))
    module.launch(logits, ids.out, tops.out.view(R, parts), leaders.out.view(R, parts), block)
    tops.written(infinite=True)
    leaders.written()
    return ids.written()


def check(logits: Tensor, block: int = SMALL, frame: float = NAN) -> None:
    """Logits [R, V], placed amid `frame`, as the equation has it."""
    truth, placed = by_hand(logits), amid(logits, frame)
    assert likeliest_reference(placed).tolist() == truth
    if INTERPRETED or logits.is_cuda:
        assert launched(placed, block).tolist() == truth
    ids = likeliest(placed)
    assert (ids.tolist(), ids.dtype) == (truth, torch.long)


# ----------------------------------------------------------------------------- reference, interpreter, GPU

EDGES: dict[str, list[list[float]]] = {
    "one logit": [[0.5]],
    "one logit, not a number": [[NAN]],
    "equal ones": [[1.0] * 5, [-1.0] * 5],
    "equal ones in two parts": [[0.0] * 3 + [2.0] + [0.0] * 20 + [2.0] * 9],
    "equal ones at the end of a part and the beginning of the next": [[0.0] * 15 + [1.0, 1.0] + [0.0] * 15],
    "the first": [[9.0] + [0.0] * 40],
    "the last": [[0.0] * 40 + [9.0]],
    "all far below zero": [[-60000.0, -60001.0, -59990.0], [-60000.0] * 3],
    "both zeros": [[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]],
    "the largest number": [[0.0, 65504.0, 3.0]],
    "∞": [[0.0, INF, 1.0], [0.0, 1.0, 2.0], [-INF, 1.0, 2.0]],
    "nothing but -∞": [[-INF] * 20],
    "not a number in another part": [[5.0] + [0.0] * 19 + [NAN] + [0.0] * 19, [0.0] * 40],
    "not a number at the very end": [[0.0] * 33 + [NAN]],
    "nothing but what is no number": [[NAN] * 40, [1.0] * 40],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("frame", [NAN, 9999.0])
def test_edges(name: str, dtype: torch.dtype, device: str, frame: float) -> None:
    check(torch.tensor(EDGES[name], dtype=dtype, device=device), frame=frame)


@st.composite
def logits_of(draw: st.DrawFn) -> Tensor:
    """A few values over and over, among which some are not finite."""
    R, V = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 100, 560]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = torch.randint(-4, 4, (R, V), generator=random) / 4.0
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, R - 1)), draw(st.integers(0, V - 1))
        logits[place] = draw(st.sampled_from([NAN, INF, -INF]))
    return logits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(logits_of(), st.sampled_from([torch.float16, torch.float32]), st.sampled_from([16, 64]))
def test_drawn(logits: Tensor, dtype: torch.dtype, block: int) -> None:
    check(logits.to(dtype), block)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("V", [BLOCK - 1, BLOCK, BLOCK + 1, 65024, 151552])
def test_vocabularies(V: int, device: str) -> None:
    """Of releases, in the launch that a user gets; the largest logit is in several places, and far back."""
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(V)).half().to(device)
    logits[:, [V // 2, V - 2, V - 1]] = 9.0
    check(logits, BLOCK)
    logits[1, V - 1] = NAN
    check(logits, BLOCK)
    assert likeliest(logits).tolist() == [V // 2, -1]


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_user_calls(device: str) -> None:
    """Any axes in front and any strides; the result is contiguous."""
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).to(device)
    truth = logits.argmax(-1)
    for layout in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1), logits.mT.contiguous().mT):
        ids = likeliest(layout)
        assert torch.equal(ids, truth)
        assert ids.is_contiguous()
    assert torch.equal(likeliest(logits.double()), truth)
    assert torch.equal(likeliest(logits[0, :1].expand(4, 7)), truth[0, :1].expand(4))
    assert likeliest(logits[0, 0]).shape == ()
    assert likeliest(logits[:0]).shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    torch.library.opcheck(module.likeliest_op, (torch.randn(2, 3, 40, device=device),))


@kernel
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    with pytest.raises(NotImplementedError, match="use float16"):
        likeliest(torch.ones(1, 8).bfloat16())


# ----------------------------------------------------------------------------- broken on purpose

MUTANTS = {  # kernel: {name: what is replaced, by what}
    "likeliest_part_kernel": {
        "of equal ones the last": ("tie_break_left=True", "tie_break_left=False"),
        "logits of another row": ("logits + row * row_stride", "logits + row * V"),
        "read past the end": ("inside = i < V", "inside = i < V + 1"),
        "the last logit left out": ("inside = i < V", "inside = i < V - 1"),
        "NaN is a number": ('finite = tl.abs(x) < float("inf")', "finite = tl.abs(x) != float('inf')"),
        "∞ is a number": ('finite = tl.abs(x) < float("inf")', "finite = x == x"),
        "-∞ is a number": ('finite = tl.abs(x) < float("inf")', 'finite = x < float("inf")'),
        "the end of a row is no number": ("inside & ~finite", "~finite"),
        "the id within the part": ("part * block + place", "place"),
        "a part in the place of another": ("tl.store(tops + row * parts + part, top)", "tl.store(tops + part, top)"),
        "parts of another row": ("tl.store(leaders + row * parts", "tl.store(leaders + 0 * row * parts"),
    },
    "likeliest_join_kernel": {
        "any leader": ("top == tl.max(top, 0)", "top <= tl.max(top, 0)"),
        "of equal parts the last": (
            "tl.min(tl.where(top == tl.max(top, 0), leader, 2147483647), 0)",
            "tl.max(tl.where(top == tl.max(top, 0), leader, -1), 0)",
        ),
        "one part too many": ("inside = part < parts", "inside = part < parts + 1"),
        "one part left out": ("inside = part < parts", "inside = part < parts - 1"),
        "not a number in the leading part only": ("tl.min(leader, 0) < 0", "lowest < 0"),
    },
}  # fmt: skip
TRIALS = [name for name, rows in EDGES.items() if len(rows) > 1 or "part" in name or "last" in name]


def check_all() -> None:
    for name in TRIALS:
        check(torch.tensor(EDGES[name], dtype=torch.float16))


@kernel
@pytest.mark.parametrize(("which", "name"), [(which, name) for which, faults in MUTANTS.items() for name in faults])
def test_mutant_is_caught(which: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MUTANTS[which][name]
    put_in(monkeypatch, tmp_path, module, which, right, wrong)
    with pytest.raises(AssertionError):
        check_all()


@kernel
def test_trials_pass_unbroken() -> None:
    check_all()


# ----------------------------------------------------------------------------- the call


@directly
def test_torch_compile_takes_it_whole() -> None:
    logits = torch.randn(2, 3, 9)
    compiled = torch.compile(lambda x: likeliest(2 * x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), logits.argmax(-1) + 1)


@directly
def test_what_is_no_choice_is_refused() -> None:
    for wrong in (torch.zeros(2, 0), torch.tensor(1.0), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"logits must be floating \[\.\.\., V\], V ≥ 1; they are torch"):
            likeliest(wrong)


@directly
@needs_triton
def test_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On an H100: all loads of logits are of 16 bytes."""
    from glm_kernels.variants import Target, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = Target("cuda", 90)
    for variant in module.variants(target):
        if variant.kernel is module.likeliest_part_kernel:
            code = compile(variant, target)
            size = 4 if "fp32" in variant.label else 2
            assert code.count(r"LDG\.E\.128") == BLOCK * size // (16 * 32 * module.WARPS), variant.name
            assert code.count("LDG") == code.count(r"LDG\.E\.128"), variant.name


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=sum(map(len, MUTANTS.values())) + 4 * len(EDGES))
