"""The command line as its users meet it: what is printed where, exit statuses, pipes, a terminal, Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch
from golden_folders import GOLDENS
from tokenizers import decoders, models, pre_tokenizers

import glm
from glm import cli, talk
from glm.export import save_pretrained
from glm.family.chatglm import build
from glm.model import GLM
from glm.talk import Talk
from glm.tokenizer import Tokenizer

PROJECT = Path(__file__).parents[1]
COMMANDS = [
    *("chat", "complete", "infill", "info", "releases", "diff", "tokenize", "trace", "verify"),
    *("convert", "quantize", "prepack", "accuracy", "synthesize", "train", "bench"),
]
TINY = PROJECT / "weights" / "tiny-glm"
SPECIAL = ("<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of random weights in ChatGLM-6B's layout, with a vocabulary of bytes, for 128 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = tokenizers.Tokenizer(models.BPE(vocab={sign: id for id, sign in enumerate(alphabet)}, merges=[]))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL])
    pad, mask, gmask, _, sop, eop = map(vocabulary.token_to_id, SPECIAL)
    spec = build(
        layers=2, width=32, inner=64, heads=2, vocabulary=vocabulary.get_vocab_size(), context=128, eps=1e-5,
        two_axes=True, sop=sop, mask=mask, gmask=gmask, pad=pad, stop=(eop,),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "small"
    save_pretrained(GLM(spec, dtype=torch.float32, seed=1), folder, generation="chatglm", dtype=torch.float16)
    vocabulary.save(str(folder / "tokenizer.json"))
    return str(folder)


class Ran(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command in this process, with `typed` on its standard input."""

    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # other tests run in this process too

    def run(*arguments: str, typed: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        capsys.readouterr()
        return Ran(cli.main(arguments), *capsys.readouterr())

    return run


def process(*arguments: str, typed: str | bytes = "", **environment: str) -> Ran:
    """Runs one command as its own process."""
    typed = typed.encode() if isinstance(typed, str) else typed
    done = subprocess.run(
        [sys.executable, "-m", "glm", *arguments],
        input=typed, capture_output=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(PROJECT)} | environment,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


# -- help and errors ---------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_needs_no_torch() -> None:
    program = (
        "import sys; from glm.cli import main; status = main(['--help']);"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'tokenizers', 'huggingface_hub')))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall("^  ([a-z]+)  ", done.stdout.split("Commands:")[1], re.MULTILINE) == COMMANDS
    assert time.perf_counter() - began < 5  # 0.2 s on a machine with nothing else to do


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example_that_can_be_read(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    words = shlex.split(" ".join(out.split("Example:")[1].split()))
    assert words[:2] == ["glm", command]
    named = {word for word in words if word.startswith("--")}
    assert named <= set(re.findall(r"--[a-z-]+", out.split("Example:")[0]))


def test_no_command_is_a_question_for_help(run: Run) -> None:
    assert run().out == run("--help").out == run("-h").out
    assert run().status == 0


def test_version(run: Run) -> None:
    assert re.fullmatch(r"\d+\.\d+\S*|not installed", run("--version").out.strip())


MISTAKES = {
    "chat /nowhere": (1, "/nowhere: there is no such folder"),
    "chat Makefile": (1, "is a file"),
    "chat SMALL --device cuda:99": (1, "try --device cpu"),
    "chat SMALL --device sideways": (1, "try --device cpu"),
    "chat SMALL --dtype int3": (2, "'int3' is not one of float64"),
    "chat SMALL --seed x": (2, "--seed"),
    "chat SMALL --engine --room 0": (1, "max_length is a whole number from 1"),
    "chat SMALL --draft -1": (1, "guesses and longest are at least 1"),
    "chat SMALL --temperature -1": (1, "temperature is 0 (greedy)"),
    "chat SMALL --top-p 0": (1, "top_p"),
    "chat SMALL --top-k -1": (1, "top_k"),
    "chat SMALL --repetition-penalty 0": (1, "repetition_penalty"),
    "chat SMALL --temperatur 1": (2, "try `glm chat --help`"),
    "chat SMALL more": (2, "try `glm chat --help`"),
    "complete": (2, "TEXT"),
    "infill no-blank -s SMALL": (1, "no [MASK] in the text"),
    "info chatglm9-6b": (1, "no such folder"),
    "info chatglm-6b --context 0": (1, "context of 0 tokens"),
    "info chatglm-6b --weights int3": (1, "'int3'; choose one of stored, fp32, bf16, int8, int4"),
    "tokenize x -s /nowhere": (1, "/nowhere"),
    "verify": (2, "FOLDER"),
    "convert SMALL SMALL": (1, "already exists"),
    "convert SMALL /tmp/never --dtype int3": (2, "'int3' is not one of float64"),
    "convert SMALL /tmp/never --dtype float64": (1, "'float64'"),
    "quantize SMALL /tmp/never --weights int3": (2, "'int3' is not one of int4, int8"),
    "quantize SMALL /tmp/never --group 7": (2, "'7' is no group: take 32, 64, 128 or row"),
    "quantize SMALL /tmp/never --group 128": (1, "groups of 128 do not divide the 32 columns"),
    "quantize SMALL /tmp/never --method gptq": (1, "takes calibration text"),
    "quantize SMALL /tmp/never --group 32 --calibration /tmp/no.txt": (1, "cannot be read as UTF-8 text"),
    "prepack SMALL": (1, "has no integers to lay out"),
    "accuracy SMALL --text /tmp/no.txt": (1, "cannot be read as UTF-8 text"),
    "synthesize chatglm9-6b --out /tmp/never": (1, "no release is called 'chatglm9-6b'"),
    "train /nowhere.toml": (1, "/nowhere.toml"),
    "sing": (2, "try `glm --help`"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_a_status(run: Run, small: str, line: str) -> None:
    status, says = MISTAKES[line]
    ran = run(*(small if word == "SMALL" else word for word in line.split()), typed="hello\n")
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.startswith("glm: ")
    assert ran.err.count("\n") == 1
    assert says in ran.err
    assert not Path("/tmp/never").exists()


def test_a_mistake_in_a_process_has_no_traceback() -> None:
    ran = process("info", "/nowhere")
    assert (ran.status, ran.out) == (1, "")
    assert re.fullmatch("glm: /nowhere: there is no such folder.*\n", ran.err)


def test_ctrl_c_is_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("glm.info.describe", interrupted)
    assert run("info", "chatglm-6b") == Ran(130, "", "")


def test_running_out_of_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate …")):

        def full(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("glm.info.describe", full)
        ran = run("info", "chatglm-6b")
        assert (ran.status, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert "out of memory" in ran.err


def test_a_reader_that_has_seen_enough_is_no_error(small: str) -> None:
    line = f"{sys.executable} -m glm tokenize -s {small} {'x' * 20000} | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=PROJECT, check=False)
    assert (done.stdout, done.stderr) == ("token  id  piece\n", "")


# -- chat --------------------------------------------------------------------------------------------------------------


def expected(small: str, *messages: str, length: int) -> str:
    """The greedy answer to the last of messages that take turns, by the library."""
    model, tokenizer = GLM.from_pretrained(small, dtype=torch.float32), Tokenizer.from_pretrained(small)
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    [ids] = glm.generate(model, [tokenizer.chat(turns)], max_new_tokens=length, stop=tokenizer.stop)
    return str(tokenizer.parse(ids)["content"])


def test_chat_in_a_pipe_prints_the_answers_and_nothing_else(run: Run, small: str) -> None:
    ran = run("chat", small, "--max-new-tokens", "9", typed="one\n\n two \n/clear\none\n/exit\nthree\n")
    first, second, again, _ = ran.out.split("\n")
    assert first == again == expected(small, "one", length=9)
    assert second == expected(small, "one", first, "two", length=9)
    assert second != expected(small, "two", length=9), "this does not show whether earlier rounds are read"


def test_chat_as_a_process(small: str) -> None:
    ran = process("chat", small, "--max-new-tokens", "9", typed="一\n".encode() + b"\xff\n", LC_ALL="C")
    assert ran.status == 0
    assert ran.out.split("\n")[0] == expected(small, "一", length=9)
    assert "\x1b" not in ran.out + ran.err


def test_seeds_decide_what_is_sampled(run: Run, small: str) -> None:
    def said(seed: int) -> str:
        return run("chat", small, "--temperature", "1", "--seed", str(seed), typed="hello\n").out

    assert said(1) == said(1) != said(2)


def test_sampling_options_arrive(run: Run, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def stream(model: GLM, prompt: list[int], **options: object) -> Iterator[int]:
        seen.update(options, prompt=prompt)
        return iter(())

    monkeypatch.setattr(talk, "stream", stream)
    options = "--temperature 0.7 --top-p 0.8 --top-k 5 --repetition-penalty 1.1 --seed 3 --max-new-tokens 17"
    assert run("chat", small, *options.split(), typed="hello\n").status == 0
    tokenizer = Tokenizer.from_pretrained(small)
    assert seen == {
        "temperature": 0.7, "top_p": 0.8, "top_k": 5, "repetition_penalty": 1.1, "seed": 3, "max_new_tokens": 17,
        "stop": tokenizer.stop, "chunk": None, "prompt": tokenizer.chat([{"role": "user", "content": "hello"}]),
    }  # fmt: skip


def test_an_answer_cut_short_is_said_to_be(run: Run, small: str) -> None:
    assert "--max-new-tokens" in run("chat", small, "--max-new-tokens", "3", typed="hello\n").err


def test_a_question_longer_than_the_context_is_refused(run: Run, small: str) -> None:
    ran = run("chat", small, typed="x" * 200 + "\n")
    assert (ran.status, ran.out) == (1, "")
    assert "202 tokens, the model takes 96: shorten it" in ran.err


def test_old_rounds_are_forgotten_when_the_context_is_full(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = GLM.from_pretrained(small, dtype=torch.float32), Tokenizer.from_pretrained(small)
    lengths = []
    original = talk.stream

    def stream(model: GLM, prompt: list[int], *, max_new_tokens: int, **options: object) -> Iterator[int]:
        lengths.append(len(prompt) + max_new_tokens)
        return original(model, prompt, max_new_tokens=max_new_tokens, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(talk, "stream", stream)
    conversation = Talk(model, tokenizer, max_new_tokens=8)
    for number in range(8):
        "".join(conversation.ask(f"question {number}"))
    assert conversation.forgotten > 0
    assert conversation.messages[-2]["content"] == "question 7"
    assert max(lengths) <= 128
    kept = tokenizer.chat([*conversation.messages, {"role": "user", "content": "?"}])
    assert len(kept) > 64, "more was forgotten than had to be"


def test_as_many_rounds_are_shown_as_asked_for(run: Run, small: str) -> None:
    def said(*options: str) -> list[str]:
        return run("chat", small, "--max-new-tokens", "5", *options, typed="one\ntwo\nthree\n").out.splitlines()

    alone = [expected(small, text, length=5) for text in ("one", "two", "three")]
    assert said("--rounds", "0") == alone
    assert said("--rounds", "1")[2] == expected(small, "two", said("--rounds", "1")[1], "three", length=5)
    assert said("--rounds", "9") == said()


def test_a_checkpoint_says_how_many_rounds_it_is_shown(run: Run, small: str, tmp_path: Path) -> None:
    def said(*options: str) -> list[str]:
        return run("chat", str(folder), "--max-new-tokens", "5", *options, typed="one\ntwo\nthree\n").out.splitlines()

    folder = tmp_path / "any-name"
    shutil.copytree(small, folder)
    all_that_fit = said()
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(fields | {"earlier_rounds": 0}))
    assert said() == [expected(small, text, length=5) for text in ("one", "two", "three")]
    assert said("--rounds", "9") == all_that_fit != said()
    config.write_text(json.dumps(fields | {"earlier_rounds": 1}))
    assert said() == said("--rounds", "1")
    for wrong in (-1, "two", True, 1.5):
        config.write_text(json.dumps(fields | {"earlier_rounds": wrong}))
        ran = run("chat", str(folder), typed="one\n")
        assert ran.status == 1
        assert "earlier_rounds in tokenizer_config.json is" in ran.err


class Typed:
    """A keyboard: gives its lines to `input`, then the end of the file."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = iter(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def at_terminal(monkeypatch: pytest.MonkeyPatch, run: Run) -> Callable[..., tuple[Ran, Typed]]:
    """Runs a command as if in front of a person who types."""

    def at(*arguments: str, lines: tuple[str | BaseException, ...]) -> tuple[Ran, Typed]:
        keyboard = Typed(*lines)
        monkeypatch.setattr("builtins.input", keyboard)
        monkeypatch.setattr(cli, "terminal", lambda: True)
        return run(*arguments), keyboard

    return at


def test_ctrl_c_stops_an_answer_and_not_the_program(at_terminal, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = talk.stream, []

    def stream(*arguments: object, **options: object) -> Iterator[int]:
        calls.append(arguments[1])
        ids = original(*arguments, **options)  # type: ignore[arg-type]
        yield from (next(ids) for _ in range(4))
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(talk, "stream", stream)
    ran, keyboard = at_terminal(
        "chat", small, lines=("one", KeyboardInterrupt(), "two", "/nonsense", "x" * 200, "/exit", "three")
    )
    assert ran.status == 0
    assert len(keyboard.prompts) == 6
    assert len(calls) == 2
    cut = expected(small, "one", length=4)
    assert cut[:-1] in ran.out
    assert calls[1] == Tokenizer.from_pretrained(small).chat(
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": cut}, {"role": "user", "content": "two"}]
    ), "what was said of the stopped answer is part of the conversation"
    assert "small · 33,920 parameters · float32 on " in ran.err
    assert "/clear and /exit" in ran.err
    assert "shorten it" in ran.err


def test_the_end_of_the_file_ends_the_conversation(at_terminal, small: str) -> None:
    ran, keyboard = at_terminal("chat", small, lines=("/clear",))
    assert (ran.status, len(keyboard.prompts)) == (0, 2)


def test_chat_in_a_real_terminal(small: str) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "glm", "chat", small, "--max-new-tokens", "9"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=PROJECT, start_new_session=True,
        env=os.environ | {"TERM": "dumb", "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    os.close(theirs)
    screen = b""

    def until(text: str) -> None:
        nonlocal screen
        while text.encode() not in screen:
            assert select.select([ours], [], [], 60)[0], f"waited for {text!r} after {screen.decode()!r}"
            screen += os.read(ours, 4096)

    try:
        until("›")
        os.write(ours, b"hello\n")
        until(expected(small, "hello", length=9)[:3])
        until("\r\n\r\n›")
        os.write(ours, b"/exit\n")
        assert child.wait(60) == 0
    finally:
        child.kill()
        os.close(ours)


def test_pieces_of_an_answer_are_the_answer(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tokens cut in two, the pieces make up what the release's reader makes of the whole."""
    tokenizer = Tokenizer.from_pretrained(small)
    conversation = Talk(GLM.from_pretrained(small, dtype=torch.float32), tokenizer, max_new_tokens=99)
    for text in ("  plain ", "你好,世界:再见", "什么?什么? yes, no", "", "é\n\n  x\n", "\U0001f600"):
        monkeypatch.setattr(talk, "stream", lambda *_, text=text, **__: iter(tokenizer.encode(text)))
        conversation.clear()
        pieces = list(conversation.ask("?"))
        assert "".join(pieces) == tokenizer.parse(text)["content"]
        assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two ", "three"]),
        ("one  two\n\nthree four", ["one  two", "", "three ", "four"]),
        ("12345678 9", ["12345678 ", "9"]),
        ("1234567890 2", ["1234567890 ", "2"]),
        ("词元一个一个地写", ["词元一个", "一个地写"]),
        ("a 词元b一个地", ["a 词元b", "一个地"]),
        ("", [""]),
    ],
)
def test_lines_break_between_words(text: str, lines: list[str]) -> None:
    for size in (1, 3, 99):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert "".join(cli.wrapped(pieces, 8)).split("\n") == lines


def test_words_are_shown_as_soon_as_they_end() -> None:
    def pieces() -> Iterator[str]:
        yield "one t"
        pytest.fail("more was asked for than was needed")

    words = cli.wrapped(pieces(), 80)
    assert [next(words), next(words)] == ["one", " "]


# -- the other commands ------------------------------------------------------------------------------------------------


def test_complete_writes_what_generate_writes(run: Run, small: str) -> None:
    model, tokenizer = GLM.from_pretrained(small, dtype=torch.float32), Tokenizer.from_pretrained(small)
    [ids] = glm.generate(model, [tokenizer.encode("abc", special=True)], max_new_tokens=6)
    said = tokenizer.decode(ids)
    assert run("complete", "abc", "-s", small, "--max-new-tokens", "6").out == said + "\n"
    assert run("complete", "-", "-s", small, "--max-new-tokens", "6", typed="abc\n").out == said + "\n"
    assert "shorten it" in run("complete", "x" * 200, "-s", small).err


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("chat -s --seed 3 --temperature 0.8 --max-new-tokens 20", "one two\nthree\n"),
        ("complete again-and-again --max-new-tokens 20 -s", ""),
        ("infill 'one [MASK] two [MASK].' --max-new-tokens 4 -s", ""),
    ],
)
def test_an_engine_and_guesses_change_nothing_that_is_printed(run: Run, small: str, command: str, typed: str) -> None:
    words = shlex.split(command)
    words[words.index("-s") : words.index("-s") + 1] = [small] if words[0] == "chat" else ["-s", small]
    plain = run(*words, typed=typed)
    assert plain.status == 0
    assert plain.out.strip()
    for flags in ((), ("--draft", "3")) if words[0] != "infill" else ((),):
        assert run(*words, *flags, "--engine", typed=typed) == plain
        assert run(*words, *flags, "--no-engine", typed=typed) == plain


def test_the_engine_has_its_room(run: Run, small: str) -> None:
    ran = run("complete", "abcdef", "-s", small, "--engine", "--room", "4")
    assert (ran.status, ran.out) == (1, "")
    assert "the model takes 4: shorten it" in ran.err


def test_infill_prints_the_text_with_its_blanks_filled(run: Run, small: str) -> None:
    ran = run("infill", "one [MASK] two [MASK].", "-s", small, "--max-new-tokens", "4")
    assert re.fullmatch(r"one .+ two .+\.\n", ran.out)
    assert "[MASK]" not in ran.out


def test_info_has_all_its_numbers_in_a_pipe(run: Run) -> None:
    status, out, _ = run("info", "chatglm3-6b", "--context", "8192", "--weights", "int4")
    assert status == 0
    for text in (
        "zai-org/chatglm3-6b",
        "heads = 32",
        "6,243,584,000",
        "28,672 bytes a token",
        "224.0 MiB for 8,192 tokens",
    ):
        assert text in out
    row = next(line.split() for line in out.splitlines() if line.startswith("int4"))
    assert row[1:3] == ["4,010,577,920", "3.7"]  # 4.01 GB, as `glm releases` says
    assert row[-1] in ("yes", "no", "?")


@pytest.mark.parametrize("width", ["40", "80"])
def test_tables_in_a_pipe_are_whole(width: str) -> None:
    ran = process("releases", COLUMNS=width)
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines] == ["release", "10⁹", *glm.releases()]
    assert next(line.split() for line in lines if line.startswith("glm-z1-rumination")) == [
        "glm-z1-rumination-32b-0414", "2025", "33.1", "66.3", "19.9", "244", "128k", "80", "24"
    ]  # fmt: skip
    assert not re.search("…|\x1b| $", ran.out, re.MULTILINE)
    assert max(map(len, lines)) <= 80, "and fit into a terminal"


def test_tokenize_shows_pieces_and_ids(run: Run, small: str) -> None:
    tokenizer = Tokenizer.from_pretrained(small)

    def rows(*options: str) -> list[list[str]]:
        return [line.split() for line in run("tokenize", "a [b]\n", "-s", small, *options).out.splitlines()[1:]]

    ids = tokenizer.encode("a [b]\n")
    assert [row[1] for row in rows()] == [str(id) for id in ids]
    assert [row[2] for row in rows()] == ["a", "␣", "[", "b", "]", r"\n"]
    assert [int(row[1]) for row in rows("--special")] == tokenizer.encode("a [b]\n", special=True)
    assert [int(row[1]) for row in rows("--chat")] == tokenizer.chat([{"role": "user", "content": "a [b]\n"}])


def test_verify_says_what_agrees(run: Run, tmp_path: Path) -> None:
    golden = GOLDENS / "chatglm3-base"
    ran = run("verify", str(golden))
    assert (ran.status, ran.err) == (0, "")
    assert "1 of 1 agree with their reference" in ran.out
    assert "hidden" in ran.out
    assert run("verify", str(golden), "--tolerance", "1e-20").status == 1
    both = run("verify", str(tmp_path), str(golden))
    assert both.status == 1
    assert "1 of 2 agree" in both.out
    assert both.err.count("\n") == 1


def test_convert_writes_a_checkpoint(run: Run, small: str, tmp_path: Path) -> None:
    assert run("convert", small, str(tmp_path / "new"), "--dtype", "float32").status == 0
    assert run("chat", str(tmp_path / "new"), typed="hello\n") == run("chat", small, typed="hello\n")
    for dtype in ("bfloat16", "bf16"):
        assert run("convert", small, str(tmp_path / dtype), "--dtype", dtype).status == 0
        assert "bfloat16" in (tmp_path / dtype / "config.json").read_text()


def test_quantize_writes_a_checkpoint_that_talks(run: Run, small: str, tmp_path: Path) -> None:
    said = tmp_path / "said.jsonl"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "goodbye"}]
    said.write_text(json.dumps({"messages": messages}) + "\n")
    ways = {
        "plain": (),
        "rows": ("--weights", "int8", "--group", "row", "--asymmetric", "--method", "nearest", "--head"),
        "text": ("--group", "32", "--calibration", str(said)),
    }
    for name, options in ways.items():
        done = run("quantize", small, str(tmp_path / name), *(options or ("--group", "32")))
        assert (done.status, done.out, done.err) == (0, "", f"{tmp_path / name} is written\n")
        assert run("chat", str(tmp_path / name), typed="hello\n").status == 0
        assert "grouped" in run("info", str(tmp_path / name)).out.lower()
        assert (tmp_path / name / "prepacked.safetensors").exists()


