"""int4_matmul and int8_matmul: on the CPU the reference and torch's operator, elsewhere the kernel."""

from pathlib import Path
from typing import Any, NamedTuple

import glm_kernels
import pytest
import torch
from glm_kernels import counters, packed_matmul, packing, splits
from glm_kernels.dispatch import Target
from glm_kernels.variants import TARGETS, compile
from harness import DEVICES, DTYPES, INTERPRETED, directly, judge, kernel, needs_triton, put_in, rerun
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_cases import Case, cases, check, exact, inputs


class Width(NamedTuple):
    """The public functions of one width."""

    matmul: Any
    experts: Any
    prepack: Any


WIDTHS = {
    4: Width(glm_kernels.int4_matmul, glm_kernels.int4_matmul_experts, glm_kernels.int4_prepack),
    8: Width(glm_kernels.int8_matmul, glm_kernels.int8_matmul_experts, glm_kernels.int8_prepack),
}
widths = pytest.mark.parametrize("bits", WIDTHS, ids=lambda bits: f"int{bits}")
CASES = (
    Case(1, 33, 256, 128, path=8),
    Case(4, 20, 384, 128, zeros=True, bias=True, path=8, splits=3),
    Case(5, 70, 192, 64, zeros=True, residual=True, path=8, splits=2),
    Case(17, 40, 96, 32, zeros=True, swiglu=True, bias=True, path=16, splits=2),
    Case(19, 33, 160, None, zeros=True, residual=True, path=16, splits=2),
    Case(33, 18, 48, 48, bias=True, path=32),
    Case(70, 40, 256, 128, zeros=True, path=64, splits=2),
    Case(131, 34, 288, 96, zeros=True, swiglu=True, residual=True, path=128, fold=True),
    Case(0, 34, 128, 64, zeros=True, bias=True, swiglu=True, path=8, experts=(3, 0, 9, 1, 0)),
    Case(0, 21, 64, None, path=16, experts=(0, 17, 0)),
    Case(3, 33, 256, 128, path=8, norm=True),
    Case(5, 34, 320, 64, bias=True, residual=True, path=8, splits=3, norm=True),
    Case(17, 40, 96, 32, zeros=True, swiglu=True, path=16, norm=True),
    Case(35, 34, 384, 96, zeros=True, bias=True, swiglu=True, path=32, splits=2, fold=True, norm=True),
    Case(2, 21, 50, None, residual=True, path=8, norm=True),
)

# ----------------------------------------------------------------------------- layouts


@directly
@widths
def test_every_byte_survives_every_layout(bits: int) -> None:
    """All 256 values in every place of a row, also of a row that does not fill its tile."""
    stored = torch.stack([torch.arange(256).roll(n) for n in range(256)]).to(torch.uint8)
    for width in (256, 250, 3):
        rows = stored[:, :width].contiguous()
        integers = packing.unpack(rows, bits)
        assert integers.min() == -(1 << (bits - 1))
        assert integers.max() == (1 << (bits - 1)) - 1
        assert torch.equal(packing.pack(integers, bits), rows)
        count = width * 8 // bits
        words = packing.words_of(rows, bits)
        assert words.shape == (-(-count // (32 * 16 // bits)), 256, 32)
        assert torch.equal(packing.stored_of(words, bits, count), rows)
    words32 = stored.view(torch.int32)
    assert torch.equal(packing.words_of(words32, bits), packing.words_of(stored, bits))


@directly
@widths
def test_prepack_is_undone(bits: int) -> None:
    case = inputs(Case(1, 34, 192, 64, zeros=True), bits, torch.float16, "cpu")
    stored = case["packed"], case["scales"], case["zeros"]
    again = packing.unprepack(WIDTHS[bits].prepack(*stored), bits, 192)
    assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True))


@directly
@widths
def test_official_bytes(bits: int) -> None:
    """Two's complement, for int4 the even column in the high nibble."""
    weight = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.int8)[None]
    integers = packing.unpack(packing.from_row_scaled(weight, bits), bits)
    expected = weight if bits == 8 else torch.stack((weight >> 4, (weight << 4) >> 4), dim=-1).flatten(-2)
    assert torch.equal(integers, expected)


