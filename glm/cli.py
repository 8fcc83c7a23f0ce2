"""The command line, `glm`: one command a function, a few lines around what the package does anyway.

What a program may want to read goes to standard output; progress, greetings and errors go to standard error. In a
pipe there are no colours, no boxes and no columns cut to a width. An error is one line that says what to do, with
exit status 1, or 2 where the command line itself was wrong; after Ctrl-C it is 130.

torch is imported by the commands that compute, not here, so that `glm --help` answers at once.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from glm.bench.command import app as bench
from glm.errors import GLMError, ParallelError

if TYPE_CHECKING:
    import torch

    from glm.grouped import Grouped
    from glm.model import GLM
    from glm.runtime import Engine
    from glm.talk import Talk
    from glm.tokenizer import Tokenizer

app = typer.Typer(
    name="glm",
    help="The GLM family of language models in readable PyTorch, loading the official checkpoints without remote code.",
    epilog="Example: glm chat",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench)

Loaded = TypeVar("Loaded")
Refusal = typer.BadParameter.__mro__[2]  # what any fault in a command line is raised as, by click or typer's own copy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of `sys.argv`, and return its exit status."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return run(arguments)
    from glm.parallel import together

    return together(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Run one command; its exit status."""
    try:
        return int(app(arguments, prog_name="glm", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except GLMError as error:
        return complain(str(error))
    except Exception as error:
        if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):  # torch's own; it may not be imported
            return complain("out of memory; try fewer tokens, a smaller --dtype or another --device")
        if not isinstance(error, Refusal):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "glm")
        return complain(f"{error.format_message().rstrip('.')}; try `{command} --help`", status=2)  # type: ignore[attr-defined]


def complain(message: str, status: int = 1) -> int:
    """One line to standard error."""
    print("glm:", " ".join(message.split()), file=sys.stderr)
    return status


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Print the version, or the help where no command is named."""
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            print(installed("glm-torch"))
        except PackageNotFoundError:  # run from a folder that merely lies there
            print("not installed")
    elif context.invoked_subcommand is None:
        print(context.get_help())


# -- what commands have in common ------------------------------------------------------------------------------------

DTYPES = {
    **{name: name for name in ("float64", "float32", "bfloat16", "float16")},
    **{"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}


def dtype_name(text: str) -> str:
    """What torch calls a dtype; BadParameter for none."""
    if text not in DTYPES:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[text]


def argument(metavar: str, help: str, default: str | bool = False) -> Any:
    """A positional argument; `default` is how to call its default."""
    return typer.Argument(metavar=metavar, help=help, show_default=default)


def option(metavar: str, help: str, default: str | bool = True, *names: str, parser: Any = None) -> Any:
    """A named one; without `names` it has that of its parameter."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=default, parser=parser)


TINY = "the embedded tiny-glm"
Source = Annotated[str, argument("SOURCE", "Checkpoint folder or hub id.", TINY)]
SourceOption = Annotated[str, option("SOURCE", "Checkpoint folder or hub id.", TINY, "--source", "-s")]
Text = Annotated[str, argument("TEXT", "The text; - reads it from standard input.")]
Temperature = Annotated[float, option("T", "0 is greedy; official demos sample at 0.8 to 0.95.")]
TopP = Annotated[float, option("P", "Sample among the likeliest tokens of this probability.")]
TopK = Annotated[int, option("K", "Sample among the k likeliest tokens; 0 is all.")]
Penalty = Annotated[float, option("R", "Over 1, words already used become less likely.")]
Seed = Annotated[int | None, option("N", "Same seed, same text.", "random")]
Length = Annotated[int, option("N", "Tokens to write at most.")]
Dtype = Annotated[
    str | None,
    option("DTYPE", "float32, bfloat16, float16 or float64.", "that of the files", parser=dtype_name),
]
Device = Annotated[str | None, option("DEVICE", "cpu, cuda, cuda:1, …", "cuda if there is one")]
ByEngine = Annotated[
    bool | None,
    typer.Option(
        "--engine/--no-engine", help="Fused kernels on a static cache; by default on a GPU.", show_default=False
    ),
]
Room = Annotated[int | None, option("N", "Tokens that the engine has room for.", "those of the model, at most 8192")]
Draft = Annotated[int, option("N", "Guess so many tokens ahead, by what followed earlier in the text.")]


