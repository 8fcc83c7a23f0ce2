"""Generation on tiny random models of every generation, in float64 on one thread; what the official code generated."""

import gc
import json
import math
import os
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm.cache import Cache
from glm.errors import GenerationError, LayoutError
from glm.family import chatglm, chatglm2, glm4
from glm.generation import Decode, Ending, Row, Sampler, generate, penalise, sample, stream, thrown, top_k, top_p
from glm.layout import Blank, Layout
from glm.model import GLM
from glm.norms import RMSNorm
from glm.positions import Interpolation, Plain, Rotary
from glm.prefix import Prefix
from glm.residual import Sandwich
from glm.spec import Spec

PROJECT = Path(__file__).parents[1]
GOLDENS = Path(os.environ.get("GLM_GOLDENS", PROJECT.parent / "shared" / "goldens"))
steady = settings(derandomize=True, deadline=None, max_examples=30)
few = settings(steady, max_examples=12)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- tiny models ---------------------------------------------------------------------------------------------------


def blank_spec(
    vocabulary: int = 30, layers: int = 2, heads: int = 2, head_width: int = 8, two_axes: bool = True
) -> Spec:
    return chatglm.build(
        layers=layers,
        width=heads * head_width,
        inner=24,
        heads=heads,
        vocabulary=vocabulary,
        context=64,
        eps=1e-5,
        two_axes=two_axes,
        sop=vocabulary - 2,
        mask=vocabulary - 4,
        gmask=vocabulary - 3,
        pad=3,
        stop=(vocabulary - 1,),
    )


def native_spec(
    vocabulary: int = 30, layers: int = 2, groups: int = 2, each: int = 2, head_width: int = 8, width: int = 24,
    inner: int = 20,
) -> Spec:  # fmt: skip
    return chatglm2.build(
        layers=layers,
        width=width,
        inner=inner,
        heads=groups * each,
        groups=groups,
        head_width=head_width,
        vocabulary=vocabulary,
        context=64,
        norm=RMSNorm(1e-5, weight_first=True),
        base=10000.0,
        scaling=Interpolation(4.0),
        pad=0,
        stop=(2,),
    )


def sandwich_spec(vocabulary: int = 30, layers: int = 2, groups: int = 2, each: int = 2, head_width: int = 8) -> Spec:
    return glm4.build(
        layers=layers,
        width=24,
        inner=20,
        heads=groups * each,
        groups=groups,
        head_width=head_width,
        vocabulary=vocabulary,
        context=64,
        eps=1e-5,
        rotary=Rotary((head_width // 2,), "interleaved", 10000.0, Plain(), None),
        qkv_bias=True,
        pad=None,
        stop=(2, 5),
        wiring=Sandwich(),
    )


@st.composite
def specs(draw: st.DrawFn, causal: bool = False) -> Spec:
    sizes: dict[str, Any] = {"vocabulary": draw(st.integers(12, 40)), "layers": draw(st.integers(1, 3))}
    sizes["head_width"] = draw(st.sampled_from([4, 8, 12]))
    build = draw(st.sampled_from([native_spec, sandwich_spec] + [blank_spec] * (not causal)))
    if build is blank_spec:
        sizes |= {"heads": draw(st.integers(1, 3)), "two_axes": draw(st.booleans())}
    else:
        sizes |= {"groups": draw(st.integers(1, 2)), "each": draw(st.integers(1, 3))}
    spec: Spec = build(**sizes)
    length = draw(st.integers(0, 3))
    projected = draw(st.sampled_from([None, (7, 5)]))
    return replace(spec, prefix=Prefix(length, projected)) if length else spec


def model_of(spec: Spec, seed: int = 0, kind: type[GLM] = GLM) -> GLM:
    """Weights big enough for attention, norms and positions to matter to the choice of every token."""
    model = kind(spec, device="cpu", dtype=torch.float64, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x.copy_(0.1 * noise if name.endswith("bias") else 0.7 * noise if x.dim() > 1 else 1 + 0.3 * noise)
    return model


@st.composite
def prompts_for(draw: st.DrawFn, spec: Spec, most: int = 4) -> list[list[int]]:
    return [draw(prompt_for(spec)) for _ in range(draw(st.integers(1, most)))]


@st.composite
def prompt_for(draw: st.DrawFn, spec: Spec) -> list[int]:
    ordinary = st.lists(st.integers(0, spec.vocabulary - 5), max_size=6)
    if not isinstance(spec.reading, Blank):
        return [*draw(ordinary), draw(st.integers(0, spec.vocabulary - 1))]
    blank = draw(st.sampled_from(spec.reading.masks[: spec.reading.axes]))  # on one axis only [gMASK] goes on
    return [*draw(ordinary), blank, *draw(ordinary), spec.reading.sop, *draw(ordinary)]


@st.composite
def cases(draw: st.DrawFn, causal: bool = False) -> tuple[GLM, list[list[int]]]:
    spec = draw(specs(causal))
    return model_of(spec, draw(st.integers(0, 1000))), draw(prompts_for(spec))


choices = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 3, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.2]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "seed": st.integers(-3, 3),
    }
)