def run_ptx(text: str, words: torch.Tensor, shift: float, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """A few instructions of PTX on 16-bit lanes: what `ptx` writes, without a GPU."""
    held: dict[str, torch.Tensor] = {"$1": words.to(torch.int64)}
    for name, value in (("$2", shift), ("$3", scale)):
        lane = torch.tensor(value, dtype=dtype).view(torch.int16).long() & 0xFFFF
        held[name] = (lane | lane << 16).expand(words.shape)

    def value(name: str) -> torch.Tensor:
        return held[name] if name in held else torch.full(words.shape, int(name, 0))

    def lanes(x: torch.Tensor) -> torch.Tensor:
        halves = torch.stack((x & 0xFFFF, x >> 16 & 0xFFFF), dim=-1)
        return (halves - (halves >> 15 << 16)).to(torch.int16).view(dtype).double()

    for line in text.strip("{ }").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        out, *args = [arg.strip() for arg in rest.split(",")]
        if op == "mov.b32":
            held[out] = value(args[0])
        elif op == "shr.b32":
            held[out] = value(args[0]) >> int(args[1])
        elif op == "lop3.b32":
            a, b, c = (value(arg) for arg in args[:3])
            table, result = int(args[3], 0), torch.zeros_like(a)
            for bit in range(8):
                if table >> bit & 1:
                    terms = [x if bit >> (2 - i) & 1 else ~x for i, x in enumerate((a, b, c))]
                    result |= terms[0] & terms[1] & terms[2]
            held[out] = result & 0xFFFFFFFF
        else:
            assert op == ("fma.rn.bf16x2" if dtype == torch.bfloat16 else "fma.rn.f16x2"), op
            a, b, c = (lanes(value(arg)) for arg in args)
            bits = (a * b + c).to(dtype).view(torch.int16).long() & 0xFFFF
            held[out] = bits[..., 0] | bits[..., 1] << 16
    return lanes(held["$0"])


@directly
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@widths
def test_ptx_gives_what_its_twin_gives(dtype: torch.dtype, bits: int) -> None:
    """For all 65536 words, each beside another one, every chunk and several zero points: exact integers."""
    low = torch.arange(1 << 16)
    words = low | low.flip(0) << 16
    for i in range(16 // bits):
        codes = torch.stack((low, low.flip(0)), dim=-1) >> (bits * i) & ((1 << bits) - 1)
        for zero in (0, -(1 << (bits - 1)), 3, (1 << (bits - 1)) - 1):
            shift = -packed_matmul.offset(bits, dtype == torch.bfloat16, True) - zero
            expected = codes.double() - packed_matmul.offset(bits, False, False) - zero
            for scaled, scale in ((False, 1.0), (True, 0.0371)):
                text = packed_matmul.ptx(bits, i, dtype == torch.bfloat16, scaled)
                wanted = (expected * torch.tensor(scale, dtype=dtype).double()).to(dtype).double()
                assert torch.equal(run_ptx(text, words, shift, scale, dtype), wanted)


# ----------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@widths
def test_forms(case: Case, dtype: torch.dtype, device: str, bits: int) -> None:
    if INTERPRETED and dtype == torch.float32 and CASES.index(case) % 3:
        pytest.skip("a third of them in float32")
    if INTERPRETED or (device == "cuda" and dtype != torch.float32):  # which the kernel takes in the interpreter only
        check(case, bits, dtype, device)
    arguments = inputs(case, bits, dtype, device)
    shared: dict[str, Any] = {"group": case.group or case.I, "bias": arguments["bias"], "swiglu": case.swiglu}
    normed = {name: arguments[name] for name in ("norm", "eps")}
    stored = arguments["packed"], arguments["scales"], arguments["zeros"]
    for layout in (stored, WIDTHS[bits].prepack(*stored)):
        if case.experts:
            y = WIDTHS[bits].experts(arguments["x"], *layout, offsets=arguments["offsets"], **shared)
        else:
            y = WIDTHS[bits].matmul(arguments["x"], *layout, residual=arguments["residual"], **normed, **shared)
        plain = packed_matmul.reference(**arguments, bits=bits, swiglu=case.swiglu)
        judge(y, plain, exact(case, bits, arguments))
        assert y.is_contiguous()


@kernel
@widths
def test_norm_reaches_as_far_as_float16(bits: int) -> None:
    """x norm is rounded before it is normalised: 65504 is the last that does not become infinite."""
    case = Case(1, 8, 32, 32, norm=True)
    given = inputs(case, bits, torch.float16, "cpu")
    given["norm"].fill_(64)
    for x, fits in ((1023.5, True), (1024.0, False)):
        given["x"].fill_(x)
        stored = given["packed"], given["scales"]
        y = WIDTHS[bits].matmul(given["x"], *stored, group=32, norm=given["norm"], eps=given["eps"])
        plain = packed_matmul.reference(**given, bits=bits, swiglu=False)
        assert plain.isfinite().all()
        if fits:
            judge(y, plain, exact(case, bits, given))
        else:
            assert not y.isfinite().any()


@kernel
@settings(max_examples=18, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from([4, 4, 8]))
def test_any_shape(case: Case, bits: int) -> None:
    check(case, bits, torch.float16, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("bits", "rows"), [(4, rows) for rows in (1, 4, 16, 33, 64, 100)] + [(8, rows) for rows in (1, 33, 100)]
)
def test_real_launch_shapes(bits: int, rows: int, device: str) -> None:
    """As the wrapper cuts them, leading axes and strides of x kept; also with the scales in another dtype."""
    case = Case(rows, 150, 512, 128, zeros=True)
    arguments = inputs(case, bits, torch.float16, device)
    stored = arguments["packed"], arguments["scales"], arguments["zeros"]
    x = arguments["x"].unsqueeze(0).expand(2, -1, -1).transpose(0, 1)
    y = WIDTHS[bits].matmul(x, *stored, group=128)
    truth = exact(case, bits, arguments)
    plain = packed_matmul.reference(**arguments, bits=bits, swiglu=False)
    for each in y.unbind(1):
        judge(each, plain, truth)
    wide = WIDTHS[bits].matmul(x, stored[0], stored[1].float(), stored[2], group=128)
    judge(wide[:, 0], plain, truth)


@pytest.mark.parametrize("device", DEVICES)
@widths
def test_opcheck(device: str, bits: int) -> None:
    for case in (CASES[3], CASES[8], CASES[12]):
        given = inputs(case, bits, torch.float32 if device == "cpu" else torch.float16, device)
        arguments = (*given.values(), bits, case.group or case.I, case.swiglu)
        torch.library.opcheck(packed_matmul.packed_matmul, arguments, test_utils=("test_schema", "test_faketensor"))


@directly
@widths
def test_torch_compile_takes_it_whole(bits: int) -> None:
    case = inputs(CASES[1], bits, torch.float32, "cpu")
    arguments = case["x"], case["packed"], case["scales"], case["zeros"]

    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * WIDTHS[bits].matmul(x + 1, *arguments[1:], group=128, bias=case["bias"])

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case["x"]), twice(case["x"]))


