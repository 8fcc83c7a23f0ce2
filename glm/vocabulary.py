"""The kinds of vocabulary file: text to ids, ids to bytes, bytes to text as they arrive.

SentencePiece models, tiktoken's list of ranks, byte-level pairs (a tokenizer.json, or GPT-2's vocab.json with its
merges.txt) and BERT's list of words and their endings. None of them looks for special tokens in a text.
"""

import base64
import codecs
import json
import operator
import re
from collections.abc import Callable, Mapping

import sentencepiece
import tiktoken
import tokenizers

from glm.errors import TokenizerError

LONGEST_BLANK = 500_000  # characters of white space in a row; the ranks' regular expression fails at a million


class Stream:
    """Ids in, text out as soon as it is certain; the sum of all `put` and the `end` is the whole text.

    `spell` gives an id's bytes. A character of several bytes is held back until it is whole; an id without bytes
    (a token that decoding leaves out) ends an unfinished one. Bytes that are no UTF-8 come out as U+FFFD.
    """

    def __init__(self, spell: Callable[[int], bytes], errors: str = "replace") -> None:
        self._spell = spell
        self._characters = codecs.getincrementaldecoder("utf-8")(errors)

    def put(self, id: int) -> str:
        """The text that `id` completes, often its own; ids beyond the vocabulary (padding of the head) have none."""
        return self._decode(self._spell(index(id)))

    def end(self) -> str:
        """What is left: an unfinished character, as U+FFFD."""
        return self._characters.decode(b"", final=True)

    def _decode(self, piece: bytes) -> str:
        return self._characters.decode(piece, final=not piece)


class Vocabulary:
    """What the three kinds have in common.

    `special`: ids by name of the tokens that must not come out of typed text; `others`: those of further added tokens
    (`<think>`); `affixes`: special tokens that the file itself says to put before and behind a text.
    """

    special: Mapping[str, int] = {}
    others: Mapping[str, int] = {}
    affixes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def __len__(self) -> int:
        raise NotImplementedError

    def encode(self, text: str, start: bool) -> list[int]:
        """The ids of a text; `start` is False where it continues another."""
        raise NotImplementedError

    def spell(self, id: int) -> bytes:
        """An id's bytes in UTF-8, perhaps only part of a character; none beyond the vocabulary."""
        raise NotImplementedError

    def piece(self, id: int) -> str:
        """The piece as one would show it in a table."""
        return self.spell(id).decode("utf-8", "backslashreplace")

    def stream(self, unseen: frozenset[int]) -> Stream:
        """A decoder that leaves out the ids in `unseen`."""
        return Stream(lambda id: b"" if id in unseen else self.spell(id))


def _behind(pieces: int, added: Mapping[str, int]) -> dict[int, str]:
    """Names by id of tokens added behind `pieces` pieces, or TokenizerError where the file should end elsewhere."""
    first = min(added.values(), default=pieces)
    if first != pieces:
        raise TokenizerError(f"it has {pieces:,} pieces and should have {first:,}; download it again")
    return {id: name for name, id in added.items()}


class SentencePiece(Vocabulary):
    """A SentencePiece model, with `added` tokens (ids by name) behind its end.

    `spellings` are the pieces that stand for white space. `shift` moves every id (ChatGLM-6B of March 2023 counted
    20000 image tokens first).
    """

    def __init__(
        self,
        model: bytes,
        added: Mapping[str, int] | None = None,
        spellings: Mapping[str, str] | None = None,
        shift: int = 0,
    ) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._shift, size = shift, len(self._model)
        self._added = _behind(size, added or {})
        unseen = [id for id in range(size) if self._model.is_control(id) or self._model.is_unknown(id)]
        named = {self._model.id_to_piece(id): id for id in unseen} | dict(added or {})
        self.special = {name: id + shift for name, id in named.items()}
        self._pieces = dict(spellings or {})
        self._blanks = {self._model.piece_to_id(piece): blank for blank, piece in self._pieces.items()}
        if self._model.unk_id() in self._blanks:
            raise TokenizerError("it lacks pieces for white space; download it again")
        self._blank = re.compile("|".join(map(re.escape, sorted(self._pieces, key=len, reverse=True))) or r"(?!)")
        self._once = self._model.decode_pieces(["▁", "▁", "a"]) == " a"

    def __len__(self) -> int:
        return max([len(self._model) - 1, *self._added]) + 1 + self._shift

    def encode(self, text: str, start: bool) -> list[int]:
        """The ids of a text; one that continues another goes without the space SentencePiece puts in front."""
        if not start:  # behind a line break, whose two ids (that space and itself) are then taken off
            text = "\n" + text
        text = self._blank.sub(lambda blank: self._pieces[blank[0]], text)
        ids = [id + self._shift for id in self._model.encode(text)]
        return ids if start else ids[2:]

    def spell(self, id: int) -> bytes:
        """An id's bytes, with the space that its piece may begin with."""
        id -= self._shift
        if id in self._added or id in self._blanks:
            return (self._added.get(id) or self._blanks[id]).encode()
        if not 0 <= id < len(self._model) or self._model.is_control(id):
            return b""
        if self._model.is_unknown(id):
            return " ⁇ ".encode()
        piece: str = self._model.id_to_piece(id)
        return bytes([int(piece[1:-1], 16)]) if self._model.is_byte(id) else piece.replace("▁", " ").encode()

    def piece(self, id: int) -> str:
        """The piece as the file has it: `▁` for a space, `<0x0A>` for a byte."""
        id -= self._shift
        return self._added.get(id) or (self._model.id_to_piece(id) if 0 <= id < len(self._model) else "")

    def stream(self, unseen: frozenset[int]) -> Stream:
        """A decoder that leaves out the ids in `unseen`, and the space SentencePiece puts in front."""
        return SentenceStream(lambda id: b"" if id in unseen else self.spell(id), self._spaced, self._once)

    def _spaced(self, id: int) -> bool:
        return self.piece(id).startswith("▁")


