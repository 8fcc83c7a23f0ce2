"""Norms, residual wiring, feed-forward, linear layers, attention, cache, prefix, spec and model, each by its words."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from glm.attention import Attention, attend
from glm.cache import Cache, Passing
from glm.checkpoint import PerHead, Stored
from glm.errors import CacheError, LayoutError
from glm.feed_forward import ACTIVATIONS, FeedForward
from glm.layout import EVERYTHING, Causal, Layout, Mask
from glm.linear import Dense, RowScaled, RowScaledLinear, pack_int4, unpack_int4
from glm.model import GLM
from glm.norms import LayerNorm, Norm, RMSNorm, wide
from glm.positions import Plain, Rotary
from glm.prefix import Prefix
from glm.residual import Deep, Pre, Sandwich, Scaled, Wiring
from glm.spec import Block, Spec, leaves

steady = settings(derandomize=True, deadline=None, max_examples=40)
D = 12
NORM = RMSNorm(1e-5, weight_first=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with every parameter random."""
    module.double()
    for i, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed + i) * 0.5 + (parameter.dim() == 1)
    return module


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a - b).abs().max() < 1e-12)


# ----------------------------------------------------------------------------- norms


@pytest.mark.parametrize("size", [1.0, 1e-3])  # at 1e-3 an eps outside the root, or of another size, shows
def test_layer_norm(size: float) -> None:
    module, x = filled(LayerNorm(1e-5).build(D)), noise(3, 4, D) * size
    centred = x - x.mean(-1, keepdim=True)
    expected = module.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + module.bias
    assert same(module(x), expected)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("weight_first", [True, False])
def test_rms_norm(size: float, weight_first: bool) -> None:
    module, x = filled(RMSNorm(1e-5, weight_first).build(D)), noise(3, 4, D) * size
    assert same(module(x), module.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())


@pytest.mark.parametrize("weight_first", [True, False])
def test_rms_norm_keeps_the_dtype_and_takes_statistics_in_float32(weight_first: bool) -> None:
    module = RMSNorm(1e-5, weight_first).build(D).half()
    x = (noise(2, D) * 1000).half()  # squares overflow in float16
    y = module(x).detach()
    assert y.dtype == torch.float16
    assert bool(y.isfinite().all())
    assert y.double().square().mean().sqrt() == pytest.approx(1, rel=1e-2)


def test_wide() -> None:
    wanted = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}
    for dtype, wider in (wanted | {torch.float64: torch.float64}).items():
        assert wide(torch.zeros(1, dtype=dtype)).dtype == wider


# ----------------------------------------------------------------------------- residual wiring


def wired(wiring: Wiring, norm: Norm = NORM, seed: int = 0) -> nn.Module:
    return filled(wiring.build(norm, D), seed)


def test_the_equations() -> None:
    x, f = noise(2, 3, D), torch.sin
    pre, sandwich, scaled = wired(Pre()), wired(Sandwich()), wired(Scaled(1.7))
    assert same(pre(x, f), x + f(pre.before(x)))
    assert same(sandwich(x, f), x + sandwich.after(f(sandwich.before(x))))
    assert same(scaled(x, f), 1.7 * scaled.before(x) + f(scaled.before(x)))
    deep = wired(Deep(1.7))
    assert same(deep(x, f), deep.after(1.7 * x + f(x)))
    assert not same(sandwich.before(x), sandwich.after(x))


def test_scaled_is_deep_norm_cut_one_norm_earlier() -> None:
    alpha, sublayers = 2.5, [torch.sin, torch.tanh, torch.cos, torch.sigmoid]
    blocks = [wired(Scaled(alpha), LayerNorm(1e-5), seed=i) for i in range(len(sublayers))]
    final = filled(LayerNorm(1e-5).build(D), seed=9)

    chain = [wired(Deep(alpha), LayerNorm(1e-5)) for _ in sublayers]
    for deep, norm in zip(chain, [*(block.before for block in blocks[1:]), final], strict=True):
        deep.after = norm  # each norm one place earlier

    y = noise(2, 3, D, seed=5)
    x = blocks[0].before(y)  # DeepNorm's stream is always normalised
    for deep, f in zip(chain, sublayers, strict=True):
        x = deep(x, f)

    for block, f in zip(blocks, sublayers, strict=True):
        y = block(y, f)
    assert same(final(y), x)