def layout_by_hand(model: GLM, prompt: list[int], length: int) -> Layout:
    """What `length` tokens that begin with `prompt` look like, from the definition."""
    reading = model.spec.reading
    if not isinstance(reading, Blank):
        return Layout.causal(1, length)
    start = prompt.index(reading.sop)
    if reading.axes == 1:
        return Layout.rule(torch.arange(length)[None, :, None], prefix=torch.tensor([start]))
    blank = next(prompt.index(mask) for mask in reading.masks if mask in prompt)
    return Layout.blanks(start, [(blank, length - start)])


def without_cache(model: GLM, prompt: list[int], count: int, stop: tuple[int, ...], penalty: float = 1.0) -> list[int]:
    """Greedy, every token from a forward pass over all that came before."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), layout_by_hand(model, prompt, len(ids)))[0, -1]
        for seen in set(ids):
            logits[seen] *= 1 / penalty if logits[seen] > 0 else penalty
        token = int(logits.argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


# --- properties ----------------------------------------------------------------------------------------------------


@steady
@given(cases(), choices)
def test_batch_equals_single_runs(case: tuple[GLM, list[list[int]]], choice: dict[str, Any]) -> None:
    model, prompts = case
    prompts = list(map(list, dict.fromkeys(map(tuple, prompts))))  # equal prompts have a test of their own
    alone = [generate(model, [prompt], max_new_tokens=7, **choice)[0] for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=7, **choice) == alone
    assert generate(model, prompts[::-1], max_new_tokens=7, **choice) == alone[::-1]


@steady
@given(cases(), choices)
def test_stream_equals_generate_and_fewer_tokens_are_a_prefix(
    case: tuple[GLM, list[list[int]]], choice: dict[str, Any]
) -> None:
    model, (prompt, *_) = case
    new = generate(model, [prompt], max_new_tokens=9, **choice)[0]
    assert list(stream(model, prompt, max_new_tokens=9, **choice)) == new
    assert generate(model, [prompt], max_new_tokens=4, **choice)[0] == new[:4]


@steady
@given(cases(), st.sampled_from([0.6, 1.0, 1.5]))
def test_greedy_equals_greedy_without_cache(case: tuple[GLM, list[list[int]]], penalty: float) -> None:
    model, prompts = case
    for stop in (model.spec.stop, ()):
        want = [without_cache(model, prompt, 6, stop, penalty) for prompt in prompts]
        assert generate(model, prompts, max_new_tokens=6, stop=stop, repetition_penalty=penalty) == want


@steady
@given(cases(causal=True), choices, st.integers(1, 9))
def test_reading_in_chunks_changes_nothing(
    case: tuple[GLM, list[list[int]]], choice: dict[str, Any], chunk: int
) -> None:
    model, prompts = case
    want = generate(model, prompts, max_new_tokens=5, **choice)
    assert generate(model, prompts, max_new_tokens=5, chunk=chunk, **choice) == want


@few
@given(cases(causal=True), st.integers(1, 9))
def test_logits_after_chunks_are_the_same(case: tuple[GLM, list[list[int]]], chunk: int) -> None:
    from glm.generation import padded_left, read

    model, prompts = case
    ids, real = padded_left(prompts, model.device)
    with torch.no_grad():
        layout = model.layout(ids, real)
        want = model(ids, layout, last=True)
        got, _ = read(model, ids, layout, model.new_cache(*ids.shape), chunk, False)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@few
@given(cases(), st.integers(0, 5))
def test_one_token_to_choose_from_is_greedy(case: tuple[GLM, list[list[int]]], seed: int) -> None:
    model, prompts = case
    greedy = generate(model, prompts, max_new_tokens=6)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        options: dict[str, Any] = {"temperature": 1.5, "seed": seed} | narrow
        assert generate(model, prompts, max_new_tokens=6, **options) == greedy


@few
@given(cases())
def test_same_seed_same_tokens_and_other_seeds_others(case: tuple[GLM, list[list[int]]]) -> None:
    model, prompts = case
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 5.0, "stop": ()}
    samples = [generate(model, prompts, seed=seed, **options) for seed in (1, 1, 2, 3)]
    assert samples[0] == samples[1]
    assert len({str(sample) for sample in samples}) == 3

    torch.manual_seed(7)  # what a seed of None is drawn from
    first, second = (generate(model, prompts, **options) for _ in range(2))
    torch.manual_seed(7)
    assert generate(model, prompts, **options) == first != second


def test_equal_prompts_get_different_samples() -> None:
    model = model_of(native_spec())
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 3.0, "seed": 4, "stop": ()}
    a, b = [7, 8], [9]
    samples = generate(model, [a, b, a, a], **options)
    assert samples[0] == generate(model, [a], **options)[0]
    assert samples[1] == generate(model, [b], **options)[0]
    assert len({tuple(sample) for sample in samples}) == 4


def test_chatglm_prompts_of_different_context_in_one_batch() -> None:
    """Rows whose context, blank and beginning of the answer all lie elsewhere, with and without a learned prefix."""
    for prefix in (None, Prefix(3, None), Prefix(2, (16, 16))):
        model = model_of(replace(blank_spec(), prefix=prefix), seed=3)
        mask, gmask, sop = 26, 27, 28
        prompts = [[gmask, sop], [5, 6, mask, 7, 8, 9, 10, sop, 11, 12], [1] * 12 + [gmask, sop], [4, mask, sop, 4]]
        want = [without_cache(model, prompt, 8, ()) for prompt in prompts]
        assert len({tuple(new) for new in want}) == 4
        assert generate(model, prompts, max_new_tokens=8, stop=()) == want


def test_half_precision_runs() -> None:
    model = model_of(native_spec()).to(torch.bfloat16)
    assert list(map(len, generate(model, [[3], [4, 5, 6]], max_new_tokens=5, temperature=1.0, seed=1, stop=()))) == [
        5,
        5,
    ]


# --- the equations -------------------------------------------------------------------------------------------------


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def test_equations_by_hand() -> None:
    inf = math.inf
    x = torch.tensor([[2.0, -1.0, 0.0, 4.0]], dtype=torch.float64)
    seen = torch.tensor([[True, True, True, False]])
    assert penalise(x, seen, 2.0).tolist() == [[1.0, -2.0, 0.0, 4.0]]
    assert top_k(x, 2).tolist() == [[2.0, -inf, -inf, 4.0]]
    assert top_k(torch.tensor([[1.0, 1.0, 0.0]]), 1).tolist() == [[1.0, 1.0, -inf]]
    p = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64)
    for limit, kept in [(1e-9, [1]), (0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3]), (0.8, [0, 1, 3]), (0.9, [0, 1, 2, 3])]:
        assert top_p(p.log(), limit).isfinite().nonzero()[:, 1].tolist() == kept, limit
    luck = [0.0, 0.1249, 0.1251, 0.6249, 0.6251, 0.7499, 0.7501, 1 - 2**-53]
    ids = sample(p.log().expand(len(luck), -1), torch.tensor(luck, dtype=torch.float64))
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    rare = torch.tensor([[-inf, 0.0, -inf], [-inf, -inf, 0.0]], dtype=torch.float64)
    assert sample(rare, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_equations_equal_transformers() -> None:
    """The same tokens survive, with the same logits, as in transformers' processors of the same names."""
    process = pytest.importorskip("transformers.generation.logits_process")
    x = random_logits(20, 50)
    ids = torch.randint(50, (20, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros_like(x, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (0.5, 1.0, 1.7):
        want = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, x.clone())
        torch.testing.assert_close(penalise(x, seen, penalty), want, rtol=0, atol=0)
    for k in (1, 5, 50, 80):
        torch.testing.assert_close(top_k(x, k), process.TopKLogitsWarper(k)(ids, x.clone()), rtol=0, atol=0)
    for p in (0.05, 0.5, 0.9, 0.999):
        torch.testing.assert_close(top_p(x, p), process.TopPLogitsWarper(p)(ids, x.clone()), rtol=0, atol=0)
        both = process.TopPLogitsWarper(p)(ids, process.TopKLogitsWarper(7)(ids, x / 0.7))
        torch.testing.assert_close(top_p(top_k(x / 0.7, 7), p), both, rtol=0, atol=0)


def test_no_penalty_changes_nothing_and_a_penalty_stops_repetition() -> None:
    x = random_logits(5, 9)
    assert penalise(x, torch.ones_like(x, dtype=torch.bool), 1.0).equal(x)
    model = model_of(native_spec(), seed=5)
    plain, penalised = (
        generate(model, [[4, 4, 9]], max_new_tokens=12, stop=(), repetition_penalty=penalty)[0]
        for penalty in (1.0, 100.0)
    )
    assert len(set(plain)) < 12
    assert len(set(penalised)) > len(set(plain))


def test_penalty_ignores_padding() -> None:
    x = model_of(native_spec())
    for other in ([0], [1] * 9):  # the padding of row 0 repeats its own id, that of the others must not matter
        both = generate(x, [[3], other], max_new_tokens=6, stop=(), repetition_penalty=30.0)
        assert both[0] == generate(x, [[3]], max_new_tokens=6, stop=(), repetition_penalty=30.0)[0]


def test_sampler_in_order() -> None:
    """Penalty, temperature, top_k, top_p: the exact probabilities of a whole sampler, read off a fine grid of luck."""
    x = random_logits(1, 8, seed=2)
    seen = torch.tensor([[True, False] * 4])
    sampler = Sampler(temperature=1.7, top_k=6, top_p=0.8, repetition_penalty=1.4)
    n = 20_000
    luck = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids, finite = sampler(x.expand(n, -1), seen.expand(n, -1), luck)
    assert finite.all()
    share = torch.bincount(ids, minlength=8) / n
    want = torch.tensor(probabilities(x[0].tolist(), seen[0].tolist(), 1.7, 6, 0.8, 1.4))
    assert (share - want).abs().max() <= 1 / n
    assert 1 < (want > 0).sum() < 6
    half = x.bfloat16().expand(n, -1)  # sampled in float32
    assert sampler(half, seen.expand(n, -1), luck)[0].equal(sampler(half.float(), seen.expand(n, -1), luck)[0])


def probabilities(
    logits: list[float], seen: list[bool], temperature: float, k: int, p: float, penalty: float
) -> list[float]:
    """The distribution of the next token, in plain Python."""
    x = [(v / penalty if v > 0 else v * penalty) if s else v for v, s in zip(logits, seen, strict=True)]
    best = sorted(range(len(x)), key=lambda i: -x[i])[: k or len(x)]
    weight = {i: math.exp(x[i] / temperature) for i in best}
    kept: list[int] = []
    for i in best:
        if sum(weight[j] for j in kept) >= p * sum(weight.values()):
            break
        kept.append(i)
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(x))]


