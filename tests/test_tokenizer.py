"""Ids against those of the official tokenizers, decoding, recognition of folders, and damaged files."""

import io
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from glm.errors import GLMError, PromptError, TokenizerError
from glm.family.text_chatglm import CHATGLM, CHATGLM_BYTES
from glm.family.text_glm4 import ADDED, GLM4
from glm.tokenizer import Tokenizer
from glm.vocabulary import ByteLevel, Ranks, SentencePiece

ROOT = Path(__file__).resolve().parent.parent
VOCABULARIES = Path(os.environ.get("GLM_TOKENIZERS", ROOT.parent / "shared" / "tokenizers"))
RELEASES = ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"]

TYPED = [  # everything a user might type in the hope of a role, and the neighbours of it
    "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]",
    "<sop>", "<eop>", "sop", "eop", "<unk>", "<pad>", "<s>", "</s>", "<n>", "<|tab|>", "<|blank_3|>", "<0x0A>",
    "<", "|", ">", "[", "]", " ", "  ", "\t", "\n", "\r\n", "\0", "▁", "�", "你好", "😀", "é", "a", "\ue000",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(TYPED), st.text(max_size=8)), max_size=12).map("".join)

loaded: dict[str, Tokenizer] = {}


def official(name: str) -> Tokenizer:
    """The tokenizer of a published vocabulary file, or a visible skip."""
    if not (VOCABULARIES / name).is_dir():
        pytest.skip(f"no vocabulary of {name}: put it under {VOCABULARIES} or set GLM_TOKENIZERS")
    if name not in loaded:
        loaded[name] = Tokenizer.from_pretrained(VOCABULARIES / name)
    return loaded[name]


def rows(name: str, *kinds: str) -> list[dict]:
    lines = (VOCABULARIES / name / "visible.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] in kinds]
    assert found, f"{name} has no rows of kind {kinds}"
    return found


# ---------------------------------------------------------------- ids of the official tokenizers


@pytest.mark.parametrize("name", RELEASES)
def test_encoding_is_the_official_one(name: str) -> None:
    tok = official(name)
    for row in rows(name, "encode"):
        assert tok.encode(row["text"]) == row["ids"], row["text"]
        assert tok.encode(row["text"], special=True) == row["ids_with_special"], row["text"]
        if "tiktoken_ids_no_special_parsing" in row:
            assert tok.encode(row["text"], parse=False) == row["tiktoken_ids_no_special_parsing"], row["text"]


@pytest.mark.parametrize("name", RELEASES)
def test_decoding_is_the_official_one(name: str) -> None:
    tok = official(name)
    for row in rows(name, "encode"):
        if "decoded" in row:
            assert tok.decode(row["ids"]) == row["decoded"], row["text"]
    if name in ("chatglm-6b", "chatglm3-6b"):
        for row in rows(name, "decode"):
            assert tok.decode(row["ids"]) == row["text"], row["ids"]


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_pairs(name: str) -> None:
    tok = official(name)
    for row in rows(name, "pair"):
        assert tok.encode(row["a"], pair=row["b"]) == row["ids"]


@pytest.mark.parametrize(("name", "kind", "text"), [
    ("chatglm-6b", "sp_no_dummy_prefix", "text"), ("chatglm2-6b", "stream_continue", "prompt"),
])  # fmt: skip
def test_a_text_that_continues_another(name: str, kind: str, text: str) -> None:
    tok = official(name)
    for row in rows(name, kind):
        assert tok.encode(row[text], start=False) == row.get("ids", row.get("input_ids"))


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "glm-4-9b-chat"])
def test_padding(name: str) -> None:
    tok = official(name)
    for row in rows(name, "batch_left_pad"):
        ids = [tok.encode(text, special=True) for text in row["texts"]]
        length = max(map(len, ids))
        assert [[tok.pad] * (length - len(line)) + line for line in ids] == row["input_ids"]


def test_roles_can_be_recognised_on_request() -> None:
    tok = official("chatglm3-6b")
    for row in rows("chatglm3-6b", "encode_special_tokens_true"):
        assert tok.encode(row["text"], parse=True) == row["ids"], row["text"]


