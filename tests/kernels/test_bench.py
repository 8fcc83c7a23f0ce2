"""The benchmark, without a GPU: what it counts, whom it believes, what it writes, and how it ends."""

import ast
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import INTERPRETED, PROJECT, directly, gpu, kernel, needs_triton, rerun
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(PROJECT / "kernels"))

from glm_kernels.bench import (
    activations,
    append,
    attention,
    cases,
    choice,
    command,
    decode,
    dense,
    goals,
    int4,
    ladders,
    norms,
    plots,
    report,
    roofs,
    rotary,
)
from glm_kernels.bench.attention import AttentionCase
from glm_kernels.bench.decode import DecodeCase
from glm_kernels.bench.peers import OURS, find
from glm_kernels.bench.results import Results, key, of_device, read
from glm_kernels.bench.run import Bench, Budget, DeviceLostError, measure, plan, run
from glm_kernels.bench.subject import Call, Case, Expected, MissingError, Side, Subject, Work, nbytes, sample
from glm_kernels.bench.timing import GraphTimer, Timing, WallClock, copies, timing
from glm_kernels.bench.visibility import visibility

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CPU = torch.device("cpu")
SUBJECTS = [subject for subject in command.SUBJECTS.values() if subject is not ladders.SUBJECT]


def small_attention(mask: str, **changes: Any) -> AttentionCase:
    fields = {"queries": 7 if mask == "chunk" else 20, "keys": 20, "dtype": "float32", "batch": 2} | changes
    shape = {"heads": 4, "groups": 2, "key": 16, "value": 8}
    return AttentionCase(model="tiny", mask=mask, **(shape | fields))


LATENT = {"cache": "latent", "groups": 1, "value": 8}


def small_decode(**changes: Any) -> DecodeCase:
    shape = {"heads": 4, "groups": 2, "key": 16, "value": 16, "batch": 3, "queries": 1, "keys": 64}
    return DecodeCase(**{"model": "tiny", "dtype": "float32", "cache": "float32", **shape, **changes})


def small_rotary(**changes: Any) -> rotary.RotaryCase:
    shape = {"heads": 4, "groups": 2, "key": 16, "widths": (8,), "pairing": "halves", "batch": 2, "tokens": 5}
    return rotary.RotaryCase(**{"model": "tiny", "dtype": "float32", **shape, **changes})


def small_append(**changes: Any) -> append.AppendCase:
    shape = {"heads": 4, "groups": 2, "key": 16, "widths": (8,), "pairing": "halves", "batch": 2, "keys": 40}
    return append.AppendCase(**{"model": "tiny", "dtype": "float32", **shape, **changes})


# ----------------------------------------------------------------------------- what is counted


def brute_force(batch: int, queries: int, keys: int, bounds: Mapping[str, Tensor]) -> Tensor:
    """The definition, pair by pair."""

    def of(name: str, b: int, i: int, otherwise: int) -> int:
        bound = bounds.get(name)
        return otherwise if bound is None else int(bound[b] if bound.ndim == 1 else bound[b, i])

    mask = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(queries):
            p = i + keys - queries
            for j in range(keys):
                inside = of("start", b, i, 0) <= j < of("length", b, i, keys)
                seen = j < of("prefix", b, i, 0) or of("segment", b, i, 0) <= j <= p
                mask[b, i, j] = inside and seen
    return mask


@st.composite
def bounded(draw: st.DrawFn) -> tuple[int, int, int, dict[str, Tensor]]:
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    keys = queries + draw(st.integers(0, 5))
    bounds = {}
    for name in draw(st.sets(st.sampled_from(["prefix", "start", "length", "segment"]))):
        each = name != "length" and draw(st.booleans())
        count = batch * queries if each else batch
        values = draw(st.lists(st.integers(-2, keys + 3), min_size=count, max_size=count))
        bounds[name] = torch.tensor(values).view((batch, queries) if each else (batch,))
    return batch, queries, keys, bounds


@directly
@given(bounded())
@settings(max_examples=60, deadline=None)
def test_pairs_and_keys_are_counted_as_a_dense_mask_has_them(drawn: Any) -> None:
    batch, queries, keys, bounds = drawn
    view, mask = visibility(batch, queries, keys, **bounds), brute_force(batch, queries, keys, bounds)
    assert torch.equal(view.dense(), mask)
    assert torch.equal(view.counts().expand(batch, queries), mask.sum(-1))
    assert view.pairs() == mask.sum()
    assert view.keys_seen() == mask.any(1).sum()


@directly
@pytest.mark.parametrize("mask", attention.MASKS)
def test_attention_counts_visible_pairs_and_live_keys(mask: str) -> None:
    case = small_attention(mask)
    visible = brute_force(case.batch, case.queries, case.keys, attention.seen(case).given)
    assert torch.equal(attention.seen(case).dense(), visible)
    pairs, live = int(visible.sum()) * case.heads, int(visible.any(1).sum()) * case.groups
    rows = case.batch * case.heads * case.queries
    q, o, k, v = rows * case.key, rows * case.value, live * case.key, live * case.value
    assert attention.work(case) == Work(4 * (q + o + k + v), 2 * (case.key + case.value) * pairs)
    trained = attention.work(replace(case, backward=True))
    scores, values = 2 * case.key * pairs, 2 * case.value * pairs  # flops of one product of either width
    assert trained.flops == 4 * scores + 3 * values  # q kᵀ twice, ds k, dsᵀ q; p v, do vᵀ, pᵀ do
    assert trained.bytes == 4 * (3 * q + 3 * k + 3 * v + 3 * o)  # q k v o; q k v o do; dq dk dv


@directly
def test_masks_are_what_their_names_say() -> None:
    """Each differs from causal, in the way of GLM's own masks."""
    causal = attention.seen(small_attention("causal")).dense()
    assert torch.equal(causal[0], torch.ones(20, 20).tril().bool())
    prefix = attention.seen(small_attention("prefix")).dense()
    assert prefix[0, 0].sum() == 10, "the first token sees the whole prefix"
    assert prefix[1, 0].sum() < 10, "and sequences differ"
    infilling = attention.seen(small_attention("infilling")).dense()[0]
    assert infilling[-1, :10].all(), "a span sees the context"
    assert not infilling[-1, 10:].all(), "and no span but itself"
    packed = attention.seen(small_attention("packed")).dense()[0]
    assert not packed[3:, :3].any(), "a sample does not see the one before"
    assert packed[0, 0]
    padded = attention.seen(small_attention("padded")).dense()
    assert torch.equal(padded[0], causal[0])
    assert not padded[1, :, :4].any()
    assert padded[1, 4, 4]
    chunk = attention.seen(small_attention("chunk")).dense()[0]
    assert torch.equal(chunk, causal[0, -7:])


@directly
@pytest.mark.parametrize(
    "changes",
    [{}, {"ragged": True}, {"queries": 4, "ragged": True}, {"cache": "int8"}, LATENT],
    ids=str,
)  # fmt: skip
def test_decode_counts_the_live_cache(changes: dict[str, Any]) -> None:
    case = small_decode(**changes)
    inputs = decode.make_inputs(case, CPU, 0)
    lengths = inputs["length"].tolist()
    assert len(set(lengths)) == (case.batch if case.ragged else 1)
    visible = decode.seen(case).dense()
    for b, length in enumerate(lengths):
        for i in range(case.queries):
            assert visible[b, i].tolist() == [j <= length - case.queries + i for j in range(case.keys)]
    stored = [inputs[name] for name in ("k", "v", "latent", "key_scale", "value_scale") if name in inputs]
    a_token = sum(x.nbytes for x in stored) // (case.batch * case.keys)
    query = inputs["q"].nbytes
    output = query // case.key * case.value
    assert decode.work(case).bytes == sum(lengths) * a_token + query + output
    assert decode.work(case).flops == 2 * (case.key + case.value) * int(visible.sum()) * case.heads


