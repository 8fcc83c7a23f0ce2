"""How ChatGLM3-6B reads and writes text: role messages, with tools.

Source: tokenizer.model (the file of ChatGLM2) and the tokenizer code of the release. Later uploads carry a chat
template as well, but it knows neither metadata nor tools; the release's own chat code, followed here, does.
"""

import json
import re

from glm.chat import Conversation, Message, Part, TextFormat, Token, content, with_tools
from glm.errors import PromptError
from glm.family import text_chatglm2

ROLE_TOKENS = {"<|system|>": 64794, "<|user|>": 64795, "<|assistant|>": 64796, "<|observation|>": 64797}
WITH_TOOLS = "Answer the following questions as best as you can. You have access to the following tools:"


def prompt(conversation: Conversation) -> list[Part]:
    """Each message is its role's token, `metadata\\n` and its content, the last two encoded apart from each other."""
    parts: list[Part] = [Token("[gMASK]"), Token("sop")]
    for message in with_tools(conversation, WITH_TOOLS):
        text = content(message)
        if message["role"] == "system" and message.get("tools"):
            text += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        parts += [role_token(message), f"{message.get('metadata') or ''}\n", text]
    return parts + ([Token("<|assistant|>")] if conversation.reply else [])


def role_token(message: Message) -> Token:
    """The token that opens a message; PromptError for a role that the release does not know."""
    token = f"<|{message['role']}|>"
    if token not in ROLE_TOKENS:
        raise PromptError(f"this release knows no {message['role']!r} role; it calls the result of a tool observation")
    return Token(token)


def answer(text: str) -> list[Message]:
    """One message between two `<|assistant|>`: a first line that names a tool is metadata, the rest its call."""
    return [_message(part) for part in text.split("<|assistant|>")]


def _message(text: str) -> Message:
    first, newline, rest = text.partition("\n")
    if newline and re.fullmatch(r"[\w.\-]+", first.strip()):
        return {"role": "assistant", "metadata": first.strip(), "content": rest}
    spoken = rest if newline and not first.strip() else text
    return {"role": "assistant", "metadata": "", "content": spoken.strip().replace("[[训练时间]]", "2023年")}


CHATGLM3 = TextFormat(
    name="ChatGLM3-6B",
    added=text_chatglm2.ADDED | ROLE_TOKENS,
    before=("[gMASK]", "sop"),
    after=(),
    closing=("</s>",),
    parsed=tuple(ROLE_TOKENS),
    parses=False,
    strips=False,
    unseen=("<unk>", "<s>", "</s>"),
    spellings={},
    pad="<unk>",
    stop=("</s>", "<|user|>", "<|observation|>"),
    fills=None,
    templates=False,
    prompt=prompt,
    answer=answer,
)