@pytest.mark.parametrize("name", RELEASES)
def test_special_ids(name: str) -> None:
    tok = official(name)
    meta = json.loads((VOCABULARIES / name / "meta.json").read_text())
    same = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<unk>"} if name in ("chatglm2-6b", "chatglm3-6b") else {}
    for token, id in meta["special_ids"].items():
        assert tok.piece(id) == same.get(token, token)
    assert len(tok) == tok.vocabulary == meta.get("vocab_size", 151343)
    assert {tok.piece(id) for id in tok.stop} <= {"<eop>", "</s>", "<|endoftext|>", "<|user|>", "<|observation|>"}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4-9B's ranks as the tokenizer.json that transformers makes of them."""
    official("glm-4-9b-chat")
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    converter = convert.TikTokenConverter(
        vocab_file=str(VOCABULARIES / "glm-4-9b-chat" / "tokenizer.model"),
        pattern=Ranks.PATTERN,
        extra_special_tokens=list(ADDED),
    )
    folder = tmp_path_factory.mktemp("glm-4-9b-chat-hf")
    converter.converted().save(str(folder / "tokenizer.json"))
    return folder


def test_tokenizer_json_gives_the_same_ids_as_the_ranks(hf_folder: Path) -> None:
    tok = Tokenizer.from_pretrained(hf_folder)
    for row in rows("glm-4-9b-chat", "encode"):
        assert tok.encode(row["text"]) == row["ids"], row["text"]
        assert tok.encode(row["text"], parse=False) == row["tiktoken_ids_no_special_parsing"], row["text"]
        if "decoded" in row:
            assert tok.decode(row["ids"]) == row["decoded"]
    for row in rows("glm-4-9b-chat", "chat_template"):
        assert tok.chat(row["messages"]) == row["input_ids"]
    native = official("glm-4-9b-chat")
    assert (tok.stop, tok.pad, len(tok)) == (native.stop, native.pad, len(native))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_decoding_agrees_with_sentencepiece_on_any_pieces(name: str) -> None:
    tok = official(name)
    file = next(f for f in ("ice_text.model", "tokenizer.model") if (VOCABULARIES / name / f).exists())
    model = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARIES / name / file))
    first_byte = model.piece_to_id("<0x00>")
    plain = (
        tok if name == "chatglm2-6b" else Tokenizer(SentencePiece((VOCABULARIES / name / file).read_bytes()), CHATGLM)
    )
    id = st.one_of(
        st.integers(3, len(model) - 1), st.integers(first_byte, first_byte + 255), st.sampled_from([1, 2, 5, 30910])
    )

    @settings(max_examples=400, deadline=None)
    @given(st.lists(id, max_size=10))
    def agree(ids: list[int]) -> None:
        assert plain.decode(ids) == model.decode(ids)

    agree()


@pytest.mark.parametrize("name", RELEASES)
def test_stream_is_decode(name: str) -> None:
    tok = official(name)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, len(tok) + 300), max_size=30), st.booleans())
    def agree(ids: list[int], special: bool) -> None:
        stream = tok.stream(special=special)
        assert "".join(map(stream.put, ids)) + stream.end() == tok.decode(ids, special=special)

    agree()


@pytest.mark.parametrize("name", RELEASES)
def test_stream_never_shows_half_a_character(name: str) -> None:
    tok = official(name)

    @settings(max_examples=150, deadline=None)
    @given(texts.map(lambda text: text.replace("�", "") + "👍🏽 𝕳 안녕 ภ"))
    def whole(text: str) -> None:
        ids = tok.encode(text, parse=False)
        stream = tok.stream()
        chunks = [*map(stream.put, ids), stream.end()]
        assert not any("�" in chunk for chunk in chunks)
        assert "".join(chunks) == tok.decode(ids)

    whole()


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_text_comes_back(name: str) -> None:
    tok = official(name)

    @settings(max_examples=200, deadline=None)
    @given(texts)
    def back(text: str) -> None:
        # In a SentencePiece model ▁ is the space itself.
        expected = text if name == "glm-4-9b-chat" else text.replace("▁", " ")
        assert tok.decode(tok.encode(text, parse=False)) == expected

    back()


