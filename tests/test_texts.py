"""Texts to calibrate with: windows of running text, conversations, random ids."""

import json
from pathlib import Path

import pytest

from glm.errors import GLMError, PromptError
from glm.family import release
from glm.layout import Blank
from glm.texts import conversations, random_texts, read_texts
from glm.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "weights" / "tiny-glm"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TINY)


def test_windows_hold_the_whole_text_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "Attention is a lookup that never quite decides. 从文本中挖去若干片段。\n" * 9
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    start = tokenizer.encode("", special=True)
    texts = read_texts(tmp_path / "a.txt", tokenizer, 50, 1000)
    assert all(window.ids[: len(start)] == start and window.start == len(start) for window in texts)
    assert {len(window.ids) for window in texts[:-1]} == {50}
    together = [id for window in texts for id in window.ids[window.start :]]
    whole = tokenizer.encode(text, parse=False)
    assert together == whole[: len(together)]
    assert len(whole) - len(together) <= 1
    assert len(read_texts(tmp_path / "a.txt", tokenizer, 50, 2)) == 2


def test_of_a_conversation_the_answer_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(conversations([("Hello", "Hi!"), ("什么是掩码？", "看不见的。")]) + "\n", encoding="utf-8")
    for text, (question, answer) in zip(
        read_texts(file, tokenizer, 100, 9), [("Hello", "Hi!"), ("什么是掩码？", "看不见的。")], strict=True
    ):
        assert text.ids[: text.start] == tokenizer.chat([{"role": "user", "content": question}])
        assert tokenizer.decode(text.ids[text.start :], special=False) == answer
        assert text.ids[-1] in tokenizer.stop
    assert len(read_texts(file, tokenizer, 100, 1)) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "a JSON object is wanted"),
        (json.dumps({"text": "a"}), "messages should be a list"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "should be the assistant's"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}), "should be the assist"),
    ],
)
def test_lines_that_are_no_conversations(tmp_path: Path, tokenizer: Tokenizer, line: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(GLMError, match=f"line 1: .*{says}"):
        read_texts(tmp_path / "a.jsonl", tokenizer, 100, 9)


def test_files_that_hold_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, says in (("empty.txt", "no text"), ("empty.jsonl", "no text"), ("bytes.txt", "UTF-8"), ("no", "UTF-8")):
        with pytest.raises(GLMError, match=says):
            read_texts(tmp_path / name, tokenizer, 100, 9)
    with pytest.raises(GLMError, match="no room"):
        read_texts(tmp_path / "empty.txt", tokenizer, 2, 9)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    with pytest.raises(PromptError):
        read_texts(tmp_path / "a.jsonl", tokenizer, 100, 9)


@pytest.mark.parametrize("name", ["chatglm-6b", "glm-4-9b"])
def test_random_ids_are_of_the_vocabulary_and_from_the_seed(name: str) -> None:
    spec = release(name).spec
    texts = random_texts(spec, 30, 4, seed=3)
    assert texts == random_texts(spec, 30, 4, seed=3) != random_texts(spec, 30, 4, seed=4)
    assert all(len(text.ids) == 30 and max(text.ids) < spec.vocabulary for text in texts)
    if isinstance(spec.reading, Blank):
        assert all(text.ids.count(spec.reading.sop) == 1 for text in texts)