# ----------------------------------------------------------------------------- feed-forward


def test_activations() -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    written = {
        "identity": x,
        "silu": x / (1 + (-x).exp()),
        "gelu": x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    }
    assert written.keys() == ACTIVATIONS.keys()
    for name, expected in written.items():
        assert same(ACTIVATIONS[name](x), expected), name


@pytest.mark.parametrize(
    "branches", [("gelu_tanh",), ("gelu", "identity"), ("silu", "identity"), ("silu", "gelu", "identity")]
)
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_is_a_product_of_branches(branches: tuple[str, ...], bias: bool) -> None:
    module, x = filled(FeedForward(5, branches, bias).build(D, Dense())), noise(2, 3, D)
    inner = torch.ones(2, 3, 5, dtype=torch.float64)
    for i, name in enumerate(branches):
        rows = slice(5 * i, 5 * i + 5)
        inner = inner * ACTIVATIONS[name](x @ module.up.weight[rows].T + (module.up.bias[rows] if bias else 0))
    assert same(module(x), inner @ module.down.weight.T + (module.down.bias if bias else 0))


# ----------------------------------------------------------------------------- linear layers


def test_int4_of_every_byte() -> None:
    packed = torch.arange(-128, 128, dtype=torch.int8)
    values = unpack_int4(packed)
    for byte, (high, low) in zip(range(-128, 128), values.view(-1, 2).tolist(), strict=True):
        assert (high, low) == tuple(n - 16 if n > 7 else n for n in ((byte & 255) >> 4, byte & 15))
    assert torch.equal(pack_int4(values), packed)
    assert values.dtype == torch.int8