class SentenceStream(Stream):
    """Takes off the space that SentencePiece puts before every text: `once`, or before each piece up to a visible one.

    `spaced` tells whether an id's piece begins with that space; a blank that is a piece of its own is no such space.
    """

    def __init__(self, spell: Callable[[int], bytes], spaced: Callable[[int], bool], once: bool) -> None:
        super().__init__(spell, errors="glm.each_byte")
        self._spaced, self._once, self._begun = spaced, once, False

    def put(self, id: int) -> str:
        """The text that `id` completes."""
        piece = self._spell(index(id))
        if not self._begun and piece and self._spaced(id):
            piece = piece[1:]
            self._begun = self._once
        self._begun = self._begun or bool(piece)
        return self._decode(piece)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece shows each byte that is no UTF-8 as a U+FFFD of its own; Python shows some together as one."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("glm.each_byte", _each_byte)


class Ranks(Vocabulary):
    """tiktoken's list: the bytes of every piece in the order of merging; behind them `added` tokens, ids by name."""

    PATTERN = (  # what GLM-4-9B cuts a text into before merging
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )

    def __init__(self, lines: bytes, added: Mapping[str, int]) -> None:
        ranks = {}
        for line in filter(None, lines.splitlines()):
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise TokenizerError("its ranks do not count from 0 over every byte and piece; download it again")
        self.special = dict(added)
        self._names = {id: name.encode() for id, name in _behind(len(ranks), added).items()}
        self._pieces = sorted(ranks, key=ranks.__getitem__)
        self._encoding = tiktoken.Encoding("ranks", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={})

    def __len__(self) -> int:
        return max([len(self._pieces) - 1, *self._names]) + 1

    def encode(self, text: str, start: bool) -> list[int]:
        """The ids of a text, whether it continues another or not."""
        if len(text) > LONGEST_BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > LONGEST_BLANK:
            raise TokenizerError(f"the text has more than {LONGEST_BLANK:,} characters of white space in a row")
        return self._encoding.encode_ordinary(text)

    def spell(self, id: int) -> bytes:
        """An id's bytes."""
        return self._pieces[id] if id < len(self._pieces) else self._names.get(id, b"")


class ByteLevel(Vocabulary):
    """A byte-level BPE in the `tokenizers` library's tokenizer.json."""

    CONTROL = re.compile(r"<\|.*\|>|\[.*MASK\]|<[se]op>|<pad>")

    def __init__(self, file: bytes) -> None:
        self._bpe = tokenizers.Tokenizer.from_buffer(file)
        if "ByteLevel" not in repr(self._bpe.decoder):
            raise TokenizerError("it is no byte-level vocabulary, as those of all GLM releases are")
        self._bpe.encode_special_tokens = True  # that is: as the text they are written in
        found = [token.content for token in self._bpe.get_added_tokens_decoder().values()]
        control = [name for name in found if self.CONTROL.fullmatch(name)]  # even where the file calls it ordinary
        self._bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in control])
        self._bpe.no_padding()
        self._bpe.no_truncation()
        added = self._bpe.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        self.others = {token.content: id for id, token in added.items() if not token.special}
        plain = self._bpe.encode("a", add_special_tokens=False).tokens
        dressed = self._bpe.encode("a").tokens
        at = next(n for n in range(len(dressed) + 1) if dressed[n : n + len(plain)] == plain)
        self.affixes = tuple(dressed[:at]), tuple(dressed[at + len(plain) :])
        self._spelled = {id: token.content.encode() for id, token in added.items()}
        self._size = max(self._bpe.get_vocab().values(), default=-1) + 1

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str, start: bool) -> list[int]:
        """The ids of a text, whether it continues another or not."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def spell(self, id: int) -> bytes:
        """An id's bytes."""
        if id not in self._spelled:
            written = self._bpe.id_to_token(id) if id < self._size else None
            self._spelled[id] = bytes(BYTES[sign] for sign in written or "")
        return self._spelled[id]


