"""How ChatGLM2-6B and CodeGeeX2 read and write text: rounds counted from 1, `[gMASK] sop` in front.

Source: tokenizer.model and the tokenizer code of the releases, which numbers five special tokens on from the end
of the file and never recognises one in a text.
"""

from glm.chat import Conversation, Message, Part, TextFormat, Token, rounds


def prompt(conversation: Conversation) -> list[Part]:
    """All rounds numbered from 1, the last one open."""
    history, question = rounds(conversation, "ChatGLM2-6B")
    past = "".join(f"[Round {n}]\n\n问：{asked}\n\n答：{said}\n\n" for n, (asked, said) in enumerate(history, 1))
    return [Token("[gMASK]"), Token("sop"), f"{past}[Round {len(history) + 1}]\n\n问：{question}\n\n答："]


def answer(text: str) -> list[Message]:
    """Without white space around it, the training date filled in."""
    return [{"role": "assistant", "content": text.strip().replace("[[训练时间]]", "2023年")}]


ADDED = {"[MASK]": 64789, "[gMASK]": 64790, "[sMASK]": 64791, "sop": 64792, "eop": 64793}

CHATGLM2 = TextFormat(
    name="ChatGLM2-6B",
    added=ADDED,
    before=("[gMASK]", "sop"),
    after=(),
    closing=("</s>",),
    parsed=(),
    parses=False,
    strips=False,
    unseen=("<unk>", "<s>", "</s>", *ADDED),
    spellings={},
    pad="<unk>",
    stop=("</s>",),
    fills=None,
    templates=False,
    prompt=prompt,
    answer=answer,
)
