"""From messages to a prompt: what a conversation is, and the two ways a release turns one into tokens.

A prompt is a list of parts. A `Token` is one special token, named by a release's prompt format or by the template
in its checkpoint; a plain string is text and nothing but text. What users type only ever becomes strings, and the
tokenizer looks for no special tokens in them, so that nobody can type the end of their own turn.

The prompt formats themselves, one `TextFormat` a generation, stand in `glm/family/text_*.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glm.errors import PromptError
from glm.sandbox import Sandbox

Message = Mapping[str, Any]
"""`role` and `content`; also, where a release knows them, `metadata` (the tool addressed), `tools`, `tool_calls`."""

Tool = Mapping[str, Any]
"""A function's JSON description, bare or as `{"type": "function", "function": …}`."""

ROLES = frozenset({"system", "user", "assistant", "observation", "tool"})


@dataclass(frozen=True)
class Token:
    """One special token, by name."""

    name: str


Part = Token | str


@dataclass(frozen=True)
class Conversation:
    """What is asked of a prompt format.

    `reply` ends the prompt where the assistant is to speak; `thinking` is None where the caller left it to the model.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool]
    reply: bool = True
    thinking: bool | None = None


@dataclass(frozen=True)
class TextFormat:
    """How the releases of one generation dress text. Names are those of special tokens; no field has a default."""

    name: str
    added: Mapping[str, int]  # tokens behind the end of the vocabulary file, ids by name
    before: tuple[str, ...]  # what the release's own tokenizer puts before a text,
    after: tuple[str, ...]  # behind it,
    closing: tuple[str, ...]  # and behind the second text of a pair
    parsed: tuple[str, ...] | None  # tokens its tokenizer can recognise in a text; None: all special tokens
    parses: bool  # whether it does so unasked
    strips: bool  # whether it drops white space beside a token recognised in a text
    unseen: tuple[str, ...]  # tokens that decoding leaves out
    spellings: Mapping[str, str]  # white space, and the piece that the vocabulary has for it
    pad: str
    stop: tuple[str, ...]  # tokens that end an answer
    fills: tuple[str, ...] | None  # tokens behind a text whose [MASK] is to be filled; None: not trained to
    templates: bool  # whether the chat template in a checkpoint, if any, is how the release prompts
    prompt: Callable[[Conversation], list[Part]]
    answer: Callable[[str], list[Message]]  # what the model wrote, as the messages it stands for


def conversation(
    messages: Iterable[Message],
    tools: Iterable[Tool] | None = None,
    *,
    reply: bool = True,
    thinking: bool | None = None,
) -> Conversation:
    """`messages` and `tools`, checked; PromptError says which of them is wrong and how."""
    if isinstance(messages, str | Mapping):
        raise PromptError('messages must be a list such as [{"role": "user", "content": "…"}]')
    turns = list(messages)
    if not turns:
        raise PromptError("there is no message to answer")
    for number, message in enumerate(turns, 1):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {number} is a {type(message).__name__}, not a mapping with role and content")
        if message.get("role") not in ROLES:
            raise PromptError(f"message {number}: role {message.get('role')!r} is none of {', '.join(sorted(ROLES))}")
        if not isinstance(message.get("content"), str | list) and not _speechless(message):
            raise PromptError(f"message {number}: content must be a string")
    functions = list(tools or [])
    for number, tool in enumerate(functions, 1):
        if not isinstance(tool, Mapping):
            raise PromptError(f"tool {number} is a {type(tool).__name__}, not the mapping that describes a function")
    return Conversation(turns, functions, reply, thinking)


def content(message: Message) -> str:
    """The text of a message; PromptError where it has anything else, such as an image."""
    value = message.get("content")
    if _speechless(message):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    raise PromptError(f"the {message['role']} message has no text as its content; this release reads only text")


def _speechless(message: Message) -> bool:
    """A message that only offers or calls tools needs no content."""
    return message.get("content") is None and bool(message.get("tools") or message.get("tool_calls"))


def with_tools(conversation: Conversation, preamble: str = "") -> list[Message]:
    """The messages, with the conversation's tools in the first system message, or in one that says `preamble`."""
    messages = list(conversation.messages)
    if not conversation.tools:
        return messages
    at = next((n for n, message in enumerate(messages) if message["role"] == "system"), None)
    if at is None:
        return [{"role": "system", "content": preamble, "tools": list(conversation.tools)}, *messages]
    messages[at] = {**messages[at], "tools": list(conversation.tools)}
    return messages