@directly
def test_elementwise_work_is_what_is_read_and_written() -> None:
    for kind in ("layer", "rms before"):
        for residual in (False, True):
            norm = norms.NormCase(model="tiny", dtype="float16", kind=kind, width=64, rows=5, residual=residual)
            read = nbytes(norms.make_inputs(norm, CPU, 0))
            assert norms.work(norm).bytes == read + norms.outputs(norm)
    for kind in activations.PLAIN:
        case = activations.ActivationCase(model="tiny", dtype="float16", kind=kind, inner=64, rows=5)
        inputs = activations.make_inputs(case, CPU, 0)
        y = activations.PLAIN[kind](inputs["x"])
        assert y.nbytes == activations.outputs(case)
        assert activations.work(case).bytes == nbytes(inputs) + y.nbytes
    product = int4.Int4Case(model="tiny", dtype="float16", matrix="down", outputs=40, inputs=256, rows=3)
    for fused in ({"norm": True, "swiglu": True}, {"bias": True, "residual": True}):
        case = dense.DenseCase(model="tiny", dtype="float16", matrix="down", outputs=40, inputs=64, rows=3, **fused)
        inputs = dense.make_inputs(case, CPU, 0)
        assert dense.cublas(case, inputs)().nbytes == dense.outputs(case)
        assert dense.work(case).bytes == nbytes(inputs) + dense.outputs(case)
    assert int4.work(product).bytes == nbytes(int4.make_inputs(product, CPU, 0)) + int4.outputs(product)
    chosen = choice.ChoiceCase(model="tiny", dtype="float16", vocabulary=40, rows=3)
    assert choice.work(chosen).bytes == nbytes(choice.make_inputs(chosen, CPU, 0)) + choice.outputs(chosen)
    step = small_append()
    inputs = append.make_inputs(step, CPU, 0)
    touched = {name: x for name, x in inputs.items() if name not in ("at", "length")}  # the token is written, not read
    assert append.work(step).bytes == nbytes(touched) + append.outputs(step)
    for kept_as in ("", "float32", "int8"):
        turned = small_rotary(append=kept_as)
        inputs = {name: x for name, x in rotary.make_inputs(turned, CPU, 0).items() if name != "at"}
        kept = rotary.caches(turned, CPU) if kept_as else {}
        slots = turned.tokens / (turned.tokens + rotary.HELD)
        made = slots * nbytes(kept) + turned.batch * turned.tokens * (4 if kept_as else 6) * 16 * 4
        assert rotary.work(turned).bytes == nbytes(inputs) + made


PUBLISHED = {
    "chatglm-6b": cases.CHATGLM_6B, "chatglm3-6b": cases.CHATGLM3_6B, "glm-4-9b": cases.GLM_4_9B,
    "glm-4-32b-0414": cases.GLM_4_32B,
}  # fmt: skip


@directly
@pytest.mark.parametrize("release", PUBLISHED)
def test_the_models_sizes_are_the_published_ones(release: str) -> None:
    """Against the family's own table of releases."""
    from glm.family import releases

    model, found = PUBLISHED[release], releases()[release]
    block: Any = found.spec.blocks[0]
    mixer, inner = block.mixer, block.feed_forward.inner
    assert (mixer.heads, mixer.groups, mixer.head_width) == (model.heads, model.groups, model.key)
    assert (found.spec.width, inner) == (model.hidden, model.inner)
    assert str(found.dtype).endswith(model.dtype)
    activation = {("silu", "identity"): "swiglu", ("gelu_tanh",): "gelu tanh"}[block.feed_forward.branches]
    assert activation == model.activation
    first = getattr(block.norm, "weight_first", None)
    assert model.norm == {None: "layer", True: "rms before", False: "rms after"}[first]
    assert choice.VOCABULARIES.get(model, found.spec.vocabulary) == found.spec.vocabulary
    turns: Any = found.spec.rotary
    assert (turns.pairing, turns.widths) == model.rotary


@directly
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_case_can_be_named_sized_and_written(subject: Subject[Any]) -> None:
    """All of them, without memory: on the meta device."""
    everything = list(subject.cases())
    assert len({key({"subject": subject.name, "fields": case.fields}) for case in everything}) == len(everything)
    names = {(subject.label(case), subject.axis(case)) for case in everything}
    assert len(names) == len(everything), "two cases of one name"
    assert {case.importance for case in everything} >= {0, 2}
    for case in everything:
        if case.importance <= 1:
            inputs = subject.inputs(case, torch.device("meta"), 0)
            assert subject.work(case).bytes <= (4 if getattr(case, "backward", False) else 1) * (
                nbytes(inputs) + subject.outputs(case)
            )
            assert subject.work(case).flops > 0
            assert subject.sides(case)[0].name == OURS
    json.dumps([case.fields for case in everything])


@directly
def test_the_asked_shapes_are_there() -> None:
    """Six models, batches of 1, 8 and 32, contexts from 1k to 32k, for decode to 128k."""
    named = {model.name for model in cases.NAMED}
    prefill = {(c.model, c.batch, c.queries) for c in attention.all_cases() if not c.backward and c.mask != "chunk"}
    assert prefill >= {(n, b, t) for n in named for b in (1, 8, 32) for t in (1024, 2048, 4096, 8192, 16384, 32768)}
    caches = {(c.model, c.batch, c.keys) for c in decode.all_cases() if c.queries == 1}
    assert caches >= {(n, b, s) for n in named for b in (1, 8, 32) for s in (1024, 4096, 32768, 131072)}
    assert {c.mask for c in attention.all_cases()} == set(attention.MASKS)
    assert {c.mask for c in attention.all_cases() if c.backward} >= {"causal", "prefix", "packed", "infilling"}
    assert {c.cache for c in decode.all_cases()} >= {"int8", "latent"}


# ----------------------------------------------------------------------------- whom it believes


def verdicts(subject: Subject[Any], case: Case, call: Any, device: torch.device = CPU) -> list[str]:
    """What the check says of a side that does not pass it."""
    inputs = subject.inputs(case, device, 0)
    output = call(case, inputs)()
    return [str(each) for part in subject.expected(case, inputs) if not (each := part.verdict(output)).ok]


PEERS = {
    "SDPA": partial(attention.sdpa, backend=SDPBackend.MATH),
    "flex_attention": partial(attention.flex, tuned=False),
    "SDPA flash": partial(attention.sdpa, backend=SDPBackend.FLASH_ATTENTION),
}


@directly
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mask", attention.MASKS)
def test_peers_agree_under_every_mask(mask: str, peer: str, backward: bool) -> None:
    """Those that run on the CPU, in both dtypes; the others say why not."""
    for dtype in ("float32", "bfloat16"):
        case = small_attention(mask, dtype=dtype, backward=backward, value=16)
        if peer == "flex_attention" and backward:  # torch has none on the CPU
            with pytest.raises(NotImplementedError):
                verdicts(attention.SUBJECT, case, PEERS[peer])
        elif peer == "SDPA flash" and mask not in ("causal", "chunk"):
            with pytest.raises(MissingError, match="causal"):
                verdicts(attention.SUBJECT, case, PEERS[peer])
        else:
            assert verdicts(attention.SUBJECT, case, PEERS[peer]) == []


@directly
@pytest.mark.parametrize("mask", [mask for mask in attention.MASKS if mask != "causal"])
def test_a_peer_with_another_mask_is_found_out(mask: str) -> None:
    causal = small_attention("causal", keys=20, queries=small_attention(mask).queries)

    def wrong(case: AttentionCase, inputs: Any) -> Call:
        bare = {name: inputs[name] for name in "qkv"}
        q, k, v = bare.values()
        return partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)

    assert verdicts(attention.SUBJECT, small_attention(mask), wrong)
    if causal.queries == causal.keys:
        assert not verdicts(attention.SUBJECT, causal, wrong)


