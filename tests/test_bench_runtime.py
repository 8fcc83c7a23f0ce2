"""The benchmark of the engine, on toys and the CPU: what it counts, what it refuses, what it writes."""

import json
import os
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from glm_kernels.bench.subject import Expected
from torch.utils.flop_counter import FlopCounterMode

import glm
from glm.bench import command, decode, plots, prefill, report, serve, work
from glm.bench.cases import RuntimeCase, all_cases, case
from glm.bench.goals import GOALS, goals_of
from glm.bench.huggingface import Eager
from glm.bench.prompts import prompts
from glm.bench.results import RuntimeResults, of_device, read, read_all
from glm.bench.run import cpu_roofs, measured, run
from glm.bench.sides import EAGER, GPT_FAST, OURS, OVERLAP, STATIC, EngineSide, Setting, Side, makers, overlapped
from glm.bench.stock import Stock, TinyLinear
from glm.bench.truth import Truth, exact
from glm.bench.turns import Place
from glm.bench.weights import random_model
from glm.cli import main
from glm.errors import GLMError
from glm.export import save_pretrained
from glm.family import glm4
from glm.grouped import Grouped, GroupedLinear
from glm.layout import Blank
from glm.runtime import Engine

CPU = torch.device("cpu")
GOLDENS = Path(__file__).parent / "goldens"
PLACE = Place(CPU, rounds=1, steps=3)
SPEC = glm4.build(
    layers=3, width=64, inner=128, heads=4, groups=2, head_width=32, vocabulary=211, context=256, eps=1e-5,
    rotary=replace(glm4.half_rotary(1e4), widths=(16,)), qkv_bias=True, pad=0, stop=(7,),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small GLM-4 with its files."""
    folder = tmp_path_factory.mktemp("bench") / "toy"
    save_pretrained(glm.GLM(SPEC, dtype=torch.float32, seed=0), folder)
    return str(folder)


def small(what: str, model: str, weights: str = "fp32", **sizes: Any) -> RuntimeCase:
    return case(what, model, weights, CPU, **{"context": 20, "layers": 2, **sizes})


def setting(made: RuntimeCase, length: int = 64) -> Setting:
    return Setting(random_model(made, CPU), made, length)


def truth_of(given: Setting, steps: int = 5) -> Truth:
    spec = given.case.spec
    return Truth(given.model, prompts(spec, given.case.batch, 12, 1), steps)


# ----------------------------------------------------------------------------- from the command line


def test_every_subject_from_the_command_line(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--layers", "2", "--device", "cpu", "--out", str(tmp_path)]
    rounds = ["--rounds", "1"]
    assert main(["bench", "decode", toy, "--context", "8,20", "--batch", "2", "--steps", "3", *rounds, *common]) == 0
    assert main(["bench", "decode", toy, "--weights", "int4", "--context", "20", "--steps", "3", *rounds, *common]) == 0
    assert main(["bench", "prefill", toy, "--context", "20", *rounds, *common]) == 0
    assert main(["bench", "serve", toy, "--context", "20", "--rate", "200", "--count", "4", *common]) == 0
    assert main(["bench", "memory", toy, "--context", "20", *common]) == 0
    said = capsys.readouterr().out
    for words in ("tokens/s", "operators of a step", GPT_FAST, STATIC, "first token p50 / p95", "peak over these"):
        assert words in said

    [results] = read_all(tmp_path)
    assert (tmp_path / f"{results.name}.json").name.startswith("runtime_")
    assert [row["subject"] for row in results.rows] == ["decode"] * 3 + ["prefill", "serve", "memory"]
    for row in results.rows:
        current = results.run_of(row)
        assert current["roofs"]["read"] > 0
        assert {"commit", "date", "versions"} <= current.keys()
        assert row["fields"]["layers"] == 2
    first, _, packed, read_in, served, peak = results.rows
    for row in (first, packed, read_in):
        assert all(side["seconds"] > 0 for side in row["sides"].values()), row["sides"]
        assert list(row["sides"]) == [OURS, GPT_FAST, EAGER, STATIC]
    assert first["kernels"]["per step"] > 10
    assert first["kernels"]["seconds"] == pytest.approx(sum(line["seconds"] for line in first["kernels"]["table"]))
    assert packed["bytes"] < first["bytes"]
    ours = served["sides"][OURS]
    assert ours["requests"] == 4
    assert 0 < ours["first"][0] <= ours["first"][1] <= ours["seconds"]
    assert 0 <= ours["queue"]["mean"] <= ours["queue"]["most"] <= 4
    found = peak["sides"][OURS]
    assert found["weights"] == sum(
        x.nbytes for x in random_model(RuntimeCase(**peak["fields"]), CPU).state_dict().values()
    )
    assert found["cache"] == 20 * 2 * 2 * 2 * 32 * 4
    assert found["over needed"] == found["peak"] / (found["weights"] + found["cache"] + found["logits"])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"{results.name}-decode-{what}.png" for what in ("context", "layer")
    ]


def test_start_is_split_and_reads_the_folder(toy: str) -> None:
    made = case("start", toy, "stored", CPU, context=8)
    assert made.spec == SPEC
    row = measured(made, Place(CPU, rounds=1))
    ours = row["sides"][OURS]
    assert list(ours["parts"]) == ["python", "import", "load", "compose", "first"]
    assert all(value > 0 for value in ours["parts"].values())
    assert ours["seconds"] == pytest.approx(sum(ours["parts"].values()))
    assert ours["parts"]["import"] > ours["parts"]["compose"], "torch is imported in the process that is measured"


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    from glm.bench.child import ask

    with pytest.raises(GLMError, match=r"measures start ended with 1.*nothing-there"):
        ask("start", folder=str(tmp_path / "nothing-there"), context=4, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--out", "x"], "measured on a GPU"),
        (["decode", "no-such-model"], "no release is called"),
        (["decode", "TOY", "--weights", "int3"], "weights are bf16"),
        (["decode", "TOY", "--context", "9999"], "takes 256 tokens"),
        (["decode", "TOY", "--context", "many"], "'many' is no number"),
        (["decode", "TOY", "--context", "0"], "whole numbers from 1"),
        (["decode", "TOY", "--layers", "4"], "has 3 layers"),
        (["decode", "TOY", "--weights", "stored"], "only the start of a folder"),
        (["start", "TOY", "--layers", "1"], "only the start of a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [toy if word == "TOY" else word for word in arguments]
    assert main(["bench", *given, "--device", "cpu"]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["decode", "prefill", "memory", "start", "serve", "all"])
def test_help_has_an_example_that_can_be_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, "--help"]) == 0
    before, example = capsys.readouterr().out.split("Example:")
    assert all(len(line) <= 80 for line in before.splitlines())
    words = example.split()
    assert words[:3] == ["glm", "bench", name]
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", before))


# ----------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("weights", ["fp32", "int4", "int8"])
def test_bytes_are_those_of_every_matrix_and_the_cache(weights: str, toy: str) -> None:
    """Counted from the tensors themselves, by name."""
    made = small("decode", toy, weights, batch=2)
    model = random_model(made, CPU)
    state = model.state_dict()
    norms = sum(x.nbytes for name, x in state.items() if x.dim() == 1 and "bias" not in name)
    matrices = sum(x.nbytes for name, x in state.items() if name != "embedding.weight") - norms
    groups, width, layers, tokens = 2, 32, 2, 21
    cache = 2 * tokens * layers * 2 * groups * width * 4
    assert work.floor(made.spec, torch.float32, 2, tokens) == matrices + norms + cache
    engine = Engine(model, max_batch=2, max_length=40)
    assert work.moved(engine, made, tokens) == pytest.approx(matrices + cache)


def test_bytes_of_a_row_are_in_the_middle_of_a_turn(toy: str) -> None:
    made = small("decode", toy)
    row = decode.measure(made, PLACE, {OURS: EngineSide})
    tokens = 20 + decode.WARM + 2  # the second of three steps
    assert row["bytes"] == work.floor(made.spec, torch.float32, 1, tokens)


def test_experts_that_nobody_met_do_not_count() -> None:
    folder = str(GOLDENS / "hf_glm4_moe-air")
    spec = case("decode", folder, "fp32", CPU, context=8).spec
    everything = work.weights_read(spec, torch.float32, 10**6)
    few = work.weights_read(spec, torch.float32, 1)
    layers = [block.feed_forward for block in spec.blocks if hasattr(block.feed_forward, "count")]
    unmet = sum((e.count - e.top) * 3 * spec.width * e.expert.inner * 4 for e in layers)
    assert everything - few == unmet > 0


def test_flops_are_those_of_the_products(toy: str) -> None:
    """torch counts the products of the pure model; of attention it counts all pairs, we those that are visible."""
    made = small("prefill", toy)
    model, ids = random_model(made, CPU), torch.tensor(prompts(made.spec, 1, 20, 0))
    with FlopCounterMode(display=False) as counted:
        model(ids, last=True)
    products = sum(flops for name, flops in counted.get_flop_counts()["Global"].items() if "mm" in str(name))
    pairs = 20 * 21 // 2
    assert work.flops(made.spec, 20) == products + 2 * 2 * 4 * 2 * 32 * pairs


def test_a_prefix_is_seen_both_ways() -> None:
    spec = case("prefill", str(GOLDENS / "chatglm1-base"), "fp32", CPU, context=8).spec
    ids = torch.tensor(prompts(spec, 1, 8, 0))
    assert isinstance(spec.reading, Blank)
    assert work.visible(spec, 8) == int(spec.reading.read(ids).visible.sum())


# ----------------------------------------------------------------------------- random weights


@pytest.mark.parametrize("weights", ["fp32", "int4", "int8"])
def test_random_weights_have_the_spread_of_published_ones(weights: str, toy: str) -> None:
    model = random_model(small("decode", toy, weights), CPU)
    for name, module in model.named_modules():
        if name.endswith(("qkv", "out", "up", "down")):
            weight = module.dense(torch.float32)  # type: ignore[operator]
            assert weight.std() == pytest.approx(0.02, rel=0.1)
    norm = model.final_norm.weight
    assert norm.unique().numel() == norm.numel(), "a norm that is left out must show"
    assert norm.mean() == pytest.approx(1, abs=0.1)


def test_integers_have_the_largest_groups_that_fit(toy: str) -> None:
    assert small("decode", toy, "int4").spec.weights == Grouped(4, 64, True)
    assert case("decode", "glm-4-9b", "int4", CPU).spec.weights == Grouped(4, 128, True)


# ----------------------------------------------------------------------------- the check


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int4", "int8"])
@pytest.mark.parametrize("name", [OURS, GPT_FAST, EAGER, STATIC])
def test_every_side_computes_the_model(name: str, weights: str, toy: str) -> None:
    given = setting(small("decode", toy, weights, batch=2))
    assert truth_of(given).faults(makers()[name](given)) == ""


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("golden", ["chatglm1-base", "chatglm3-base", "glm130b-base", "hf_glm4-base"])
@pytest.mark.parametrize("name", [OURS, GPT_FAST])
def test_every_wiring_and_position(name: str, golden: str, weights: str) -> None:
    given = setting(small("decode", str(GOLDENS / golden), weights, batch=2))
    assert truth_of(given).faults(makers()[name](given)) == ""


def test_all_sides_write_the_tokens_of_generate(toy: str) -> None:
    given = setting(small("decode", toy, batch=3))
    texts = prompts(given.case.spec, 3, 9, 5)
    expected = glm.generate(given.model, texts, max_new_tokens=8, stop=())
    for name, make in makers().items():
        side = make(given)
        side.start(texts)
        decode.steps(side, 12)
        assert [row[:8] for row in side.tokens()] == expected, name
        side.start(texts)  # and once more, from the beginning
        decode.steps(side, 12)
        assert [row[:8] for row in side.tokens()] == expected, name


def test_the_engine_overlapped_is_a_side_where_a_device_can(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the plain one, in the same run; what kernels do on a CPU stays the same."""
    assert OVERLAP not in decode.measure(small("decode", toy), PLACE)["sides"]
    monkeypatch.setattr("glm.bench.sides.makers", lambda: {OURS: EngineSide})
    monkeypatch.setattr("glm.bench.sides.can_overlap", lambda device: True)
    row = decode.measure(small("decode", toy), PLACE)
    assert list(row["sides"]) == [OURS, OVERLAP]
    assert all(side["seconds"] > 0 for side in row["sides"].values())
    assert f"× {OVERLAP}" in report.ratios(row)
    made = {name: make(setting(small("decode", toy))) for name, make in overlapped(CPU).items()}
    assert [side.engine.overlap for side in made.values() if isinstance(side, EngineSide)] == [True]


def test_the_overlapped_engine_is_no_other_side() -> None:
    row = decoding(batch=32, tokens=32)
    row["sides"][OVERLAP] = figures(1e-3)
    results = on_a_gpu(row)
    value = {goal.name: goal.value(results.rows[0], results) for goal in goals_of(results.rows[0], results)}
    assert value["decode, batch 32: against every other side"] == pytest.approx(1.1)


def test_exact_is_the_model_in_float64(toy: str) -> None:
    model = random_model(small("decode", toy), CPU)
    ids = torch.tensor(prompts(model.spec, 2, 9, 0))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = exact(model, ids)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), "the model is as it was"
    torch.testing.assert_close(found, model.double()(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_the_compiled_step_is_one_graph(weights: str, toy: str) -> None:
    """Traced whole, without the compiler behind it, which wants a GPU."""
    side = Stock(setting(small("decode", toy, weights, batch=2)))
    texts = prompts(side.module.spec, 2, 9, 5)
    tokens = []
    for call in (side.module, torch.compile(side.module, fullgraph=True, dynamic=False, backend="eager")):
        side.call = call
        side.start(texts)
        decode.steps(side, 3)
        tokens.append(side.tokens())
    assert tokens[0] == tokens[1]


def mutated(change: Callable[[Any], None]) -> Callable[[Setting], Side]:
    """transformers with something changed."""

    def make(given: Setting) -> Side:
        side = Eager(given)
        for name, x in side.model.named_parameters():  # its tensors are ours: take others
            owner, _, leaf = name.rpartition(".")
            setattr(side.model.get_submodule(owner), leaf, torch.nn.Parameter(x.clone(), requires_grad=False))
        change(side.model.model)
        return side

    return make


def times(name: str, factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_parameter(name).data[0] *= factor

    return change


MUTANTS = {
    "one weight of a norm": times("layers.1.input_layernorm.weight", 1.001),
    "a row of a matrix": times("layers.0.self_attn.q_proj.weight", 1.01),
    "a bias": times("layers.1.self_attn.v_proj.bias", 0.9),
    "eps": lambda model: setattr(model.norm, "variance_epsilon", 1.1e-5),
    "the last norm": lambda model: model.norm.weight.data.mul_(1.0001),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_peer_is_refused_and_gets_no_figure(name: str, toy: str) -> None:
    row = decode.measure(small("decode", toy), PLACE, {OURS: EngineSide, "wrong": mutated(MUTANTS[name])})
    assert "logits" in row["sides"]["wrong"]["refused"]
    assert "seconds" not in row["sides"]["wrong"]
    assert row["sides"][OURS]["seconds"] > 0, "which costs the others nothing"
    read_in = prefill.measure(small("prefill", toy), PLACE, {"wrong": mutated(MUTANTS[name])})
    assert list(read_in["sides"]["wrong"]) == ["refused"]


class Forgetful(Stock):
    """Right in the prompt; in steps it writes where the last token was."""

    def step(self) -> None:
        super().step()
        if len(self.chosen) == 3:
            self.at -= 1


class Stuck(EngineSide):
    """Says the first token again and again."""

    def tokens(self) -> list[list[int]]:
        return [row[:1] * len(row) for row in super().tokens()]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("wrong", [Forgetful, Stuck])
def test_what_goes_wrong_in_steps_only_is_refused(wrong: Callable[[Setting], Side], weights: str, toy: str) -> None:
    row = decode.measure(small("decode", toy, weights, batch=2), PLACE, {OURS: wrong})
    assert re.match(r"tokens: one chosen is|logits behind steps: ", row["sides"][OURS]["refused"])
    assert "moved" not in row
    assert "kernels" not in row


EXPERTS = str(GOLDENS / "hf_glm4_moe-air")


def changed_engine(change: Callable[[Any], None]) -> Callable[[Setting], Side]:
    """The engine of a changed copy of the model; of its experts only."""

    def make(given: Setting) -> Side:
        model = deepcopy(given.model)
        change(model.blocks[-1].feed_forward)
        return EngineSide(replace(given, model=model))

    return make


def nearly_tied(given: Setting, distance: float) -> None:
    """Experts 0 and 1 of the last layer suit every token equally well but for `distance`, and 0 is always chosen."""
    router: Any = given.model.blocks[-1].feed_forward.router  # type: ignore[union-attr]
    router.weight.data[1] = router.weight.data[0]
    router.bias[:] = torch.tensor([1.0, 1.0 - distance, 3.0, *[0.0] * (len(router.bias) - 3)])


def prefers(expert: int) -> Callable[[Any], None]:
    return lambda experts: experts.router.bias[expert].add_(1e-3)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("seed", range(2))
def test_the_engine_computes_models_with_experts(weights: str, seed: int) -> None:
    """In bf16 the first of these draws sends a token through another expert than float64 does."""
    made = case("decode", EXPERTS, weights, CPU, context=20, batch=2)
    given = Setting(random_model(made, CPU, seed), made, 64)
    assert truth_of(given).faults(EngineSide(given)) == ""


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_another_expert_is_explained_where_a_rounding_could_choose_it(weights: str) -> None:
    made = case("decode", EXPERTS, weights, CPU, context=20, batch=2)
    given = setting(made)
    nearly_tied(given, 0.0)
    truth, flipped = truth_of(given), changed_engine(prefers(1))
    assert truth.faults(EngineSide(given)) == ""
    assert truth.faults(flipped(given)) == "", "both suit equally well"
    logits = flipped(given).logits(truth.prompts[0])
    plain = truth.both(truth.prompts[:1], len(truth.prompts[0]), None)
    verdict = Expected("logits", lambda y: y, plain.plain[0], plain.truth[0]).verdict(logits)
    assert not verdict.ok, "against what float64 itself chooses it would be refused"
    nearly_tied(given, 0.1)
    chosen = changed_engine(lambda experts: experts.router.bias[1].add_(0.2))(given)
    assert re.match(r"experts: in layer 1 of .* better by 0\.1 in float64, ", truth_of(given).faults(chosen))


BROKEN_EXPERTS: dict[str, Callable[[Any], None]] = {
    "a row of an expert": lambda experts: experts.experts.down.weight.data[2, 0].mul_(-3),
    "two experts exchanged": lambda experts: experts.experts.down.weight.data.copy_(
        experts.experts.down.weight.data[[0, 1, 3, 2, 4, 5]]
    ),
    "the scale of a router": lambda experts: setattr(
        experts.router, "spec", replace(experts.router.spec, scale=1.3 * experts.router.spec.scale)
    ),
    "the bias weighs": lambda experts: setattr(
        experts.router, "weights", lambda s, chosen: (s + experts.router.bias).gather(-1, chosen)
    ),
    "the shared ones": lambda experts: setattr(experts, "shared", None),
}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BROKEN_EXPERTS)
def test_broken_experts_are_refused(name: str, weights: str) -> None:
    given = setting(case("decode", EXPERTS, weights, CPU, context=20, batch=2))
    nearly_tied(given, 0.0)
    assert truth_of(given).faults(changed_engine(BROKEN_EXPERTS[name])(given)).startswith(("logits", "experts"))


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_experts_that_are_chosen_wrongly_in_steps_only_are_refused(weights: str) -> None:
    class Wanders(EngineSide):
        def step(self) -> None:
            if self.requests[-1].state == "writing":
                self.model.blocks[-1].feed_forward.router.bias[3] = 9.0  # type: ignore[union-attr, index]
            super().step()

    given = setting(case("decode", EXPERTS, weights, CPU, context=20, batch=2))
    nearly_tied(given, 0.0)
    wrong = truth_of(given).faults(Wanders(replace(given, model=deepcopy(given.model))))
    assert wrong.startswith("experts: in layer 1 of those")


def test_steps_that_are_replayed_are_held_to_those_that_were_seen() -> None:
    class Stale(EngineSide):
        def tokens(self) -> list[list[int]]:
            found = super().tokens()
            return found if self.engine.routes else [[row[0]] * len(row) for row in found]

    given = setting(case("decode", EXPERTS, "fp32", CPU, context=20, batch=2))
    assert truth_of(given).faults(Stale(given)).startswith("tokens: recorded steps choose others")


def test_a_side_whose_experts_cannot_be_seen_is_told_so() -> None:
    given = setting(case("decode", EXPERTS, "fp32", CPU, context=20, batch=2))
    assert truth_of(given).faults(Stock(given)) == ""
    worn = deepcopy(given.model)
    worn.final_norm.weight.data.mul_(1.01)  # type: ignore[operator, union-attr]
    assert truth_of(given).faults(Stock(replace(given, model=worn))).endswith("cannot be seen of this side)")


def test_a_refusal_says_where_chosen_keys_are_not_seen() -> None:
    given = setting(case("decode", str(GOLDENS / "hf_glm_moe_dsa-base"), "fp32", CPU, context=20, batch=2))
    assert truth_of(given).faults(EngineSide(given)) == ""
    broken = changed_engine(lambda experts: setattr(experts, "shared", None))
    assert truth_of(given).faults(broken(given)).endswith("other keys to attend to, which is not seen)")


def test_a_side_that_is_right_only_at_first_is_refused(toy: str) -> None:
    class Tired(Stock):
        """Its weights wear out."""

        def step(self) -> None:
            super().step()
            self.total = getattr(self, "total", 0) + 1
            if self.total == 12:  # while it is timed
                worn = self.module.model.blocks[1].mixer.out  # type: ignore[union-attr, index]
                worn.weight = torch.nn.Parameter(1.5 * worn.weight, requires_grad=False)

    row = decode.measure(small("decode", toy), PLACE, {OURS: EngineSide, "tired": Tired})
    assert row["sides"]["tired"]["refused"].startswith("after it was timed, logits")
    assert "seconds" not in row["sides"]["tired"]
    assert row["sides"][OURS]["seconds"] > 0


def test_a_red_check_is_printed_without_a_speed(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("glm.bench.sides.makers", lambda: {OURS: Stuck, GPT_FAST: Stock})
    assert main(["bench", "decode", toy, "--layers", "2", "--context", "20", "--rounds", "1", "--device", "cpu"]) == 1
    ours, theirs = re.findall(rf"^({OURS}|{GPT_FAST})  +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert ours[1].startswith("refused: tokens: one chosen is")
    assert theirs[1].endswith("tokens/s")


def test_a_side_that_fails_is_a_reason(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(given: Setting) -> Side:
        raise RuntimeError("no such luck\nand a second line")

    class Late(EngineSide):
        """Fails when it is timed."""

        def start(self, prompts: Sequence[Sequence[int]]) -> None:
            if len(prompts[0]) == 30:
                raise ValueError("too long for me")
            super().start(prompts)

    row = decode.measure(small("decode", toy, context=30), PLACE, {OURS: EngineSide, "broken": broken, "late": Late})
    assert row["sides"]["broken"] == {"failed": "RuntimeError: no such luck"}
    assert row["sides"]["late"] == {"failed": "ValueError: too long for me"}
    assert row["sides"][OURS]["seconds"] > 0

    def absent(name: str) -> Any:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr("glm.bench.huggingface.import_module", absent)
    row = decode.measure(small("decode", toy), PLACE, {EAGER: Eager})
    assert row["sides"][EAGER] == {"missing": "transformers cannot be imported: No module named 'transformers'"}


def test_what_transformers_does_not_have_is_a_reason() -> None:
    row = decode.measure(small("decode", str(GOLDENS / "chatglm1-base")), PLACE, {EAGER: Eager})
    assert row["sides"][EAGER]["missing"].startswith("transformers has no model of this shape")


def test_tinygemm_multiplies_with_the_same_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        stored = GroupedLinear(Grouped(4, 32, True), 128, 64, bias=True).to(dtype)
        stored.weight_packed.random_(-(2**31), 2**31)
        stored.weight_scale.uniform_(0.01, 0.02)
        stored.bias.data.normal_()
        x = torch.randn(3, 5, 128, dtype=dtype)
        truth = x.double() @ stored.dense(dtype).double().T + stored.bias.double()
        error, plain = ((y.double() - truth).abs().max() for y in (TinyLinear(stored)(x), stored(x)))
        assert error <= 2 * plain + truth.abs().max() * torch.finfo(dtype).eps


def test_weights_are_in_memory_once(toy: str) -> None:
    given = setting(small("decode", toy))
    theirs, stock = Eager(given), Stock(given)
    q = theirs.model.model.layers[0].self_attn.q_proj.weight
    assert q.data_ptr() == given.model.blocks[0].mixer.qkv.weight.data_ptr()
    shared = stock.module.model.get_parameter("blocks.1.feed_forward.up.weight")
    assert shared.data_ptr() == given.model.get_parameter("blocks.1.feed_forward.up.weight").data_ptr()


# ----------------------------------------------------------------------------- serving


def test_requests_are_served_as_they_come(toy: str) -> None:
    """By a clock that only the engine's steps move: a tenth of a second each."""
    made = replace(small("serve", toy, batch=1), rate=1.0, count=3)
    engine = Engine(random_model(made, CPU), max_batch=1, max_length=64)
    clock = [0.0]
    steps = engine.step

    def step() -> None:
        clock[0] += 0.1
        steps()

    engine.step = step  # type: ignore[method-assign]
    due = (0.0, 0.05, 10.0)
    everybody = [serve.Guest(when, prompts(made.spec, 1, 5, 0)[0], 4) for when in due]
    queue = serve.served(engine, everybody, lambda: clock[0], lambda pause: clock.__setitem__(0, clock[0] + pause))
    assert [len(guest.came) for guest in everybody] == [4, 4, 4]
    first, second, third = everybody
    assert first.came[0] == pytest.approx(0.1)
    assert second.came[0] >= first.came[-1], "one slot: the second waits for the first"
    assert third.came[0] == pytest.approx(10.1), "and nobody works before the third has come"
    assert max(queue) == 1
    found = serve.figures(everybody, queue)
    assert found["tokens/s"] == pytest.approx(12 / third.came[-1])
    assert found["first"][1] == pytest.approx(second.came[0] - 0.05)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_nothing_is_recorded_or_known_when_the_first_request_comes(
    batch: int, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of rows has had its step, so that no request waits for that, and no prompt was read before."""
    before: list[set[Any]] = []
    engines: list[Engine] = []
    served = serve.served

    def watched(engine: Engine, *rest: Any) -> list[int]:
        before.append({rows for rows, _ in engine.recordings})
        engines.append(engine)
        assert not any(engine.seats.texts)
        return served(engine, *rest)

    monkeypatch.setattr(serve, "served", watched)
    made = replace(small("serve", toy, batch=batch), rate=1000.0, count=6)
    found = serve.measure(made, Place(CPU, rounds=1, steps=1))
    assert found["sides"][OURS]["requests"] == 6
    assert before == [{rows for rows in (1, 2, batch) if rows <= batch}]
    assert {rows for rows, _ in engines[0].recordings} == before[0]


def test_arrivals_are_drawn_from_a_seed(toy: str) -> None:
    made = replace(small("serve", toy, context=100), rate=5.0, count=2000)
    everybody = serve.guests(made)
    assert [guest.prompt for guest in serve.guests(made)] == [guest.prompt for guest in everybody]
    assert everybody[-1].due / 2000 == pytest.approx(1 / 5, rel=0.1)
    lengths = {len(guest.prompt) for guest in everybody}
    assert (min(lengths), max(lengths)) == (25, 100)
    assert {guest.tokens for guest in everybody} == set(range(16, 26))


def test_percentiles() -> None:
    assert [serve.percentile(range(1, 101), of) for of in (50, 95)] == [50, 95]
    assert serve.percentile([3.0], 95) == 3.0
    assert serve.percentile([], 50) == 0.0


# ----------------------------------------------------------------------------- files and runs


def quick(made: RuntimeCase, place: Place) -> dict[str, Any]:
    """In the place of a measurement."""
    return {"bytes": 1e9, "tokens": made.batch, "sides": {OURS: {"seconds": 1e-3, "low": 1e-3, "high": 1e-3}}}


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm.bench.run.MEASURES", {"decode": quick})
    monkeypatch.setattr("glm.bench.run.cpu_roofs", lambda device: type("", (), {})())
    monkeypatch.setattr("glm.bench.run.asdict", lambda _: {"read": 2e12, "multiply": 5e14, "details": {}})


@pytest.mark.usefixtures("without_work")
def test_resume_leaves_out_what_was_measured_at_this_commit(toy: str, tmp_path: Path) -> None:
    cases = [small("decode", toy, batch=batch) for batch in (1, 2, 4)]
    assert command.measure(cases[:2], PLACE, tmp_path, commit="abc", resume=True) == 0
    assert command.measure(cases, PLACE, tmp_path, commit="abc", resume=True) == 0
    [results] = read_all(tmp_path)
    assert [(row["fields"]["batch"], row["run"]) for row in results.rows] == [(1, 1), (2, 1), (4, 2)]
    assert command.measure(cases, PLACE, tmp_path, commit="abc", resume=True) == 0
    assert len(read_all(tmp_path)[0].runs) == 2, "nothing was left to do"
    assert command.measure(cases[:1], PLACE, tmp_path, commit="def", resume=True) == 0
    [results] = read_all(tmp_path)
    assert sorted((row["fields"]["batch"], row["run"]) for row in results.rows) == [(1, 3), (2, 1), (4, 2)]


@pytest.mark.usefixtures("without_work")
def test_minutes_and_interruptions_keep_what_was_measured(toy: str, tmp_path: Path, monkeypatch: Any) -> None:
    from glm_kernels.bench.run import Budget

    cases = [small("decode", toy, batch=batch) for batch in (1, 2, 4)]
    ticks = iter(range(0, 1000, 50))
    results = of_device(tmp_path, {"device": "A Device", "kind": "cpu"})
    ending = run(cases, PLACE, results, tmp_path, commit="abc", budget=Budget(3, now=lambda: float(next(ticks))))
    assert (ending.measured, ending.left, ending.why) == (1, 2, "the minutes are spent")

    def interrupted(made: RuntimeCase, place: Place) -> dict[str, Any]:
        if made.batch == 4:
            raise KeyboardInterrupt
        return quick(made, place)

    monkeypatch.setattr("glm.bench.run.MEASURES", {"decode": interrupted})
    ending = run(cases, PLACE, results, tmp_path, commit="abc")
    assert (ending.measured, ending.left, ending.why) == (2, 1, "interrupted")
    assert len(read(tmp_path / "runtime_a-device.json").rows) == 2


@pytest.mark.usefixtures("without_work")
def test_a_case_that_cannot_be_measured_is_skipped_with_its_reason(toy: str, monkeypatch: Any) -> None:
    def too_large(made: RuntimeCase, place: Place) -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("glm.bench.run.MEASURES", {"decode": too_large})
    row = measured(small("decode", toy), PLACE)
    assert row["skipped"] == "OutOfMemoryError: CUDA out of memory"
    assert report.decode_cells(row, RuntimeResults({}, [], []))[0] == f"skipped: {row['skipped']}"


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = RuntimeResults({"device": "A Device", "kind": "cuda"}, [], [])
    path = results.save(tmp_path)
    before = path.read_text()
    assert json.loads(before)["format"] == "glm.bench 1"
    results.begin({"roofs": {}})

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        results.save(tmp_path)
    assert path.read_text() == before
    path.write_text('{"format": "another 9"}')
    with pytest.raises(ValueError, match="move it away"):
        read(path)


def test_the_files_of_kernels_and_of_the_engine_lie_side_by_side(tmp_path: Path) -> None:
    from glm_kernels.bench import results as kernels

    kernels.Results({"device": "A Device"}, [], []).save(tmp_path)
    RuntimeResults({"device": "A Device"}, [], []).save(tmp_path)
    assert [found.name for found in kernels.read_all(tmp_path)] == ["a-device"]
    assert [found.name for found in read_all(tmp_path)] == ["runtime_a-device"]


def test_cpu_roofs_are_numbers() -> None:
    found = cpu_roofs(CPU)
    assert 1e8 < found.read < 1e13
    assert found.multiply > 1e8


# ----------------------------------------------------------------------------- goals, tables, pictures


def on_a_gpu(*rows: dict[str, Any]) -> RuntimeResults:
    roofs = {"read": 4e12, "multiply": 7e14, "details": {}}
    one = {"id": 1, "date": "2026-01-01", "commit": "abc", "versions": {"torch": "2"}, "roofs": roofs}
    return RuntimeResults({"device": "NVIDIA X", "kind": "cuda"}, [one], [row | {"run": 1} for row in rows])


def figures(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "low": seconds, "high": seconds}


def row_of(what: str, model: str, weights: str, sides: dict[str, Any], **more: Any) -> dict[str, Any]:
    sizes = {key: more.pop(key) for key in ("batch", "context", "layers") if key in more}
    made = case(what, model, weights, torch.device("cuda"), **sizes)
    counted = {"bytes": 1.76e10, "tokens": made.batch, "moved": 1.76e10}
    base = {"subject": what, "label": made.label, "axis": ["context", made.context], "fields": made.fields}
    return base | counted | {"sides": sides} | more


def decoding(weights: str = "bf16", ours: float = 5e-3, **more: Any) -> dict[str, Any]:
    table = [{"name": f"kernel {i}", "count": 40.0, "seconds": ours / 10} for i in range(8)]
    kernels = {"what": "kernels", "per step": 200.0, "seconds": 0.8 * ours, "table": table}
    sides = {OURS: figures(ours), GPT_FAST: figures(5.5e-3), EAGER: figures(2.4e-2), STATIC: {"failed": "no luck"}}
    return row_of("decode", "glm-4-9b", weights, sides, kernels=kernels, **more)


def test_goals_are_held_to_the_rows_they_cover() -> None:
    rows = [decoding(), decoding("int4", 1.6e-3, bytes=4.5e9), decoding(batch=32, tokens=32)]
    results = on_a_gpu(*rows)
    value = {goal.name: goal.value(row, results) for row in results.rows for goal in goals_of(row, results)}
    assert value["decode bf16, batch 1: of the read stream"] == pytest.approx(1.76e10 / 4e12 / 5e-3)
    assert value["decode bf16, batch 1: against gpt-fast style"] == pytest.approx(1.1)
    assert value["decode int4, batch 1: against our own bf16"] == pytest.approx(5 / 1.6)
    assert value["decode, batch 32: against every other side"] == pytest.approx(1.1)
    assert len([goal for goal in GOALS if goal.name in value]) == 7
    lines = {cells[0]: cells[1:] for cells in report.goal_rows(results)}
    assert lines["decode bf16, batch 1: of the read stream"][2:] == ["0.88 R", "1 at first"]
    assert lines["decode bf16, batch 1: against gpt-fast style"][2:] == ["1.10×", "1 **miss**"]
    assert lines["memory: ChatGLM2-6B int4, 8192 tokens"][2:] == ["not yet", "–"]
    [missed, *_] = report.misses(results, [{"case": "decode glm-4-9b bf16 ×1 *", "text": "The head."}])
    assert "1.10× against gpt-fast style, ≥ 1.15× wanted. The head." in missed
    [missed, *_] = report.misses(results, [])
    assert missed.endswith("Not yet explained.")


def test_a_smaller_model_or_a_cpu_reaches_no_goal() -> None:
    results = on_a_gpu(decoding(layers=2))
    assert goals_of(results.rows[0], results) == []
    whole = on_a_gpu(decoding())
    assert len(goals_of(whole.rows[0], whole)) == 3
    whole.device["kind"] = "cpu"
    assert goals_of(whole.rows[0], whole) == []


def test_memory_and_start_have_their_goals() -> None:
    big = {"peak": 4.3e9, "weights": 4e9, "cache": 1e8, "logits": 1e6, "over needed": 1.05}
    parts = dict.fromkeys(("python", "import", "load", "compose", "first"), 0.8)
    results = on_a_gpu(
        row_of("memory", "chatglm2-6b", "int4", {OURS: big}, context=8192),
        row_of("start", "chatglm3-6b", "int4", {OURS: figures(4.0) | {"parts": parts, "cold": parts}}, context=32),
    )
    memory, start = results.rows
    states = [goal.verdict(goal.value(memory, results) or 0) for goal in goals_of(memory, results)]
    assert states == ["miss", "miss"]
    [goal] = goals_of(start, results)
    assert goal.verdict(goal.value(start, results) or 0) == "accepted"
    assert report.start_cells(start, results) == ["4.00 s", *["0.80"] * 5, "4.00 s"]


def test_tables_show_figures_reasons_and_refusals(tmp_path: Path) -> None:
    assert "Not yet measured" in report.markdown(tmp_path, tmp_path)
    assert all(goal.name in report.goals_markdown(tmp_path) for goal in GOALS)
    refused = decoding(context=2048)
    refused["sides"][OURS] = {"refused": "logits: error 9× (rms)"}
    on_a_gpu(decoding(), decoding(batch=32), refused).save(tmp_path)
    text = report.markdown(tmp_path, tmp_path)
    assert "### NVIDIA X" in text
    assert (
        "| glm-4-9b bf16 ×1 context=1024 | 200.0 ± 0.0 % | 5.00 ms | 88 % R | 1.000 × 17.60 GB | 200 kernels |" in text
    )
    assert "1.10× gpt-fast style, 4.80× transformers, transformers static failed" in text
    assert "**no figure, its check failed**: logits: error 9× (rms)" in text
    assert "- transformers static: failed: no luck (3)" in text
    assert "`kernel 0`" in text
    assert "| 0.88 R | 1 at first, 1 without a figure |" in report.goals_markdown(tmp_path)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    results = on_a_gpu(decoding(context=256), decoding(), decoding("int4", 2e-3))
    found = plots.draw(results, tmp_path)
    assert [path.name for path in found] == [f"runtime_nvidia-x-decode-{what}.png" for what in ("context", "layer")]
    assert all(path.stat().st_size > 5000 for path in found)
    assert len(list(tmp_path.iterdir())) == 2, "and nothing unfinished is left"
    stacked = dict(plots.stack(results.rows[1]))
    assert sum(stacked.values()) == pytest.approx(5e-3)
    assert stacked["between kernels"] == pytest.approx(1e-3)
    assert plots.roof(results.rows[1], results) == pytest.approx(4e12 / 1.76e10)
    assert plots.draw(on_a_gpu(), tmp_path) == []


def test_all_measures_the_set_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[list[RuntimeCase], Place]] = []
    monkeypatch.setattr("glm.cli.placed", lambda device: torch.device("cuda"))
    monkeypatch.setattr(command, "measure", lambda cases, place, out, **_: asked.append((cases, place)) or 0)
    assert main(["bench", "all", "--out", str(tmp_path)]) == 0
    assert main(["bench", "all", "--quick", "--out", str(tmp_path)]) == 0
    (everything, place), (few, quicker) = asked
    assert everything == all_cases(torch.device("cuda"))
    assert few == [each for each in everything if each.importance == 0]
    assert 0 < len(few) < len(everything)
    assert quicker.rounds < place.rounds


def test_the_set_is_the_issues() -> None:
    cases = all_cases(torch.device("cuda"))
    assert len(set(cases)) == len(cases)
    assert [each.importance for each in cases] == sorted(each.importance for each in cases)
    first = {(c.what, c.model, c.weights, c.batch) for c in cases if c.importance == 0}
    for model in ("chatglm-6b", "chatglm3-6b", "glm-4-9b"):
        for weights in ("bf16", "int4"):
            assert {("decode", model, weights, 1), ("decode", model, weights, 32)} <= first
    assert ("decode", "glm-4-32b-0414", "int4", 32) in first
    assert ("decode", "glm-4-32b-0414", "bf16", 1) not in {(c.what, c.model, c.weights, c.batch) for c in cases}
    assert any((c.model, c.weights, c.context) == ("chatglm2-6b", "int4", 8192) for c in cases if c.what == "memory")
    assert all(c.context <= c.spec.context for c in cases)
    assert {c.what for c in cases} == {"decode", "prefill", "memory", "start", "serve"}
