"""Answers read while they are written: what comes out does not depend on how the text was cut."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.family.text_glm4_moe import GLM4_MOE, called, marks
from glm.reply import Called, Reader, Said

steady = settings(derandomize=True, deadline=None, max_examples=150)
TOOLS = [
    {"function": {"name": "find", "parameters": {"properties": {"code": {"type": "string"}, "n": {"type": "integer"}}}}}
]
WHOLE = (
    "\n<think>The user asks\n\nfor <b>two</b>.</think>\n I shall look.\n"
    "<tool_call>find\n<arg_key>code</arg_key>\n<arg_value>007</arg_value>\n"
    "<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
    "<tool_call>now</tool_call>\nDone. \n"
)


def read(pieces: list[str], thinking: bool = False) -> tuple[list[Any], dict[str, Any]]:
    """The parts, neighbours joined whatever the cut, and the message."""
    reader, parts = Reader(marks(TOOLS), thinking), []
    for part in [part for piece in pieces for part in reader.put(piece)] + reader.end():
        if parts and isinstance(part, Said) and isinstance(parts[-1], Said) and part.kind == parts[-1].kind:
            parts[-1] = Said(part.kind, parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts, reader.message


def test_thoughts_words_and_calls_are_told_apart() -> None:
    parts, message = read([WHOLE])
    assert parts == [
        Said("reasoning", "The user asks\n\nfor <b>two</b>."),
        Said("content", "I shall look."),
        Called("find", {"code": "007", "n": 2}),
        Called("now", {}),
        Said("content", "\n\n\nDone."),
    ]
    assert message == {
        "role": "assistant",
        "content": "I shall look.\n\n\nDone.",
        "reasoning_content": "The user asks\n\nfor <b>two</b>.",
        "tool_calls": [
            {"type": "function", "function": {"name": "find", "arguments": {"code": "007", "n": 2}}},
            {"type": "function", "function": {"name": "now", "arguments": {}}},
        ],
    }


def test_every_part_comes_as_soon_as_it_is_certain() -> None:
    reader = Reader(marks([]))
    assert reader.put("\n<thi") == []
    assert reader.put("nk>so ") == [Said("reasoning", "so")]
    assert reader.put("be it </") == [Said("reasoning", " be it")]
    assert reader.put("b></think>\nA <") == [Said("reasoning", " </b>"), Said("content", "A")]
    assert reader.put("1 <tool_call>f") == [Said("content", " <1")]
    assert reader.put("\n</tool_call>") == [Called("f", {})]
    assert reader.end() == []


MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
BITS = ["<", "</", "think>", "<tool_", "call>", "find", "code", "1", " ", "\n", "é", "word", "{", '"a"']
texts = st.lists(st.sampled_from([*MARKS, *BITS]), max_size=25).map("".join)


@steady
@given(texts | st.just(WHOLE), st.booleans(), st.data())
def test_the_cut_does_not_matter(text: str, thinking: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, thinking) == read([text], thinking) == read(list(text), thinking)


@steady
@given(st.dictionaries(st.text("abc_", min_size=1), st.text("xyz 1\n<{") | st.integers() | st.booleans() | st.none()))
def test_what_a_prompt_says_of_a_call_is_read_back(arguments: dict[str, Any]) -> None:
    text = called({"function": {"name": "f", "arguments": arguments}})
    kinds = {name: {"type": "string"} for name, value in arguments.items() if isinstance(value, str)}
    reader = Reader(marks([{"name": "f", "parameters": {"properties": kinds}}]))
    reader.put(text)
    assert reader.calls == [Called("f", arguments)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("so</think>yes", {"content": "yes", "reasoning_content": "so"}),
        ("<think></think>\nyes", {"content": "yes"}),
        ("yes <tool_call>f", {"content": "yes <tool_call>f"}),
        ("<tool_call></tool_call>", {"content": "<tool_call></tool_call>"}),
        ("<think>open", {"content": "", "reasoning_content": "open"}),
    ],
)
def test_whole_answers(text: str, message: dict[str, Any]) -> None:
    assert GLM4_MOE.answer(text) == [{"role": "assistant"} | message]
    json.dumps(GLM4_MOE.answer(text))