MUTANTS = {  # name: kernel, what is replaced, by what
    "order of the integers in a word": ("numbers", "(bits * i)", "(16 - bits - bits * i)"),
    "mask of a code too narrow": ("numbers", "(1 << bits) - 1", "(1 << (bits - 1)) - 1"),
    "scale not applied where weights are": ("numbers", "(number * scale).to(dtype) if fold else number", "number"),
    "sign of the zero point": ("product", "shift -= tl.load(zeros", "shift += tl.load(zeros"),
    "scale of the next group": ("product", "column, inputs - 1) // group", "column + group, inputs - 1) // group"),
    "columns of the next chunk": ("product", "columns = column + j", "columns = column + chunk + j"),
    "no mask behind the last column": ("product", "there[:, None] & (columns < inputs)[None, :]", "there[:, None]"),
    "a row too many": ("packed_kernel", "block * rows, N", "block * rows, N + 1"),
    "a group's part kept for the next": (
        "product", "[:, None]\n                    part = tl.zeros([outs, rows], tl.float32)", "[:, None]",
    ),
    "scale of the row forgotten": ("product", "if per_scale == 0:\n        acc *=", "if False:\n        acc *="),
    "stride of x ignored": ("product", "n[:, None] * x_row", "n[:, None] * inputs"),
    "a split too few": ("joined", "range(splits)", "range(splits - 1)"),
    "a split summed twice": ("joined", "tl.cast(k, tl.int64) * plane", "tl.cast(tl.maximum(k, 1), tl.int64) * plane"),
    "joined too early": ("join", "== splits - 1", "== splits - 2"),
    "counter left as it is": ("join", "tl.store(tally, 0)", "pass"),
    "gate and up exchanged": ("packed_kernel", "acc / (1.0 + tl.exp(-acc)) * up", "up / (1.0 + tl.exp(-up)) * acc"),
    "bias of the gate for both": ("packed_kernel", "bias + outputs + o", "bias + o"),
    "stride of the residual": ("packed_kernel", "n[None, :] * residual_row", "n[None, :] * y_row"),
    "outputs behind the last written": (
        "packed_kernel", "inside = (o < outputs)[:, None] & there", "inside = (o < outputs + 1)[:, None] & there",
    ),
    "the wrong expert's matrix": ("packed_kernel", "words += expert * words_expert", "pass"),
    "an empty expert has a block": ("packed_kernel", "(upto <= block)", "(upto < block)"),
}  # fmt: skip
NORM_MUTANTS = {
    "eps lost": ("packed_kernel", "square / inputs + eps", "square / inputs"),
    "mean over the tiles, not the inputs": (
        "packed_kernel", "square / inputs", "square / (tiles * (16 // bits * chunk))",
    ),
    "squares of one split only": ("joined_squares", "range(splits)", "range(1)"),
    "squares left by the first split alone": ("join", "squares + part * squares_plane", "squares"),
    "one row's squares for all": ("joined_squares", "* plane + n,", "* plane + n * 0,"),
    "squares of what is weighted": (
        "product", "square += raw * raw",
        "square += raw * raw * tl.load(norm + columns, mask=columns < inputs, other=0.0).to(tl.float32)",
    ),
    "weight of the norm forgotten": ("product", "(raw * weight[None, :])", "raw"),
    "weight of the next chunk": ("product", "norm + columns, mask", "norm + columns + chunk, mask"),
    "no mask behind the last weight": (
        "product", "tl.load(norm + columns, mask=columns < inputs, other=0.0)", "tl.load(norm + columns)",
    ),
    "up half not normalised": ("packed_kernel", "up *= r", "pass"),
}  # fmt: skip
JOINING = "join", "joined", "joined_squares"  # of splits.py
TRIED = [(4, name) for name in MUTANTS | NORM_MUTANTS]
TRIED += [(8, name) for name, (where, *_) in (MUTANTS | NORM_MUTANTS).items() if where in ("numbers", "product")]
FOLDED = Case(9, 20, 192, 64, True, path=8, fold=True)
SHORT = (CASES[5]._replace(zeros=True), FOLDED, CASES[8], *CASES[1:5])  # writing outside shows before it does harm