@directly
def test_wrong_gradients_are_found_out() -> None:
    """Each of them."""
    case = small_attention("prefix", backward=True)
    right = PEERS["SDPA"]
    for i in range(4):

        def wrong(case: AttentionCase, inputs: Any, i: int = i) -> Call:
            call = right(case, inputs)

            def spoiled() -> Any:
                out = list(call())
                out[i] = out[i] * 1.001
                return tuple(out)

            return spoiled

        faults = verdicts(attention.SUBJECT, case, wrong)
        assert [fault.split(":")[0] for fault in faults] == [("o", "dq", "dk", "dv")[i]]


@directly
@pytest.mark.parametrize("changes", [{}, {"ragged": True}, {"queries": 4}, LATENT], ids=str)  # fmt: skip
def test_peers_agree_on_decode(changes: dict[str, Any]) -> None:
    case = small_decode(**changes)
    assert verdicts(decode.SUBJECT, case, partial(decode.sdpa, backend=SDPBackend.MATH)) == []
    if case.ragged:
        assert verdicts(decode.SUBJECT, case, lambda case, inputs: lambda: naive_decode(inputs)), "length is ignored"


def naive_decode(inputs: Any) -> Tensor:
    attend: Tensor = torch.nn.functional.scaled_dot_product_attention(
        inputs["q"], inputs["k"], inputs["v"], enable_gqa=True
    )
    return attend


HALF: dict[str, Any] = {"dtype": "float16"}
FEW: list[tuple[Subject[Any], Case]] = [  # for the interpreter, which is slow, and for a GPU, where peers are compiled
    (attention.SUBJECT, small_attention("prefix", backward=True, value=16, batch=1, **HALF)),
    (decode.SUBJECT, small_decode(ragged=True, **HALF)),
    (append.SUBJECT, small_append(**HALF)),
    (norms.SUBJECT, norms.NormCase(model="tiny", kind="layer", width=48, rows=5, residual=True, **HALF)),
    (rotary.SUBJECT, small_rotary(append="float16", **HALF)),
    (activations.SUBJECT, activations.ActivationCase(model="tiny", kind="swiglu", inner=24, rows=5, **HALF)),
    (dense.SUBJECT, dense.DenseCase(model="tiny", matrix="up", outputs=40, inputs=256, rows=2, norm=True, **HALF)),
    (int4.SUBJECT, int4.Int4Case(model="tiny", matrix="down", outputs=40, inputs=256, rows=3, **HALF)),
    (choice.SUBJECT, choice.ChoiceCase(model="tiny", vocabulary=50, rows=3, **HALF)),
]


def tiny_cases() -> list[tuple[Subject[Any], Case]]:
    """Every subject's every kind, so small that the CPU can do it."""
    found: list[tuple[Subject[Any], Case]] = []
    for mask, backward in itertools.product(attention.MASKS, (False, True)):
        found.append((attention.SUBJECT, small_attention(mask, backward=backward, value=16, **HALF)))
    for changes in ({}, {"ragged": True}, {"queries": 3}, {"cache": "int8"}, LATENT):
        found.append((decode.SUBJECT, small_decode(**HALF, **changes)))
    for kind, residual in itertools.product(("layer", "rms before", "rms after"), (False, True)):
        case = norms.NormCase(model="tiny", kind=kind, width=48, rows=5, residual=residual, **HALF)
        found.append((norms.SUBJECT, case))
    for pairing, widths in (("interleaved", (8,)), ("halves", (8, 8)), ("halves", (16,))):
        found.append((append.SUBJECT, small_append(pairing=pairing, widths=widths, **HALF)))
        for kept_as in ("", "float16", "int8"):
            found.append((rotary.SUBJECT, small_rotary(pairing=pairing, widths=widths, append=kept_as, **HALF)))
    for kind in activations.PLAIN:
        activation = activations.ActivationCase(model="tiny", kind=kind, inner=24, rows=5, **HALF)
        found.append((activations.SUBJECT, activation))
    for rows, fused in ((1, {"norm": True, "swiglu": True}), (5, {"bias": True, "residual": True})):
        few = dense.DenseCase(model="tiny", matrix="down", outputs=40, inputs=256, rows=rows, **HALF, **fused)
        found.append((dense.SUBJECT, few))
    for rows in (1, 5):
        product = int4.Int4Case(model="tiny", matrix="down", outputs=40, inputs=256, rows=rows, **HALF)
        found.append((int4.SUBJECT, product))
    found.append((choice.SUBJECT, choice.ChoiceCase(model="tiny", vocabulary=5000, rows=3, **HALF)))
    return found


MEASURED = [pytest.param(*entry, "cpu", id=entry[0].name) for entry in (FEW if INTERPRETED else tiny_cases())]
MEASURED += [pytest.param(*entry, "cuda", id=f"{entry[0].name}-cuda", marks=gpu) for entry in FEW]


@pytest.mark.parametrize(("subject", "case", "device"), MEASURED)
def test_ours_and_peers_are_measured(subject: Subject[Any], case: Any, device: str) -> None:
    """The whole of a case: ours passes its check if it is there, nobody is refused, all others have a reason."""
    timer = GraphTimer() if device == "cuda" else WallClock(1)
    row = measure(subject, case, Bench(torch.device(device), timer, 1e9, 1e4))
    if any(row["sides"][OURS].get("missing", "").endswith(f"has no {name}") for name in NEW):
        pytest.skip(row["sides"][OURS]["missing"])
    assert row["sides"][OURS]["seconds"] > 0, row["sides"][OURS]
    for name, side in row["sides"].items():
        assert "refused" not in side, (name, side)
        assert "seconds" in side or side.get("missing") or side.get("failed"), (name, side)
    assert max(ratio for pair in row["sides"][OURS]["error"].values() for ratio in pair) <= 2


NEW = (
    "append_attention", "attention", "decode_attention", "decode_latent_attention", "swiglu", "geglu", "gelu",
    "rotary", "rotary_append",
)  # fmt: skip


@directly
def test_a_cache_that_is_not_written_is_found_out() -> None:
    """Although another side has written the same into its own."""
    case = small_rotary(append="float32")
    assert verdicts(rotary.SUBJECT, case, partial(rotary.torch_rotary, compile=False)) == []

    def lazy(case: rotary.RotaryCase, inputs: Any) -> Call:
        call = rotary.torch_rotary(case, inputs, compile=False)
        return lambda: (call()[0], rotary.caches(case, CPU))

    assert [fault.split(":")[0] for fault in verdicts(rotary.SUBJECT, case, lazy)] == ["k", "v"]

    step, wrote = small_append(), partial(append.torch_step, compile=False)
    assert verdicts(append.SUBJECT, step, wrote) == []

    def forgets(case: append.AppendCase, inputs: Any) -> Call:
        o = wrote(case, inputs)()
        append.emptied(inputs)
        return lambda: o

    assert [fault.split(":")[0] for fault in verdicts(append.SUBJECT, step, forgets)] == ["key and value"]


LADDER = """
from types import SimpleNamespace
from torch.nn.functional import scaled_dot_product_attention

def right(q, k, v, length):
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)

def wrong(q, k, v):
    return scaled_dot_product_attention(q, k, v + 0.01, enable_gqa=True)

def ladders():
    return ["decode"]

def steps(name):
    return [SimpleNamespace(name="01_right", call=right), SimpleNamespace(name="02_wrong", call=wrong)]

def write(figures):
    open(__file__ + ".figures", "w").write(repr(figures))
"""