def chi_square(counts: Counter[int], p: list[float]) -> float:
    """Pearson's statistic over its expectation: about 1 for draws from `p`, with spread sqrt(2 / degrees)."""
    n, support = counts.total(), [i for i, v in enumerate(p) if v > 0]
    assert set(counts) <= set(support)
    return sum((counts[i] - n * p[i]) ** 2 / (n * p[i]) for i in support) / (len(support) - 1)


def test_samples_follow_the_distribution() -> None:
    """3000 continuations of one prompt: the first token, and the second after the commonest first."""
    model = model_of(native_spec(vocabulary=14), seed=1)
    how: dict[str, Any] = {"temperature": 2.0, "top_k": 9, "top_p": 0.95, "repetition_penalty": 1.2}
    prompt = [5, 3]
    pairs = generate(model, [prompt] * 3000, max_new_tokens=2, seed=0, stop=(), **how)
    first = Counter(pair[0] for pair in pairs)
    common, count = first.most_common(1)[0]
    assert count > 500
    second = Counter(pair[1] for pair in pairs if pair[0] == common)
    for text, counts in ((prompt, first), ([*prompt, common], second)):
        with torch.no_grad():
            logits = model(torch.tensor([text]))[0, -1].tolist()
        p = probabilities(logits, [i in text for i in range(14)], 2.0, 9, 0.95, 1.2)
        degrees = sum(v > 0 for v in p) - 1
        assert degrees >= 3
        assert abs(chi_square(counts, p) - 1) < 4 * math.sqrt(2 / degrees)