def opened(source: str, dtype: str | None, device: str | None) -> "tuple[GLM, Tokenizer]":
    """The model and the tokenizer of a folder or hub id, of tiny-glm for an empty one."""
    from glm.parallel import mesh_of_all
    from glm.pretrained import load

    return loaded(
        source, dtype, device, lambda *of, device, **how: load(*of, device=device, mesh=mesh_of_all(device), **how)
    )


def author(
    source: str, dtype: str | None, device: str | None, engine: bool | None, room: int | None = None, draft: int = 0
) -> "tuple[GLM | Engine, Tokenizer, dict[str, Any]]":
    """Who is to write, and what to tell them besides: an engine on a GPU or where it is asked for, else the model.

    A model dealt out to several processes writes by itself unless told otherwise.
    """
    from glm.drafting import PromptLookup

    drafter = PromptLookup(draft) if draft else None
    if engine is None:
        engine = placed(device).type == "cuda" and os.environ.get("WORLD_SIZE", "1") == "1"
    if not engine:
        return *opened(source, dtype, device), {"draft": drafter} if drafter else {}
    from glm.runtime import Engine

    return *loaded(source, dtype, device, partial(Engine.from_pretrained, max_length=room, draft=drafter)), {}


def loaded(
    source: str, dtype: str | None, device: str | None, load: "Callable[..., Loaded]"
) -> "tuple[Loaded, Tokenizer]":
    """What `load` makes of a folder or hub id, and the tokenizer; with a bar where it takes a while."""
    import torch

    from glm.hub import PREPACKED, fetch
    from glm.parallel import agreed
    from glm.progress import progress_bar
    from glm.tokenizer import Tokenizer

    source, place = source or embedded(), placed(device)
    folder = fetch(source)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != PREPACKED)
    if total < 64 << 20:
        torch.set_num_threads(1)  # sharing so little work takes longer than doing it
    kind = getattr(torch, dtype) if dtype else agreed(usual_dtype(folder, total, place))
    tokenizer = Tokenizer.from_pretrained(source)
    with progress_bar(f"loading {called(source)}", total, quiet=total < 1 << 30) as progress:
        return load(source, dtype=kind, device=place, progress=progress), tokenizer


def alone(command: str) -> None:
    """Raise ParallelError where torchrun started this several times."""
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ParallelError(f"{command} is the work of one process, not of {count}: run it without torchrun")


def usual_dtype(folder: Path, total: int, device: "torch.device") -> "torch.dtype | None":
    """That of the files (None), but not float16 on the CPU, which is no good at it.

    There it is float32 where `total` bytes of float16 become no more than half of the free memory, else bfloat16.
    """
    import torch

    from glm.fields import read_object
    from glm.info import stored_dtype
    from glm.memory import memory_found

    if device.type != "cpu" or stored_dtype(read_object(folder / "config.json")) != torch.float16:
        return None
    found = memory_found(device)
    return torch.float32 if found is None or 4 * total <= found.bytes else torch.bfloat16


def embedded() -> str:
    """The folder of tiny-glm."""
    from glm.packaged import embedded

    return str(embedded())


def called(source: str) -> str:
    """A source as briefly as it can be said."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def placed(device: str | None) -> "torch.device":
    """The device asked for, by default a GPU if there is one. Raises GLMError where it is not there."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise GLMError(f"there is no device {device!r} ({str(error).splitlines()[0]}); try --device cpu") from None


def given(text: str) -> str:
    """A text argument, or standard input without its last newline."""
    return sys.stdin.read().removesuffix("\n") if text == "-" else text