def test_white_space_of_chatglm() -> None:
    tok = official("chatglm-6b")
    for blank in ["\n", "\t", "  ", " " * 79, " " * 80]:
        assert tok.decode(tok.encode(f"a{blank}b")) == f"a{blank}b"
        assert len(tok.encode(f"a{blank}b")) == 3
    assert tok.encode("a" + " " * 163 + "b")[1:-1] == [130087, 130087, 130010]


def test_specials_are_left_out_on_request() -> None:
    tok = official("chatglm3-6b")
    ids = [tok.id("<|user|>"), *tok.encode("你好"), 2]
    assert tok.decode(ids) == "<|user|> 你好"
    assert tok.decode(ids, special=False) == "你好"


@pytest.mark.parametrize("name", RELEASES)
def test_long_answers_are_decoded_in_linear_time(name: str) -> None:
    tok = official(name)
    ids = tok.encode("a你好 ") * 12_500
    stream, start = tok.stream(), time.perf_counter()
    text = "".join(map(stream.put, ids)) + stream.end()
    assert (
        time.perf_counter() - start < 5
    )  # seconds for 50 000 tokens or more; decoding all anew each time takes minutes
    assert len(text) >= 12_500 * 3


def test_pieces_are_shown() -> None:
    tok = Tokenizer(Ranks(ranks(["好".encode()]), numbered(257)), GLM4)
    assert [tok.piece(id) for id in (97, 256, 0xE4, 257, 9999)] == ["a", "好", "\\xe4", "<|endoftext|>", ""]
    assert [official("chatglm3-6b").piece(id) for id in (13, 30910, 64795, 65000)] == ["<0x0A>", "▁", "<|user|>", ""]


# ---------------------------------------------------------------- vocabularies made here, that need no file


def ranks(pieces: list[bytes]) -> bytes:
    """A list of ranks: all bytes, then `pieces`."""
    import base64

    all_pieces = [bytes([byte]) for byte in range(256)] + pieces
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(all_pieces))


def numbered(first: int) -> dict[str, int]:
    return {name: first + n for n, name in enumerate(ADDED)}


def byte_level(special: list[str], others: list[str] | None = None, adds: str = "") -> bytes:
    """A small tokenizer.json; `adds` is what its post-processor makes of a text $A."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ["What is GLM? A general language model.", "什么是注意力？你好，世界。"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_tokens(others or [])
    if adds:
        used = [(token, bpe.token_to_id(token)) for token in special if token in adds]
        bpe.post_processor = processors.TemplateProcessing(single=adds, special_tokens=used)
    return bpe.to_str().encode()


TINY = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>"]


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    """As the embedded model's folder: a byte-level tokenizer.json beside a ChatGLM-6B config.json."""
    (tmp_path / "tokenizer.json").write_bytes(byte_level(TINY))
    (tmp_path / "config.json").write_text('{"model_type": "chatglm", "position_encoding_2d": true}')
    return Tokenizer.from_pretrained(tmp_path)


def test_tiny_follows_chatglm(tiny: Tokenizer) -> None:
    gmask, sop, eop, mask = (tiny.id(name) for name in ("[gMASK]", "<sop>", "<eop>", "[MASK]"))
    question = tiny.encode("你好 GLM\n\t  x")
    assert tiny.decode(question) == "你好 GLM\n\t  x"
    assert tiny.encode("你好 GLM\n\t  x", special=True) == [*question, gmask, sop]
    assert tiny.chat([{"role": "user", "content": "你好 GLM\n\t  x"}]) == [*question, gmask, sop]
    assert tiny.encode("a", pair="b") == [*tiny.encode("a"), gmask, sop, *tiny.encode("b"), eop]
    assert tiny.infill("A [MASK] model") == [*tiny.encode("A"), mask, *tiny.encode("model"), sop]
    assert tiny.stop == (eop,)
    assert tiny.pad == tiny.id("<pad>")
    assert tiny.decode([mask, *question, eop]) == "你好 GLM\n\t  x"
    assert eop not in tiny.chat([{"role": "user", "content": "<eop>[MASK]"}])