def test_dice_are_fair_across_seeds_and_prompts() -> None:
    by_seed = [thrown([[1, 2]], seed)[0].random() for seed in range(2000)]
    by_prompt = [thrown([[i, 2]], 0)[0].random() for i in range(2000)]
    by_repetition = [die.random() for die in thrown([[1, 2]] * 2000, 0)]
    for draws in (by_seed, by_prompt, by_repetition):
        bins = Counter(int(10 * x) for x in draws)
        assert abs(chi_square(bins, [0.1] * 10) - 1) < 4 * math.sqrt(2 / 9)
    assert by_seed[0] == by_prompt[1] == by_repetition[0] != by_seed[1]
    assert by_seed[0] == 0.7211121591683823  # today's tokens are next year's: Python keeps what a seed draws


# --- ends ----------------------------------------------------------------------------------------------------------


@steady
@given(cases(), st.data())
def test_stop_ids(case: tuple[GLM, list[list[int]]], data: st.DataObject) -> None:
    """Rows end where any of the ids comes first, each on its own; the id itself is left out unless asked for."""
    model, prompts = case
    full = generate(model, prompts, max_new_tokens=10, stop=())
    assert list(map(len, full)) == [10] * len(prompts)
    stop = data.draw(st.sets(st.sampled_from([token for row in full for token in row]), min_size=1, max_size=3))
    ends = [next((i for i, token in enumerate(row) if token in stop), 10) for row in full]
    assert generate(model, prompts, max_new_tokens=10, stop=stop) == [
        row[:end] for row, end in zip(full, ends, strict=True)
    ]
    assert generate(model, prompts, max_new_tokens=10, stop=stop, keep_stop=True) == [
        row[: end + 1] for row, end in zip(full, ends, strict=True)
    ]
    one = next(iter(stop))
    assert generate(model, prompts, max_new_tokens=10, stop=one) == generate(
        model, prompts, max_new_tokens=10, stop=[one]
    )


