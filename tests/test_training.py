"""The loop: the same run however often it was interrupted, files in the official layout, a text learnt by heart."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from glm.errors import CheckpointError, ConfigError, GLMError
from glm.generation import generate
from glm.infilling import fill
from glm.model import GLM
from glm.recipe import Recipe
from glm.tokenizer import Tokenizer
from glm.training import LOUD, SPECIAL, Run, initialised, learnt_vocabulary, processor, rate, train

GLOSSARY = """
Q: What is GLM?
A: A language model.

问：什么是掩码？
答：文中的一个空白。

Q: Who are you?
A: I am small.
"""
PASSAGE = "# Title\n\nThe sun rises over the hill, and a small boat leaves the harbour.\n"
TABLES = {
    "tokenizer": {"vocabulary": 400},
    "model": {"layers": 2, "width": 64, "inner": 128, "heads": 2, "context": 128},
    "training": {
        "steps": 6,
        "tokens": 256,
        "learning_rate": 4e-3,
        "warm_up": 2,
        "beta1": 0.9,
        "beta2": 0.98,
        "weight_decay": 0.01,
        "clip": 1.0,
        "checkpoint_every": 100,
        "threads": 1,
        "exam": 10,
    },
}
OBJECTIVES = (("chat", "glossary.md"), ("cuts", "passage.md"), ("short", "passage.md"), ("continue", "passage.md"))


@pytest.fixture(scope="module", autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def recipe(folder: Path, seed: int = 5, **training: Any) -> Path:
    """A toy recipe and its texts."""
    folder.mkdir(exist_ok=True)
    (folder / "glossary.md").write_text(GLOSSARY, encoding="utf-8")
    (folder / "passage.md").write_text(PASSAGE, encoding="utf-8")
    tables = TABLES | {"training": TABLES["training"] | training}
    lines = ['name = "toy"', 'out = "done"', f"seed = {seed}"]
    for name, fields in tables.items():
        lines += [f"[{name}]", *(f"{field} = {json.dumps(value)}" for field, value in fields.items())]
    for kind, text in OBJECTIVES:
        lines += ["[[objective]]", f'kind = "{kind}"', f'text = "{text}"', "share = 1"]
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    straight = train(path, out=tmp_path / "straight", quiet=True)
    for step in (3, 5):
        halted = train(path, out=tmp_path / "halted", pause=step, quiet=True)
        assert [folder.name for folder in (halted / "unfinished").iterdir()] == [f"step-{step:08d}"]
        assert not (halted / "config.json").exists()
    train(path, out=halted, quiet=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (straight / name).read_bytes() == (halted / name).read_bytes(), name
    assert not (halted / "unfinished").exists()
    figures = [json.loads((folder / "training.json").read_text()) for folder in (straight, halted)]
    for figure in figures:
        assert figure.pop("minutes") < 5
    assert figures[0] == figures[1]


def test_the_weights_between_are_the_same_to_the_bit(tmp_path: Path) -> None:
    plan = Recipe.read(recipe(tmp_path))
    torch.set_num_threads(1)
    straight, first = Run(plan, tmp_path / "a"), Run(plan, tmp_path / "b")
    for _ in range(3):
        straight.advance()
        first.advance()
    first.save()
    second = Run(plan, tmp_path / "b")
    second.resume()
    assert (second.step, second.losses, second.seen) == (3, first.losses, first.seen)
    for _ in range(3):
        straight.advance()
        second.advance()
    assert straight.losses == second.losses
    assert all(torch.equal(x, second.parameters[name]) for name, x in straight.parameters.items())


def test_without_resuming_a_run_begins_anew(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    train(path, pause=4, quiet=True)
    train(path, resume=False, pause=2, quiet=True)
    assert [folder.name for folder in (tmp_path / "done" / "unfinished").iterdir()] == ["step-00000002"]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(recipe(tmp_path), pause=2, quiet=True)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(recipe(tmp_path, seed=6), quiet=True)
    (tmp_path / "passage.md").write_text("Another text.")
    with pytest.raises(CheckpointError, match="another recipe"):
        Run(Recipe.read(tmp_path / "recipe.toml"), tmp_path / "done" / "unfinished").resume()


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    path = recipe(tmp_path)
    train(path, pause=1, quiet=True)
    file = tmp_path / "done" / "unfinished" / "step-00000001" / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="remove it"):
        train(path, quiet=True)


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    one, two = (train(recipe(tmp_path / str(seed), seed=seed, steps=1), quiet=True) for seed in (1, 2))
    name = "transformer.layers.0.mlp.dense_4h_to_h.weight"
    assert not torch.equal(tensors(one)[name], tensors(two)[name])


def test_what_is_written(tmp_path: Path) -> None:
    folder = train(recipe(tmp_path, steps=1), quiet=True)
    pytest.importorskip("matplotlib")
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json", "loss.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    ids = Tokenizer.from_pretrained(folder)
    assert (config["model_type"], config["inner_hidden_size"], config["torch_dtype"]) == ("chatglm", 128, "float16")
    named = {"bos_token_id": "<sop>", "eos_token_id": "<eop>", "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}
    assert {key: config[key] for key in named} == {key: ids.id(name) for key, name in named.items()}
    assert config["vocab_size"] == len(ids) <= 400
    assert ids.rounds == 0, "no question of this recipe follows another"
    stored = tensors(folder)
    assert {x.dtype for x in stored.values()} == {torch.float16}
    assert stored["transformer.layers.1.attention.query_key_value.weight"].shape == (192, 64)
    assert {"transformer.word_embeddings.weight", "lm_head.weight", "transformer.final_layernorm.bias"} <= stored.keys()
    figures = json.loads((folder / "training.json").read_text())
    assert [(exam["kind"], exam["asked"]) for exam in figures["exam"]] == [("chat", 3), ("cuts", 10)]
    assert figures["parameters"] == sum(x.numel() for x in stored.values())
    assert figures["device"] == processor() != ""


def test_matplotlib_may_be_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    folder = train(recipe(tmp_path, steps=1), quiet=True)
    assert not (folder / "loss.png").exists()
    assert "pip install 'glm-torch[plot]'" in capsys.readouterr().err


def test_progress_is_told_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(tmp_path, steps=100, tokens=16), pause=100)
    assert "toy: step 100 of 100, loss " in capsys.readouterr().err


def test_a_text_is_learnt_by_heart(tmp_path: Path) -> None:
    folder = train(recipe(tmp_path, steps=400, tokens=512, warm_up=20), quiet=True)
    exam = json.loads((folder / "training.json").read_text())["exam"]
    assert exam == [
        {"kind": "chat", "text": "glossary.md", "asked": 3, "right": 3},
        {"kind": "cuts", "text": "passage.md", "asked": 10, "right": 10},
    ]
    model, tokenizer = GLM.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    [ids] = generate(model, [tokenizer.chat([{"role": "user", "content": "什么是掩码？"}])], max_new_tokens=20)
    assert tokenizer.decode(ids) == "文中的一个空白。"
    whole = PASSAGE.partition("\n\n")[2].strip()
    filled = fill(model, tokenizer, "The sun [MASK] over the hill, and[MASK]leaves the harbour.")
    assert (filled.text, filled.blanks) == (whole, ["rises", "a small boat"])


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    plan = Recipe.read(recipe(tmp_path, steps=100, warm_up=10, learning_rate=0.5))
    rates = [rate(plan, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[9] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.09)))
    assert rates[50] == pytest.approx(0.25)
    assert sorted(rates[9:], reverse=True) == rates[9:]
    assert 0 < rates[-1] < 2e-4


def test_adamw_decays_matrices_and_nothing_else(tmp_path: Path) -> None:
    run = Run(Recipe.read(recipe(tmp_path)), tmp_path)
    decays = {id(x): group["weight_decay"] for group in run.optimiser.param_groups for x in group["params"]}
    assert {x.dim(): decays[id(x)] for x in run.model.parameters()} == {1: 0.0, 2: 0.01}
    assert len(decays) == len(list(run.model.parameters()))


def test_the_loss_is_that_of_what_is_written(tmp_path: Path) -> None:
    run = Run(Recipe.read(recipe(tmp_path)), tmp_path)
    samples = next(run.batches)
    nats = []
    for sample in samples:
        predicted = run.model(torch.tensor([sample.ids]), sample.layout)[0].log_softmax(-1)
        nats += [-predicted[t, target].item() for t, target in enumerate(sample.targets) if target >= 0]
    assert len(nats) == sum(len(span) + 1 for sample in samples for _, span in sample.written)
    assert run.loss(samples).item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = Run(Recipe.read(recipe(tmp_path)), tmp_path)
    with torch.no_grad():
        run.model.final_norm.weight.fill_(math.inf)  # type: ignore[union-attr, operator]
    with pytest.raises(GLMError, match="lower learning_rate"):
        run.advance()


def test_blocks_keep_the_size_of_what_they_are_given_and_speak_up(tmp_path: Path) -> None:
    run = Run(Recipe.read(recipe(tmp_path)), tmp_path)
    for block in run.model.blocks:
        for matrix, gain in (
            (block.mixer.qkv, 1),  # type: ignore[union-attr]
            (block.feed_forward.up, 1),  # type: ignore[union-attr]
            (block.mixer.out, LOUD),  # type: ignore[union-attr]
            (block.feed_forward.down, LOUD),  # type: ignore[union-attr]
        ):
            x = torch.randn(1000, matrix.in_features, generator=torch.Generator().manual_seed(0))
            assert matrix(x).std().item() == pytest.approx(gain, rel=0.1)
    again = initialised(run.spec, 5)
    assert all(torch.equal(x, again.get_parameter(name)) for name, x in run.parameters.items())


@pytest.mark.parametrize(("kind", "text"), [("chat", "passage.md"), ("cuts", "empty.md")])
def test_a_text_of_the_wrong_kind_is_refused(tmp_path: Path, kind: str, text: str) -> None:
    path = recipe(tmp_path)
    (tmp_path / "empty.md").write_text("# Only a heading\n")
    changed = path.read_text().replace('kind = "chat"\ntext = "glossary.md"', f'kind = "{kind}"\ntext = "{text}"')
    path.write_text(changed)
    with pytest.raises(ConfigError, match=text):
        train(path, quiet=True)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace("heads = 2", "heads = 3"))
    with pytest.raises(ConfigError, match="not a multiple"):
        train(path, quiet=True)


# -- the vocabulary ----------------------------------------------------------------------------------------------------

BPE = learnt_vocabulary([GLOSSARY, PASSAGE], 400)


def test_the_vocabulary_is_learnt_alike_every_time() -> None:
    assert BPE.to_str() == learnt_vocabulary([GLOSSARY, PASSAGE], 400).to_str()


def test_special_tokens_are_the_last_and_the_bytes_are_complete() -> None:
    size = BPE.get_vocab_size()
    assert [BPE.token_to_id(name) for name in SPECIAL] == list(range(size - 6, size))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert all(BPE.token_to_id(letter) is not None for letter in alphabet)


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_any_text_can_be_spelt(text: str) -> None:
    BPE.encode_special_tokens = True
    assert BPE.decode(BPE.encode(text).ids, skip_special_tokens=False) == text


def test_a_cut_between_characters_does_not_change_how_its_sides_are_spelt() -> None:
    text = "文中的一个空白。"
    whole = BPE.encode(text).ids
    assert all(BPE.encode(text[:i]).ids + BPE.encode(text[i:]).ids == whole for i in range(len(text)))


def test_white_space_beside_a_mask_is_swallowed_by_the_file_itself() -> None:
    BPE.encode_special_tokens = False
    assert BPE.encode("sun [MASK] hill").ids == BPE.encode("sun[MASK]hill").ids