@directly
def test_ladders_are_measured_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is a side, a wrong one gets no figure, and the ladder writes the others into its table."""
    (tmp_path / "ladder.py").write_text(LADDER)
    monkeypatch.setattr(ladders, "FOLDER", tmp_path)
    monkeypatch.setattr(ladders, "CASES", {"decode": (decode.SUBJECT, small_decode())})
    monkeypatch.delitem(sys.modules, "ladder", raising=False)
    ladders.loaded.cache_clear()
    known = results()
    try:
        run(plan([ladders.SUBJECT]), bench(), known, tmp_path, facts=FACTS, roof_sizes=(1e-5, 8))
        sides = known.rows[0]["sides"]
        assert list(sides) == [OURS, "01_right", "02_wrong"]
        assert "o: error" in sides["02_wrong"]["refused"]
        assert ladders.write([known])
        written = ast.literal_eval((tmp_path / "ladder.py.figures").read_text())
        assert list(written["decode"]) == ["01_right"]
        assert written["decode"]["01_right"].endswith(" (Imaginary GPU-9)")
        assert " % " in written["decode"]["01_right"]
        assert not ladders.write([results()])
    finally:
        ladders.loaded.cache_clear()
        sys.modules.pop("ladder", None)


# ----------------------------------------------------------------------------- a subject of our own


@dataclass(frozen=True, kw_only=True)
class SumCase(Case):
    size: int


class Faults:
    """How the sides of `sums` behave; a test may change them."""

    ours: Any = staticmethod(lambda x, y: x + y)
    before: Any = staticmethod(lambda case: None)


def sides_of_sums(case: SumCase) -> list[Side]:
    def missing(inputs: Any) -> Call:
        raise MissingError("nopackage is not installed")

    def failing(inputs: Any) -> Call:
        raise ValueError("shape not supported\nand a long explanation")

    def prepared(function: Any, inputs: Any) -> Call:
        return lambda: function(inputs["x"], inputs["y"])

    Faults.before(case)
    return [
        Side(OURS, partial(prepared, lambda x, y: Faults.ours(x, y))),
        Side("right", partial(prepared, torch.add)),
        Side("wrong", partial(prepared, lambda x, y: x + 1.001 * y)),
        Side("poisoned", partial(prepared, lambda x, y: torch.where(x == x.max(), torch.nan, x + y))),
        Side("short", partial(prepared, lambda x, y: (x + y)[1:])),
        Side("absent", missing),
        Side("failing", failing),
    ]


def inputs_of_sums(case: SumCase, device: torch.device, seed: int) -> dict[str, Tensor]:
    x = torch.arange(case.size, device=device, dtype=case.torch_dtype).sin() + seed
    return {"x": x, "y": x.flip(0)}


def expected_sum(case: SumCase, inputs: Any) -> list[Expected]:
    x, y = inputs["x"], inputs["y"]
    return [Expected("s", lambda out: out, x + y, x.double() + y.double())]


SIZES = (8, 16, 32, 64)
SUMS: Subject[SumCase] = Subject(
    "sums", "Sums", lambda: [SumCase(model="m", dtype="float32", size=n, importance=i) for i, n in enumerate(SIZES)],
    inputs_of_sums, lambda case: 4.0 * case.size, lambda case: Work(12 * case.size, case.size), sides_of_sums,
    expected_sum, lambda case: case.model, lambda case: ("n", case.size),
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_faults() -> Any:
    before, ours = Faults.before, Faults.ours
    yield
    Faults.before, Faults.ours = staticmethod(before), staticmethod(ours)


def bench(timer: Any = None, memory: float = 1e9) -> Bench:
    return Bench(CPU, timer or WallClock(1), memory, 1e3)


def results() -> Results:
    return Results({"device": "Imaginary GPU-9", "memory": 1e9, "l2": 1e3}, [], [])


FACTS = {"commit": "abc1234", "driver": "1.2"}


def ran(folder: Path, into: Results, where: Bench | None = None, **more: Any) -> Any:
    more = {"facts": FACTS, "roof_sizes": (1e-5, 8)} | more
    return run(plan([SUMS]), where or bench(), into, folder, **more)


@directly
def test_only_who_is_right_gets_a_figure(tmp_path: Path) -> None:
    known = results()
    ending = ran(tmp_path, known)
    assert (ending.measured, ending.left, ending.failed) == (4, 0, False)
    for row in known.rows:
        sides = row["sides"]
        assert {name for name in sides if "seconds" in sides[name]} == {OURS, "right"}
        assert "s: error" in sides["wrong"]["refused"]
        assert "inf" in sides["poisoned"]["refused"]
        assert "expected" in sides["short"]["refused"]
        assert sides["absent"] == {"missing": "nopackage is not installed"}
        assert sides["failing"] == {"failed": "ValueError: shape not supported"}


@directly
def test_a_wrong_kernel_of_ours_has_no_figure_anywhere(tmp_path: Path) -> None:
    """Not in the file, not in the tables, not in the plots, not for a goal."""
    Faults.ours = staticmethod(lambda x, y: x - y)
    known = results()
    ran(tmp_path, known)
    text = report.markdown(tmp_path, tmp_path)
    assert all("seconds" not in row["sides"][OURS] for row in known.rows)
    assert text.count("**no figure, its check failed**: s: error") == 4
    assert "% R" not in text
    assert report.roof(known.rows[0], known) is None
    assert goals.Goal("sums", "", lambda row: True, "R", goals.at_read_roof, 1.0).value(known.rows[0], known) is None


@directly
def test_a_kernel_that_is_right_only_once_gets_no_figure(tmp_path: Path) -> None:
    """As one would be whose counter is not set back."""
    counter = itertools.count()
    Faults.ours = staticmethod(lambda x, y: x + y if next(counter) % 50 == 0 else x - y)
    row = measure(SUMS, SUMS.cases()[0], bench())
    assert row["sides"][OURS]["refused"].startswith("after it was timed, s: error")
    assert row["sides"]["right"]["seconds"] > 0


@directly
def test_a_case_that_fails_does_not_cost_the_others(tmp_path: Path) -> None:
    def fail(case: SumCase) -> None:
        if case.size == 16:
            raise RuntimeError("no kernel image is available")

    Faults.before = staticmethod(fail)
    known = results()
    assert ran(tmp_path, known).measured == 4
    assert [row.get("skipped") for row in known.rows] == [
        None,
        "RuntimeError: no kernel image is available",
        None,
        None,
    ]


@directly
def test_sampled_rows_are_at_every_place_of_a_tile() -> None:
    for count, most in ((1, 16), (5, 16), (300, 16), (32768, 128)):
        rows = sample(count, most)
        assert {0, count - 1} <= set(rows.tolist())
        assert len(rows) <= max(4, most)
        assert rows.max() < count
    assert len(set((rows % 128).tolist())) > 60
    assert torch.equal(sample(5, 16), torch.arange(5))


@directly
def test_rows_are_kept_replaced_and_resumed(tmp_path: Path) -> None:
    known = results()
    ran(tmp_path, known)
    again = of_device(tmp_path, known.device)
    assert [key(row) for row in again.rows] == [key(row) for row in known.rows]
    assert again.has("sums", SUMS.cases()[0], "abc1234")
    assert not again.has("sums", SUMS.cases()[0], "another")
    first = plan([SUMS], 0)
    assert [case.importance for _, case in first] == [0]
    run(first, bench(), again, tmp_path, facts=FACTS | {"commit": "def5678"}, roof_sizes=(1e-5, 8))
    stored = read(tmp_path / "imaginary-gpu-9.json")
    assert stored is not None
    assert len(stored.rows) == 4
    assert [run["commit"] for run in stored.runs] == ["abc1234", "def5678"]
    assert stored.run_of(stored.rows[-1])["commit"] == "def5678"
    run(plan([SUMS]), bench(), stored, tmp_path, facts=FACTS, roof_sizes=(1e-5, 8))
    assert len(stored.runs) == 1, "a run of which no row is left is forgotten"
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


@directly
def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    def interrupt(case: SumCase) -> None:
        if case.size == 32:
            raise KeyboardInterrupt

    Faults.before = staticmethod(interrupt)
    ending = ran(tmp_path, results())
    assert (ending.measured, ending.left, ending.why) == (2, 2, "interrupted")
    stored = json.loads((tmp_path / "imaginary-gpu-9.json").read_text())
    assert [row["fields"]["size"] for row in stored["rows"]] == [8, 16]
    assert command.publish(tmp_path, tmp_path / "README.md", ending) == 130
    assert "2 cases of" in (tmp_path / "README.md").read_text()


@directly
def test_minutes_are_kept(tmp_path: Path) -> None:
    """Cases take 20 s here: a case that would not end in time is not begun."""
    clock = {"now": 0.0}

    def takes(case: SumCase) -> None:
        clock["now"] += 20

    Faults.before = staticmethod(takes)
    for minutes, measured in ((2, 4), (1.1, 3), (0.5, 1)):
        ending = ran(tmp_path, results(), budget=Budget(minutes, now=lambda: clock["now"]))
        assert (ending.measured, ending.left) == (measured, 4 - measured)
        assert ending.why == ("" if measured == 4 else "the minutes are spent")
        assert clock["now"] <= 60 * minutes
        clock["now"] = 0.0


@directly
def test_a_lost_device_ends_the_run_with_what_there_is(tmp_path: Path) -> None:
    def lose(case: SumCase) -> None:
        if case.size == 16:
            raise DeviceLostError("illegal memory access")

    Faults.before = staticmethod(lose)
    known = results()
    ending = ran(tmp_path, known)
    assert (ending.measured, ending.failed) == (1, True)
    assert "illegal memory access" in known.rows[-1]["skipped"]
    assert "skipped: the device was lost" in report.markdown(tmp_path, tmp_path)


@directly
def test_a_case_that_does_not_fit_says_so() -> None:
    row = measure(SUMS, SumCase(model="m", dtype="float32", size=10**9), bench(memory=1e9))
    assert row["skipped"] == "inputs and outputs take 12 GB, the device has 1 GB"
    assert "sides" not in row


@directly
def test_a_side_that_fails_beside_the_others_does_not_cost_our_figure() -> None:
    class Crowded(WallClock):
        def __call__(self, sides: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
            tried.append(list(sides))
            if len(sides) > 1:
                raise RuntimeError("out of memory")
            return super().__call__(sides)

    tried: list[list[str]] = []

    row = measure(SUMS, SUMS.cases()[0], bench(Crowded(1)))
    assert row["sides"][OURS]["seconds"] > 0
    assert row["sides"]["right"] == {"failed": "not beside the others: RuntimeError: out of memory"}
    assert tried == [[OURS, "right"], [OURS]]


@directly
def test_importance_orders_cases_of_all_subjects() -> None:
    entries = plan(SUBJECTS)
    order = [case.importance for _, case in entries]
    assert order == sorted(order)
    quick = plan(SUBJECTS, 0)
    assert {subject.name for subject, _ in quick} == {subject.name for subject in SUBJECTS}
    assert len(quick) < 45 < len(entries)
    covered = {goal for subject, case in quick for goal in goals.goals_of(row_of(subject, case))}
    assert covered == set(goals.GOALS), "a short run measures every goal"


# ----------------------------------------------------------------------------- time


@directly
def test_copies_outgrow_the_cache_and_fit_the_memory() -> None:
    l2 = 50e6
    assert copies(1e6, l2, 50e9) * 1e6 >= 2 * l2
    assert copies(1e3, l2, 50e9) == 512
    assert copies(1e9, l2, 50e9) == 2
    assert copies(1.9e9, l2, 50e9) == 2
    assert copies(2.1e9, l2, 50e9) == 1, "it pushes itself out"
    assert copies(40e9, l2, 50e9) == 1


@directly
def test_median_and_spread() -> None:
    found = timing([5, 1, 2, 3, 4, 100, 2, 3, 3, 3, 3], 7, "graph")
    assert (found.seconds, found.low, found.high, found.rounds, found.copies) == (3, 2, 5, 11, 7)
    assert found.spread == 0.5


@directly
def test_sides_take_turns_over_all_copies() -> None:
    order: list[str] = []
    sides = {name: [partial(order.append, f"{name}{i}") for i in range(2)] for name in "ab"}
    found = WallClock(rounds=2)(sides)
    assert order == ["a0", "a1", "b0", "b1"] * 2
    assert found["a"].copies == 2
    slow = WallClock(1)({"sleep": [lambda: time.sleep(0.01)] * 2})["sleep"]
    assert 0.01 <= slow.seconds < 0.1


@directly
def test_rounds_on_a_gpu_take_turns_and_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer of the GPU, with graphs that only say how long they take: 3 copies of 10 µs, and 2 of 0.3 s."""
    from glm_kernels.bench import timing as module

    durations, order = {"short": 30e-6, "long": 0.6}, []

    def captured(calls: Sequence[Call]) -> module.Captured:
        return module.Captured(calls, graph=calls[0](), kept=[call() for call in calls])

    def elapsed(graph: module.Captured, repeats: int) -> float:
        order.append((graph.graph, repeats))
        return durations[graph.graph] * repeats

    monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(module, "elapsed", elapsed)
    monkeypatch.setattr(module, "warm", lambda graph: None)
    monkeypatch.setattr(GraphTimer, "look", lambda self, graph: self.clocks.append({"clocks.sm": 1980.0}))
    timer = GraphTimer(rounds=(25, 7), seconds=1.0, least=1e-3)
    found = timer({"short": [lambda: "short"] * 3, "long": [lambda: "long"] * 2})
    assert found["short"].seconds == pytest.approx(10e-6)
    assert found["long"].seconds == pytest.approx(0.3)
    assert (found["short"].rounds, found["long"].rounds) == (25, 7)
    assert (found["short"].copies, found["long"].copies) == (3, 2)
    assert order[2:6] == [("short", 34), ("long", 1)] * 2, "in turn, and a millisecond or more at a time"
    assert timer.outputs == {"short": "short", "long": "long"}
    assert timer.clocks == [{"clocks.sm": 1980.0}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_are_timed() -> None:
    """A product eight times as large takes longer, but not a hundred times; both run as graphs."""
    timer = GraphTimer()
    sides = {}
    for side in (2048, 4096):
        x = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
        sides[str(side)] = [lambda x=x: x @ x] * 2
    found = timer(sides)
    assert {each.mode for each in found.values()} == {"graph"}
    assert 2 < found["4096"].seconds / found["2048"].seconds < 100
    assert timer.clocks


# ----------------------------------------------------------------------------- roofs


@directly
def test_roofs_are_measured_in_bytes_and_flops() -> None:
    class Second(WallClock):
        def __call__(self, sides: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
            return {name: Timing(0.5, 0.5, 0.5, 1, 1, "wall clock") for name in sides}

    found = roofs.measure(Second(), CPU, 1e-4, 16)
    assert found.read == found.details["read"]["bytes"] / 0.5
    assert found.read == pytest.approx(2 * 1e-4 * 2**30, rel=0.01)
    assert found.multiply == 2 * 16**3 / 0.5
    assert roofs.GIGABYTES >= 4
    assert roofs.SIDE == 8192


@kernel
@pytest.mark.parametrize(("block", "warps", "each"), roofs.SHAPES)
def test_the_read_stream_reads_everything_once(block: int, warps: int, each: int) -> None:
    for count in (1, block, block * each, 3 * block * each + 17):
        x = torch.full((count + 64,), torch.nan)[:count].copy_(torch.arange(count) % 7)
        sums = torch.full((each + 2,), -1.0)
        roofs.read_stream(x, sums[1:-1], block, warps)
        assert sums[1:-1].sum() == x.sum()
        assert sums[0] == sums[-1] == -1


@directly
@needs_triton
def test_the_read_stream_loads_16_bytes_at_a_time() -> None:
    from glm_kernels.variants import Target, Variant, compile

    for block, warps in sorted({(block, warps) for block, warps, _ in roofs.SHAPES}):
        types = {"x": "*fp32", "sums": "*fp32", "count": "i32", "step": "i32"}
        values = {"block": block, "deep": roofs.DEEP}
        variant = Variant("read", roofs.read_kernel, types, values, {"num_warps": warps})
        built = compile(variant, Target("cuda", 90))
        assert built.spilled == 0
        assert built.count(r"LDGSTS\S*\.128|LDG\S*\.128"), built.instructions


# ----------------------------------------------------------------------------- tables, plots, goals


def row_of(subject: Subject[Any], case: Any) -> dict[str, Any]:
    """A row without figures."""
    work = subject.work(case)
    return {
        "run": 1, "subject": subject.name, "label": subject.label(case), "axis": list(subject.axis(case)),
        "fields": case.fields, "bytes": work.bytes, "flops": work.flops,
    }  # fmt: skip


def figures(seconds: float) -> dict[str, Any]:
    return asdict(Timing(seconds, 0.99 * seconds, 1.02 * seconds, 25, 3, "graph")) | {"in cache": False}


def find_row(known: Results, label: str, size: int) -> dict[str, Any]:
    return next(row for row in known.rows if (row["label"], row["axis"][1]) == (label, size))


def made_up(folder: Path) -> Results:
    """A file of a device that does not exist: our kernels reach a part of the roof that grows with the size."""
    read_roof, multiply_roof = 4e12, 700e12
    known = results()
    known.begin(
        FACTS | {"date": "2026-01-31", "versions": {"torch": "2.13.0"}, "clocks": {"clocks.sm": [1500, 1700, 1980]}}
        | {"roofs": {"read": read_roof, "multiply": multiply_roof, "details": {}}}
    )  # fmt: skip
    for subject, case in plan(SUBJECTS, 1):
        row = row_of(subject, case)
        floor, _ = Work(row["bytes"], row["flops"]).floor(read_roof, multiply_roof)
        size = row["axis"][1]
        part = min(0.93, 0.35 + 0.12 * (size / 1024) ** 0.4)
        row["sides"] = {OURS: figures(floor / part + 1e-6)}
        for i, side in enumerate(subject.sides(case)[1:]):
            row["sides"][side.name] = (
                {"missing": "flashinfer-python is not installed"} if side.name == "flashinfer"
                else figures(floor / part * (1.05 + 0.2 * i))
            )  # fmt: skip
        known.put(row)
    wrong, skipped = (find_row(known, "GLM-4-32B causal ×1", size) for size in (2048, 4096))
    wrong["sides"][OURS] = {"refused": "o: error 7.1× (rms), 30× (max) of plain torch"}
    for name in ("sides", "bytes", "flops"):
        del skipped[name]
    skipped["skipped"] = "90 GB"
    known.save(folder)
    return known


@directly
def test_tables_and_plots_are_written_from_a_file(tmp_path: Path) -> None:
    known = made_up(tmp_path / "results")
    document = tmp_path / "README.md"
    document.write_text(
        "# Before\n<!-- begin other -->\nkept\n<!-- end other -->\n"
        "<!-- begin benchmark -->\nold\n<!-- end benchmark -->\nafter\n"
    )
    pictures = plots.draw(known, tmp_path / "results")
    assert report.write(document, tmp_path / "results")
    text = document.read_text()
    assert text.startswith("# Before\n<!-- begin other -->\nkept\n<!-- end other -->")
    assert text.endswith("<!-- end benchmark -->\nafter\n")
    assert "old" not in text.split()
    assert "Not yet measured" not in text
    assert "Imaginary GPU-9" in text
    assert "R = 4.00 TB/s, C = 700 TFLOP/s, driver 1.2, torch 2.13.0, clocks.sm 1500–1980 MHz" in text
    assert "**no figure, its check failed**: o: error 7.1× (rms)" in text
    assert "skipped: 90 GB" in text
    assert "- flashinfer: missing: flashinfer-python is not installed (" in text
    assert [path.name for path in pictures] == [f"imaginary-gpu-9-{subject.name}.png" for subject in SUBJECTS]
    for picture in pictures:
        assert f"](results/{picture.name})" in text
        with Image.open(picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 50, "blank"
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {line.count("|") for line in lines if "GLM-4-9B causal ×1 |" in line}
    assert len(widths) == 1
    [line] = [line for line in lines if line.startswith("| GLM-4-9B causal ×1 | T=32768 ")]
    row = find_row(known, "GLM-4-9B causal ×1", 32768)
    mine = row["sides"][OURS]["seconds"]
    assert f"{mine * 1e3:.2f} ms ± 1.5 %" in line
    assert f"{row['flops'] / mine / 1e12:.0f} TFLOP/s" in line
    assert f"{100 * row['flops'] / 700e12 / mine:.0f} % C" in line
    assert f"{row['sides']['SDPA cuDNN']['seconds'] / mine:.2f}× of SDPA cuDNN: goal" in line
    before = document.read_text()
    report.write(document, tmp_path / "results")
    assert document.read_text() == before


@directly
def test_a_miss_stands_beside_its_goal_with_what_bounds_it(tmp_path: Path) -> None:
    known = made_up(tmp_path)
    text = report.markdown(tmp_path, tmp_path)
    missed = report.misses(known, [])
    assert missed
    assert all(line.endswith("wanted. Not yet explained.") for line in missed)
    assert "**miss** (goal 0.92, at first 0.85)" in text
    (tmp_path / "remarks.toml").write_text(
        '[[remark]]\ndevice = "Imaginary*"\ncase = "decode GLM-4-9B *"\ntext = "Bound by the moon."\n'
        '[[remark]]\ndevice = "Another*"\ncase = "*"\ntext = "Not here."\n'
    )
    explained = report.markdown(tmp_path, tmp_path)
    assert "Bound by the moon." in explained
    assert "Not here." not in explained
    assert explained.count("Not yet explained.") < text.count("Not yet explained.")


@directly
def test_goals_are_held_to_the_figures() -> None:
    def rows(**seconds: float) -> tuple[dict[str, Any], Results]:
        case = attention.case(cases.GLM_4_9B, "causal", 1, 8192, 0)
        known = results()
        known.begin(FACTS | {"roofs": {"read": 4e12, "multiply": 1e15}})
        row = row_of(attention.SUBJECT, case) | {
            "sides": {name.replace("_", " "): figures(s) for name, s in seconds.items()}
        }
        row["sides"][OURS] = row["sides"].pop("ours")
        known.put(row)
        return row, known

    row, known = rows(ours=1.0, SDPA_cuDNN=0.9)
    cudnn, roof = goals.goals_of(row)
    assert cudnn.value(row, known) == 0.9
    assert [cudnn.verdict(value) for value in (1.0, 0.99, 0.85, 0.84)] == ["goal", "accepted", "accepted", "miss"]
    assert roof.value(row, known) == row["flops"] / 1e15
    assert roof.verdict(0.77) == "miss"
    assert cudnn.needs(row, known, 0.85) == 0.9 / 0.85
    row, known = rows(ours=1.0)
    assert cudnn.value(row, known) is None
    assert "≥ 1.00× of SDPA cuDNN: no figure" in report.goal_cell(row, known)
    short = next(goal for goal in goals.GOALS if goal.base is None)
    assert [short.verdict(value) for value in (5.9, 7.9, 8.1)] == ["goal", "accepted", "miss"]
    assert (short.sign, short.written(6.0)) == ("≤", "6.0 µs")


@directly
def test_masked_attention_is_held_to_our_causal_rate_in_the_same_run(tmp_path: Path) -> None:
    known = made_up(tmp_path)
    row, other = (find_row(known, f"ChatGLM-6B {mask} ×1", 4096) for mask in ("prefix", "causal"))
    for each, seconds in ((row, 3.0), (other, 1.0)):
        each["sides"][OURS] = figures(seconds)
    goal = next(goal for goal in goals.goals_of(row) if goal.against == "our causal rate")
    rates = [each["flops"] / seconds for each, seconds in ((row, 3.0), (other, 1.0))]
    assert goal.value(row, known) == pytest.approx(rates[0] / rates[1])
    other["run"] = 7
    assert goal.value(row, known) is None


@directly
def test_plots_have_percents_at_the_points_and_goals_as_lines(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    known = made_up(tmp_path)
    rows = [row for row in known.rows if row["label"] == "GLM-4-9B causal ×1"]
    place = Figure().subplots()
    handles = plots.panel(place, "x", rows, known)
    assert {"goal: ≥ 0.78 C", "goal: ≥ 1.00× SDPA cuDNN", OURS, "SDPA cuDNN"} <= set(handles)
    written = [text.get_text() for text in place.texts]
    for row in rows:
        found = report.roof(row, known)
        assert found is None or f"{100 * found[0]:.0f}" in written
    assert handles["goal: ≥ 0.78 C"].get_ydata() == pytest.approx([78.0] * len(handles["goal: ≥ 0.78 C"].get_ydata()))
    peer = dict(zip(*handles["SDPA cuDNN"].get_data(), strict=True))
    line = dict(zip(*handles["goal: ≥ 1.00× SDPA cuDNN"].get_data(), strict=True))
    assert line.keys() <= peer.keys()
    assert all(value == pytest.approx(peer[size]) for size, value in line.items())


@directly
def test_nothing_measured_is_said_with_the_command_and_the_goals(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text('{"device": "a CPU"}')
    text = report.markdown(tmp_path, tmp_path)
    assert text.startswith("Not yet measured")
    assert report.COMMAND in text
    assert text.count("not yet |") == len(goals.GOALS)
    readme = (PROJECT / "kernels" / "README.md").read_text()
    if not report.read_all(PROJECT / "kernels" / "results"):
        assert text in readme


@directly
def test_a_file_of_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"format": "glm_kernels.bench 0"}')
    with pytest.raises(ValueError, match="measure again"):
        report.markdown(tmp_path, tmp_path)


# ----------------------------------------------------------------------------- the command


def commanded(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(PROJECT), str(PROJECT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100", **more}
    return subprocess.run(
        [sys.executable, "-m", "glm_kernels.bench", *arguments],
        env=environment, capture_output=True, text=True, cwd=PROJECT,
    )  # fmt: skip


@directly
def test_without_a_gpu_there_is_one_clear_error(tmp_path: Path) -> None:
    done = commanded("all", "--out", str(tmp_path / "results"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no GPU")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


@directly
def test_a_strange_subject_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["rugs"]) == 2
    assert "no subject 'rugs'; there are attention, decode, append, norms" in capsys.readouterr().err.replace("\n", " ")
    assert command.main(["all", "--minutes", "0"]) == 2


@directly
def test_the_command_measures_publishes_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it, with the CPU in place of the GPU."""
    facts = results().device | {"driver": "1.2", "cuda": "13.0"}
    monkeypatch.setattr(command, "gpu", lambda: CPU)
    monkeypatch.setattr(command, "free_memory", lambda device: 1e9)
    monkeypatch.setattr(command.machine, "gpu", lambda device: facts)
    monkeypatch.setattr(command, "GraphTimer", lambda *_: WallClock(1))
    monkeypatch.setattr(command, "SUBJECTS", {"sums": SUMS})
    monkeypatch.setattr(command, "run", partial(run, roof_sizes=(1e-5, 8)))
    (tmp_path / "README.md").write_text("<!-- begin benchmark -->\n<!-- end benchmark -->\n")
    out = tmp_path / "results"
    assert command.main(["all", "--out", str(out), "--quick", "--commit", "c1"]) == 0
    stored = json.loads((out / "imaginary-gpu-9.json").read_text())
    assert [row["fields"]["size"] for row in stored["rows"]] == [8]
    assert stored["runs"][0] | {"quick": True, "driver": "1.2", "commit": "c1"} == stored["runs"][0]
    assert command.main(["sums", "--out", str(out), "--resume", "--commit", "c1"]) == 0
    stored = json.loads((out / "imaginary-gpu-9.json").read_text())
    assert [row["run"] for row in stored["rows"]] == [1, 2, 2, 2]
    assert command.main(["sums", "--out", str(out), "--only", "n=64", "--commit", "c1"]) == 0
    assert command.main(["sums", "--out", str(out), "--resume", "--commit", "c1"]) == 0
    shown = capsys.readouterr()
    assert "nothing to measure" in shown.err
    assert "sums m n=64" in shown.err
    text = (tmp_path / "README.md").read_text()
    assert "![sums: percent of the roof](results/imaginary-gpu-9-sums.png)" in text
    assert (out / "imaginary-gpu-9-sums.png").stat().st_size > 5000
    (out / "imaginary-gpu-9-sums.png").unlink()
    assert command.main(["all", "--out", str(out), "--tables"]) == 0
    assert (out / "imaginary-gpu-9-sums.png").exists()


@directly
def test_what_cannot_be_imported_has_a_reason() -> None:
    with pytest.raises(MissingError, match="no_such_package is not installed"):
        find("no_such_package.ops", "f")
    with pytest.raises(MissingError, match="torch has no flash_of_genius"):
        find("torch", "flash_of_genius")
    assert find("torch.nn", "functional.gelu") is torch.nn.functional.gelu


# ----------------------------------------------------------------------------- peers of the int4 product


def small_int4(rows: int = 5, dtype: str = "bfloat16") -> int4.Int4Case:
    return int4.Int4Case(model="tiny", dtype=dtype, matrix="down", outputs=40, inputs=256, rows=rows)


@directly
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_who_quantises_the_matrix_anew_finds_the_same_integers(dtype: str) -> None:
    """From the least and the greatest of a group, or from the greatest absolute value; and the matrix is exact."""
    case = small_int4(dtype=dtype)
    inputs = int4.make_inputs(case, CPU, 0)
    matrix = int4.dense(inputs, case.torch_dtype)
    assert torch.equal(matrix.double(), int4.dense(inputs, torch.float64))
    assert not torch.equal(matrix, int4.dense(int4.make_inputs(case, CPU, 1), case.torch_dtype))
    groups = matrix.unflatten(-1, (-1, int4.GROUP))
    least, greatest = groups.aminmax(dim=-1)
    for step in ((greatest - least) / 15, groups.abs().amax(dim=-1) / 8):
        assert torch.equal(step, inputs["scales"])
    codes = ((groups - least[..., None]) / inputs["scales"][..., None]).round()
    assert torch.equal(codes.flatten(-2), int4.integers(inputs["packed"]).to(matrix.dtype))


def unpacked(words: Tensor) -> Tensor:
    """The codes 0 to 15 of int32 words, the first in the lowest bits."""
    return torch.stack([words >> (4 * i) & 15 for i in range(8)], dim=-1).flatten(-2)


def grouped(codes: Tensor, scales: Tensor, zeros: float | Tensor) -> Tensor:
    """(code - zero) s, in float32."""
    return ((codes.float().unflatten(-1, (-1, int4.GROUP)) - zeros) * scales.float()[..., None]).flatten(-2)


class PeerLayer(torch.nn.Module):
    """Multiplies with a matrix that was written out."""

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype).mT


class HummingLayer(PeerLayer):
    """humming-kernels 0.1.19: words of eight codes, the first in the lowest bits; ready after `transform`."""

    def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
        super().__init__()
        assert weight_config == {"dtype": "uint4", "group_size": int4.GROUP}
        self.register_buffer("weight", torch.empty(shape_n, shape_k // 8, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(shape_n, shape_k // int4.GROUP, dtype=torch_dtype))

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert tensors["weight"].dtype == torch.int32
        self.load_state_dict(tensors, strict=False)

    def transform(self) -> None:
        self.matrix = grouped(unpacked(self.weight), self.weight_scale, 8)


class GemLiteLinear(PeerLayer):
    """gemlite 0.6: codes, a column of scales and one of zero points."""

    def __init__(self, bits: int, group: int, inputs: int, outputs: int, input_dtype: str, output_dtype: str) -> None:
        super().__init__()
        assert (bits, group, input_dtype) == (4, int4.GROUP, output_dtype)
        self.shape = outputs, inputs

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: None) -> None:
        assert codes.dtype == torch.uint8
        assert codes.shape == self.shape
        scales, zeros = scales.view(len(codes), -1), zeros.view(len(codes), -1)
        self.matrix = grouped(codes, scales, zeros[..., None])


class Quantised(torch.nn.Parameter):
    """What torchao puts in the place of a weight: a tensor of another kind."""


def quantize_(layer: torch.nn.Linear, config: dict[str, Any]) -> None:
    """torchao 0.18: between the least and the greatest of a group; what does not fit is passed over in silence."""
    assert config["group_size"] == int4.GROUP
    assert config["int4_packing_format"] in ("plain", "tile_packed_to_4d")
    if layer.weight.shape[0] % 8 == 0:
        groups = layer.weight.detach().unflatten(-1, (-1, int4.GROUP))
        least, greatest = groups.aminmax(dim=-1, keepdim=True)
        step = (greatest - least) / 15
        matrix = ((groups - least) / step).round() * step + least
        layer.weight = Quantised(matrix.flatten(-2), requires_grad=False)


NF4 = torch.linspace(-1, 1, 16) ** 3  # not the real sixteen numbers, but no integers either


def quantize_4bit(matrix: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, tuple[Tensor, Any]]:
    """bitsandbytes 0.50: the nearest of sixteen numbers, times the greatest of a block."""
    assert (blocksize, quant_type) == (int4.GROUP, "nf4")
    blocks = matrix.view(-1, blocksize)
    most = blocks.abs().amax(dim=-1, keepdim=True)
    return (blocks[..., None] / most[..., None] - NF4).abs().argmin(-1).to(torch.uint8), (most, matrix.shape)


def dequantize_4bit(codes: Tensor, state: tuple[Tensor, Any]) -> Tensor:
    most, shape = state
    return (NF4[codes.long()] * most).view(shape)


def matmul_4bit(x: Tensor, codes: Tensor, quant_state: tuple[Tensor, Any]) -> Tensor:
    return x @ dequantize_4bit(codes, quant_state).to(x.dtype).mT


STAND_INS: dict[str, dict[str, Any]] = {
    "humming.layer": {"HummingLayer": HummingLayer},
    "gemlite.core": {
        "DType": type("DType", (), {"BF16": "bf16", "FP16": "fp16"}), "GemLiteLinear": GemLiteLinear,
        "set_autotune": lambda config: None,
    },
    "torchao.quantization": {"Int4WeightOnlyConfig": dict, "quantize_": quantize_},
    "bitsandbytes": {"matmul_4bit": matmul_4bit},
    "bitsandbytes.functional": {"quantize_4bit": quantize_4bit, "dequantize_4bit": dequantize_4bit},
}  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The peers' functions with their layouts, on the CPU; `stand_ins(module, name=value)` changes one."""
    known = {module: dict(names) for module, names in STAND_INS.items()}
    monkeypatch.setattr(int4, "on_gpu", lambda x, what: None)
    monkeypatch.setattr(
        int4, "find", lambda module, name: known[module][name] if module in known else find(module, name)
    )
    int4.tune_gemlite.cache_clear()
    yield lambda module, **names: known[module].update(names)
    int4.tune_gemlite.cache_clear()


INT4_PEERS = "gemlite", "humming", "torchao plain", "torchao tiled", "bitsandbytes"


@directly
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_int4_peers_are_given_the_matrix_in_their_own_layout(dtype: str, stand_ins: Any) -> None:
    row = measure(int4.SUBJECT, small_int4(dtype=dtype), bench())
    for name in INT4_PEERS:
        assert row["sides"][name].get("seconds", 0) > 0, (name, row["sides"][name])


@directly
def test_an_int4_peer_with_another_matrix_is_found_out(stand_ins: Any) -> None:
    """Also the one that has numbers of its own: it is held to those, not to nothing."""

    class Turned(HummingLayer):
        def transform(self) -> None:
            self.matrix = grouped(unpacked(self.weight).flip(-1), self.weight_scale, 8)

    class Shifted(GemLiteLinear):
        def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: None) -> None:
            super().pack(codes, scales, zeros + 1, bias)

    stand_ins("humming.layer", HummingLayer=Turned)
    stand_ins("gemlite.core", GemLiteLinear=Shifted)
    stand_ins("bitsandbytes", matmul_4bit=lambda x, codes, quant_state: matmul_4bit(x, 15 - codes, quant_state))
    sides = measure(int4.SUBJECT, small_int4(), bench())["sides"]
    assert {name for name in INT4_PEERS if "refused" in sides[name]} == {"gemlite", "humming", "bitsandbytes"}
    assert sides["torchao plain"]["seconds"] > 0


@directly
def test_numbers_of_its_own_are_not_the_integers() -> None:
    """Without `expected_nf4` bitsandbytes would be refused."""
    case = small_int4()
    inputs = int4.make_inputs(case, CPU, 0)
    output = matmul_4bit(inputs["x"], *quantize_4bit(int4.dense(inputs, torch.float32), int4.GROUP, "nf4"))
    assert [part.verdict(output).ok for part in int4.expected(case, inputs)] == [False]


@directly
def test_int4_peers_that_cannot_have_a_reason(stand_ins: Any) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise RuntimeError("nvcc was not found\nand much more")

    stand_ins("humming.layer", HummingLayer=raising)
    sides = measure(int4.SUBJECT, replace(small_int4(), outputs=36), bench())["sides"]
    assert sides["humming"] == {"failed": "RuntimeError: nvcc was not found"}
    assert sides["torchao tiled"] == {"missing": "torchao leaves a matrix of 36×256 as it is"}
    assert sides["bitsandbytes"]["seconds"] > 0


@directly
def test_the_fastest_peer_is_the_one_to_beat() -> None:
    [goal] = [goal for goal in goals.GOALS if goal.against == "the fastest peer"]
    row = {"sides": {OURS: figures(2.0), "slow": figures(6.0), "fast": figures(3.0), "absent": {"missing": "why"}}}
    assert goal.value(row, results()) == 1.5
    assert goal.verdict(1.5) == "goal"
    del row["sides"]["fast"], row["sides"]["slow"]
    assert goal.value(row, results()) is None
    assert goal.covers(row_of(int4.SUBJECT, int4.LADDER))
    assert not goal.covers(row_of(int4.SUBJECT, replace(int4.LADDER, rows=2)))


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    """The kernels themselves through the same pipeline, and the read stream."""
    rerun(__file__, at_least=len(roofs.SHAPES) + 1)