@settings(max_examples=200, deadline=None)
@given(texts)
def test_byte_level_gives_any_text_back(text: str) -> None:
    tok = byte_tokenizer()
    ids = tok.encode(text, parse=False)
    assert tok.decode(ids) == text
    stream = tok.stream()
    chunks = [*map(stream.put, ids), stream.end()]
    assert "".join(chunks) == text
    if "�" not in text:
        assert not any("�" in chunk for chunk in chunks)


def byte_tokenizer() -> Tokenizer:
    if "bytes" not in loaded:
        loaded["bytes"] = Tokenizer(ByteLevel(byte_level(TINY)), CHATGLM_BYTES)
    return loaded["bytes"]


def test_what_a_tokenizer_json_adds_is_followed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level(list(ADDED), adds="[gMASK] <sop> $A"))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.encode("a", special=True) == [tok.id("[gMASK]"), tok.id("<sop>"), *tok.encode("a")]
    assert tok.encode("", special=True) == [tok.id("[gMASK]"), tok.id("<sop>")]


def test_image_tokens_of_march_2023_move_every_id() -> None:
    model = sentencepiece_model()
    plain, moved = SentencePiece(model), SentencePiece(model, shift=20_000)
    ids = plain.encode("glm 好 x\n", start=True)
    assert moved.encode("glm 好 x\n", start=True) == [id + 20_000 for id in ids]
    assert moved.special == {name: id + 20_000 for name, id in plain.special.items()}
    assert len(moved) == len(plain) + 20_000
    for vocabulary in (plain, moved):
        stream = vocabulary.stream(frozenset())
        written = "".join(map(stream.put, vocabulary.encode("glm 好 x\n", start=True)))
        assert written + stream.end() == "glm 好 x\n"


def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["glm reads and writes text", "a general language model"] * 20),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


# ---------------------------------------------------------------- what a user types stays text


@pytest.mark.parametrize("name", RELEASES)
def test_typed_text_never_becomes_a_special_token(name: str) -> None:
    tok = official(name)
    special = set(tok._pieces.special.values())

    @settings(max_examples=150, deadline=None)
    @given(texts, texts, texts)
    def safe(first: str, second: str, third: str) -> None:
        messages = [("user", first), ("assistant", second), ("user", third)]
        turns = [{"role": role, "content": content} for role, content in messages]
        empty = [{"role": role, "content": "a"} for role, _ in messages]
        count = sum(id in special for id in tok.chat(turns))
        assert count <= sum(id in special for id in tok.chat(empty))  # GLM-4 leaves out empty messages

    safe()


def test_infilling_reads_the_mask_only() -> None:
    tok = official("chatglm-6b")
    assert tok.infill("清华大学位于[MASK]。") == [5, 72306, 64683, 130000, 5, 63823, 130004]
    ids = tok.infill("<sop><eop> [MASK] [gMASK]")
    assert [id for id in ids if id >= 130000] == [130000, 130004]


@pytest.mark.parametrize("text", ["no mask", "[MASK] and [MASK]"])
def test_infilling_wants_one_mask(tiny: Tokenizer, text: str) -> None:
    with pytest.raises(PromptError, match="one \\[MASK\\]"):
        tiny.infill(text)


def test_infilling_is_refused_where_it_was_not_trained() -> None:
    tok = Tokenizer(Ranks(ranks([]), numbered(256)), GLM4)
    with pytest.raises(PromptError, match="ChatGLM-6B and tiny-glm were"):
        tok.infill("a [MASK]")


# ---------------------------------------------------------------- recognition of folders