def terminal() -> bool:
    """Whether a person sits in front of this."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def columns(*names: str) -> Table:
    """An empty table; names that end in > are those of columns of numbers."""
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", no_wrap=True)
    return table


def show(what: RenderableType) -> None:
    """Print a table or a report: in a terminal as wide as that; in a pipe as wide as it takes, lines ending clean."""
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    with screen.capture() as printed:
        screen.print(what)
    text = printed.get()
    print(text if sys.stdout.isatty() else re.sub(" +$", "", text, flags=re.MULTILINE), end="")


def note(text: str) -> None:
    """A line for the person at the keyboard."""
    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Something to look at meanwhile, where there is somebody to look."""
    screen = Console(stderr=True)
    with screen.status(escape(text)) if screen.is_terminal else nullcontext():
        yield


def write(pieces: Iterable[str]) -> None:
    """Print text as it comes, and a newline after it; on a terminal without lines that break inside a word."""
    for piece in wrapped(pieces, get_terminal_size().columns - 1) if sys.stdout.isatty() else pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def wrapped(pieces: Iterable[str], width: int) -> Iterator[str]:
    """The text of `pieces` word by word, with a newline before each word that would reach past `width` columns.

    A wide character, such as a Chinese one, is a word of its own.
    """
    column, word = 0, ""
    for sign in chain.from_iterable(chain(pieces, "\0")):
        if word and (sign in " \n\0" or cell_len(sign) > 1 or cell_len(word[0]) > 1):
            if column and column + cell_len(word) > width:
                yield "\n"
                column = 0
            yield word
            column, word = column + cell_len(word), ""
        if sign in " \n":
            yield sign
            column = 0 if sign == "\n" else column + 1
        else:
            word += sign


# -- talking ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: glm chat THUDM/chatglm3-6b --dtype bfloat16 --temperature 0.8 --top-p 0.8")
def chat(
    source: Source = "",
    system: Annotated[str | None, option("TEXT", "Instructions that stand before the conversation.")] = None,
    rounds: Annotated[
        int | None,
        option("N", "Earlier rounds to show the model.", "what the checkpoint says, else all that fit"),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_new_tokens: Length = 1024,
    dtype: Dtype = None,
    device: Device = None,
    engine: ByEngine = None,
    room: Room = None,
    draft: Draft = 0,
) -> None:
    """Talk with a model, a question a line.

    Questions can come from a pipe; then the output holds the answers and nothing else.
    """
    writer, tokenizer, how = author(source, dtype, device, engine, room, draft)
    from glm.talk import Talk

    name = called(source or embedded())
    talk = Talk(
        writer, tokenizer, system=system, max_new_tokens=max_new_tokens,
        rounds=tokenizer.rounds if rounds is None else rounds,
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed, **how,
    )  # fmt: skip
    if terminal():
        at_the_keyboard(talk, name)
    else:
        with suppress(EOFError):
            for line in sys.stdin:
                if question := asked(talk, line):
                    answer(talk, question)


def at_the_keyboard(talk: "Talk", name: str) -> None:
    """Ask until the person leaves. Ctrl-C stops an answer, or drops a line half typed."""
    from glm.info import parameters

    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its editing and history)

    model, dtype = talk.model, str(talk.model.dtype).removeprefix("torch.")
    note(f"{name} · {parameters(model.spec):,} parameters · {dtype} on {model.device}")
    note("/clear forgets · /exit or Ctrl-D leaves · Ctrl-C stops an answer")
    while True:
        try:
            question = asked(talk, input("\n› "))
            if question:
                answer(talk, question)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print()
        except GLMError as error:
            complain(str(error))


def asked(talk: "Talk", line: str) -> str:
    """The question in a line; empty where there is none, or where the line was a command, which is then obeyed."""
    line = line.strip()
    if line == "/exit":
        raise EOFError
    if line == "/clear":
        talk.clear()
        if terminal():
            note("(forgotten)")
    elif re.fullmatch(r"/[a-z]*", line):
        note("(the commands are /clear and /exit)")
    else:
        return line
    return ""


def answer(talk: "Talk", question: str) -> None:
    """Print the answer, and what the person should know about it."""
    forgotten = talk.forgotten
    with closing(talk.ask(question)) as pieces:
        write(pieces)
    if talk.forgotten > forgotten:
        note(f"(the first rounds are forgotten: the model reads {talk.model.context:,} tokens)")
    if talk.cut:
        note("(cut here; more with --max-new-tokens)")


