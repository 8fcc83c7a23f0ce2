"""dense_matmul: on the CPU the reference, in Triton's interpreter and on a GPU the kernel."""

import itertools
import re
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from glm_kernels import counters, dense_matmul, dense_matmul_experts, splits
from glm_kernels.dispatch import Target
from glm_kernels.variants import TARGETS, compile
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

dense: Any = import_module("glm_kernels.dense_matmul")
EPS = 1e-3  # such that it shows in rows of small numbers
HOPPER = TARGETS[2]


class Case(NamedTuple):
    """One product: rows N, outputs O before SwiGLU, inputs I, rows a program, rows of each expert."""

    N: int
    O: int  # noqa: E741
    I: int  # noqa: E741
    path: int = 1
    splits: int = 1
    bias: bool = False
    residual: bool = False
    swiglu: bool = False
    norm: bool = False
    experts: tuple[int, ...] = ()


CASES = (
    Case(1, 19, 70),
    Case(1, 34, 100, splits=3, bias=True, residual=True, swiglu=True, norm=True),
    Case(2, 21, 33, path=2, norm=True, residual=True),
    Case(2, 36, 130, path=2, splits=2, swiglu=True, bias=True),
    Case(1, 1, 1, path=2, bias=True),
    Case(5, 33, 70, path=16, residual=True),
    Case(16, 38, 200, path=16, splits=3, swiglu=True, norm=True, bias=True),
    Case(11, 18, 96, path=16, splits=2, norm=True),
    Case(0, 22, 70, bias=True, swiglu=True, experts=(1, 0, 3, 2, 0)),
    Case(0, 17, 40, path=2, bias=True, experts=(0, 5, 0)),
    Case(0, 34, 65, path=16, swiglu=True, bias=True, experts=(0, 17, 16, 1)),
)


@st.composite
def cases(draw: Any) -> Case:
    """All paths and forms at small, odd sizes."""
    path = draw(st.sampled_from([1, 2, 16]))
    bias, residual, swiglu, norm = (draw(st.booleans()) for _ in range(4))
    outputs = draw(st.integers(1, 25)) * (2 if swiglu else 1)
    case = Case(draw(st.integers(1, path)), outputs, draw(st.integers(1, 100)), path, bias=bias, swiglu=swiglu)
    if draw(st.booleans()):
        return case._replace(experts=tuple(draw(st.lists(st.integers(0, path + 2), min_size=1, max_size=5))))
    return case._replace(residual=residual, norm=norm, splits=draw(st.integers(1, 3)))