def test_default_stop_is_the_models() -> None:
    model = model_of(native_spec())
    free = generate(model, [[6]], max_new_tokens=8, stop=())[0]
    model.spec = replace(model.spec, stop=(free[3],))
    assert generate(model, [[6]], max_new_tokens=8) == [free[: free.index(free[3])]]


PIECES = ["", "a", "b", "ab", "ba", "c", "\n", "aab"]
NI, HAO = "你".encode(), "好".encode()
BYTES = [b"", NI[:1], NI[1:], HAO[:2], HAO[2:], b"a", HAO[2:] + b"a", HAO + b"a"]


def by_pieces(ids: list[int]) -> str:
    return "".join(PIECES[id % 8] for id in ids)


def by_bytes(ids: list[int]) -> str:
    return b"".join(BYTES[id % 8] for id in ids).decode("utf-8", errors="replace")


def cut(ids: list[int], strings: list[str], decode: Decode, keep: bool) -> list[int]:
    """The definition: at the first token that completes a stop string, all tokens that lie wholly before it."""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if found := [text.index(string) for string in strings if string in text]:
            if keep:
                return ids[:end]
            before = text[: min(found)]
            return ids[: max(n for n in range(end) if before.startswith(decode(ids[:n])))]
    return ids


@settings(steady, max_examples=400)
@given(st.lists(st.integers(0, 7), max_size=20), st.sampled_from([by_pieces, by_bytes]), st.booleans(), st.data())
def test_stop_strings_may_straddle_tokens(ids: list[int], decode: Decode, keep: bool, data: st.DataObject) -> None:
    text = decode(ids)
    place = st.integers(0, max(0, len(text) - 1))
    inside = st.builds(lambda start, length: text[start : start + length] or "a", place, st.integers(1, 4))
    strings = data.draw(st.lists(inside | st.sampled_from(["a", "bc", "好你", "\n\n"]), min_size=1, max_size=3))
    row = Row(0, Ending.of((), strings, decode, keep))
    want = cut(ids, strings, decode, keep)
    out: list[int] = []
    for i, token in enumerate(ids):
        out += row.take(token, last=i == len(ids) - 1)
        assert out == want[: len(out)], "an id was handed out that belongs to a stop string"
    assert out == want


