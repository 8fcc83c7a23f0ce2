"""Attention of many queries: on the CPU the reference, in Triton's interpreter and on a GPU the kernels."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from glm_kernels import attention, dispatch
from glm_kernels.attention import Bounds, Tiles, attention_reference, visible
from harness import DEVICES, DTYPES, INTERPRETED, Guarded, amid, directly, judge, kernel, needs_triton, put_in, rerun
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

module = importlib.import_module("glm_kernels.attention")


@dataclass(frozen=True)
class Case:
    """Shapes and bounds; the numbers follow from the seed."""

    B: int = 1
    G: int = 1
    heads: int = 1
    T: int = 1
    S: int = 1
    K: int = 8
    Kv: int = 8
    bounds: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Bounds]:
        """q, k, v, dy, dlse amid NaN, and the bounds. What lies behind the length is NaN as well."""
        generator = torch.Generator().manual_seed(self.T * 1000 + self.S * 10 + self.K)
        H = self.G * self.heads

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        q, k = 2 * draw(self.B, H, self.T, self.K), draw(self.B, self.G, self.S, self.K)
        v, dy = draw(self.B, self.G, self.S, self.Kv), draw(self.B, H, self.T, self.Kv)
        dlse = draw(self.B, H, self.T).float()
        bounds = Bounds(**{name: torch.tensor(value, device=device) for name, value in self.bounds.items()})
        if bounds.length is not None:
            for row, length in enumerate(bounds.length.clamp(min=0).tolist()):
                k[row, :, length:] = v[row, :, length:] = torch.nan
        return [*(amid(x) for x in (q, k, v, dy)), dlse], bounds


def filled(x: Tensor, length: Tensor | None) -> Tensor:
    return x if length is None else x.nan_to_num()  # what is NaN lies behind the length


def plainly(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, fused: bool) -> tuple[Tensor, Tensor]:
    """(y, lse) in the dtype of q, by torch's own attention or by its parts; a query that sees nothing gets 0 and -∞."""
    heads = q.shape[1] // k.shape[1]
    k, v = (filled(x, bounds.length).repeat_interleave(heads, 1) for x in (k, v))
    seen = visible(q.shape[2], k.shape[2], bounds, q.device)
    nothing = ~seen.any(-1, keepdim=True)
    s = ((q @ k.mT) * q.shape[-1] ** -0.5).masked_fill(~(seen | nothing), -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | nothing) if fused else s.softmax(-1) @ v
    wide = s.to(torch.promote_types(q.dtype, torch.float32))
    return y.masked_fill(nothing, 0), wide.masked_fill(nothing, -torch.inf).logsumexp(-1)


def differentiated(function: Any, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dlse: Tensor) -> list[Tensor]:
    """y, lse, dq, dk, dv; where lse is -∞ nothing flows back."""
    alone = [x.detach().clone(memory_format=torch.contiguous_format) for x in (q, k, v)]  # torch's kernels want it so
    leaves = [x.requires_grad_() for x in alone]
    y, lse = function(*leaves)
    finite = lse.masked_fill(lse.isinf(), 0)
    grads = torch.autograd.grad([y, finite], leaves, [dy, dlse.to(lse.dtype)])
    return [y.detach(), lse.detach(), *grads]


def roundings(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dlse: Tensor, bounds: Bounds, dtype: torch.dtype
) -> list[Tensor]:
    """What roundings of the terms of y, lse, dq, dk and dv come to, all added up in absolute values.

    Terms are rounded in float32. A rounding of the exponent is, relative to the exponential, as large as the exponent.
    The y in equation (7) has been rounded to the dtype of the results.
    """
    G, heads, scale = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    y, lse = plainly(q, k, v, bounds, fused=False)
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    seen = visible(q.shape[2], k.shape[2], bounds, q.device)
    lse = lse.nan_to_num(neginf=0)[..., None]
    s = scale * q.abs() @ k.abs().mT * seen
    once = (scale * q @ k.mT - lse).exp() * seen
    p = once * (1 + s + lse.abs())
    delta = (dy * y).abs().sum(-1, keepdim=True)
    single, stored = (torch.finfo(x).eps / 2 for x in (torch.float32, dtype))
    ds = scale * single * p * (dy.abs() @ v.abs().mT + delta + dlse.abs()[..., None]) + scale * stored * once * delta
    dk, dv = ((x @ other.abs()).unflatten(1, (G, heads)).sum(2) for x, other in ((ds.mT, q), (single * p.mT, dy)))
    return [single * p @ v.abs(), single * s.amax(-1), ds @ k.abs(), dk, dv]