def merged(vocabulary: bytes, merges: bytes, added: Mapping[str, int]) -> bytes:
    """GPT-2's vocab.json and merges.txt, with `added` tokens behind (or among) them, as a tokenizer.json.

    TokenizerError where the added tokens do not continue the vocabulary.
    """
    lines = [line for line in merges.decode().splitlines() if line and not line.startswith("#version")]
    pairs = [(left, right) for left, right in map(str.split, lines)]
    ids = json.loads(vocabulary)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=pairs))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    _behind(len(ids), {name: id for name, id in added.items() if name not in ids})
    order = sorted(added, key=added.__getitem__)
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in order])
    if wrong := [name for name in order if bpe.token_to_id(name) != added[name]]:
        raise TokenizerError(f"the token {wrong[0]} is not where it should be; download vocab.json again")
    return bpe.to_str().encode()


class WordPieces(Vocabulary):
    """BERT's vocab.txt: words and, behind `##`, their endings, in lower case; `added` tokens behind its end.

    (Devlin et al. 2019, arXiv:1810.04805.) White space and accents are lost: decoding sets words apart by a space.
    """

    def __init__(self, lines: str, added: Mapping[str, int]) -> None:
        self._pieces = lines.splitlines()
        ids = {piece: id for id, piece in enumerate(self._pieces)}
        self._names = _behind(len(ids), {name: id for name, id in added.items() if name not in ids})
        if wrong := [name for name, id in added.items() if ids.get(name, id) != id]:
            raise TokenizerError(f"the token {wrong[0]} is not where it should be; download vocab.txt again")
        self.special = dict(added)
        self._model = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
        self._model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        self._model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    def __len__(self) -> int:
        return len(self._pieces) + len(self._names)

    def encode(self, text: str, start: bool) -> list[int]:
        """The ids of a text, whether it continues another or not."""
        return self._model.encode(text).ids

    def spell(self, id: int) -> bytes:
        """An id's bytes, with the space before a word, of which there is none before a sign that closes one."""
        piece = self.piece(id)
        space = "" if piece in (".", "?", "!", ",", "") else " "
        return (piece[2:] if piece.startswith("##") else space + piece).encode()

    def piece(self, id: int) -> str:
        """The piece as the file has it, `##` before an ending."""
        return self._pieces[id] if id < len(self._pieces) else self._names.get(id, "")

    def stream(self, unseen: frozenset[int]) -> Stream:
        """A decoder that leaves out the ids in `unseen`, and the space before the first word."""
        words = super().stream(unseen)
        return Begun(words)


class Begun(Stream):
    """Another stream without the space it may begin with."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._begun = stream, False

    def put(self, id: int) -> str:
        """The text that `id` completes."""
        text = self._stream.put(id)
        if self._begun or not text:
            return text
        self._begun = True
        return text.removeprefix(" ")

    def end(self) -> str:
        """What is left."""
        return self._stream.end()


class Apart(Stream):
    """Another stream in which special tokens, the ids `apart`, have a space between them and what is beside them."""

    def __init__(self, stream: Stream, apart: frozenset[int]) -> None:
        self._stream, self._apart = stream, apart
        self._begun = self._owed = False

    def put(self, id: int) -> str:
        """The text that `id` completes."""
        special = index(id) in self._apart
        unfinished = self._stream.end() if special else ""
        return self._beside(unfinished, False) + self._beside(self._stream.put(id), special)

    def _beside(self, text: str, special: bool) -> str:
        """`text` with the space that belongs before it."""
        if not text:
            return ""
        space = " " if self._begun and (special or self._owed) else ""
        self._begun, self._owed = True, special
        return space + text

    def end(self) -> str:
        """What is left."""
        return self._stream.end()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write any byte as a visible character: those that are visible stand for themselves."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


def index(id: object) -> int:
    """`id` as an int; TokenizerError if it is none or negative."""
    try:
        value = operator.index(id)  # type: ignore[arg-type]
    except TypeError:
        raise TokenizerError(f"an id must be a whole number, not {id!r}") from None
    if value < 0:
        raise TokenizerError(f"an id cannot be negative: {value}")
    return value