@pytest.mark.parametrize(
    ("ids", "strings", "decode", "want"),
    [
        ([5, 1, 2], ["ab", "b"], by_pieces, [5]),  # both are complete at once: the earlier counts
        ([5, 1, 2], ["b", "ab"], by_pieces, [5]),
        ([5, 3, 1], ["ba"], by_pieces, [5]),  # the token that holds its first letter goes with it
        ([5, 3, 4], ["好"], by_bytes, [5]),  # half a character is held back
        ([5, 3, 6], ["a好a"], by_bytes, []),
        ([3, 6], ["a"], by_bytes, []),  # never half a character is left
        ([3, 4, 1, 2, 1], ["你你"], by_bytes, [3, 4, 1, 2, 1]),  # the end came first
    ],
)
def test_stop_strings_by_hand(ids: list[int], strings: list[str], decode: Decode, want: list[int]) -> None:
    row = Row(0, Ending.of((), strings, decode, keep=False))
    assert [id for i, token in enumerate(ids) for id in row.take(token, last=i == len(ids) - 1)] == want


def test_stop_strings_are_held_back_no_longer_than_needed() -> None:
    row = Row(0, Ending.of(9, ["abc"], lambda ids: "".join("abcx"[id] for id in ids if id < 4), keep=False))
    given_out = [row.take(token, last=False) for token in (3, 0, 1, 3, 0, 0, 1, 2, 3)]
    assert given_out == [[3], [], [], [0, 1, 3], [], [0], [], [], []]
    assert row.done
    row = Row(0, Ending.of(9, ["abc"], lambda ids: "".join("abcx"[id] for id in ids if id < 4), keep=False))
    assert [row.take(token, last=False) for token in (3, 0, 1, 9)] == [[3], [], [], [0, 1]]  # an id ends it first


@few
@given(cases(), st.booleans(), st.data())
def test_stop_strings_in_generate(case: tuple[GLM, list[list[int]]], keep: bool, data: st.DataObject) -> None:
    model, prompts = case
    full = generate(model, prompts, max_new_tokens=14, stop=())
    text = by_pieces(full[0])
    start = data.draw(st.integers(0, max(0, len(text) - 3)))
    strings = [text[start : start + 3] or "a", "c\nc"]
    options: dict[str, Any] = {"stop": (), "stop_text": strings, "decode": by_pieces, "keep_stop": keep}
    want = [cut(row, strings, by_pieces, keep) for row in full]
    assert generate(model, prompts, max_new_tokens=14, **options) == want
    assert list(stream(model, prompts[0], max_new_tokens=14, **options)) == want[0]


def test_reading_for_stop_strings_stays_short() -> None:
    """The cost of a step does not grow with what was generated, and long runs do not hide a stop string."""
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join("ab"[id] for id in ids)

    for keep in (False, True):
        row = Row(0, Ending.of((), "baaab", decode, keep))
        out = [id for token in [0] * 500 + [1, 0, 0, 0, 1] for id in row.take(token, last=False)]
        assert row.done
        assert len(out) == (505 if keep else 500)
    assert longest < 60