def launched(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dlse: Tensor, bounds: Bounds) -> list[Tensor]:
    """The same from the kernels, which write between guard bands."""
    B, H, T, K = q.shape
    bounds = Bounds(*(None if bound is None else bound.int() for bound in bounds))
    scale = K**-0.5
    y, lse = Guarded((B, H, T, v.shape[3]), q), Guarded((B * H * T,), dlse)
    module.launch_forward(q, k, v, y.out, lse.out, bounds, scale)
    results = [y.written(), lse.written(infinite=True).view(B, H, T)]
    dlse = dlse.masked_fill(results[1].isinf(), 0)
    grads = [Guarded(tuple(x.shape), x) for x in (q, k, v)]
    delta = Guarded((B * H * T,), dlse)
    outs = [grad.out for grad in grads]
    module.launch_backward(dy, dlse, q, k, v, results[0], results[1], *outs, delta.out, bounds, scale)
    delta.written()
    return results + [grad.written() for grad in grads]


def check(case: Case, dtype: torch.dtype, device: str, twice: bool = True) -> None:
    """Where kernels run, these between guards, else (or `twice`, also) the public function: against float64 and torch's
    own error, and to the bit the same."""
    (q, k, v, dy, dlse), bounds = case.tensors(dtype, device)
    k_, v_ = filled(k, bounds.length), filled(v, bounds.length)
    wide = [x.double() for x in (q, k_, v_, dy, dlse)]
    truth = differentiated(lambda *x: plainly(*x, bounds, fused=False), *wide)
    fused = differentiated(lambda *x: plainly(*x, bounds, fused=True), q, k_, v_, dy, dlse)
    parts = differentiated(lambda *x: plainly(*x, bounds, fused=False), q, k_, v_, dy, dlse)
    least = roundings(*wide, bounds, dtype)
    runs = []
    if dispatch.takes_kernel(q):  # first, since a broken kernel does no harm between guards
        runs.append(launched(q, k, v, dy, dlse, bounds))
    named = {name: bound for name, bound in bounds._asdict().items() if bound is not None}
    if twice or not runs:
        runs.append(differentiated(lambda *x: attention(*x, **named, return_lse=True), q, k, v, dy, dlse))
    for ours in runs:
        for mine, one, other, true, rounding in zip(ours, fused, parts, truth, least, strict=True):
            empty = true.isinf()
            assert torch.equal(mine.isinf(), empty)
            mine, one, other, true = (x.masked_fill(empty, 0) for x in (mine, one, other, true))
            judge(mine, (one, other), true, rounding=rounding)
    assert all(torch.equal(*same) for same in zip(runs[0], runs[-1], strict=True))


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small, in the interpreter, that a few dozen tokens fill several."""
    if INTERPRETED and "real_tiles" not in request.keywords:
        monkeypatch.setattr(module, "tiles_for", lambda *_: Tiles(16, 16, 4, 1))


PACKED = {  # two samples of 20 and 30 tokens in a row; the first reads 7 tokens, the second 8 and answers twice
    "start": [[0] * 20 + [20] * 30],
    "prefix": [[7] * 20 + [28] * 30],
    "segment": [[0] * 20 + [20] * 18 + [38] * 12],
}
CASES = {
    "one": Case(),
    "causal": Case(T=40, S=40),
    "groups": Case(G=2, heads=3, T=18, S=18, K=8, Kv=12),
    "chunk after a cache": Case(T=19, S=60),
    "more queries than keys": Case(T=40, S=21),
    "prefix": Case(B=3, T=37, S=37, bounds={"prefix": [0, 20, 99]}),
    "padding": Case(B=3, T=34, S=34, bounds={"start": [5, 0, 33], "prefix": [20, 7, 34]}),
    "cache": Case(B=3, G=2, T=17, S=50, bounds={"length": [50, 41, 0], "prefix": [0, 45, 10]}),
    "packed": Case(T=50, S=50, bounds=PACKED),
    "answers to one question": Case(T=49, S=49, bounds={"prefix": [17], "segment": [[0] * 17 + [17] * 16 + [33] * 16]}),
    "nothing to see": Case(B=2, T=5, S=18, bounds={"start": [18, 3]}),
    "one width": Case(T=17, S=33, K=64, Kv=64),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, name: str, device: str) -> None:
    check(CASES[name], dtype, device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shapes, block edges more often, and any bounds."""
    edges = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33])
    size = edges | st.integers(1, 40)
    B, T = draw(st.integers(1, 2)), draw(size)
    S = draw(st.just(T) | size)
    G, heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (1, 32)]))
    if heads == 32:
        B, T = 1, min(T, 2)
    bound = st.integers(-2, S + 3) | edges
    bounds: dict[str, Any] = {}
    for name in draw(st.sets(st.sampled_from(["start", "prefix", "segment", "length"]))):
        if name != "length" and draw(st.booleans()):
            bounds[name] = [draw(st.lists(bound, min_size=T, max_size=T)) for _ in range(B)]
        else:
            bounds[name] = draw(st.lists(bound, min_size=B, max_size=B))
    K, Kv = draw(st.sampled_from([(1, 1), (5, 8), (16, 16), (64, 64), (24, 20)]))
    return Case(B, G, heads, T, S, K, Kv, bounds)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(
    max_examples=8 if INTERPRETED else 40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(case=cases())
def test_any_shape(dtype: torch.dtype, device: str, case: Case) -> None:
    check(case, dtype, device, twice=False)


@pytest.mark.real_tiles
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
def test_the_blocks_of_a_launch(width: int, device: str) -> None:
    """Heads of every size, at the block sizes of a GPU, a little more than two blocks of each."""
    bounds = {"prefix": [70], "length": [270]} if width % 128 == 0 else {}
    check(Case(T=140, S=275, K=width, Kv=width, bounds=bounds), torch.float16, device)


def test_empty_batches() -> None:
    x = torch.ones(0, 2, 3, 8)
    assert attention(x, x, x).shape == (0, 2, 3, 8)
    y, lse = attention(torch.ones(1, 2, 3, 8), torch.ones(1, 1, 0, 8), torch.ones(1, 1, 0, 4), return_lse=True)
    assert not y.any()
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device: str) -> None:
    """Whatever the strides; what comes back lies as [B, T, H, K]."""
    packed = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(0)).to(device)
    by_query = packed.transpose(1, 2)
    expanded = packed[:1, :, :1].transpose(1, 2).expand(2, 3, 9, 8)
    stepped = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(1)).to(device)[..., ::2]
    for q, k, v in ((by_query, expanded, stepped), (stepped, by_query, expanded), (expanded, stepped, by_query)):
        y = attention(q, k, v)
        assert y.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(y, attention_reference(q, k, v))


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_time(device: str) -> None:
    """Also whatever else is in the batch."""
    (q, k, v, dy, dlse), bounds = CASES["padding"].tensors(torch.float32, device)
    start, prefix = bounds.start, bounds.prefix
    assert start is not None
    assert prefix is not None

    def run(rows: slice) -> list[Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attention(q, k, v, start=start[rows], prefix=prefix[rows], return_lse=True)

        return differentiated(function, *(x[rows] for x in (q, k, v, dy, dlse)))

    whole, again, alone = run(slice(0, 3)), run(slice(0, 3)), run(slice(1, 2))
    for first, second, one in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        if INTERPRETED or device == "cuda":
            assert torch.equal(first[1:2], one)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    (q, k, v, _, _), _ = CASES["groups"].tensors(torch.float32, device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for bounds in ((None,) * 4, (torch.ones(1, dtype=torch.int32, device=device),) * 4):
        torch.library.opcheck(module.attention_op, (*leaves, *bounds, 0.3))


MUTANTS = {  # name: (kernel, what is replaced, by what, how often it stands there, the case that shows it)
    "mask off by one": (
        "sight",
        "(S - T) + 1, S)",
        "(S - T), S)",
        1,
        "causal",
    ),
    "prefix lost": (
        "sight",
        "tl.maximum(read, past), read)",
        "past, read)",
        1,
        "prefix",
    ),
    "padding seen": (
        "sight",
        "tl.load(start + row * start_row + i * start_query, mask=there, other=0), 0)",
        "0, 0)",
        1,
        "padding",
    ),
    "other samples seen": (
        "sight",
        "low2 = tl.where(touch, 0, near)",
        "low2 = tl.where(touch, 0, low)",
        1,
        "packed",
    ),
    "length of another row": (
        "sight",
        "length + row * length_row",
        "length",
        1,
        "cache",
    ),
    "query's bound taken for the row's": (
        "sight",
        "prefix_row + i * prefix_query",
        "prefix_row + i * 0",
        1,
        "packed",
    ),
    "a block too few": (
        "live_blocks",
        "tl.cdiv(tl.max(tl.where(some, high, 0)), size)",
        "tl.max(tl.where(some, high, 0)) // size",
        1,
        "causal",
    ),
    "a block without mask too many": (
        "live_blocks",
        "tl.min(tl.where(there, high, never)) // size",
        "tl.cdiv(tl.min(tl.where(there, high, never)), size)",
        1,
        "causal",
    ),
    "first block skipped": (
        "live_blocks",
        "tl.min(tl.where(some, low, never)) // size",
        "tl.min(tl.where(some, low, never)) // size + 1",
        1,
        "causal",
    ),
    "runs mixed up": (
        "nth",
        "first3 + n3",
        "first2 + n3",
        1,
        "answers to one question",
    ),
    "loads past the end": (
        "rows_of",
        "mask=((first + i)[:, None] < end) & (c",
        "mask=((first + i)[:, None] <= end) & (c",
        1,
        "causal",
    ),
    "channels past the end": (
        "rows_of",
        "(c[None, :] < width)",
        "(c[None, :] <= width)",
        1,
        "causal",
    ),
    "stores past the end": (
        "store_rows",
        "(first + i)[:, None] < end",
        "(first + i)[:, None] <= end",
        1,
        "causal",
    ),
    "stores too wide": (
        "store_rows",
        "c[None, :] < width",
        "c[None, :] <= width",
        1,
        "causal",
    ),
    "sum not rescaled": (
        "attention_kernel",
        "a = a * rescale[:, None]",
        "a = a",
        2,
        "causal",
    ),
    "weights not rescaled": (
        "attention_kernel",
        "w = w * rescale + tl.sum(p, 1)",
        "w = w + tl.sum(p, 1)",
        2,
        "causal",
    ),
    "wrong key head": (
        "attention_kernel",
        "head // heads * k_head",
        "0 * k_head",
        1,
        "groups",
    ),
    "stride of another tensor": (
        "attention_kernel",
        "head // heads * v_head",
        "head // heads * k_head",
        1,
        "groups",
    ),
    "lse in base 2": (
        "attention_kernel",
        "(m + tl.log2(w)) * 0.6931471805599453",
        "(m + tl.log2(w))",
        1,
        "causal",
    ),
    "empty row divided by": (
        "attention_kernel",
        "tl.where(w == 0, 1.0, w)",
        "w",
        1,
        "nothing to see",
    ),
    "gradient of lse lost": (
        "gradient_kernel_q",
        "d -= tl.load(dlse + at, mask=i < T, other=0.0)",
        "pass",
        1,
        "causal",
    ),
    "dq not scaled": (
        "gradient_kernel_q",
        "grad * out_scale",
        "grad",
        1,
        "causal",
    ),
    "a head of the group left out": (
        "gradient_kernel_kv",
        "group * heads + heads)",
        "group * heads + heads - 1)",
        1,
        "groups",
    ),
    "last block of queries lost": (
        "gradient_kernel_kv",
        "last = tl.where(live, n + 1, last)",
        "last = tl.where(live, n, last)",
        1,
        "prefix",
    ),
    "first block of queries lost": (
        "gradient_kernel_kv",
        "tl.maximum(block * keys - (S - T), 0) // queries",
        "tl.maximum(block * keys - (S - T) + keys, 0) // queries",
        1,
        "one width",
    ),
    "gradient without mask": (
        "gradient_kernel_kv",
        "low2[None, :], high2[None, :], bounded), p, 0.0)",
        "low2[None, :], high2[None, :], bounded) | (j >= 0), p, 0.0)",
        1,
        "causal",
    ),
}


@kernel
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which, right, wrong, times, case = MUTANTS[name]
    put_in(monkeypatch, tmp_path, module, which, right, wrong, times)
    with pytest.raises(AssertionError):
        check(CASES[case], torch.float16, "cpu")


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=2 * len(CASES) + len(MUTANTS) + 6)


# ----------------------------------------------------------------------------- the reference, and around it


@directly
@pytest.mark.parametrize("name", [name for name in CASES if "length" not in CASES[name].bounds])
def test_gradients(name: str) -> None:
    """The backward pass written out is what torch finds."""
    small = CASES[name]
    (q, k, v, _, _), bounds = small.tensors(torch.float64, "cpu")
    named = {key: bound for key, bound in bounds._asdict().items() if bound is not None}
    leaves = [x[..., :2].clone().requires_grad_() for x in (q, k, v)]

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = attention(*x, **named, return_lse=True)
        return y, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@directly
def test_who_sees_whom() -> None:
    """The rule, key by key; and without bounds that is torch's causal mask."""
    bounds = Bounds(*(torch.tensor(value) for value in ([1, 0], [3, 0], [[0, 4, 4], [2, 2, 3]], [5, 6])))
    seen = visible(3, 6, bounds)
    for b in range(2):
        for i in range(3):
            start, prefix, segment, length = (x[b] if x.dim() == 1 else x[b, i] for x in bounds)  # type: ignore[union-attr]
            for j in range(6):
                assert seen[b, 0, i, j] == (start <= j < length and (j < prefix or segment <= j <= i + 3))
    x = torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(x, x, x), F.scaled_dot_product_attention(x, x, x, is_causal=True))


