"""A release's tokenizer: its vocabulary together with the tokens it adds, its prompts and its stops.

Text is only text: `chat` and `infill` never look for special tokens in what a user typed. `encode` does where the
release's own tokenizer does (ChatGLM-6B: five of them; GLM-4-9B: all), because its ids are to be that tokenizer's;
`encode(text, parse=False)` does not.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from glm import chat
from glm.chat import Message, Part, TextFormat, Token, Tool
from glm.errors import PromptError, TokenizerError
from glm.reply import Reader
from glm.vocabulary import Apart, ByteLevel, Ranks, SentencePiece, Stream, Vocabulary, WordPieces, index, merged

VOCABULARIES = (  # files that hold one, in the order they are looked for
    "ice_text.model",
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "cog-pretrain.model",
)
LARGEST_FILE = 256 * 2**20  # bytes; the largest published vocabulary file has 20 million


class Tokenizer:
    """Text to ids, ids to text, messages to prompts.

    `pad` is the id that fills up a batch on its left, `stop` the ids that end an answer, `vocabulary` (and `len`)
    the number of ids; a model's embedding may have more rows. `rounds` is how many earlier rounds of a conversation the
    model was trained to read before a question, None where the checkpoint does not say.
    """

    def __init__(
        self,
        pieces: Vocabulary,
        format: TextFormat,
        templates: Mapping[str, str] | None = None,
        named: Mapping[str, str] | None = None,
        rounds: int | None = None,
    ) -> None:
        """`templates`: the checkpoint's chat templates by name; `named`: `eos_token` and the like, which they may use.

        TokenizerError: the vocabulary lacks a token that the format needs.
        """
        before, after = pieces.affixes
        self.format = replace(format, before=format.before or before, after=format.after or after)
        self._pieces = pieces
        self._templates = dict(templates or {}) if format.templates else {}
        self._named = dict(named or {})
        self._parsed = tuple(pieces.special) if format.parsed is None else format.parsed
        self._unseen = frozenset(pieces.special[name] for name in format.unseen if name in pieces.special)
        self._before, self._after, self._closing = (
            [self.id(name) for name in names] for names in (self.format.before, self.format.after, format.closing)
        )
        self.rounds = rounds
        self.pad = self.id(format.pad)
        self.stop = tuple(self.id(name) for name in format.stop)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, generation: str | None = None
    ) -> "Tokenizer":
        """The tokenizer of a local folder or a hub id.

        `generation` ("chatglm2", "glm4", …) decides where a folder does not tell, since ChatGLM2 and ChatGLM3 share
        one file; a folder of no telling name counts as ChatGLM3. TokenizerError: no vocabulary, or a damaged one.
        """
        folder = Path(source)
        if not folder.is_dir():
            if folder.exists():
                raise TokenizerError(f"{folder} is a file; give the folder that holds it")
            if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", str(source)):
                raise TokenizerError(f"{source}: no such folder, and no hub id such as org/name either")
            from glm.hub import fetch

            folder = fetch(str(source), revision=revision, weights=False)
        return _load(folder, str(source), generation)

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def vocabulary(self) -> int:
        """The number of ids."""
        return len(self._pieces)

    def id(self, token: str) -> int:
        """The id of a special token, by name; TokenizerError if there is none."""
        id = self._pieces.special.get(token, self._pieces.others.get(token))
        if id is None:
            raise TokenizerError(f"the vocabulary has no token {token}; it does not belong to {self.format.name}")
        return id

    def piece(self, id: int) -> str:
        r"""One id's piece, for showing; bytes that are no character as `\xe4`. Empty beyond the vocabulary."""
        return self._pieces.piece(index(id))

    def encode(
        self,
        text: str,
        *,
        special: bool = False,
        pair: str | None = None,
        parse: bool | None = None,
        start: bool = True,
    ) -> list[int]:
        """The ids of `text`, those of the release's own tokenizer.

        `special` adds what that one adds unless told not to ([gMASK] and <sop>, mostly); `pair` is a second text
        behind that, with the token that closes it. `parse` says whether special tokens written in a text are
        recognised; None leaves it to the release. `start=False` continues a text: without SentencePiece's space.
        TokenizerError for what is no text, such as half of a surrogate pair.
        """
        parse = self.format.parses if parse is None else parse
        names = self._parsed if parse else ()
        ids = self._ids(self._split(text, names), start)
        if special or pair is not None:
            ids = [*self._before, *ids, *self._after]
        if pair is not None:
            ids += self._ids(self._split(pair, names)) + self._closing
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of `ids`; `special=False` leaves out all special tokens, not only those the release leaves out."""
        stream = self.stream(special=special)
        return "".join(map(stream.put, ids)) + stream.end()

    def stream(self, *, special: bool = True) -> Stream:
        """Decodes one id at a time: the sum of all `put(id)` and the final `end()` is `decode` of them all."""
        apart = frozenset(map(self.id, self.format.apart))
        stream = self._pieces.stream(self._unseen if special else self._unseen.union(self._pieces.special.values()))
        return Apart(stream, apart) if apart else stream

    def chat(
        self,
        messages: Iterable[Message],
        tools: Iterable[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """The prompt that asks for the next message, as ids.

        `messages`: `[{"role": "user", "content": "…"}, …]`, as each release knows them. Nothing in them becomes a
        special token. PromptError: they form no conversation, or the checkpoint's chat template failed.
        """
        return self._ids(self._prompt(messages, tools, add_generation_prompt, enable_thinking))

    def prompt(
        self,
        messages: Iterable[Message],
        tools: Iterable[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> str:
        """What `chat` encodes, written out; only for reading, since in it a token and its name look the same."""
        return chat.shown(self._prompt(messages, tools, add_generation_prompt, enable_thinking))

    def infill(self, text: str) -> list[int]:
        """Ids that ask the model for what belongs in the one `[MASK]` of `text`.

        Where the release knows several kinds of blanks, a text may have several; they ask for the first.
        PromptError: another number of masks, or a release that was not trained to fill them.
        """
        format = self.format
        if format.fills is None:
            raise PromptError(f"{format.name} was not trained to fill in a [MASK]; ChatGLM-6B and tiny-glm were")
        parts = self._split(text, format.blanks)
        count = sum(isinstance(part, Token) for part in parts)
        if count != 1 and (count == 0 or len(format.blanks) == 1):
            raise PromptError(f"the text must have one {' or '.join(format.blanks)}, not {count}")
        fills = format.fills[-1:] if format.open_ended and isinstance(parts[-1], Token) else format.fills
        return self._before + self._ids(parts) + [self.id(name) for name in fills]

    def continuation(self, text: str) -> list[int]:
        """Ids that ask the model to write on where `text` stops."""
        if self.format.continues is None:
            return self.encode(text, special=True)
        return self._before + self._ids(self._split(text, ())) + [self.id(name) for name in self.format.continues]

    def parse(self, answer: str | Iterable[int]) -> Message:
        """What the model wrote, as the assistant's message; `metadata` names a tool it calls.

        Of several (ChatGLM3 and GLM-4-9B may speak, then call a tool) the last; `replies` has them all.
        """
        return self.replies(answer)[-1]

    def replies(self, answer: str | Iterable[int]) -> list[Message]:
        """What the model wrote, as messages. Ids are read up to the first that ends an answer."""
        if not isinstance(answer, str):
            answer = self.decode(takewhile(lambda id: id not in self.stop, map(index, answer)))
        return self.format.answer(answer)

    def reader(self, prompt: Iterable[int] = (), tools: Iterable[Tool] | None = None) -> Reader:
        """Reads the answer to `prompt` while it is written; `tools` are those it may call. See `glm.reply`.

        PromptError: the release marks neither thoughts nor calls.
        """
        if self.format.marks is None:
            raise PromptError(f"{self.format.name} has no marks to read an answer by; use parse or replies")
        marks = self.format.marks(list(tools or ()))
        opened, closed = (self._pieces.special.get(name, self._pieces.others.get(name)) for name in marks.thought)
        last = next((id for id in reversed(list(prompt)) if id in (opened, closed)), None)
        return Reader(marks, thinking=last is not None and last == opened)

    def _prompt(
        self, messages: Iterable[Message], tools: Iterable[Tool] | None, reply: bool, thinking: bool | None
    ) -> list[Part]:
        turns = chat.conversation(messages, tools, reply=reply, thinking=thinking)
        template = self._templates.get("tool_use" if turns.tools else "default") or self._templates.get("default")
        if template is None:
            return self.format.prompt(turns)
        names = [*self._pieces.special, *self._pieces.others]
        return chat.rendered(template, turns, names, self._pieces.special, **self._named)

    def _split(self, text: str, names: Iterable[str]) -> list[Part]:
        """`text` cut at the tokens `names`; without the white space beside them, where the release drops that."""
        parts = chat.split(checked(text), names)
        for at, part in enumerate(parts[1:]):
            if isinstance(part, Token) and part.name in self.format.swallows and isinstance(parts[at], str):
                parts[at] = str(parts[at]).rstrip()
        if not self.format.strips:
            return parts
        tokens = [False, *(isinstance(part, Token) for part in parts), False]
        stripped: list[Part] = []
        for part, follows, precedes in zip(parts, tokens, tokens[2:], strict=False):
            if isinstance(part, str):
                part = part.lstrip() if follows else part
                part = part.rstrip() if precedes else part
            stripped.append(part)
        return stripped

    def _ids(self, parts: Iterable[Part], start: bool = True) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Token):
                ids.append(self.id(part.name))
            elif part:
                ids += self._pieces.encode(checked(part), start or bool(ids))
        return ids


def checked(text: str) -> str:
    """`text`, if it is one; TokenizerError for anything else and for lone surrogates, which no encoding has."""
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        sign = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(f"character {error.start} is {sign}, half of a surrogate pair, which is no text") from None
    return text


def _load(folder: Path, source: str, generation: str | None) -> Tokenizer:
    """Finds the vocabulary, and names the folder in every error."""
    for path in map(folder.joinpath, VOCABULARIES):
        if path.is_file():
            break
    else:
        raise TokenizerError(f"{folder} holds no vocabulary: no {', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]}")
    try:
        file = _read(path)
        settings = _Settings(_json(folder / "config.json"), _json(folder / "tokenizer_config.json"), folder, source)
        pieces, format = _recognised(path.name, file, settings, generation)
        return Tokenizer(pieces, format, settings.templates(), settings.named(), settings.rounds())
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: {error}") from None
    except Exception as error:  # each library has its own way to say that a file is none of its kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise TokenizerError(f"{path} is damaged or of an unknown kind ({reason}); download it again") from None


def _recognised(name: str, file: bytes, settings: "_Settings", generation: str | None) -> tuple[Vocabulary, TextFormat]:
    """The kind of vocabulary, told by its file, and the release, told by that and the rest of the folder."""
    from glm.family import text as family

    if not file:
        raise TokenizerError(f"{name} is empty; download it again")
    if name == "ice_text.model":
        generation = generation or family.of_ice_text(settings.config)
        format = family.named(family.ICE_TEXT, generation)
        return SentencePiece(file, format.added, format.spellings, settings.shift(family.IMAGES[generation])), format
    if name == "vocab.json":
        format = family.named(family.MERGES, generation or "glm")
        return ByteLevel(merged(file, _read(settings.folder / "merges.txt"), format.added)), format
    if name == "vocab.txt":
        format = family.named(family.WORDS, generation or "glm")
        return WordPieces(file.decode(), format.added), format
    if name == "cog-pretrain.model":
        format = family.named(family.COG, generation or "glm")
        return SentencePiece(file, format.added), format
    if name == "tokenizer.json":
        pieces = ByteLevel(file)
        tokens = {*pieces.special, *pieces.others}
        return pieces, family.named(
            family.JSON, generation or family.of_json(tokens, settings.config, settings.names())
        )
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file):
        format = family.named(family.RANKS, generation or "glm4")
        return Ranks(file, settings.added() or format.added), format
    generation = generation or family.of_sentencepiece(settings.names(), settings.added())
    format = family.named(family.SENTENCEPIECE, generation)
    return SentencePiece(file, format.added, format.spellings), format


@dataclass(frozen=True)
class _Settings:
    """What a folder says of its tokenizer beside the vocabulary: its config.json and tokenizer_config.json."""

    config: Mapping[str, Any]
    own: Mapping[str, Any]
    folder: Path
    source: str

    def names(self) -> list[str]:
        """What the release is called here, the most telling name first."""
        files = (self.config, self.own)
        told = [str(file[key]) for file in files for key in ("_name_or_path", "name_or_path") if file.get(key)]
        folder = self.folder.resolve()
        cached = [folder.parent.parent.name] if folder.parent.name == "snapshots" else []  # the hub's cache
        return [*told, Path(self.source).name, folder.name, *cached]

    def shift(self, usual: int) -> int:
        """How many image tokens are counted before the text; `usual` where the folder does not say."""
        images = self.own.get("num_image_tokens", usual)
        if not isinstance(images, int):
            raise TokenizerError(f"num_image_tokens in tokenizer_config.json is {images!r}, not a number")
        return images

    def added(self) -> dict[str, int]:
        """The special tokens listed, ids by name."""
        try:
            return {str(token["content"]): int(id) for id, token in self.own.get("added_tokens_decoder", {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise TokenizerError("added_tokens_decoder in tokenizer_config.json is no table of tokens") from None

    def templates(self) -> dict[str, str]:
        """The checkpoint's chat templates by name: a file of its own, or a field that holds one or several."""
        file, field = self.folder / "chat_template.jinja", self.own.get("chat_template")
        try:
            if file.is_file():
                return {"default": _read(file).decode()}
            if isinstance(field, str):
                return {"default": field}
            return {str(entry["name"]): str(entry["template"]) for entry in field or ()}
        except (KeyError, TypeError, ValueError):
            raise TokenizerError("the chat template beside it is neither a text nor a list of named texts") from None

    def named(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and so on, each a text or a table with its `content`."""
        fields = {key: value for key, value in self.own.items() if key.endswith("_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in fields.items()}
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    def rounds(self) -> int | None:
        """`earlier_rounds`, a field of ours."""
        most = self.own.get("earlier_rounds")
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 0):
            raise TokenizerError(f"earlier_rounds in tokenizer_config.json is {most!r}, not a whole number from 0")
        return most


def _json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        data = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path.name} must hold a JSON object, not a {type(data).__name__}")
    return data


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise TokenizerError(f"{path.name} has more than {LARGEST_FILE >> 20} MiB, which no such file needs")
        file = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path.name} cannot be read: {error.strerror}") from None
    if file.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"{path.name} is only a pointer to the file; fetch the file with `git lfs pull`")
    return file
