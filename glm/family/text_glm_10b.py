"""How the GLMs of 2021 read and write text: `[CLS]` in front, three kinds of blanks in it, `<|endoftext|>` behind.

Three vocabularies: GPT-2's bytes (2B, 10B), BERT's words in lower case (base, large) and a Chinese SentencePiece
model. Their tokenizers recognise special tokens typed in a text, and a mask swallows the white space on its left.
Nothing was trained on conversations.
"""

from glm.chat import Conversation, Message, Part, TextFormat
from glm.errors import PromptError

MASKS = ("[MASK]", "[sMASK]", "[gMASK]")

GPT2 = {
    "<|endoftext|>": 50256,
    "<|startofpiece|>": 50257,
    "<|endofpiece|>": 50258,
    "[CLS]": 50259,
    "[MASK]": 50260,
    "[SEP]": 50261,
    "[UNK]": 50262,
    "[gMASK]": 50263,
    "[sMASK]": 50264,
}
BERT = {
    "[PAD]": 0,
    "[UNK]": 100,
    "[CLS]": 101,
    "[SEP]": 102,
    "[MASK]": 103,
    "<|startofpiece|>": 30522,
    "<|endofpiece|>": 30523,
    "[gMASK]": 30524,
    "[sMASK]": 30525,
}
CHINESE = {
    "<|endoftext|>": 50000,
    "[SEP]": 50001,
    "[CLS]": 50002,
    "[MASK]": 50003,
    "[UNK]": 50004,
    "<|startofpiece|>": 50006,
    "<|endofpiece|>": 50007,
    "[sMASK]": 50008,
    "[gMASK]": 50009,
}


def prompt(conversation: Conversation) -> list[Part]:
    """No prompt at all: PromptError."""
    raise PromptError("this release was not trained to converse; it fills blanks (glm infill) and writes on")


def answer(text: str) -> list[Message]:
    """What was written, as it is."""
    return [{"role": "assistant", "content": text}]


def format(name: str, added: dict[str, int], end: str, *, apart: tuple[str, ...] = ()) -> TextFormat:
    """The format of one vocabulary; `end` is the token that closes a text and fills up a batch."""
    return TextFormat(
        name=name,
        added=added,
        before=("[CLS]",),
        after=(end,),
        closing=("<|endofpiece|>",),
        parsed=tuple(added),
        parses=True,
        strips=False,
        unseen=(),
        spellings={},
        pad=end,
        stop=("<|endofpiece|>",),
        fills=(end, "<|startofpiece|>"),
        templates=False,
        prompt=prompt,
        answer=answer,
        blanks=MASKS,
        swallows=MASKS,
        apart=apart,
        continues=("[gMASK]", end, "<|startofpiece|>"),
    )


# Decoding sets tokens apart that were added to the vocabulary; <|endoftext|> was in it from the start.
GLM_GPT2 = format("GLM-10B", GPT2, "<|endoftext|>", apart=tuple(name for name in GPT2 if name != "<|endoftext|>"))
GLM_BERT = format("GLM-large", BERT, "[PAD]")
GLM_CHINESE = format("GLM-10B-Chinese", CHINESE, "<|endoftext|>")