def rounds(turns: Conversation, release: str) -> tuple[list[tuple[str, str]], str]:
    """Answered questions, and the one to answer: for releases that know rounds and no roles."""
    expected = ["user", "assistant"] * (len(turns.messages) // 2) + ["user"]
    if [message["role"] for message in turns.messages] != expected:
        raise PromptError(f"{release} knows only user and assistant messages, in turn, the last one the user's")
    if turns.tools or not turns.reply:
        raise PromptError(f"{release} has no prompt with tools or without a place for the answer")
    texts = [content(message) for message in turns.messages]
    return list(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1]


def split(text: str, names: Iterable[str]) -> list[Part]:
    """`text` cut at every special token named, the longest first where several fit."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text) if pattern else [text]
    return [Token(piece) if number % 2 else piece for number, piece in enumerate(pieces) if piece]


def shown(parts: Iterable[Part]) -> str:
    """A prompt as one string, as a template would have rendered it."""
    return "".join(part.name if isinstance(part, Token) else part for part in parts)


_sandbox = Sandbox()


def rendered(
    template: str, turns: Conversation, names: Iterable[str], special: Iterable[str], **variables: object
) -> list[Part]:
    """The prompt that a checkpoint's own chat template makes of a conversation.

    `names` are the tokens to cut the result at; of those, `special` must not come out of a message. So before
    rendering, each text in it that begins like one of them gets a mark behind its first character (`<|user|>` goes
    in as `<◆|user|>`, ◆ a private-use character that occurs nowhere in the conversation), which is taken out again
    after cutting. The template can still look into, split and strip the texts as its author meant it to.
    PromptError: what the template itself objects to, or that it is faulty or exceeds its time, memory or length.
    """
    data: dict[str, Any] = {"messages": list(turns.messages), "tools": list(turns.tools) or None}
    taken = frozenset(template).union(*_texts(data))
    mark = next((sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in taken), None)
    if mark is None:
        raise PromptError("the messages use up all 6400 private-use characters, and one is needed to guard them")
    starts = {re.escape(name[0]) + (f"(?={re.escape(name[1])})" if name[1:] else "") for name in special}
    guard = re.compile("|".join(sorted(starts)) or r"(?!)")
    data = _marked(data, guard, mark) | variables | {"add_generation_prompt": turns.reply}
    if turns.thinking is not None:
        data["enable_thinking"] = turns.thinking
    try:
        reply = _sandbox.ask(template, data)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"messages and tools must be plain JSON data: {error}") from None
    if "error" in reply:
        raise PromptError(f"the checkpoint's chat template failed: {reply['error']}")
    if turns.tools and "tools" in reply["unread"]:  # GLM-4-9B's looks for them in the system message
        inside = replace(turns, messages=with_tools(turns), tools=())
        return rendered(template, inside, names, special, **variables)
    parts = split(reply["text"], names)
    return [part if isinstance(part, Token) else part.replace(mark, "") for part in parts]


def _texts(data: object) -> Iterator[str]:
    """Every string in nested lists and mappings."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _texts(item)


def _marked(data: Any, guard: re.Pattern[str], mark: str) -> Any:
    """The same nested data with `mark` behind everything that `guard` finds."""
    if isinstance(data, str):
        return guard.sub(rf"\g<0>{mark}", data)
    if isinstance(data, Mapping):
        return {_marked(key, guard, mark): _marked(value, guard, mark) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_marked(item, guard, mark) for item in data]
    return data