@directly
def test_torch_compile_takes_it_whole() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
        y, lse = attention(2 * q, k, v, prefix=prefix, return_lse=True)
        return y.transpose(1, 2).flatten(2).sum(-1) + lse.sum(1)

    (q, k, v, _, _), _ = CASES["groups"].tensors(torch.float32, "cpu")
    q.requires_grad_()
    results = [
        f(q, k, v, torch.tensor([3])) for f in (block, torch.compile(block, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), q) for y in results))


@directly
def test_tensors_that_do_not_fit_are_named() -> None:
    q, k = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)
    for fault, arguments in {
        "four axes": {"q": q[0]},
        r"k must be \[2, 2, 5, 8\]": {"k": k[..., :7]},
        "v must be .* torch.float32": {"v": k.half()},
        "4 query heads cannot share 3": {"k": torch.ones(2, 3, 5, 8), "v": torch.ones(2, 3, 5, 8)},
        "scale must be positive": {"scale": 0.0},
        r"prefix must be integers \[2\] or \[2, 3\]": {"prefix": torch.ones(3, dtype=torch.int64)},
        "start must be integers": {"start": torch.ones(2)},
        r"length must be integers \[2\]; it is torch.int64 \[2, 3\]": {"length": torch.ones(2, 3, dtype=torch.int64)},
        "segment must be on cpu": {"segment": torch.ones(2, dtype=torch.int32, device="meta")},
    }.items():
        with pytest.raises(ValueError, match=fault):
            attention(**{"q": q, "k": k, "v": k, **arguments})


@directly
@needs_triton
def test_machine_code() -> None:
    """On Hopper its own tensor-core instructions multiply, and keys come 16 bytes at a time, ahead of their use."""
    from glm_kernels.variants import compile

    device = dispatch.Target("cuda", 90)
    for variant in module.variants(device):
        if variant.name in ("attention_kernel bf16 128", "attention_kernel fp16 128 bounded"):
            code = compile(variant, device)
            assert code.count("HGMMA")
            assert not code.count("HMMA")
            assert code.count(r"LDGSTS\.E.*128")
            assert not code.count("LDL|STL")
            break
    else:
        raise AssertionError("no such variant")