NORMED = CASES[11], CASES[14], CASES[12]


def check_short(bits: int, short: tuple[Case, ...] = SHORT) -> None:
    for case in short:
        check(case, bits, torch.float16, "cpu")


@kernel
@pytest.mark.parametrize(("bits", "name"), TRIED, ids=lambda value: f"int{value}" if isinstance(value, int) else value)
def test_mutant_is_caught(bits: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, right, wrong = (MUTANTS | NORM_MUTANTS)[name]
    if where in JOINING:
        put_in(monkeypatch, tmp_path, splits, where, right, wrong)
        monkeypatch.setattr(packed_matmul, "join", splits.join)
    else:
        put_in(monkeypatch, tmp_path, packed_matmul, where, right, wrong)
    monkeypatch.setattr(counters, "kept", {})

    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_short(bits, NORMED if name in NORM_MUTANTS else SHORT)


@kernel
@widths
def test_short_cases_pass_without_a_mutant(bits: int) -> None:
    check_short(bits, SHORT + NORMED)


@kernel
@widths
def test_bfloat16_is_refused_by_the_interpreter(bits: int) -> None:
    case = inputs(CASES[0], bits, torch.bfloat16, "cpu")
    with pytest.raises(NotImplementedError, match="use float16"):
        WIDTHS[bits].matmul(case["x"], case["packed"], case["scales"], group=128)


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=len(TRIED) + 2 * len(CASES))


# ----------------------------------------------------------------------------- around it


