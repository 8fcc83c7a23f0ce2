"""How GLM-4.5, 4.6 and 4.7 read and write text, for folders that come without their chat template.

Source: the template published with GLM-4.6. `<think>` and `</think>` are tokens of the vocabulary; thoughts are
kept only in the assistant's messages behind the user's last one.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

from glm.chat import Conversation, Message, Part, Token, Tool, content
from glm.errors import PromptError
from glm.family.text_glm4 import GLM4_HF
from glm.reply import Called, Marks, Reader, kinds_of, pairs, value_of

TOOLS_BEFORE = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_BEHIND = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
)


def prompt(conversation: Conversation) -> list[Part]:
    """Tools, the messages in order, and where the assistant goes on; results of tools in a row share one role token."""
    messages = conversation.messages
    quiet = conversation.thinking is False
    last_question = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    parts: list[Part] = [Token("[gMASK]"), Token("<sop>")]
    if conversation.tools:
        listed = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in conversation.tools)
        parts += [Token("<|system|>"), TOOLS_BEFORE + listed + TOOLS_BEHIND]
    for n, message in enumerate(messages):
        match message["role"]:
            case "system":
                parts += [Token("<|system|>"), f"\n{content(message)}"]
            case "user":
                text = content(message)
                parts += [
                    Token("<|user|>"),
                    f"\n{text}{'/nothink' if quiet and not text.endswith('/nothink') else ''}",
                ]
            case "assistant":
                parts += [Token("<|assistant|>"), *said(message, thoughts=n > last_question)]
            case "tool":
                if n == 0 or messages[n - 1]["role"] != "tool":
                    parts.append(Token("<|observation|>"))
                parts.append(f"\n<tool_response>\n{content(message)}\n</tool_response>")
            case other:
                raise PromptError(f"this release knows no {other!r} role; it calls the result of a tool tool")
    if conversation.reply:
        parts += [Token("<|assistant|>"), *(thought("") if quiet else ())]
    return parts


def thought(text: str) -> list[Part]:
    """A thought, often empty, between its tokens."""
    return ["\n", Token("<think>"), text, Token("</think>")]


def said(message: Message, thoughts: bool) -> list[Part]:
    """An earlier answer: its thoughts if they are still wanted, what it said, the tools it called."""
    text, reasoning = content(message), message.get("reasoning_content")
    if not isinstance(reasoning, str):
        reasoning = ""
        if "</think>" in text:
            reasoning = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            text = text.split("</think>")[-1].lstrip("\n")
    tail = f"\n{text.strip()}" if text.strip() else ""
    return [
        *thought(reasoning.strip() if thoughts else ""),
        tail + "".join(called(call) for call in message.get("tool_calls") or ()),
    ]


def called(call: Mapping[str, Mapping[str, object]]) -> str:
    """One tool call, argument by argument; those that are not strings as JSON."""
    function: Mapping[str, object] = call.get("function") or call
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, Mapping):
        raise PromptError("the arguments of a tool call must be a mapping, not their JSON text")
    values = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
    pairs = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items())
    return f"\n<tool_call>{function.get('name')}\n{pairs}</tool_call>"


def marks(tools: list[Tool]) -> Marks:
    """Where an answer thinks and calls; arguments are texts where the tool says so, else JSON where they are that."""
    kinds = kinds_of(tools)

    def call(text: str) -> Called | None:
        name = text.partition("<arg_key>")[0].strip()
        found = pairs(text, "arg_key", "arg_value")
        return Called(name, {k: value_of(v, kinds.get((name, k))) for k, v in found}) if name else None

    return Marks(thought=("<think>", "</think>"), call=("<tool_call>", "</tool_call>"), called=call)


def answer(text: str) -> list[Message]:
    """What the model wrote, read at once. A thought without its first mark began in the prompt."""
    before, ended, _ = text.partition("</think>")
    reader = Reader(marks([]), thinking=bool(ended) and "<think>" not in before)
    reader.put(text)
    reader.end()
    return [reader.message]


GLM4_MOE = replace(GLM4_HF, name="GLM-4.5", prompt=prompt, answer=answer, marks=marks)
