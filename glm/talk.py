"""A conversation with a model: remembers what was said, asks for the next answer, hands it out as it is written."""

from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from glm.chat import Message
from glm.errors import PromptError
from glm.generation import stream
from glm.info import PIECE
from glm.layout import Causal
from glm.model import GLM
from glm.reply import Reader, Said
from glm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from glm.runtime import Engine


class Talk:
    """`rounds` is how many earlier ones the model is shown, None all that fit; `sampling` what `glm.stream` takes."""

    def __init__(
        self,
        model: "GLM | Engine",
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        system: str | None = None,
        rounds: int | None = None,
        **sampling: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.rounds, self.sampling = max_new_tokens, rounds, sampling
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self.forgotten = 0  # rounds dropped since the context was full
        self.cut = False  # whether the last answer was ended by its length

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages.clear()

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, in pieces as they become certain.

        Question and answer are then part of the conversation; of an answer that is not read to its end (because
        the iterator was closed or interrupted), what there was of it. When the context is full, the oldest rounds
        are forgotten. Raises PromptError for a question that does not even fit alone.
        """
        prompt = self.prompt(question)
        ids: list[int] = []
        try:
            pieces = spelt(self.tokenizer, self.written(prompt, ids))
            marked = self.tokenizer.format.marks is not None
            yield from self.read(self.tokenizer.reader(prompt), pieces) if marked else self.told(pieces)
        finally:
            if ids:
                self.messages += [{"role": "user", "content": question}, self.tokenizer.parse(ids)]

    def prompt(self, question: str) -> list[int]:
        """The conversation up to `question` as ids, with room for an answer of a quarter of the context."""
        context = self.model.context
        room = min(self.max_new_tokens, context // 4)
        if self.rounds is not None:
            del self.messages[: max(0, len(self.messages) - 2 * self.rounds)]
        while True:
            asked = [*self.system, *self.messages, {"role": "user", "content": question}]
            ids = self.tokenizer.chat(asked)
            if len(ids) + room <= context:
                return ids
            if not self.messages:
                raise PromptError(
                    f"the question has {len(ids):,} tokens, the model takes {context - room:,}: shorten it"
                )
            del self.messages[:2]
            self.forgotten += 1

    def written(self, prompt: list[int], ids: list[int]) -> Iterator[int]:
        """The ids that follow `prompt`, one by one; they are put into `ids` as well."""
        room = min(self.max_new_tokens, self.model.context - len(prompt))
        for id in written(self.model, self.tokenizer, prompt, max_new_tokens=room, **self.sampling):
            ids.append(id)
            yield id
        self.cut = len(ids) == room

    def read(self, reader: Reader, pieces: Iterable[str]) -> Iterator[str]:
        """What is said aloud, for a release that marks its thoughts and the tools it calls."""
        for piece in pieces:
            yield from (part.text for part in reader.put(piece) if isinstance(part, Said) and part.kind == "content")
        yield from (part.text for part in reader.end() if isinstance(part, Said) and part.kind == "content")

    def told(self, pieces: Iterable[str]) -> Iterator[str]:
        """What the release's reader of answers makes of the text so far, as far as it will not change any more.

        The last character waits for the next one, on which it may depend (ChatGLM-6B's punctuation). Where the
        reader starts anew – what was said turns out to be a thought or the call of a tool – so does the paragraph.
        """
        text = told = said = ""
        for piece in pieces:
            text += piece
            said = str(self.tokenizer.parse(text)["content"])
            if said and not said.startswith(told):
                yield "\n\n"
                told = ""
            if len(said) - 1 > len(told):
                yield said[len(told) : -1]
                told = said[:-1]
        yield said[len(told) :]


def written(model: "GLM | Engine", tokenizer: Tokenizer, prompt: list[int], **options: Any) -> Iterator[int]:
    """`glm.stream` up to the tokenizer's stops; a long prompt is read in pieces where the model can, to save memory."""
    chunk = PIECE if isinstance(model, GLM) and isinstance(model.spec.reading, Causal) else None
    return stream(model, prompt, stop=tokenizer.stop, chunk=chunk, **options)


def spelt(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` without special tokens, piece by piece, never half a character."""
    text = tokenizer.stream(special=False)
    for id in ids:
        yield text.put(id)
    yield text.end()