def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments, those that may have strides amid NaN."""
    g = torch.Generator().manual_seed(case.N * 7919 + case.O * 101 + case.I)
    lead = (len(case.experts),) if case.experts else ()
    N = sum(case.experts) if case.experts else case.N

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    x = draw(N, case.I) / case.I**0.5
    if case.norm:  # rows of all sizes: the factor of one is not that of another
        x *= 10 ** (2 * torch.rand(N, 1, generator=g) - 1).to(device, dtype)
    return {
        "x": amid(x),
        "weight": amid(draw(*lead, case.O, case.I), margin=4),
        "bias": draw(*lead, case.O) if case.bias else None,
        "residual": amid(draw(N, case.O // (1 + case.swiglu)), margin=5) if case.residual else None,
        "norm": amid(1 + draw(case.I) / 2) if case.norm else None,
        "eps": EPS if case.norm else None,
        "offsets": torch.tensor([0, *case.experts]).cumsum(0).int().to(device) if case.experts else None,
    }


def launched(case: Case, given: dict[str, Any]) -> Tensor:
    """The kernel's y between guard bands, its path and splits as the case says, in small blocks."""
    vector = case.path <= dense.MOST_BY_VECTOR
    large = given["x"].is_cuda  # tensor cores have a least size
    outs, width = (8, 32) if vector else (64, 64) if large else (16, 32)
    y = Guarded((len(given["x"]), case.O // (1 + case.swiglu)), given["x"])
    dense.launch(
        given["x"], given["weight"], given["bias"], given["residual"], given["norm"], y.out, given["offsets"],
        gated=case.swiglu, eps=given["eps"] or 0.0, shape=dense.Shape(case.path, outs, width, vector, 4, 2),
        splits=case.splits,
    )  # fmt: skip
    assert all((c == 0).all() for c in counters.kept.values()), "counters not set back"
    return y.written()


def plainly(case: Case, given: dict[str, Any]) -> Tensor:
    """The reference."""
    y: Tensor = dense.reference(**given, swiglu=case.swiglu)
    return y


def exact(case: Case, given: dict[str, Any]) -> Tensor:
    """In float64, written down anew."""
    x, w = given["x"].double(), given["weight"].double()
    if case.norm:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * given["norm"].double()
    which = torch.arange(max(1, len(case.experts))).repeat_interleave(torch.tensor(case.experts or [len(x)]))
    which = which.to(x.device)
    w = w if case.experts else w[None]
    y = torch.einsum("ni,noi->no", x, w[which])
    if case.bias:
        y = y + (given["bias"].double()[which] if case.experts else given["bias"].double())
    if case.swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if given["residual"] is None else y + given["residual"].double()


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """The kernel, twice, in its guard bands, against float64."""
    given = inputs(case, dtype, device)
    if not given["x"].numel():
        return
    y = launched(case, given)
    judge(y, plainly(case, given), exact(case, given))
    assert torch.equal(y, launched(case, given)), "not the same twice"


def called(case: Case, given: dict[str, Any]) -> Tensor:
    """By the public function."""
    shared: dict[str, Any] = {name: given[name] for name in ("x", "weight", "bias")} | {"swiglu": case.swiglu}
    if case.experts:
        return dense_matmul_experts(**shared, offsets=given["offsets"])
    return dense_matmul(**shared, **{name: given[name] for name in ("residual", "norm", "eps")})


# ----------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms(case: Case, dtype: torch.dtype, device: str) -> None:
    if INTERPRETED and dtype == torch.float32 and CASES.index(case) % 3:
        pytest.skip("a third of them in float32")
    if INTERPRETED or device == "cuda":
        check(case, dtype, device)
    given = inputs(case, dtype, device)
    y = called(case, given)
    judge(y, plainly(case, given), exact(case, given))
    assert y.is_contiguous()


@kernel
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_shape(case: Case) -> None:
    check(case, torch.float16, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17])
def test_real_launch_shapes(rows: int, device: str) -> None:
    """As the wrapper cuts them, or without the kernel, leading axes and strides of x kept."""
    case = Case(rows, 70, 300, bias=True, swiglu=True, norm=True)
    given = inputs(case, torch.float16, device)
    y = called(case, given | {"x": given["x"][:, None]})
    assert y.shape == (rows, 1, 35)
    judge(y[:, 0], plainly(case, given), exact(case, given))
    turned = inputs(case, torch.float16, device)
    turned["x"] = turned["x"].T.contiguous().T  # the elements of a row not side by side
    judge(called(case, turned), plainly(case, given), exact(case, given))


@pytest.mark.parametrize("device", DEVICES)
def test_experts_of_many_rows(device: str) -> None:
    """More than one block of rows each, in every path the wrapper may choose."""
    for experts in ((40, 3, 0), (150,), (1, 0, 0, 1)):
        case = Case(0, 20, 40, bias=True, swiglu=True, experts=experts)
        given = inputs(case, torch.float16, device)
        judge(called(case, given), plainly(case, given), exact(case, given))


@pytest.mark.parametrize("device", DEVICES)
def test_float64_is_computed_by_the_reference(device: str) -> None:
    for case in (CASES[1], CASES[8]):
        given = inputs(case, torch.float64, device)
        y = called(case, given)
        assert torch.equal(y, plainly(case, given))
        torch.testing.assert_close(y, exact(case, given), rtol=1e-12, atol=1e-12)


def test_nothing_of_nothing() -> None:
    """No rows, no columns: torch's answer."""
    weight = torch.ones(4, 3)
    assert dense_matmul(torch.ones(0, 3), weight).shape == (0, 4)
    assert torch.equal(dense_matmul(torch.ones(2, 0), weight[:, :0], bias=torch.ones(4)), torch.ones(2, 4))
    offsets = torch.zeros(3, dtype=torch.int32)
    assert dense_matmul_experts(torch.ones(0, 3), torch.ones(2, 4, 3), offsets=offsets).shape == (0, 4)


@kernel
def test_norm_reaches_as_far_as_float16() -> None:
    """By tile x norm is rounded before it is normalised: 65504 is the last that does not become infinite."""
    for rows, x, fits in ((1, 1024.0, True), (3, 1023.5, True), (3, 1024.0, False)):
        case = Case(rows, 8, 32, norm=True)
        given = inputs(case, torch.float16, "cpu")
        given["norm"].fill_(64)
        given["x"].fill_(x)
        y, plain = called(case, given), plainly(case, given)
        assert plain.isfinite().all()
        if fits:
            judge(y, plain, exact(case, given))
        else:
            assert not y.isfinite().any()


@kernel
def test_bfloat16_is_refused_by_the_interpreter() -> None:
    with pytest.raises(NotImplementedError, match="use float16"):
        called(CASES[0], inputs(CASES[0], torch.bfloat16, "cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    for case in (CASES[1], CASES[6], CASES[8]):
        given = inputs(case, torch.float32 if device == "cpu" else torch.float16, device)
        torch.library.opcheck(
            dense.dense_product, (*given.values(), case.swiglu), test_utils=("test_schema", "test_faketensor")
        )


@directly
def test_torch_compile_takes_it_whole() -> None:
    given = inputs(CASES[6], torch.float32, "cpu")

    def twice(x: Tensor) -> Tensor:
        return 2 * called(CASES[6], given | {"x": x + 1})

    x = given["x"].contiguous()
    torch.testing.assert_close(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_experts_stand_in_a_graph(device: str) -> None:
    """Captured once, right for other offsets too."""
    case = Case(0, 96, 128, swiglu=True, experts=(3, 0, 4, 1))
    given = inputs(case, torch.float16, device)
    called(case, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = called(case, given)
    for experts in ((3, 0, 4, 1), (0, 8, 0, 0), (2, 2, 2, 2)):
        given["offsets"].copy_(torch.tensor([0, *experts]).cumsum(0))
        graph.replay()
        other = case._replace(experts=experts)
        judge(y, plainly(other, given), exact(other, given))


# ----------------------------------------------------------------------------- faults on purpose

MUTANTS = {  # name: kernel, what is replaced, by what
    "by vector, no mask behind the last column": ("by_vector", "column + j < inputs", "column + j <= inputs"),
    "by vector, stride of x": ("by_vector", "line + r * tl.cast(x_row, tl.int64)", "line + r * inputs"),
    "by vector, stride of W": ("by_vector", "[:, None] * weight_row", "[:, None] * inputs"),
    "by vector, one row's sums for all": ("by_vector", "row[None, :] == r", "row[None, :] >= 0"),
    "by vector, one row's squares for all": ("by_vector", "row == r", "row >= 0"),
    "by vector, tiles not added": ("by_vector", "accs[r] + tl.sum(", "tl.sum("),
    "by vector, weight of the norm forgotten": ("by_vector", "value *= scale", "pass"),
    "by vector, squares of what is weighted": ("by_vector", "value * value,", "value * value * scale,"),
    "by tile, no mask behind the last column": ("by_tile", "column + j < inputs", "column + j <= inputs"),
    "by tile, stride of x": ("by_tile", "n[:, None] * x_row", "n[:, None] * inputs"),
    "by tile, tiles not added": ("by_tile", "tl.trans(x_tile), acc,", "tl.trans(x_tile),"),
    "by tile, weight of the norm forgotten": ("by_tile", "(value * scale)", "value"),
    "by tile, squares of the last tile only": ("by_tile", "square += value", "square = value"),
    "a row too many": ("dense_kernel", "block * rows, N", "block * rows, N + 1"),
    "gate and up exchanged": ("dense_kernel", "i % 2 * (height // 2)", "(1 - i % 2) * (height // 2)"),
    "bias of the gate for both": ("dense_kernel", "bias + m, mask", "bias + m % (height // 2), mask"),
    "no silu": ("dense_kernel", "gate / (1.0 + tl.exp(-gate)) * up", "gate * up"),
    "an output too many": ("dense_kernel", "inside = (m < height)", "inside = (m < height + 1)"),
    "an output too many of swiglu": ("dense_kernel", "inside = (o < height // 2)", "inside = (o < height // 2 + 1)"),
    "stride of the residual": ("dense_kernel", "n[None, :] * residual_row", "n[None, :] * y_row"),
    "eps lost": ("dense_kernel", "square / inputs + eps", "square / inputs"),
    "splits overlap": ("dense_kernel", "first + tiles_each", "first + tiles_each + 1"),
    "joined too early": ("join", "== splits - 1", "== splits - 2"),
    "counter left as it is": ("join", "tl.store(tally, 0)", "pass"),
    "squares left by the first split alone": ("join", "squares + part * squares_plane", "squares"),
    "one expert's matrix for all": ("dense_kernel", "weight += expert * weight_expert", "pass"),
    "one expert's bias for all": ("dense_kernel", "bias += expert * bias_expert", "pass"),
    "an empty expert has a block": ("block_of", "(upto <= block)", "(upto < block)"),
    "an expert has one block only": ("block_of", "(block - before) * rows", "0"),
    "rows of the next expert": ("block_of", "tl.where(mine, ends, 0)", "tl.where(mine, ends + 1, 0)"),
}  # fmt: skip
SHORT = CASES[:4] + CASES[5:]


def check_short() -> None:
    for case in SHORT:
        check(case, torch.float16, "cpu")


@kernel
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where, right, wrong = MUTANTS[name]
    if where == "join":
        put_in(monkeypatch, tmp_path, splits, where, right, wrong)
        monkeypatch.setattr(dense, where, splits.join)
    else:
        put_in(monkeypatch, tmp_path, dense, where, right, wrong)
    monkeypatch.setattr(counters, "kept", {})
    with pytest.raises(AssertionError):
        check_short()


@kernel
def test_short_cases_pass_without_a_mutant() -> None:
    check_short()


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=len(MUTANTS) + len(CASES))


# ----------------------------------------------------------------------------- around it


@directly
def test_tensors_that_do_not_fit_are_named() -> None:
    x, weight = torch.ones(2, 6), torch.ones(4, 6)
    good: dict[str, Any] = {"x": x, "weight": weight}
    for fault, change in {
        "x must be a floating": {"x": x.int()},
        r"weight must be \[4, 6\] torch.float32": {"weight": weight.half()},
        r"weight must be \[4, 6\]": {"weight": weight[:, 1:]},
        "weight must have 2 axes": {"weight": weight[None]},
        "must lie side by side": {"weight": torch.ones(6, 4).T},
        r"bias must be \[4\]": {"bias": torch.ones(3)},
        "bias must be contiguous": {"bias": torch.ones(8)[::2]},
        r"residual must be \[2, 4\]": {"residual": torch.ones(2, 2)},
        r"residual must be \[2, 2\]": {"residual": torch.ones(2, 4), "swiglu": True},
        "given together": {"norm": torch.ones(6)},
        "norm, the weight of an RMSNorm": {"eps": 1e-5},
        "eps is added to a mean square": {"norm": torch.ones(6), "eps": -1e-5},
        r"norm must be \[6\]": {"norm": torch.ones(4), "eps": 1e-5},
        "norm must be contiguous": {"norm": torch.ones(12)[::2], "eps": 1e-5},
        "cannot be halved": {"weight": weight[:3], "swiglu": True},
    }.items():
        with pytest.raises(ValueError, match=fault):
            dense_matmul(**(good | change))
    for wrong in (torch.tensor([0, 2]), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="offsets are int32"):
            dense_matmul_experts(x, weight[None], offsets=wrong)
    with pytest.raises(ValueError, match=r"weight must be \[2, 4, 6\]"):
        dense_matmul_experts(x, weight[None], offsets=torch.tensor([0, 1, 2]).int())


@directly
def test_every_row_of_every_expert_has_a_block() -> None:
    """The grid holds all blocks that a division of the rows among experts can need, and not one more than the worst."""
    for rows, experts, count in itertools.product((1, 2, 3, 16), (1, 2, 3, 4), range(1, 9)):
        worst = max(
            sum(-(-each // rows) for each in division)
            for division in itertools.product(range(count + 1), repeat=experts)
            if sum(division) == count
        )
        assert dense.row_blocks_for(count, rows, experts) == worst


@directly
def test_devices_are_filled() -> None:
    """Two programs a processor or more by splitting, but not where there are enough, nor into single tiles."""
    assert dense.splits_for(512, 16, 132) == 1
    assert dense.splits_for(64, 32, 132) == 5
    assert dense.splits_for(64, 4, 132) == 2
    assert dense.splits_for(1, 1000, 132) == dense.MOST_SPLITS
    assert dense.splits_for(1, 1, 132) == 1
    assert dense.shape_of_launch(1, 4096, 132, HOPPER).outs == 16
    assert dense.shape_of_launch(1, 2048, 132, HOPPER).outs == 8


# ----------------------------------------------------------------------------- machine code


def longest_loop(text: str) -> list[str]:
    """The instructions of the longest loop in a disassembly: what a backward branch jumps over."""
    places: dict[str, int] = {}
    found: list[str] = []
    longest: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            places[label[1]] = len(found)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?);", line):
            found.append(instruction[1])
            jump = re.match(r"BRA.*?(\.L_x_\d+)", instruction[1])
            if jump and jump[1] in places:
                longest = max(longest, found[places[jump[1]] :], key=len)
    return longest


@directly
@needs_triton
@pytest.mark.parametrize(("rows", "norm", "small"), [(1, False, False), (2, True, False), (1, False, True)])
def test_by_vector_on_hopper(rows: int, norm: bool, small: bool) -> None:
    """W comes 16 bytes at a time, asynchronously, and lanes are not added before the end."""
    built = compile(dense.variant(HOPPER, torch.bfloat16, rows, norm=norm, gated=norm, small=small), HOPPER)
    loop = longest_loop(built.text)
    assert sum(line.startswith("LDGSTS.E.BYPASS.128") for line in loop) == 4  # 8 KiB by 128 threads
    assert sum(line.startswith("FFMA") for line in loop) >= 28 * rows
    assert not any(line.startswith(("SHFL", "LDG.", "LDL")) for line in loop)
    assert built.count("SHFL") >= 20
    assert built.spilled == 0


@directly
@needs_triton
def test_by_tile_on_hopper() -> None:
    """W and x come 16 bytes at a time, and tensor cores multiply them."""
    built = compile(dense.variant(HOPPER, torch.bfloat16, 16, split=True), HOPPER)
    loop = longest_loop(built.text)
    assert sum(line.startswith("LDGSTS.E.BYPASS.128") for line in loop) == 10  # (64 + 16) × 128 numbers
    assert sum(line.startswith("HGMMA.64x16x16") for line in loop) == 8
    assert built.count("FFMA") == 0
    assert built.spilled == 0


@directly
@needs_triton
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_tensor_cores_multiply_everywhere(target: Target) -> None:
    """A compiler that gives up leaves a trap behind, and nothing else."""
    for rows, experts in ((16, 0), (dense.path_of(128, target), 8)):
        built = compile(dense.variant(target, torch.bfloat16, rows, experts=experts), target)
        assert built.count("HMMA|HGMMA|UTC.*MMA|v_mfma") >= 4
        assert built.shared <= target.shared