@app.command(epilog="Example: glm complete 'A mixture of experts is'")
def complete(
    text: Text,
    source: SourceOption = "",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_new_tokens: Length = 128,
    dtype: Dtype = None,
    device: Device = None,
    engine: ByEngine = None,
    room: Room = None,
    draft: Draft = 0,
) -> None:
    """Write on where a text stops.

    Prints only what is new.
    """
    text = given(text)
    writer, tokenizer, how = author(source, dtype, device, engine, room, draft)
    from glm.talk import spelt, written

    prompt = tokenizer.continuation(text)
    left = min(max_new_tokens, writer.context - len(prompt))
    if left < 1:
        raise GLMError(f"the text has {len(prompt):,} tokens and the model takes {writer.context:,}: shorten it")
    ids = written(
        writer, tokenizer, prompt, max_new_tokens=left,
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed, **how,
    )  # fmt: skip
    write(spelt(tokenizer, ids))


@app.command(epilog="Example: glm infill 'GLM is taught with [MASK] instead.'")
def infill(
    text: Text,
    source: SourceOption = "",
    max_new_tokens: Length = 128,
    dtype: Dtype = None,
    device: Device = None,
    engine: ByEngine = None,
) -> None:
    """Fill every [MASK] of a text, which is what GLM was made for.

    Prints the whole text.
    """
    text = given(text)
    writer, tokenizer, _ = author(source, dtype, device, engine)
    from glm.infilling import fill

    write([fill(writer, tokenizer, text, max_new_tokens=max_new_tokens).text])


# -- looking ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: glm info chatglm3-6b --context 8192 --weights int4")
def info(
    source: Annotated[str, argument("SOURCE", "Checkpoint folder, hub id, or a name from `glm releases`.", TINY)] = "",
    context: Annotated[int | None, option("N", "Tokens to leave room for.", "all the model takes")] = None,
    weights: Annotated[str, option("STORAGE", "stored (as in the files), fp32, bf16, int8 or int4.")] = "stored",
    device: Device = None,
) -> None:
    """What a model is made of, and whether it fits into memory.

    Reads no weights: of a hub id, only the config is fetched. int8 and int4 are the matrices of the blocks in groups
    of 128, as `glm quantize` writes them, and the rest in bfloat16; "stored" is what the files have.
    """
    from glm.info import describe
    from glm.memory import size

    with busy("counting …"):
        about = describe(source or embedded(), context, weights, device=placed(device))
    need, found = about.need, about.found
    published = f", {about.release.hub}, {about.release.year}" if about.release else ""
    print(f"{called(about.source)} (generation {about.generation}{published})\n")
    print(f"{about.spec}\n")
    active = f" ({about.active:,} active for a token)" if about.active < about.parameters else ""
    print(f"parameters  {about.parameters:,}{active}")
    print(f"cache       {need.per_token:,} bytes a token, {size(need.cache)} for {need.context:,} tokens")
    print(f"memory      {'unknown' if found is None else f'{size(found.bytes)} {found.where}'}\n")

    table = columns("weights as", "bytes>", "weights>", "cache>", "working>", "together>", "fits")
    for way, takes in about.needs.items():
        parts = (size(part) for part in (takes.weights, takes.cache, takes.working, takes.bytes))
        fits = {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}[about.fits(way)]
        table.add_row(way, f"{takes.weights:,}", *parts, fits, style="bold" if way == about.storage else "")
    show(table)


@app.command(epilog="Example: glm releases")
def releases() -> None:
    """The published checkpoints, with their sizes and the card they fit.

    Columns: parameters (all/active) in 10⁹; weights in GB as bfloat16 and with the matrices of the blocks in int4
    (groups of 128, 0.516 B a weight, as in `glm info`); KiB of cache a token; context (k = 1024); and the smallest
    card, in GB of memory, that holds one sequence of 8k tokens. `glm info NAME` says all of one.
    """
    from glm.cards import HEAD, family_table

    table = columns("release\n", *(f"{above}\n{below}>" for above, below in HEAD))
    with busy("counting …"):
        for line in family_table():
            table.add_row(line.release.name, *line.cells)
    show(table)