@steady
@given(st.lists(st.integers(-8, 7), min_size=2, max_size=8).filter(lambda x: len(x) % 2 == 0), st.integers(1, 3))
def test_int4_packs_columns(columns: list[int], rows: int) -> None:
    values = torch.tensor([columns] * rows, dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (rows, len(columns) // 2)
    assert torch.equal(unpack_int4(packed), values)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, torch.float64), (4, torch.float64), (8, torch.float32), (4, torch.float32)]
)
def test_row_scaled(bits: int, dtype: torch.dtype) -> None:
    module = RowScaled(bits).linear(6, 4, bias=True).to(dtype)
    assert isinstance(module, RowScaledLinear)
    integers = torch.randint(-7, 8, (4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    module.weight.copy_(integers if bits == 8 else pack_int4(integers))
    module.weight_scale.copy_(torch.tensor([0.5, 0.25, 2.0, 0.0]))
    nn.init.normal_(module.bias)
    dense = torch.tensor([[0.5], [0.25], [2.0], [0.0]], dtype=dtype) * integers
    x = noise(3, 6).to(dtype)
    assert module.weight.dtype == torch.int8  # .to(dtype) leaves integers alone
    assert torch.equal(module.dense(dtype), dense)
    torch.testing.assert_close(module(x), x @ dense.T + module.bias)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("outputs", "bias"), [(8, True), (7, False), (1, True)])
def test_linear_is_linear_for_one_row_too(outputs: int, bias: bool, threads: int) -> None:
    module = filled(Dense().linear(D, outputs, bias)).float()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in [(1, 1, D), (1, D), (D,), (2, 1, D), (1, 5, D)]:
            x = noise(*shape, 2).float()[..., 0]  # not contiguous
            expected = x @ module.weight.T + (module.bias if bias else 0)
            torch.testing.assert_close(module(x), expected)
    finally:
        torch.set_num_threads(before)


@steady
@given(st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_per_head_is_a_permutation(heads: int, width: int, matrix: bool) -> None:
    rows = 3 * heads * width
    memory = torch.arange(rows * 2.0).view(rows, 2) if matrix else torch.arange(float(rows))
    disk = PerHead(heads).on_disk(memory).reshape(memory.shape)
    for h in range(heads):
        for part in range(3):  # on disk head by head, each with its q, k and v
            at = (3 * h + part) * width
            assert torch.equal(disk[at : at + width], memory[(part * heads + h) * width :][:width])
    back = torch.empty_like(memory)
    Stored("name", "parameter", packing=PerHead(heads)).on_disk(back).copy_(
        disk.view(heads, 3, width, *memory.shape[1:])
    )
    assert torch.equal(back, memory)


# ----------------------------------------------------------------------------- attention


def by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """One query at a time."""
    B, H, T, K = q.shape
    G, y = k.shape[1], torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen, g = allowed[b, i], h // (H // G)
                scores = k[b, g, seen] @ q[b, h, i] / math.sqrt(K)
                y[b, h, i] = scores.softmax(-1) @ v[b, g, seen]
    return y


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("T", [1, 4])
def test_attention_by_hand(groups: int, T: int) -> None:
    B, H, S, K = 2, 6, 5, 4
    q, k, v = noise(B, H, T, K), noise(B, groups, S, K, seed=1), noise(B, groups, S, K, seed=2)
    allowed = noise(B, T, S, seed=3) > -0.5
    allowed[..., 0] = True
    assert same(attend(q, k, v, Mask(allowed[:, None], causal=False)), by_hand(q, k, v, allowed))
    assert same(attend(q, k, v, EVERYTHING), by_hand(q, k, v, torch.ones_like(allowed)))
    if T == 4:
        causal = torch.ones(B, T, T, dtype=torch.bool).tril()
        assert same(
            attend(q, k[:, :, :T], v[:, :, :T], Mask(None, causal=True)), by_hand(q, k[:, :, :T], v[:, :, :T], causal)
        )


def test_attention_takes_its_rows_in_the_order_q_k_v() -> None:
    spec = Attention(heads=2, groups=1, head_width=4, qkv_bias=True, out_bias=True)
    module, x = filled(spec.build(D, Dense())), noise(1, 3, D)
    rotation = Rotary((4,), "halves", 100.0, Plain(), None).rotation(torch.zeros(1, 3, 1, dtype=torch.long), x.dtype)
    rows = (x @ module.qkv.weight.T + module.qkv.bias).view(1, 3, 4, 4).transpose(1, 2)  # heads q0 q1 k v
    y = by_hand(rows[:, :2], rows[:, 2:3], rows[:, 3:], torch.ones(1, 3, 3, dtype=torch.bool).tril())
    expected = y.transpose(1, 2).flatten(2) @ module.out.weight.T + module.out.bias
    assert same(module(x, rotation, Mask(None, causal=True), Passing(None, {})), expected)
    assert spec.remembers == ((1, 4), (1, 4))


# ----------------------------------------------------------------------------- cache and prefix


def small_spec(prefix: Prefix | None = None, layers: int = 2) -> Spec:
    block = Block(
        wiring=Pre(),
        norm=NORM,
        mixer=Attention(heads=4, groups=2, head_width=6, qkv_bias=True, out_bias=False),
        feed_forward=FeedForward(10, ("silu", "identity"), bias=False),
    )
    return Spec(
        vocabulary=50,
        width=D,
        context=64,
        reading=Causal(),
        rotary=Rotary((4,), "interleaved", 100.0, Plain(), None),
        blocks=(block,) * layers,
        final_norm=NORM,
        tied=False,
        prefix=prefix,
        weights=Dense(),
        pad=0,
        stop=(1,),
    )


def small_model(prefix: Prefix | None = None, layers: int = 2) -> GLM:
    model = GLM(small_spec(prefix, layers), dtype=torch.float64, seed=0)
    filled(model)
    return model


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [15, 16, 17, 18, 19, 20]])


