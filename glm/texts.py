"""Text to calibrate with or to measure on: a file, as rows of ids that a model reads.

*.jsonl   a conversation a line, {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]};
          what counts is the last answer
others    running text, cut into windows that each begin as the release begins a text
"""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from glm.checkpoint import Checkpoint
from glm.errors import GLMError, PromptError
from glm.fields import parse_object
from glm.layout import Blank
from glm.pretrained import described
from glm.spec import Spec
from glm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """Ids, of which those from `start` on are to be predicted."""

    ids: list[int]
    start: int


def read_texts(path: str | PathLike[str], tokenizer: Tokenizer, length: int, most: int) -> list[Text]:
    """At most `most` texts of at most `length` tokens from a file.

    Raises GLMError for a file that cannot be read or holds nothing, PromptError for a line that is no conversation.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GLMError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if Path(path).suffix == ".jsonl":
        lines = (line for line in content.splitlines() if line.strip())
        texts = [conversation(line, f"{path}: line {i}", tokenizer) for i, line in enumerate(lines, 1) if i <= most]
        texts = [Text(text.ids[:length], text.start) for text in texts if text.start < min(length, len(text.ids))]
    else:
        texts = windows(content, tokenizer, length)[:most]
    if not texts:
        raise GLMError(f"{path}: holds no text that {length} tokens have room for")
    return texts


def conversation(line: str, where: str, tokenizer: Tokenizer) -> Text:
    """A prompt, and the answer as the model would write it, with the token that ends it."""
    messages = parse_object(line.encode(), where).get("messages")
    if not (isinstance(messages, list) and messages and isinstance(messages[-1], dict)):
        raise PromptError(f"{where}: messages should be a list that ends in an answer")
    *before, answer = messages
    if answer.get("role") != "assistant" or not isinstance(answer.get("content"), str):
        raise PromptError(f"{where}: the last of the messages should be the assistant's")
    prompt = tokenizer.chat(before)
    said = tokenizer.encode(answer["content"], parse=False, start=False)
    return Text([*prompt, *said, *tokenizer.stop[:1]], len(prompt))


def windows(content: str, tokenizer: Tokenizer, length: int) -> list[Text]:
    """Running text in windows of `length` tokens; the last may be shorter."""
    start = tokenizer.encode("", special=True)
    ids, room = tokenizer.encode(content, parse=False), length - len(start)
    if room < 2:
        raise GLMError(f"windows of {length} tokens have no room for text")
    cut = [ids[i : i + room] for i in range(0, len(ids), room)]
    return [Text(start + window, max(1, len(start))) for window in cut if len(window) > 1]


def given_or_random(
    folder: Path, text: Path | None, calibration: Path | None, length: int, most: int
) -> tuple[list[Text], list[Text]]:
    """The texts to measure on and those to calibrate with (possibly none); of random ids where no text is given.

    Those are for checkpoints of random weights, to which no text means more than another. Raises GLMError.
    """
    _, spec = described(Checkpoint.open(folder), folder.name)
    length = min(length, spec.context)
    if text is None:
        return random_texts(spec, length, most, seed=0), random_texts(spec, length, most, seed=1)
    tokenizer = Tokenizer.from_pretrained(folder)
    read = read_texts(text, tokenizer, length, most)
    return read, [] if calibration is None else read_texts(calibration, tokenizer, length, most)


def random_texts(spec: Spec, length: int, count: int, seed: int) -> list[Text]:
    """Ids drawn evenly, after those with which the model takes a text to begin."""
    generator = torch.Generator().manual_seed(seed)
    start = [*spec.reading.masks[:1], spec.reading.sop] if isinstance(spec.reading, Blank) else []
    ids = torch.randint(0, spec.vocabulary, (count, length - len(start)), generator=generator)
    if isinstance(spec.reading, Blank):  # a second <sop> or mask would change who sees whom
        for id in (*spec.reading.masks, spec.reading.sop):
            ids[ids == id] = 0
    return [Text([*start, *row], len(start) + 1) for row in ids.tolist()]


def conversations(pairs: list[tuple[str, str]]) -> str:
    """Questions and answers as the lines of a .jsonl file."""
    return "".join(
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
        for q, a in pairs
    )
