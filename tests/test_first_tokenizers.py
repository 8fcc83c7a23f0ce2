"""The vocabularies of the first GLMs: the ids of the official tokenizers, and what special tokens do to a text."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from golden_folders import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.errors import PromptError, TokenizerError
from glm.family.text_glm_10b import BERT, CHINESE, GPT2
from glm.tokenizer import Tokenizer

VOCABULARIES = Path(os.environ.get("GLM_TOKENIZERS", PROJECT.parent / "shared" / "tokenizers"))
steady = settings(derandomize=True, deadline=None, max_examples=60)
loaded: dict[str, Tokenizer] = {}


def official(name: str) -> Tokenizer:
    if not (VOCABULARIES / name).is_dir():
        pytest.skip(f"no vocabulary of {name}: put it under {VOCABULARIES} or set GLM_TOKENIZERS")
    if name not in loaded:
        loaded[name] = Tokenizer.from_pretrained(VOCABULARIES / name)
    return loaded[name]


def rows(name: str, kind: str) -> list[dict[str, Any]]:
    lines = (VOCABULARIES / name / "visible.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] == kind]
    assert found
    return found


# -- GPT-2's bytes -----------------------------------------------------------------------------------------------------


def test_glm_10b_is_the_official_tokenizer() -> None:
    tok = official("glm-10b")
    for row in rows("glm-10b", "encode"):
        assert tok.encode(row["text"]) == row["ids"], row["text"]
        assert tok.encode(row["text"], special=True) == row["ids_with_special"], row["text"]
        assert tok.decode(row["ids"]) == row["decoded"], row["text"]
    meta = json.loads((VOCABULARIES / "glm-10b" / "meta.json").read_text())
    assert meta["special_ids"] == GPT2
    assert all(tok.piece(id) == name for name, id in GPT2.items())
    assert (len(tok), tok.pad, tok.stop) == (50265, 50256, (50258,))


def test_what_special_tokens_do_to_a_text() -> None:
    tok = official("glm-10b")
    plain = tok.encode
    assert plain("at  [MASK] (b") == [*plain("at"), 50260, *plain(" (b")]  # a mask swallows what is left of it
    assert plain("a [SEP] b") == [*plain("a "), 50261, *plain(" b")]
    assert 50260 not in plain("a [MASK] b", parse=False)
    assert tok.decode(plain("a[MASK][gMASK]b<|endoftext|>c")) == "a [MASK] [gMASK] b<|endoftext|>c"
    assert tok.decode(plain("a[MASK]b"), special=False) == "ab"
    stream = tok.stream()
    assert [stream.put(id) for id in (*plain("好")[:1], 50260, *plain("b"))] == ["", "\ufffd [MASK]", " b"]


def test_prompts_of_glm_10b() -> None:
    tok = official("glm-10b")
    assert tok.infill("a [MASK] b [gMASK]") == [50259, 64, 50260, 275, 50263, 50256, 50257]
    assert tok.continuation("a [MASK]") == [50259, *tok.encode("a [MASK]", parse=False), 50263, 50256, 50257]
    for call in (lambda: tok.chat([{"role": "user", "content": "hi"}]), lambda: tok.prompt([])):
        with pytest.raises(PromptError):
            call()


@steady
@given(st.text())
def test_bytes_come_back(text: str) -> None:
    tok = official("glm-10b")
    ids = tok.encode(text, parse=False)
    assert tok.decode(ids) == text
    assert max(ids, default=0) < 50256


@pytest.mark.parametrize(
    ("file", "text"), [("merges.txt", None), ("merges.txt", "a b c\n"), ("vocab.json", "{}"), ("vocab.json", "[")]
)
def test_a_damaged_vocabulary_of_pairs(tmp_path: Path, file: str, text: str | None) -> None:
    official("glm-10b")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((VOCABULARIES / "glm-10b" / name).read_bytes())
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        Tokenizer.from_pretrained(tmp_path)


# -- the Chinese SentencePiece model -----------------------------------------------------------------------------------


def test_chinese_pieces() -> None:
    tok = official("glm-chinese-sp")
    for row in rows("glm-chinese-sp", "sp_encode"):
        assert tok.encode(row["text"], parse=False) == row["ids"], row["text"]
        assert tok.decode(row["ids"]) == row["decoded"], row["text"]
        for id, piece in zip(row["ids"], row["pieces"], strict=True):
            assert tok.piece(id) == (piece if id else "<unk>")
    assert (len(tok), tok.pad, tok.stop) == (50010, 50000, (50007,))
    assert tok.encode("a", special=True) == [50002, *tok.encode("a"), 50000]
    assert tok.infill("清华[gMASK]")[-3:] == [50009, 50000, 50006]
    assert tok.encode("<s>") == tok.encode("<s>", parse=False)  # a piece of the file, but no token of the code
    assert all(tok.id(name) == id for name, id in CHINESE.items())


# -- BERT's words ------------------------------------------------------------------------------------------------------

WORDS = ["the", "university", "is", "in", "bei", "##jing", "##s", "a", "##b", "cafe", ".", ",", "!", "清", "华", "un"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of BERT's size and special ids, with few words."""
    lines = [f"[unused{n}]" for n in range(30522)]
    for name, id in BERT.items():
        if id < len(lines):
            lines[id] = name
    lines[1000 : 1000 + len(WORDS)] = WORDS
    folder = tmp_path_factory.mktemp("glm-large")
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_words_are_those_of_transformers(bert: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(str(bert), do_lower_case=True)
    ours = Tokenizer.from_pretrained(bert)
    for text in ("The University is in Beijing.", "Café, unBEIJINGS!  ab 清华x", "", "xyz a", "a\tb\n.", "...", "İ"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, parse=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=True), text


def test_prompts_in_words(bert: Path) -> None:
    tok = Tokenizer.from_pretrained(bert)
    plain = tok.encode
    assert plain("the [MASK] is", special=True) == [101, *plain("the"), 103, *plain("is"), 0]
    assert tok.infill("the [MASK].") == [101, *plain("the"), 103, *plain("."), 0, 30522]
    assert tok.decode(plain("The [gMASK] beijing"), special=False) == "the beijing"
    assert (len(tok), tok.pad, tok.stop) == (30526, 0, (30523,))


def test_a_vocabulary_of_words_that_ends_elsewhere(tmp_path: Path, bert: Path) -> None:
    lines = (bert / "vocab.txt").read_text().splitlines()
    for changed in (lines[:-1], [*lines, "more"], [lines[1], lines[0], *lines[2:]]):
        (tmp_path / "vocab.txt").write_text("\n".join(changed))
        with pytest.raises(TokenizerError, match="download"):
            Tokenizer.from_pretrained(tmp_path)
