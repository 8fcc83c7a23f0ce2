"""From messages to a prompt: what a conversation is, and the two ways a release turns one into tokens.

A prompt is a list of parts. A `Token` is one special token, named by a release's prompt format or by the template
in its checkpoint; a plain string is text and nothing but text. What users type only ever becomes strings, and the
tokenizer looks for no special tokens in them, so that nobody can type the end of their own turn.

The prompt formats themselves, one `TextFormat` a generation, stand in `glm/family/text_*.py`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from glm.errors import PromptError
from glm.reply import Marks
from glm.sandbox import Sandbox

Message = Mapping[str, Any]
"""`role` and `content`; also, where a release knows them, `metadata` (the tool addressed), `tools`, `tool_calls`."""

Tool = Mapping[str, Any]
"""A function's JSON description, bare or as `{"type": "function", "function": …}`."""

ROLES = ("system", "user", "assistant", "observation", "tool")


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

    messages: list[Message]
    tools: list[Tool]
    reply: bool = True
    thinking: bool | None = None


@dataclass(frozen=True)
class TextFormat:
    """How the releases of one generation dress text. Names are those of special tokens; no field
    has a default but the last, which only releases that think have."""

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
    marks: Callable[[list[Tool]], Marks] | None = None  # where it marks thoughts and calls of these tools
    # What only models need to say that were trained on blanks of several kinds:
    blanks: tuple[str, ...] = ("[MASK]",)  # kinds of blanks a text can have; of several kinds, also several blanks
    swallows: tuple[str, ...] = ()  # tokens that, recognised in a text, drop the white space on their left
    apart: tuple[str, ...] = ()  # tokens that decoding sets apart by spaces
    open_ended: bool = False  # whether a text that ends in a blank is not closed before the blank is filled
    continues: tuple[str, ...] | None = None  # tokens behind a text to be written on; None: those of `after`


def conversation(
    messages: Iterable[Message],
    tools: Iterable[Tool] | None = None,
    *,
    reply: bool = True,
    thinking: bool | None = None,
) -> Conversation:
    """`messages` and `tools`, checked and copied; PromptError says which of them is wrong and how."""
    if isinstance(messages, str | Mapping):
        raise PromptError('messages must be a list such as [{"role": "user", "content": "…"}]')
    try:
        turns, functions = json.loads(json.dumps([list(messages), list(tools or [])]))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"messages and tools must be plain JSON data: {error}") from None
    if not turns:
        raise PromptError("there is no message to answer")
    for number, message in enumerate(turns, 1):
        if not isinstance(message, dict):
            raise PromptError(f"message {number} is a {type(message).__name__}, not a mapping with role and content")
        if message.get("role") not in ROLES:
            raise PromptError(f"message {number}: role {message.get('role')!r} is none of {', '.join(ROLES)}")
        for key in ("tools", "tool_calls"):
            _check_functions(message.get(key), f"{key} of message {number}")
        if not isinstance(message.get("content"), str | list) and not _speechless(message):
            raise PromptError(f"message {number}: content must be a string")
    _check_functions(functions, "tools")
    return Conversation(turns, functions, reply, thinking)


def _check_functions(listed: object, what: str) -> None:
    if not isinstance(listed, list | None):
        raise PromptError(f"{what}: not a list")
    for function in listed or ():
        if not isinstance(function, dict) or not isinstance(function.get("function", {}), dict):
            raise PromptError(f"{what}: each must be the mapping that describes a function, or have it as 'function'")


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
    messages, tools = conversation.messages, conversation.tools
    if not tools:
        return messages
    at = next((n for n, message in enumerate(messages) if message["role"] == "system"), None)
    if at is None:
        return [{"role": "system", "content": preamble, "tools": tools}, *messages]
    return [*messages[:at], {**messages[at], "tools": tools}, *messages[at + 1 :]]


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

    `names` are the tokens to cut the result at; of those, `special` must not come out of a message. Tools are handed
    over as templates expect them: on their own, or (GLM-4-9B) inside the system message. PromptError: what the
    template itself objects to, tools it has no place for, or that it is faulty or exceeds time, memory or length.
    """

    def parts(turns: Conversation) -> list[Part]:
        return _rendered(template, turns, names, special, variables)

    def shows_tools(prompt: list[Part], without: Conversation) -> bool:
        try:
            return prompt != parts(without)
        except PromptError:  # it cannot do without them
            return True

    prompt = parts(turns)
    if not turns.tools or shows_tools(prompt, replace(turns, tools=[])):
        return prompt
    inside = replace(turns, messages=with_tools(turns), tools=[])
    bare: list[Message] = [{key: m[key] for key in m if key != "tools"} for m in inside.messages]
    prompt = parts(inside)
    if shows_tools(prompt, replace(inside, messages=bare)):
        return prompt
    raise PromptError("the checkpoint's chat template has no place for tools")


def _rendered(
    template: str, turns: Conversation, names: Iterable[str], special: Iterable[str], variables: Mapping[str, object]
) -> list[Part]:
    """One rendering, in which nothing of `special` comes out of a message.

    Each text in the conversation that begins like a special token gets a mark behind its first character (`<|user|>`
    goes in as `<◆|user|>`, ◆ a private-use character that occurs nowhere), which is taken out again after cutting.
    The template can still look into, split and strip the texts as its author meant it to.
    """
    data: dict[str, Any] = {"messages": turns.messages, "tools": turns.tools or None}
    taken = frozenset(template + json.dumps(data, ensure_ascii=False))
    mark = next((sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in taken), None)
    if mark is None:
        raise PromptError("the messages use up all 6400 private-use characters, and one is needed to guard them")
    starts = {re.escape(name[0]) + (f"(?={re.escape(name[1])})" if name[1:] else "") for name in special}
    guard = re.compile("|".join(sorted(starts)) or r"(?!)")
    try:
        data = _marked(data, guard, mark) | variables | {"add_generation_prompt": turns.reply}
    except RecursionError:
        raise PromptError("messages or tools are nested too deeply") from None
    if turns.thinking is not None:
        data["enable_thinking"] = turns.thinking
    reply = _sandbox.ask(template, data)
    if "error" in reply:
        raise PromptError(f"the checkpoint's chat template failed: {reply['error']}")
    parts = split(reply["text"], names)
    return [part if isinstance(part, Token) else part.replace(mark, "") for part in parts]


def _marked(data: Any, guard: re.Pattern[str], mark: str) -> Any:
    """The same JSON data with `mark` behind everything that `guard` finds in its texts."""
    if isinstance(data, str):
        return guard.sub(rf"\g<0>{mark}", data)
    if isinstance(data, dict):
        return {_marked(key, guard, mark): _marked(value, guard, mark) for key, value in data.items()}
    if isinstance(data, list):
        return [_marked(item, guard, mark) for item in data]
    return data