@steady
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from([None, Prefix(3, None), Prefix(2, (4, 5))]))
@torch.inference_mode()
def test_a_cache_grows_in_any_steps(steps: list[int], prefix: Prefix | None) -> None:
    model, total = small_model(prefix), sum(steps)
    ids = torch.arange(2 * total).view(2, -1) % 50
    cache, parts = model.new_cache(2, total), []
    for start, step in zip([sum(steps[:i]) for i in range(len(steps))], steps, strict=True):
        assert len(cache) == start
        parts.append(model(ids[:, start : start + step], cache=cache))
    assert same(torch.cat(parts, dim=1), model(ids))
    assert len(cache) == total


@torch.inference_mode()
def test_a_full_cache_refuses_and_stays_as_it_was() -> None:
    model = small_model()
    cache = model.new_cache(2, 5)
    model(IDS[:, :4], cache=cache)
    with pytest.raises(CacheError, match="holds 4 of 5"):
        model(IDS[:, 4:], cache=cache)
    with pytest.raises(CacheError, match="made for 2 rows, not 1"):
        model(IDS[:1, 4:5], cache=cache)
    assert len(cache) == 4
    assert same(model(IDS[:, 4:5], cache=cache), model(IDS[:, :5])[:, 4:])


@torch.inference_mode()
def test_a_failed_call_does_not_advance_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    cache = model.new_cache(2, 6)
    model(IDS[:, :3], cache=cache)
    with pytest.raises(IndexError):
        model(torch.full((2, 1), 99), cache=cache)  # outside the vocabulary
    assert len(cache) == 3
    assert same(model(IDS[:, 3:], cache=cache), model(IDS)[:, 3:])


def test_cache_memory() -> None:
    cache = small_model(Prefix(3, None)).new_cache(2, 7)
    assert cache.bytes == 2 * 2 * (3 + 7) * 2 * 2 * 6 * 8  # layers · k, v · tokens · rows · groups · channels · bytes
    assert isinstance(cache, Cache)
    assert len(cache) == 0


def test_prefix_slices() -> None:
    layers, groups, K, p = 3, 2, 4, 5
    module = Prefix(p, None).build(layers, ((groups, K), (groups, K)))
    module.embedding.weight.data = torch.arange(float(p * layers * 2 * groups * K)).view(p, -1)
    whole = module.embedding.weight.view(p, 2 * layers, groups, K)
    for i, (k, v) in enumerate(module()):  # layer i has slices 2i and 2i + 1
        assert torch.equal(k, whole[:, 2 * i].transpose(0, 1)[None])
        assert torch.equal(v, whole[:, 2 * i + 1].transpose(0, 1)[None])


def test_projected_prefix() -> None:
    module = filled(Prefix(5, (7, 8)).build(3, ((2, 4), (2, 4))))
    first, _, last = module.project
    rows = torch.tanh(module.embedding.weight @ first.weight.T + first.bias) @ last.weight.T + last.bias
    assert module.embedding.weight.shape == (5, 7)
    assert rows.shape == (5, 3 * 2 * 2 * 4)
    assert same(module()[1][0], rows.view(5, 6, 2, 4)[:, 2].transpose(0, 1)[None])


@torch.inference_mode()
def test_a_prefix_is_keys_and_values_that_everybody_sees() -> None:
    model, bare = small_model(Prefix(3, None), layers=1), small_model(layers=1)
    bare.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("prefix")})
    ((k, v),) = model.prefix()
    seen: list[tuple[Tensor, Tensor]] = []

    class Before(Passing):
        """Puts the prefix before the keys by hand."""

        def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
            seen.append(new)
            return tuple(torch.cat((old.expand(2, -1, -1, -1), x), dim=2) for old, x in zip((k, v), new, strict=True))

    visible = torch.cat((torch.ones(6, 3), torch.ones(6, 6).tril()), dim=1).bool()
    block, layout = bare.blocks[0], bare.layout(IDS)
    rotation = bare.spec.rotary.rotation(layout.positions, torch.float64)
    x = block(bare.embedding(IDS), rotation, Mask(visible[None, None], causal=False), Before(None, {}))
    assert same(bare.head(bare.final_norm(x)), model(IDS))
    assert len(seen) == 1