@directly
@widths
def test_torch_computes_on_the_cpu(bits: int) -> None:
    """torch's own operator is used where it fits, within the rule."""
    dtype = torch.bfloat16
    for group in (32, 64, 128, 256, None) if bits == 4 else (None,):
        case = Case(5, 64, 512, group)
        arguments = inputs(case, bits, dtype, "cpu")
        given = arguments["x"], arguments["packed"], arguments["scales"]
        used = packed_matmul.on_cpu(*given, None, bits, group or 512)
        assert used is not None
        assert torch.equal(WIDTHS[bits].matmul(*given, group=group or 512), used)
        judge(used, packed_matmul.reference(**arguments, bits=bits, swiglu=False), exact(case, bits, arguments))
        arguments = inputs(normed := case._replace(norm=True), bits, dtype, "cpu")
        given = arguments["x"], arguments["packed"], arguments["scales"]
        y = WIDTHS[bits].matmul(*given, group=group or 512, norm=arguments["norm"], eps=arguments["eps"])
        judge(y, packed_matmul.reference(**arguments, bits=bits, swiglu=False), exact(normed, bits, arguments))


@directly
@widths
def test_tensors_that_do_not_fit_are_named(bits: int) -> None:
    case = inputs(Case(2, 6, 64, 32, zeros=True), bits, torch.float32, "cpu")
    good = {name: case[name] for name in ("x", "packed", "scales", "zeros")} | {"group": 32}
    for fault, change in {
        "groups of 48 do not divide": {"group": 48},
        r"scales must be \[6, 2\]": {"scales": case["scales"][:, :1]},
        r"packed must be": {"packed": case["packed"][:, :-1]},
        "packed integers are uint8 or int32": {"packed": case["packed"].to(torch.int64)},
        "zeros are int8": {"zeros": case["zeros"].float()},
        "bias must be torch.float32": {"bias": torch.zeros(6, dtype=torch.float16)},
        r"residual must be \[2, 6\]": {"residual": torch.zeros(2, 5)},
        "given together": {"norm": torch.ones(64)},
        "norm, the weight of an RMSNorm": {"eps": 1e-5},
        "eps is added to a mean square": {"norm": torch.ones(64), "eps": -1e-5},
        r"norm must be \[64\]": {"norm": torch.ones(6), "eps": 1e-5},
        "norm must be torch.float32": {"norm": torch.ones(64).half(), "eps": 1e-5},
        "norm must be contiguous": {"norm": torch.ones(128)[::2], "eps": 1e-5},
        "scales must be contiguous": {"scales": case["scales"].T.contiguous().T},
        "cannot be halved": {"swiglu": True, **{k: case[k][:5] for k in ("packed", "scales", "zeros")}},
    }.items():
        with pytest.raises(ValueError, match=fault):
            WIDTHS[bits].matmul(**(good | change))
    lead = {name: case[name][None] for name in ("packed", "scales", "zeros")}
    with pytest.raises(ValueError, match="offsets are int32"):
        WIDTHS[bits].experts(case["x"], **lead, offsets=torch.tensor([0, 2]), group=32)


@directly
@needs_triton
@pytest.mark.parametrize("rows", packed_matmul.PATHS)
@widths
def test_instructions_on_hopper(rows: int, bits: int) -> None:
    """Weights come 16 bytes at a time, are never converted, and tensor cores multiply them."""
    target = TARGETS[2]
    for dtype in (torch.bfloat16, torch.float16):
        built = compile(packed_matmul.variant(target, bits, dtype, rows, 16 // bits, zeros=True), target)
        assert built.count("LDGSTS.*128") > 0
        assert built.count("I2F") == 0
        assert built.count("HMMA" if rows == 8 else "HGMMA") >= 4
        assert built.spilled == 0


@directly
@needs_triton
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@widths
def test_tensor_cores_multiply_many_rows_everywhere(target: Target, bits: int) -> None:
    """A compiler that gives up leaves a trap behind, and nothing else."""
    rows = packed_matmul.path_of(128, target)
    built = compile(packed_matmul.variant(target, bits, torch.bfloat16, rows, 16 // bits), target)
    assert built.count("HMMA|HGMMA|UTC.*MMA|v_mfma") >= 4
    assert built.shared <= target.shared