# --- streams -------------------------------------------------------------------------------------------------------


def test_closing_a_stream_frees_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(native_spec())
    caches: list[weakref.ref[Cache]] = []
    make = model.new_cache

    def watched(*size: int) -> Cache:
        cache = make(*size)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model, "new_cache", watched)
    tokens = stream(model, [3, 4], max_new_tokens=20, stop=())
    assert caches == []  # nothing is allocated before the first token is asked for
    next(tokens)
    assert caches[0]() is not None
    tokens.close()
    gc.collect()
    assert caches[0]() is None
    assert list(tokens) == []


def test_a_stream_leaves_gradients_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(native_spec())
    inside: list[bool] = []
    forward = model.forward

    def watched(*args: Any, **more: Any) -> Any:
        inside.append(torch.is_inference_mode_enabled())
        return forward(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", watched)
        for _ in stream(model, [3, 4], max_new_tokens=3, stop=()):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
    assert inside == [True] * 3
    with torch.no_grad():
        generate(model, [[1]], max_new_tokens=1)
        assert not torch.is_grad_enabled()
    assert model(torch.tensor([[1, 2]])).requires_grad


def test_the_cache_is_exact_and_every_token_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(native_spec())
    sizes: list[tuple[int, ...]] = []
    reads: list[tuple[int, ...]] = []
    make, forward = model.new_cache, model.forward
    monkeypatch.setattr(model, "new_cache", lambda *size: sizes.append(size) or make(*size))  # type: ignore[func-returns-value]
    monkeypatch.setattr(
        model,
        "forward",
        lambda ids, *rest, last, **more: reads.append((*ids.shape, last)) or forward(ids, *rest, last=last, **more),  # type: ignore[func-returns-value]
    )
    generate(model, [[3, 4, 5], [6]], max_new_tokens=4, stop=())
    assert sizes == [(2, 6)]
    assert reads == [(2, 3, True)] + [(2, 1, True)] * 3
    reads.clear()
    generate(model, [[3, 4, 5, 6, 7]], max_new_tokens=1, stop=(), chunk=2)
    assert [read[1] for read in reads] == [2, 2, 1]
    reads.clear()
    assert generate(model, [], max_new_tokens=4) == []
    assert generate(model, [[1], [2]], max_new_tokens=0) == [[], []]
    assert list(stream(model, [1], max_new_tokens=0)) == []
    assert reads == []
    stop = generate(model, [[3]], max_new_tokens=1, stop=())[0][0]
    reads.clear()
    assert generate(model, [[3]], max_new_tokens=100, stop=stop) == [[]]
    assert len(reads) == 1  # nothing runs on once every row is done


# --- errors --------------------------------------------------------------------------------------------------------


class Faulty(GLM):
    """Puts `value` into the logits of row `row` once the cache holds `at` tokens."""

    row, at, value = 0, 0, math.nan

    def forward(self, ids: Tensor, *rest: Any, **more: Any) -> Any:
        logits = super().forward(ids, *rest, **more)
        if len(more.get("cache") or rest[1]) == self.at:
            logits[self.row, -1, 5] = self.value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    model = model_of(native_spec(), kind=Faulty)
    assert isinstance(model, Faulty)
    prompts = [[3, 4], [6, 7, 8]]
    options: dict[str, Any] = {"temperature": temperature, "seed": 0}
    clean = generate(model, prompts, max_new_tokens=6, stop=(), **options)
    model.row, model.at, model.value = 1, 5, value  # after 3 + 2 tokens: the third new one
    with pytest.raises(GenerationError, match=r"prompt 1: .* new token 3 are not finite"):
        generate(model, prompts, max_new_tokens=6, stop=(), **options)
    assert generate(model, prompts, max_new_tokens=2, stop=(), **options) == [row[:2] for row in clean]
    stop = clean[1][1]  # row 1 ends before; what its logits are afterwards is nobody's business
    free = [row[: row.index(stop)] if stop in row else row for row in clean]
    assert generate(model, prompts, max_new_tokens=6, stop=stop, **options) == free
    said = stream(model, prompts[1], max_new_tokens=6, stop=(), **options)
    model.row = 0
    assert [next(said), next(said)] == clean[1][:2]
    with pytest.raises(GenerationError, match="new token 3"):
        next(said)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-9}, "greedy"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "greedy is temperature=0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"stop": "\n"}, "stop_text"),
        ({"stop": [1, "\n"]}, "stop_text"),
        ({"stop_text": "\n"}, "decode="),
        ({"stop_text": [""], "decode": by_pieces}, "at least one character"),
        ({"stop_text": [3], "decode": by_pieces}, "at least one character"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], says: str) -> None:
    model = model_of(native_spec())
    options = {"max_new_tokens": 3} | options
    with pytest.raises(GenerationError, match=says):
        generate(model, [[1, 2]], **options)
    with pytest.raises(GenerationError, match=says):
        stream(model, [1, 2], **options)  # the call itself, before the first token


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1, 30]], "prompt 0 holds the id 30, but the model's are 0 … 29"),
        ([[-1]], "id -1"),
        ([1, 2], "prompt 0 should be a list of ids"),
        (["hello"], "encode text first"),
        ([[[1, 2]]], "stream a single one"),
        ([[1.5]], "list of ids"),
    ],
)
def test_prompts_that_cannot_be_used(prompts: Any, says: str) -> None:
    with pytest.raises(GenerationError, match=says):
        generate(model_of(native_spec()), prompts, max_new_tokens=3)