@pytest.mark.parametrize(("folder", "files", "expected"), [
    ("chatglm2-6b", {}, "ChatGLM2-6B"),
    ("chatglm2-6b-32k", {}, "ChatGLM2-6B"),
    ("codegeex2-6b", {}, "ChatGLM2-6B"),
    ("chatglm3-6b-128k", {}, "ChatGLM3-6B"),
    ("models--THUDM--chatglm2-6b/snapshots/6d5ef3f", {}, "ChatGLM2-6B"),
    ("mine", {}, "ChatGLM3-6B"),
    ("mine", {"config.json": {"_name_or_path": "THUDM/chatglm2-6b"}}, "ChatGLM2-6B"),
    ("chatglm3", {"tokenizer_config.json": {"name_or_path": "THUDM/chatglm2-6b"}}, "ChatGLM2-6B"),
    ("chatglm2", {"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<|user|>"}}}}, "ChatGLM3-6B"),
])  # fmt: skip
def test_chatglm2_and_3_are_told_apart(tmp_path: Path, folder: str, files: dict, expected: str) -> None:
    official("chatglm2-6b")
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "tokenizer.model").symlink_to(VOCABULARIES / "chatglm2-6b" / "tokenizer.model")
    for name, content in files.items():
        (tmp_path / folder / name).write_text(json.dumps(content))
    assert Tokenizer.from_pretrained(tmp_path / folder).format.name == expected
    assert Tokenizer.from_pretrained(tmp_path / folder, generation="chatglm2").format.name == "ChatGLM2-6B"


@pytest.mark.parametrize(("special", "others", "folder", "config", "expected"), [
    (list(ADDED), [], "glm-edge-1.5b-chat", {"model_type": "glm"}, "GLM-4-9B"),
    (list(ADDED), [], "GLM-4-9B-0414", {"model_type": "glm4"}, "GLM-4-0414"),
    (list(ADDED), [], "GLM-Z1-9B-0414", {"model_type": "glm4"}, "GLM-Z1"),
    (list(ADDED), ["<think>", "</think>", "<tool_call>"], "GLM-4.5-Air", {}, "GLM-4.5"),
    (TINY, [], "tiny-glm", {"model_type": "chatglm"}, "ChatGLM-6B"),
])  # fmt: skip
def test_tokenizer_json_is_recognised(
    tmp_path: Path, special: list[str], others: list[str], folder: str, config: dict, expected: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "tokenizer.json").write_bytes(byte_level(special, others))
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(str(tmp_path / folder)).format.name == expected


def test_added_tokens_may_be_listed_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(ranks([b"ab"]))
    listed = {str(id): {"content": name, "special": True} for name, id in numbered(257).items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.encode("ab<|user|>") == [256, 264]
    assert len(tok) == 257 + len(ADDED)


def test_hub_ids_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level(TINY))
    asked = []

    def fetch(source: str, revision: str | None = None, weights: bool = True) -> Path:
        asked.append((source, revision, weights))
        return tmp_path

    hub = types.ModuleType("glm.hub")
    hub.fetch = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "glm.hub", hub)
    assert Tokenizer.from_pretrained("THUDM/tiny-glm", revision="v1").format.name == "ChatGLM-6B"
    assert asked == [("THUDM/tiny-glm", "v1", False)]


def test_importing_it_leaves_torch_alone() -> None:
    code = "import sys; from glm.tokenizer import Tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- one clear error for everything else