@torch.inference_mode()
def test_padding_does_not_hide_the_prefix() -> None:
    model = small_model(Prefix(3, None))
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), IDS), dim=1)
    real = torch.arange(8).expand(2, -1) >= 2
    assert same(model(padded, model.layout(padded, real))[:, 2:], model(IDS))


# ----------------------------------------------------------------------------- spec and model


def test_leaves_are_every_field() -> None:
    found = dict(leaves(small_spec(Prefix(3, None))))
    assert found["vocabulary"] == 50
    assert found["blocks[1].mixer.groups"] == 2
    assert found["prefix.length"] == 3
    assert found["rotary.scaling"] == Plain()
    assert found["stop"] == (1,)
    blocks = 2 * (1 + 2 + 6 + 3 + 1)  # wiring, norm, mixer, feed-forward, dense
    assert len(found) == 3 + 1 + 5 + blocks + 2 + 1 + 2 + 1 + 2 + 1 + 1  # in the order of the fields of Spec


def test_a_spec_prints_itself_with_equal_blocks_once() -> None:
    spec = small_spec(layers=3)
    text = str(spec)
    assert "3 × Block" in text
    assert text.count("head_width = 6") == 1
    odd = dataclasses.replace(spec.blocks[0], wiring=Sandwich())
    text = str(dataclasses.replace(spec, blocks=(odd, *spec.blocks[1:])))
    assert "1 × Block" in text
    assert "2 × Block" in text
    assert text.count("Sandwich") == 1


def test_specs_are_values() -> None:
    assert small_spec() == small_spec()
    assert hash(small_spec()) == hash(small_spec())
    assert small_spec() != dataclasses.replace(small_spec(), pad=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_spec().pad = 1  # type: ignore[misc]


def states(model: GLM) -> Iterator[Tensor]:
    return iter(model.state_dict().values())


def test_random_weights_come_from_the_seed() -> None:
    one, again, other = (GLM(small_spec(), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(states(one), states(again), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(states(one), states(other), strict=True))
    assert one.embedding.weight.detach().std() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(one.final_norm.weight, torch.ones(D))


def test_a_model_on_the_meta_device_has_no_memory() -> None:
    model = GLM(small_spec(), device="meta", dtype=torch.bfloat16)
    assert all(x.is_meta for x in states(model))
    assert model.dtype == torch.bfloat16


def test_tied_head() -> None:
    model = GLM(dataclasses.replace(small_spec(), tied=True), seed=0)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.detach().std() == pytest.approx(0.02, rel=0.2)
    assert GLM(dataclasses.replace(small_spec(), tied=True), device="meta").head.weight.is_meta


@torch.inference_mode()
def test_hidden_states_and_the_last_logits() -> None:
    model = small_model(layers=3)
    logits, hidden = model(IDS, hidden=True)
    assert len(hidden) == 3 + 2
    assert torch.equal(hidden[0], model.embedding(IDS))
    assert torch.equal(hidden[-1], model.final_norm(hidden[-2]))
    assert torch.equal(logits, model.head(hidden[-1]))
    assert same(model(IDS, last=True), logits[:, -1:])


@torch.inference_mode()
def test_layouts_and_ids_that_do_not_fit() -> None:
    model = small_model()
    for ids in (IDS[0], IDS[:, :0]):
        with pytest.raises(LayoutError, match="ids must be"):
            model(ids)
    with pytest.raises(LayoutError, match="the layout is for"):
        model(IDS, Layout.causal(2, 5))
    with pytest.raises(LayoutError, match="the layout is for"):
        model(IDS, Layout.causal(1, 6))
    cache = model.new_cache(2, 6)
    model(IDS[:, :3], cache=cache)
    with pytest.raises(LayoutError, match="6 keys"):
        model(IDS[:, 3:], Layout.causal(2, 3), cache)
    with pytest.raises(LayoutError, match="axes"):
        model(IDS, Layout.prefix(2, 6, read=3, blank=1))