def test_prompts_that_a_blank_filling_model_cannot_use() -> None:
    model = model_of(blank_spec())
    with pytest.raises(GenerationError, match="prompt 1 lacks the start token 28"):
        generate(model, [[1, 27, 28], [1, 2, 27]], max_new_tokens=3)
    with pytest.raises(GenerationError, match="both directions"):
        generate(model, [[1, 27, 28]], max_new_tokens=3, chunk=2)
    with pytest.raises(LayoutError, match="none of the blanks"):
        generate(model, [[1, 28]], max_new_tokens=3)


def test_ids_may_be_tensors() -> None:
    model = model_of(native_spec())
    want = generate(model, [[3, 4]], max_new_tokens=3)
    assert generate(model, [torch.tensor([3, 4])], max_new_tokens=3) == want  # type: ignore[list-item]


# --- what the official code generated ------------------------------------------------------------------------------


def golden_folders() -> list[Path]:
    dense = ("chatglm", "glm4-9b", "hf_glm-", "hf_glm4-")
    return sorted(folder for folder in GOLDENS.glob("*") if folder.name.startswith(dense))


@pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"no golden folders at {GOLDENS}: set GLM_GOLDENS")
@pytest.mark.parametrize("folder", golden_folders(), ids=lambda folder: folder.name)
def test_greedy_equals_the_official_greedy(folder: Path) -> None:
    """`<scenario>.generated` is prompt and greedy tokens; the rows of a scenario go in as one ragged batch."""
    from safetensors.torch import load_file

    model = GLM.from_pretrained(folder, dtype=torch.float64, device="cpu")
    reference = load_file(folder / "reference.safetensors")
    scenarios = [key.split(".")[0] for key in reference if key.endswith(".generated") and "positions" not in key]
    assert scenarios or not json.loads((folder / "meta.json").read_text()).get("scenarios"), folder
    for scenario in scenarios:
        ids, generated = reference[f"{scenario}.input_ids"], reference[f"{scenario}.generated"]
        mask = reference.get(f"{scenario}.attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None:
            real = (mask[:, 0] == 0).any(-1) if mask.dim() == 4 else mask.bool()
        prompts = [row[keep].tolist() for row, keep in zip(ids, real.expand(ids.shape), strict=True)]
        want = generated[:, ids.shape[1] :].tolist()
        for row in want:
            end = next((i + 1 for i, token in enumerate(row) if token in model.spec.stop), len(row))
            del row[end:]
        count = generated.shape[1] - ids.shape[1]
        assert generate(model, prompts, max_new_tokens=count, keep_stop=True) == want, scenario
        if not isinstance(model.spec.reading, Blank):
            assert generate(model, prompts, max_new_tokens=count, keep_stop=True, chunk=3) == want, scenario