GOOD_RANKS, GOOD_JSON = ranks([]), byte_level(TINY)
WORDS = tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str().encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"
MODEL, JSON, ICE = "tokenizer.model", "tokenizer.json", "ice_text.model"
CONFIG, OWN = "config.json", "tokenizer_config.json"
BAD = {
    "nothing": ({}, r"holds no vocabulary"),
    "pointer": ({MODEL: POINTER}, r"git lfs pull"),
    "empty": ({MODEL: b""}, r"tokenizer.model is empty"),
    "garbage": ({MODEL: b"\x7fELF" + bytes(100)}, r"damaged or of an unknown kind"),
    "garbage ice": ({ICE: b"hello"}, r"damaged or of an unknown kind"),
    "html": ({JSON: b"<!doctype html>"}, r"damaged or of an unknown kind"),
    "no model": ({JSON: b"{}"}, r"damaged or of an unknown kind"),
    "deep": ({JSON: b'{"a":' * 100_000}, r"damaged or of an unknown kind"),
    "no base64": ({MODEL: b"AA== 0\n!!!! 1\n"}, r"damaged or of an unknown kind"),
    "gap": ({MODEL: GOOD_RANKS + b"YWI= 300\n"}, r"do not count from 0"),
    "twice": ({MODEL: GOOD_RANKS + b"YWI= 255\n"}, r"do not count from 0"),
    "short": ({MODEL: GOOD_RANKS}, r"256 pieces and should have 151,329"),
    "no line end": ({MODEL: GOOD_RANKS[:-5]}, r"damaged or of an unknown kind"),
    "foreign pieces": ({JSON: byte_level(["<s>"])}, r"neither the <\|user\|>"),
    "no byte level": ({JSON: WORDS}, r"byte-level"),
    "bad config": ({JSON: GOOD_JSON, CONFIG: b"{"}, r"config.json is not valid JSON"),
    "deep config": ({JSON: GOOD_JSON, CONFIG: b"[" * 100_000}, r"config.json is not valid JSON"),
    "list config": ({JSON: GOOD_JSON, CONFIG: b"[]"}, r"must hold a JSON object"),
    "latin config": ({JSON: GOOD_JSON, CONFIG: b'{"a": "\xe9"}'}, r"config.json is not valid JSON"),
    "bad template": ({JSON: GOOD_JSON, OWN: b'{"chat_template": [1]}'}, r"chat template"),
    "bad added": ({MODEL: GOOD_RANKS, OWN: b'{"added_tokens_decoder": [1]}'}, r"no table of tokens"),
    "missing role": ({JSON: byte_level(["<|user|>", "<|endoftext|>"])}, r"no token <\|observation\|>"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_folders_are_refused(tmp_path: Path, case: str) -> None:
    files, message = BAD[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ice_text.model", "tokenizer.model"])
@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_cut_off_files_are_refused(tmp_path: Path, name: str, part: float) -> None:
    release = "chatglm-6b" if name == "ice_text.model" else "chatglm3-6b"
    official(release)
    file = (VOCABULARIES / release / name).read_bytes()
    (tmp_path / name).write_bytes(file[: int(len(file) * part)])
    with pytest.raises(TokenizerError, match="download it again"):
        Tokenizer.from_pretrained(tmp_path)


def test_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere" / "at all")
    (tmp_path / "file").touch()
    with pytest.raises(TokenizerError, match="is a file"):
        Tokenizer.from_pretrained(tmp_path / "file")


def test_a_generation_must_fit_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level(TINY))
    with pytest.raises(TokenizerError, match="no generation 'chatglm2' has this vocabulary"):
        Tokenizer.from_pretrained(tmp_path, generation="chatglm2")
    with pytest.raises(TokenizerError, match=r"no token <\|endoftext\|>; it does not belong to GLM-4-9B"):
        Tokenizer.from_pretrained(tmp_path, generation="glm4")


@pytest.mark.parametrize("name", [*RELEASES, "bytes"])
@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", b"bytes", None, 3])
def test_what_is_no_text_is_refused(name: str, text: object) -> None:
    tok = byte_tokenizer() if name == "bytes" else official(name)
    with pytest.raises(TokenizerError, match=r"surrogate|must be a str"):
        tok.encode(text)  # type: ignore[arg-type]
    if isinstance(text, str):
        with pytest.raises(GLMError):
            tok.chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("ids", [[-1], [1.5], ["a"], [None]])
def test_what_is_no_id_is_refused(ids: list) -> None:
    tok = byte_tokenizer()
    for decode in (tok.decode, tok.replies, lambda ids: tok.stream().put(ids[0]), lambda ids: tok.piece(ids[0])):
        with pytest.raises(TokenizerError, match="an id"):
            decode(ids)


def test_endless_white_space_is_refused_not_a_crash() -> None:
    tok = Tokenizer(Ranks(ranks([]), numbered(256)), GLM4)
    assert len(tok.encode(" " * 400_000)) == 400_000
    with pytest.raises(TokenizerError, match="white space in a row"):
        tok.encode(" " * 1_000_000)
