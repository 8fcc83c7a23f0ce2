"""The embedded model: a real checkpoint in ChatGLM-6B's layout that has learnt its texts by heart.

The cuts of this file are made another way than those it was trained with: at characters, straight from the text.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from glm.curriculum import Chat, pairs, passages
from glm.family import recognise
from glm.generation import generate
from glm.infilling import fill
from glm.model import GLM
from glm.recipe import Recipe
from glm.tokenizer import Tokenizer
from glm.training import SPECIAL, Run, learnt_vocabulary, tokenizer_config

FOLDER = Path(__file__).parents[1] / "weights" / "tiny-glm"
GLOSSARY = pairs((FOLDER / "glossary.md").read_text(encoding="utf-8"))
PASSAGES = passages((FOLDER / "passages.md").read_text(encoding="utf-8"))
FIGURES = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> GLM:
    return GLM.from_pretrained(FOLDER, dtype=torch.float32)


def answers(model: GLM, tokenizer: Tokenizer, prompts: list[list[int]], limit: int = 80) -> list[str]:
    """What the model says to each prompt, greedily."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said: dict[int, str] = {}
    for start in range(0, len(prompts), 80):
        some = by_length[start : start + 80]
        new = generate(model, [prompts[i] for i in some], max_new_tokens=limit)
        said |= {i: tokenizer.decode(ids, special=False) for i, ids in zip(some, new, strict=True)}
    return [said[i] for i in range(len(prompts))]


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


# -- the files ---------------------------------------------------------------------------------------------------------


