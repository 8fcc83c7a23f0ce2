"""How ChatGLM-6B reads and writes text: rounds counted from 0, white space spelled out, `[gMASK] <sop>` at the end.

Source: ice_text.model and the tokenizer code of the release. Its tokenizer recognises five special tokens typed in
a text and drops the white space beside them; `encode` does the same, a chat prompt never does.
"""

import re
from dataclasses import replace

from glm.chat import Conversation, Message, Part, TextFormat, Token, rounds

SPECIAL = (
    "<s>",
    "</s>",
    "<pad>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<unused_0>",
    "<sop>",
    "<eop>",
    "<ENC>",
    "<dBLOCK>",
)
LONGEST_BLANK = 80


def prompt(conversation: Conversation) -> list[Part]:
    """The bare question, or, after earlier rounds, all of them numbered from 0."""
    history, question = rounds(conversation, "ChatGLM-6B")
    text = question
    if history:
        past = "".join(f"[Round {n}]\n问：{asked}\n答：{said}\n" for n, (asked, said) in enumerate(history))
        text = f"{past}[Round {len(history)}]\n问：{question}\n答："
    return [text, Token("[gMASK]"), Token("<sop>")]


def answer(text: str) -> list[Message]:
    """Without white space around it, the training date filled in, ASCII punctuation beside Chinese made full-width.

    The vocabulary folds ，！：；？ into ASCII, so that the model cannot write them itself.
    """
    text = text.strip().replace("[[训练时间]]", "2023年")
    text = re.sub(r"(?<=[一-\u9fff])[,!:;?]|[,!:;?](?=[一-\u9fff])", lambda sign: _FULL_WIDTH[sign[0]], text)
    return [{"role": "assistant", "content": text}]


_FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))

CHATGLM = TextFormat(
    name="ChatGLM-6B",
    added={},
    before=(),
    after=("[gMASK]", "<sop>"),
    closing=("<eop>",),
    parsed=("[MASK]", "<sop>", "<eop>", "<unk>", "<pad>"),
    parses=True,
    strips=True,
    unseen=SPECIAL,
    spellings={"\n": "<n>", "\t": "<|tab|>"} | {" " * n: f"<|blank_{n}|>" for n in range(2, LONGEST_BLANK + 1)},
    pad="<pad>",
    stop=("<eop>",),
    fills=("<sop>",),
    templates=False,
    prompt=prompt,
    answer=answer,
)

# A byte-level vocabulary (tiny-glm's) under the same prompts: it spells white space as it is.
CHATGLM_BYTES = replace(CHATGLM, parsed=("[MASK]", "<sop>", "<eop>", "<pad>"), spellings={})