def test_prepack_writes_what_quantize_leaves_out(run: Run, small: str, tmp_path: Path) -> None:
    new, file = str(tmp_path / "new"), tmp_path / "new" / "prepacked.safetensors"
    assert run("quantize", small, new, "--group", "32", "--no-prepacked").status == 0
    assert not file.exists()
    for _ in range(2):  # the second in the place of the first
        done = run("prepack", new)
        assert (done.status, done.out, done.err) == (0, "", f"{file} is written\n")
        assert file.exists()


def test_prepack_of_a_hub_id_says_that_it_writes_into_the_cache(
    run: Run, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it is found under the same id, since all look into the same folder."""
    from glm.pretrained import Opened
    from glm.runtime.prepacked import tensors_of

    snapshot = tmp_path / "snapshots" / "main"
    snapshot.parent.mkdir()
    assert run("quantize", small, str(snapshot), "--group", "32", "--no-prepacked").status == 0
    monkeypatch.setattr("glm.hub.download", lambda id, revision, patterns: snapshot)
    done = run("prepack", "someone/something")
    assert (done.status, done.out) == (0, "")
    written, where = done.err.splitlines()
    assert written == f"{snapshot / 'prepacked.safetensors'} is written"
    assert where.startswith("that is in the hub's cache, beside what was fetched of someone/something")
    assert tensors_of(Opened.of("someone/something"))


def test_accuracy_of_text_and_of_random_ids(run: Run, small: str, tmp_path: Path) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "out.json"
    book.write_text("Call me Ishmael. " * 20)
    asked = ("--weights", "int8,int4", "--group", "32,row", "--length", "64", "--texts", "3")
    by_text = run("accuracy", small, "--text", str(book), "--calibration", str(book), *asked, "--out", str(out))
    assert by_text.status == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(by_text.out.splitlines()) - 1 == 2 + 2 * 2 * 3
    assert [row["weights"] for row in rows[:3]] == ["as stored", "bf16", "int8"]
    assert all(len(row["layers"]) == 2 for row in rows)
    assert (rows[0]["KL"], rows[0]["agreement"]) == (0.0, 1.0)
    assert max(row["KL"] for row in rows if row["weights"] == "int8") < min(
        row["KL"] for row in rows if row["weights"] == "int4"
    )
    at_random = run("accuracy", small, *asked, "--asymmetric")
    assert len(at_random.out.splitlines()) - 1 == 2 + 2 * 2 * 2 * 3


def test_synthesize_writes_a_checkpoint(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "random"
    calls = []
    monkeypatch.setattr("glm.synthesize.synthesize", lambda *args, **options: calls.append((args, options)))
    assert run("synthesize", "chatglm3-6b", "--out", str(folder), "--seed", "5", "--layers", "2").status == 0
    [(arguments, options)] = calls
    assert arguments == ("chatglm3-6b", folder)
    assert (options["seed"], options["layers"]) == (5, 2)


@pytest.mark.parametrize(
    ("free", "dtype"), [(1 << 40, "float32"), (500_000, "float32"), (250_000, "bfloat16"), (None, "float32")]
)
def test_float16_is_for_gpus(small: str, monkeypatch: pytest.MonkeyPatch, free: int | None, dtype: str) -> None:
    found = None if free is None else glm.memory.Found(free, "available")
    monkeypatch.setattr("glm.memory.memory_found", lambda device: found)
    total = (Path(small) / "model.safetensors").stat().st_size
    assert 250_000 < 4 * total <= 500_000
    assert cli.usual_dtype(Path(small), total, torch.device("cpu")) == getattr(torch, dtype)
    assert cli.usual_dtype(Path(small), total, torch.device("cuda")) is None


def test_what_is_laid_out_beforehand_is_not_counted_as_weights(
    run: Run, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cli, "usual_dtype", lambda folder, total, device: asked.append(total))
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    (folder / "prepacked.safetensors").write_bytes(bytes(1000))
    assert run("complete", "hello", "-s", str(folder), "--max-new-tokens", "1").status == 0
    assert asked == [(folder / "model.safetensors").stat().st_size]


# -- tiny-glm ----------------------------------------------------------------------------------------------------------

needs_tiny = pytest.mark.skipif(not (TINY / "config.json").exists(), reason="weights/tiny-glm is not trained yet")


@needs_tiny
def test_tiny_glm_answers_through_the_pipe() -> None:
    text = (TINY / "glossary.md").read_text()
    pairs = re.findall(r"^(?:Q: |问：)(.+)\n(?:A: |答：)(.+)$", text, re.MULTILINE)[::40]
    ran = process("chat", typed="".join(f"{question}\n" for question, _ in pairs))
    assert ran.out.splitlines() == [answer for _, answer in pairs]


@needs_tiny
def test_embedded_is_the_default(run: Run) -> None:
    assert glm.embedded() == TINY
    assert "generation chatglm" in run("info").out
    assert json.loads((TINY / "config.json").read_text())["model_type"] == "chatglm"


# -- trace -----------------------------------------------------------------------------------------------------------


def test_trace_prints_a_table_a_page_and_json(run: Run, small: str, tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    ran = run("trace", "A [MASK] here", "-s", small, "--only", "block 1 / attention / *", "--html", str(page))
    assert ran.status == 0, ran.err
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["block", "1"] in lines
    assert [line[0] for line in lines if line[1:2] == ["1"] and line[0] != "block"][:3] == ["input", "qkv", "q"]
    assert [line[1] for line in lines if line[2:4] == ["/", "stream"]] == ["0", "1"], "what each layer would say"
    assert ran.err.strip() == f"{page} is written"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")

    ran = run("trace", "A [MASK] here", "-s", small, "--json", "--new", "2")
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert told[0]["name"] == "ids"
    assert told[0]["shape"] == [1, len(Tokenizer.from_pretrained(small).infill("A [MASK] here")) + 2]
    assert told[-1]["name"] == "logits"


def test_trace_says_what_is_wrong(run: Run, small: str, tmp_path: Path) -> None:
    ran = run("trace", "A", "-s", small, "--only", "layer 0")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("glm: no step's name matches 'layer 0'")
    ran = run("trace", "A", "-s", small, "--html", str(tmp_path / "nowhere" / "trace.html"))
    assert ran.status == 1
    assert "cannot be written" in ran.err