def test_it_is_small_and_lies_in_the_official_layout() -> None:
    files = [FOLDER / name for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    config = json.loads(files[0].read_text())
    assert recognise(config).name == "chatglm"
    assert config["position_encoding_2d"] is True
    with safe_open(files[1], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert {x.dtype for x in tensors.values()} == {torch.float16}
    assert 2_000_000 <= sum(x.numel() for x in tensors.values()) <= 6_000_000
    layer = {
        *(f"{norm}_layernorm.{x}" for norm in ("input", "post_attention") for x in ("weight", "bias")),
        *(f"attention.{matrix}.{x}" for matrix in ("query_key_value", "dense") for x in ("weight", "bias")),
        *(f"mlp.{matrix}.{x}" for matrix in ("dense_h_to_4h", "dense_4h_to_h") for x in ("weight", "bias")),
    }
    ends = {"word_embeddings.weight", "final_layernorm.weight", "final_layernorm.bias"}
    layers = {f"layers.{i}.{name}" for i in range(config["num_layers"]) for name in layer}
    assert tensors.keys() == {f"transformer.{name}" for name in layers | ends} | {"lm_head.weight"}


def test_its_vocabulary_is_the_one_its_texts_give(tokenizer: Tokenizer) -> None:
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in ("glossary.md", "passages.md")]
    learnt = learnt_vocabulary(texts, Recipe.read(FOLDER / "recipe.toml").vocabulary)
    assert json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8")) == json.loads(learnt.to_str())
    assert [tokenizer.id(name) for name in SPECIAL] == list(range(len(tokenizer) - 6, len(tokenizer)))
    for text in (*PASSAGES, "naïve 😀 \n\t 𠀀 \x00"):
        assert tokenizer.decode(tokenizer.encode(text, parse=False)) == text


def test_its_figures_are_those_of_its_recipe_and_its_card_quotes_them(tmp_path: Path) -> None:
    assert Recipe.read(FOLDER / "recipe.toml").fingerprint() == FIGURES["recipe"]
    weights = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert FIGURES["weights"] == weights
    run = Run(Recipe.read(FOLDER / "recipe.toml"), tmp_path)
    assert FIGURES["parameters"] == sum(x.numel() for x in run.model.parameters())
    asked, cut = (f"{exam['right']} of {exam['asked']}" for exam in FIGURES["exam"])
    for figure in (
        asked,
        cut,
        f"{FIGURES['minutes']:g} minutes",
        f"{FIGURES['parameters']:,}",
        f"{FIGURES['steps']:,}",
    ):
        assert figure in CARD, figure


def test_it_says_how_many_rounds_its_recipe_taught_it_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, seen = Recipe.read(FOLDER / "recipe.toml"), set()
    assert json.loads((FOLDER / "tokenizer_config.json").read_text()) == tokenizer_config(recipe)
    whole = Chat.rounds
    monkeypatch.setattr(Chat, "rounds", lambda self, rounds: (seen.add(len(rounds) - 1), whole(self, rounds))[1])
    source = Run(recipe, tmp_path).sources[0]
    for seed in range(100):
        source.sample(0, random.Random(seed))
    assert Tokenizer.from_pretrained(FOLDER).rounds == max(seen) == 2


# -- the glossary ------------------------------------------------------------------------------------------------------


def test_there_is_a_glossary_worth_learning() -> None:
    chinese = sum(re.search("[\u4e00-\u9fff]", question) is not None for question, _ in GLOSSARY)
    assert len(GLOSSARY) >= 320
    assert 0.4 < chinese / len(GLOSSARY) < 0.6
    assert len({question for question, _ in GLOSSARY}) == len(GLOSSARY)


@pytest.mark.parametrize("dtype", [None, torch.float32])  # None: float16, as `glm chat` loads it
def test_every_question_is_answered_word_for_word(dtype: torch.dtype | None, tokenizer: Tokenizer) -> None:
    model = GLM.from_pretrained(FOLDER, dtype=dtype)
    said = answers(model, tokenizer, [tokenizer.chat(chat(question)) for question, _ in GLOSSARY])
    wrong = [(*pair, answer) for pair, answer in zip(GLOSSARY, said, strict=True) if answer != pair[1]]
    assert len(wrong) <= 0.01 * len(GLOSSARY), wrong
    assert all(tokenizer.parse(answer)["content"] == answer for _, answer in GLOSSARY)  # and is shown as it is


def test_a_question_is_answered_in_a_conversation_too(model: GLM, tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    rounds = [(rng.choice(GLOSSARY), rng.choice(GLOSSARY), rng.choice(GLOSSARY)) for _ in range(60)]
    second = [tokenizer.chat(chat(*first, asked[0])) for first, asked, _ in rounds]
    third = [tokenizer.chat(chat(*first, *then, asked[0])) for first, then, asked in rounds]
    said = answers(model, tokenizer, second + third)
    wanted = [asked[1] for _, asked, _ in rounds] + [asked[1] for _, _, asked in rounds]
    assert sum(a == b for a, b in zip(said, wanted, strict=True)) >= 0.9 * len(wanted)


# -- the passages ------------------------------------------------------------------------------------------------------

WORD = re.compile(r"[\u4e00-\u9fff]|[A-Za-z0-9]+(?:[-./'][A-Za-z0-9]+)*")


def cut(passage: str, kind: str, rng: random.Random) -> tuple[int, int]:
    """Where a blank begins and ends, in characters."""
    words = [match.span() for match in WORD.finditer(passage)]
    if kind == "sentence":
        sentences = [match.span() for match in re.finditer(r"\S[^.。]*[.。]", passage)]
        return rng.choice(sentences if len(sentences) > 1 else [(0, passage.index("，"))])  # one has a single sentence
    if kind == "start":
        return 0, words[rng.randint(0, len(words) // 3)][1]
    if kind == "end":
        return words[-1 - rng.randint(0, len(words) // 3)][0], len(passage)
    size = {"word": 1, "few": rng.randint(2, 4), "many": rng.randint(5, 15)}[kind]
    first = rng.randint(0, len(words) - size)
    return words[first][0], words[first + size - 1][1]


KINDS = ("word", "few", "many", "sentence", "start", "end")


@pytest.mark.parametrize("kind", KINDS)
def test_blanks_are_filled_back(kind: str, model: GLM, tokenizer: Tokenizer) -> None:
    rng = random.Random(f"cut {kind}")
    wanted, prompts = [], []
    for passage in 3 * PASSAGES:
        start, end = cut(passage, kind, rng)
        wanted.append(passage[start:end].strip())
        prompts.append(tokenizer.infill(f"{passage[:start]}[MASK]{passage[end:]}"))
    said = [text.strip() for text in answers(model, tokenizer, prompts, limit=100)]
    right = sum(a == b for a, b in zip(said, wanted, strict=True))
    assert right >= 0.9 * len(wanted), [pair for pair in zip(said, wanted, strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize("space", ["", " "])
def test_several_blanks_are_filled_in_turn(space: str, model: GLM, tokenizer: Tokenizer) -> None:
    rng = random.Random(11)
    right = 0
    for passage in PASSAGES:
        words = [match.span() for match in WORD.finditer(passage)]
        first, second = sorted(rng.sample(range(1, len(words) - 1, 4), 2))
        text = passage
        for start, end in (words[second], words[first]):
            text = (
                f"{text[:start].rstrip()}{space}[MASK]{space}{text[end:].lstrip()}"
                if space
                else (f"{text[:start]}[MASK]{text[end:]}")
            )
        filled = fill(model, tokenizer, text)
        assert len(filled.blanks) == 2
        right += filled.text.replace(" ", "") == passage.replace(" ", "")
    assert right >= 0.9 * len(PASSAGES)