@app.command(epilog="Example: glm diff chatglm3-6b glm-4-9b")
def diff(
    before: Annotated[str, argument("A", "A name from `glm releases`, a checkpoint folder or a hub id.")],
    after: Annotated[str, argument("B", "Another one.")],
) -> None:
    """What changed from one model to another, field by field.

    Reads no weights. Equal blocks are compared once.
    """
    from glm.changes import diff as compare

    found = compare(before, after)
    if sys.stdout.isatty():
        show(found)
    else:
        print(found)


@app.command(epilog="Example: glm tokenize 'General language model' --special")
def tokenize(
    text: Text,
    source: SourceOption = "",
    special: Annotated[bool, typer.Option("--special", help="With the tokens the release adds to a text.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="As a question, in the release's prompt.")] = False,
) -> None:
    """The pieces and ids that a model reads a text as."""
    from glm.tokenizer import Tokenizer

    text = given(text)
    tokenizer = Tokenizer.from_pretrained(source or embedded())
    ids = tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text, special=special)
    table = columns("token>", "id>", "piece")
    for number, id in enumerate(ids, 1):
        table.add_row(str(number), str(id), escape(visible(tokenizer.piece(id))))
    show(table)


@app.command(epilog="Example: glm trace 'Attention is [MASK].' --only 'block 0 / *' --html trace.html")
def trace(
    text: Text,
    source: SourceOption = "",
    chat: Annotated[bool, typer.Option("--chat", help="As a question, in the release's prompt.")] = False,
    new: Annotated[int, option("N", "Tokens to write first, greedily, and trace as well.")] = 0,
    only: Annotated[str, option("PATTERN", "The steps whose names match, such as 'block 0 / *'.")] = "*",
    html: Annotated[Path | None, option("FILE", "Write a page to step through, too.", "no")] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON object a step instead of a table.")] = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Every tensor of one forward pass: its name, equation, shape and size.

    A text with a blank is read as by `glm infill`, another as by `glm complete`. Then what the model would say after
    each layer: the final norm and the head, applied to the stream there.
    """
    alone("trace")
    text = given(text)
    model, tokenizer = opened(source, dtype, device)
    from glm.generation import generate
    from glm.tracing import asked, lens_table
    from glm.tracing import trace as traced

    ids = tokenizer.chat([{"role": "user", "content": text}]) if chat else asked(tokenizer, text)
    if new:
        ids += generate(model, [ids], max_new_tokens=new)[0]
    with busy("tracing …"):
        found = traced(model, ids, tokenizer)
    if html is not None:
        found.write(html)
        note(f"{html} is written")
    if json:
        print(found.only(only).json())
    else:
        show(found.only(only))
        show(lens_table(found))


def visible(piece: str) -> str:
    """A piece with its spaces as ␣, and with every other sign that cannot be seen written out."""
    return "".join("␣" if sign == " " else sign if sign.isprintable() else repr(sign)[1:-1] for sign in piece)


@app.command(epilog="Example: glm verify tests/goldens/*")
def verify(
    folders: Annotated[list[str], argument("FOLDER", "A small checkpoint and what the official code made of it.")],
    dtype: Annotated[str, option("DTYPE", "float64, float32, bfloat16 or float16.", parser=dtype_name)] = "float64",
    device: Annotated[str, option("DEVICE", "cpu, cuda, …")] = "cpu",
    tolerance: Annotated[
        float | None, option("X", "Largest error of the logits over their rms.", "1e-9 in float64")
    ] = None,
    engine: Annotated[bool, typer.Option("--engine", help="Hold the engine to them as well.")] = False,
) -> None:
    """Compare models with reference outputs, layer by layer.

    The exit status is 1 if anything is over the tolerance.
    """
    import torch

    from glm.parallel import mesh_of_all
    from glm.verify import verify as held

    place, over = placed(device), 0
    mesh = mesh_of_all(place)
    for folder in folders:
        try:
            with busy(f"verifying {called(folder)} …"):
                kind = getattr(torch, dtype)
                report = held(folder, dtype=kind, device=place, tolerance=tolerance, mesh=mesh, engine=engine)
            show(report)
            over += not report.ok
        except GLMError as error:
            complain(str(error))
            over += 1
    print(f"{len(folders) - over} of {len(folders)} agree with their reference")
    if over:
        raise typer.Exit(1)


# -- making ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: glm convert chatglm-6b chatglm-6b-safetensors --dtype bf16")
def convert(
    source: Annotated[str, argument("SRC", "Checkpoint folder or hub id; .bin files are welcome.")],
    destination: Annotated[Path, argument("DST", "The folder to create.")],
    dtype: Annotated[
        str | None, option("DTYPE", "float32, bfloat16 or float16.", "as it is", parser=dtype_name)
    ] = None,
    names: Annotated[str | None, option("NAMES", "Tensor names of GLM-4-9B: hf or chatglm.", "as they are")] = None,
) -> None:
    """Rewrite a checkpoint as safetensors.

    The folder appears complete or not at all.
    """
    alone("convert")
    from glm.convert import convert as rewrite

    short = {"bfloat16": "bf16", "float16": "fp16"}
    rewrite(source, destination, dtype=dtype and short.get(dtype, dtype), names=names)
    note(f"{destination} is written")


@app.command(epilog="Example: glm quantize chatglm3-6b chatglm3-int4 --weights int4 --group 128")
def quantize(
    source: Annotated[str, argument("SRC", "Checkpoint folder or hub id.")],
    destination: Annotated[Path, argument("DST", "The folder to create.")],
    weights: Annotated[str, option("WEIGHTS", "int4 or int8.")] = "int4",
    group: Annotated[str, option("N", "Columns that share a scale: 32, 64, 128, … or row.")] = "128",
    method: Annotated[
        str | None, option("METHOD", "nearest, search or gptq.", "gptq with --calibration, else search")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With zero points.")] = False,
    calibration: Annotated[
        Path | None, option("FILE", "Text, or .jsonl conversations, to choose integers by.", "none")
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="The head too. The embedding stays as it is.")] = False,
    prepacked: Annotated[bool, typer.Option("--prepacked/--no-prepacked", help="Then as `glm prepack` does.")] = True,
) -> None:
    """Rewrite a checkpoint with integer weights.

    In the compressed-tensors layout, which other engines read as well. The folder appears complete or not at all.
    """
    from glm.compress import compress
    from glm.runtime.prepacked import prepack as lay_out

    chosen = method or ("search" if calibration is None else "gptq")
    compress(
        source, destination, form(weights, group, not asymmetric), method=chosen, calibration=calibration, head=head
    )
    if prepacked:
        lay_out(destination)
    note(f"{destination} is written")


@app.command(epilog="Example: glm prepack chatglm2-6b-int4")
def prepack(
    source: Annotated[str, argument("SOURCE", "Folder or hub id of a checkpoint with integer weights.")],
) -> None:
    """Lay integer weights out for the kernels, once, so that the engine starts sooner on a GPU.

    Writes prepacked.safetensors beside the checkpoint, as large as its integers: of a hub id into the cache of the hub
    on this machine, where the engine looks for it under that id. `glm quantize` does so by itself.
    """
    alone("prepack")
    from glm.runtime.prepacked import prepack as lay_out

    note(f"{lay_out(source)} is written")
    if not Path(source).expanduser().is_dir():
        note(f"that is in the hub's cache, beside what was fetched of {source}; deleting that deletes it too")


def form(weights: str, group: str, symmetric: bool) -> "Grouped":
    """Integers as they are asked for; BadParameter for none."""
    from glm.grouped import Grouped

    if weights not in ("int4", "int8"):
        raise typer.BadParameter(f"{weights!r} is not one of int4, int8.")
    if group != "row" and not (group.isdecimal() and int(group) >= 8):
        raise typer.BadParameter(f"{group!r} is no group: take 32, 64, 128 or row.")
    return Grouped(int(weights.removeprefix("int")), None if group == "row" else int(group), symmetric)


@app.command(epilog="Example: glm accuracy chatglm3-6b --text book.txt --weights int4 --group 128,row")
def accuracy(
    source: Annotated[str, argument("SOURCE", "Checkpoint folder or hub id.")],
    text: Annotated[Path | None, option("FILE", "Text, or .jsonl conversations, to predict.", "random ids")] = None,
    calibration: Annotated[
        Path | None, option("FILE", "Other text, for gptq.", "random ids if the text is, else none: no gptq")
    ] = None,
    weights: Annotated[str, option("LIST", "int4, int8 or both.")] = "int8,int4",
    group: Annotated[str, option("LIST", "Columns that share a scale.")] = "32,64,128,row",
    length: Annotated[int, option("N", "Tokens of a text at most.")] = 256,
    texts: Annotated[int, option("N", "Texts at most, of either file.")] = 32,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With zero points as well.")] = False,
    out: Annotated[Path | None, option("FILE", "Write the figures as JSON too.", "no")] = None,
) -> None:
    """What integer weights cost: error of every layer, KL of the logits, perplexity.

    bfloat16, then every method and group size, against the weights as they are stored, computed in float32.
    """
    import torch

    from glm.accuracy import measure, variants, weighed
    from glm.checkpoint import write_object
    from glm.hub import fetch
    from glm.progress import progress_bar
    from glm.texts import given_or_random

    folder = fetch(source)
    read, learnt = given_or_random(folder, text, calibration, length, texts)
    kinds = (True, False)[: 1 + asymmetric]
    forms = [form(w, g, kind) for w in weights.split(",") for g in group.split(",") for kind in kinds]
    ways = variants(forms, ("nearest", "search", *(("gptq",) if learnt else ())))
    if (total := weighed(folder)) < 64 << 20:
        torch.set_num_threads(1)  # as for `opened`
    with progress_bar("measuring", total * len(ways)) as progress:
        results = measure(folder, read, ways, learnt, progress)
    table = columns("weights", "group>", "", "method", "last layer>", "KL>", "perplexity>", "agreement>")
    for row in (result.row() for result in results):
        kind = {True: "symmetric", False: "asymmetric", None: ""}[row["symmetric"]]
        figures = f"{row['layers'][-1]:.1e}", f"{row['KL']:.1e}", f"{row['perplexity']:.4f}", f"{row['agreement']:.2%}"
        table.add_row(row["weights"], row["group"], kind, row["method"], *figures)
    show(table)
    if out is not None:
        write_object(out, {"rows": [result.row() for result in results]})


@app.command(epilog="Example: glm synthesize chatglm3-6b --out /tmp/chatglm3-random")
def synthesize(
    release: Annotated[str, argument("RELEASE", "A name from `glm releases`.")],
    out: Annotated[Path, option("DIR", "The folder to create.")],
    seed: Annotated[int, option("N", "Of the random weights.")] = 0,
    layers: Annotated[int | None, option("N", "Make only so many layers.", "all")] = None,
    weights: Annotated[str | None, option("WEIGHTS", "int4 or int8.", "as the release has them")] = None,
    group: Annotated[str, option("N", "Columns that share a scale of integers, or row.")] = "128",
) -> None:
    """Write a checkpoint of random weights, to measure with.

    Files, names and shapes are those of the release.
    """
    alone("synthesize")
    from dataclasses import replace

    from glm import family
    from glm.info import weight_bytes
    from glm.progress import progress_bar
    from glm.synthesize import synthesize as make

    chosen = family.release(release)
    kind = None if weights is None else form(weights, group, symmetric=True)
    spec = replace(chosen.spec, blocks=chosen.spec.blocks[:layers], weights=kind or chosen.spec.weights)
    total = weight_bytes(spec, chosen.dtype)
    with progress_bar(f"writing {out}", total) as progress:
        make(release, out, seed=seed, layers=layers, weights=kind, progress=progress)
    note(f"{out} is written")


@app.command(epilog="Example: glm train weights/tiny-glm/recipe.toml")
def train(
    recipe: Annotated[Path, argument("RECIPE", "A TOML file: the model, its data, and how long.")],
) -> None:
    """Train a small model from nothing.

    A run that was interrupted goes on where it stopped.
    """
    from glm.training import train as run

    run(recipe)
