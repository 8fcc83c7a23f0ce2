"""How GLM-4-0414 and GLM-Z1 read and write text, for folders that come without their chat template.

Source: the template published with GLM-Z1-9B-0414. Tools and system messages come first, thoughts of earlier turns
are dropped, contents are stripped; Z1 is made to begin its answer by thinking.
"""

import json
from dataclasses import replace

from glm.chat import Conversation, Part, Token, content
from glm.family.text_chatglm3 import role_token
from glm.family.text_glm4 import CALLING, GLM4_HF

PREAMBLE = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)


def prompt(conversation: Conversation, thinks: bool = False) -> list[Part]:
    """Tools, system messages, the turns, and where the assistant goes on."""
    parts: list[Part] = [Token("[gMASK]"), Token("<sop>")]
    if conversation.tools:
        functions = [tool.get("function") or tool for tool in conversation.tools]
        written = ((f.get("name", ""), json.dumps(f, indent=4, ensure_ascii=False)) for f in functions)
        listed = "".join(f"\n## {name}\n\n{text}\n{CALLING}" for name, text in written)
        parts += [Token("<|system|>"), f"\n{PREAMBLE}{listed}"]
    for message in conversation.messages:
        if message["role"] == "system":
            parts += [Token("<|system|>"), f"\n{content(message)}"]
    for message in conversation.messages:
        if message["role"] != "system":
            metadata = (message.get("metadata") or "") if message["role"] == "assistant" else ""
            visible = content(message).split("</think>")[-1].strip()
            parts += [role_token(message), f"{metadata}\n{visible}"]
    if conversation.reply:
        think = thinks if conversation.thinking is None else conversation.thinking
        parts += [Token("<|assistant|>"), *(["\n<think>"] if think else [])]
    return parts


GLM4_0414 = replace(GLM4_HF, name="GLM-4-0414", prompt=prompt)
GLM_Z1 = replace(GLM4_HF, name="GLM-Z1", prompt=lambda conversation: prompt(conversation, thinks=True))
