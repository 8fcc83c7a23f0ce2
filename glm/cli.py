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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glm.errors import GLMError

if TYPE_CHECKING:
    import torch

    from glm.model import GLM
    from glm.talk import Talk
    from glm.tokenizer import Tokenizer

app = typer.Typer(
    name="glm",
    help="The GLM family of language models in readable PyTorch, loading the official checkpoints without remote code.",
    epilog="Example: glm chat",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Refusal = typer.BadParameter.__mro__[2]  # what any fault in a command line is raised as, by click or typer's own copy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of `sys.argv`, and return its exit status."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
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
        if not isinstance(error, Refusal):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "glm")
        return complain(f"{error.format_message()} Try `{command} --help`.", status=2)  # type: ignore[attr-defined]


def complain(message: str, status: int = 1) -> int:
    """One line to standard error."""
    print("glm:", " ".join(message.split()), file=sys.stderr)
    return status


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("glm-torch"))
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


TINY = "the embedded tiny-glm"
Source = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", show_default=TINY)]
SourceOption = Annotated[str, typer.Option("--source", "-s", help="Checkpoint folder or hub id.", show_default=TINY)]
Text = Annotated[str, typer.Argument(help="The text; - reads it from standard input.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        parser=dtype_name,
        metavar="DTYPE",
        help="float32, bfloat16, float16 or float64.",
        show_default="that of the files",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="cuda where there is one, else cpu")
]
Temperature = Annotated[
    float, typer.Option(min=0, help="0 always takes the likeliest token; the official demos use 0.8 to 0.95.")
]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens; 0 is all.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Over 1 makes what was said before less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed samples the same text.", show_default="random")]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")]


def opened(source: str, dtype: str | None, device: str | None) -> "tuple[GLM, Tokenizer]":
    """The model and the tokenizer of a folder or hub id, of tiny-glm for an empty one."""
    import torch

    from glm.model import GLM
    from glm.tokenizer import Tokenizer

    source = source or embedded()
    with busy(f"loading {called(source)} …"):
        tokenizer = Tokenizer.from_pretrained(source)
        model = GLM.from_pretrained(source, dtype=getattr(torch, dtype) if dtype else None, device=placed(device))
    return model, tokenizer


def embedded() -> str:
    """The folder of tiny-glm."""
    from glm.embedded import embedded

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


def console() -> Console:
    """Standard output, as wide as the terminal, or as wide as it takes."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def columns(*names: str) -> Table:
    """An empty table; names that end in > are those of columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", no_wrap=True)
    return table


def note(text: str) -> None:
    """A line for the person at the keyboard."""
    Console(stderr=True, highlight=False).print(text, style="dim", markup=False)


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Something to look at meanwhile, where there is somebody to look."""
    screen = Console(stderr=True)
    with screen.status(escape(text)) if screen.is_terminal else suppress():
        yield


def write(pieces: Iterable[str]) -> None:
    """Print text as it comes, and a newline after it."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


# -- talking ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: glm chat THUDM/chatglm3-6b --dtype bfloat16 --temperature 0.8 --top-p 0.8")
def chat(
    source: Source = "",
    system: Annotated[str | None, typer.Option(help="Instructions that stand before the conversation.")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_new_tokens: Length = 1024,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Talk with a model: a question a line. From a pipe, too: then there is nothing on the output but the answers."""
    model, tokenizer = opened(source, dtype, device)
    from glm.talk import Talk

    talk = Talk(
        model, tokenizer, system=system, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    if sys.stdin.isatty() and sys.stdout.isatty():
        at_the_keyboard(talk, called(source or embedded()))
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

    note(
        f"{name} · {parameters(talk.model.spec):,} parameters · {str(talk.model.dtype).removeprefix('torch.')} on {talk.model.device}"
    )
    note("/clear forgets the conversation · /exit or Ctrl-D leaves · Ctrl-C stops an answer")
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
        note(f"(the first rounds are forgotten: the model reads {talk.model.spec.context:,} tokens)")
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
) -> None:
    """Write on where a text stops. Prints only what is new."""
    text = given(text)
    model, tokenizer = opened(source, dtype, device)
    from glm.generation import stream

    prompt = tokenizer.encode(text, special=True)
    room = min(max_new_tokens, model.spec.context - len(prompt))
    if room < 1:
        raise GLMError(f"the text has {len(prompt):,} tokens and the model takes {model.spec.context:,}: shorten it")
    said = tokenizer.stream(special=False)
    ids = stream(
        model, prompt, max_new_tokens=room, stop=tokenizer.stop,
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    write(map(said.put, ids))
    print(said.end())


@app.command(epilog="Example: glm infill 'GLM is taught with [MASK] instead.'")
def infill(
    text: Text,
    source: SourceOption = "",
    max_new_tokens: Length = 128,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Fill every [MASK] of a text, which is what GLM was made for. Prints the whole text."""
    text = given(text)
    model, tokenizer = opened(source, dtype, device)
    from glm.infilling import fill

    console().print(fill(model, tokenizer, text, max_new_tokens=max_new_tokens), markup=False, soft_wrap=True)


# -- looking ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: glm info chatglm3-6b --context 8192 --weights int4")
def info(
    source: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub id, or a name from `glm releases`.", show_default=TINY)
    ] = "",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens to leave room for.", show_default="all the model takes")
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="STORAGE", help="stored (as in the files), fp32, bf16, int8 or int4.")
    ] = "stored",
    device: Device = None,
) -> None:
    """What a model is made of and what it asks of memory, before anything is loaded."""
    from glm.info import describe
    from glm.memory import size

    with busy("counting …"):
        about = describe(source or embedded(), context, weights, device=placed(device))
    screen, need, found = console(), about.need, about.found
    published = f", {about.release.hub}, {about.release.year}" if about.release else ""
    screen.print(f"{called(about.source)} (generation {about.generation}{published})\n", markup=False)
    screen.print(f"{about.spec}\n", markup=False)
    screen.print(f"parameters  {about.parameters:,}")
    screen.print(f"cache       {need.per_token:,} bytes a token, {size(need.cache)} for {need.context:,} tokens")
    screen.print(f"memory      {'unknown' if found is None else f'{size(found.bytes)} {found.where}'}\n")

    table = columns("weights as", "bytes>", "weights>", "cache>", "working>", "together>", "fits")
    for way, takes in about.needs.items():
        parts = (size(part) for part in (takes.weights, takes.cache, takes.working, takes.bytes))
        fits = {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}[about.fits(way)]
        table.add_row(way, f"{takes.weights:,}", *parts, fits, style="bold" if way == about.storage else "")
    screen.print(table)


@app.command(epilog="Example: glm releases")
def releases() -> None:
    """The published checkpoints whose numbers are known without a file: `glm info NAME` says more of each."""
    from glm import family
    from glm.info import STORAGES, need, parameters
    from glm.memory import size

    table = columns("release", "year", "parameters>", "bf16>", "cache/token>", "context>")
    with busy("counting …"):
        for name, release in family.releases().items():
            takes = need(release.spec, STORAGES["bf16"][0], release.spec.context)
            table.add_row(
                name,
                str(release.year),
                f"{parameters(release.spec):,}",
                size(takes.weights),
                f"{takes.per_token:,} B",
                f"{release.spec.context:,}",
            )
    console().print(table)


@app.command(epilog="Example: glm tokenize 'General language model' --special")
def tokenize(
    text: Text,
    source: SourceOption = "",
    special: Annotated[bool, typer.Option("--special", help="With the tokens the release puts around a text.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="As a question, with the prompt the release makes of it.")
    ] = False,
) -> None:
    """The pieces and ids that a model reads a text as."""
    from glm.tokenizer import Tokenizer

    text = given(text)
    tokenizer = Tokenizer.from_pretrained(source or embedded())
    ids = tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text, special=special)
    table = columns("token>", "id>", "piece")
    for number, id in enumerate(ids, 1):
        table.add_row(str(number), str(id), escape(tokenizer.piece(id)))
    console().print(table)


@app.command(epilog="Example: glm verify tests/goldens/*")
def verify(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders with a small checkpoint and what the release's own code made of it.")
    ],
    dtype: Annotated[
        str, typer.Option(parser=dtype_name, metavar="DTYPE", help="float64, float32, bfloat16 or float16.")
    ] = "float64",
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest error of the logits over their rms.", show_default="1e-9 in float64"),
    ] = None,
) -> None:
    """Hold models to reference outputs, layer by layer; exit status 1 if anything is over the tolerance."""
    import torch

    from glm.verify import verify as held

    place, screen, over = placed(device), console(), 0
    for folder in folders:
        try:
            with busy(f"{folder.name} …"):
                report = held(folder, dtype=getattr(torch, dtype), device=place, tolerance=tolerance)
            screen.print(report)
            over += not report.ok
        except GLMError as error:
            complain(str(error))
            over += 1
    screen.print(f"{len(folders) - over} of {len(folders)} folders agree with their reference")
    if over:
        raise typer.Exit(1)


# -- making ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: glm convert chatglm-6b chatglm-6b-safetensors --dtype bf16")
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; .bin files are welcome.")],
    destination: Annotated[Path, typer.Argument(help="The folder to create.")],
    dtype: Annotated[str | None, typer.Option(help="float32, fp16 or bf16.", show_default="as it is")] = None,
    names: Annotated[
        str | None, typer.Option(help="hf or chatglm: whose tensor names.", show_default="as they are")
    ] = None,
) -> None:
    """Rewrite a checkpoint as safetensors, complete or not at all."""
    from glm.convert import convert as rewrite

    rewrite(source, destination, dtype=dtype, names=names)
    note(f"{destination} is written")


@app.command(epilog="Example: glm synthesize chatglm3-6b --out /tmp/chatglm3-random")
def synthesize(
    release: Annotated[str, typer.Argument(help="A name from `glm releases`.")],
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep only so many layers.", show_default="all")] = None,
) -> None:
    """Write a random-weight checkpoint in the layout of a release, to measure with."""
    from glm.synthesize import synthesize as make

    make(release, out, seed=seed, layers=layers)
    note(f"{out} is written")


@app.command(epilog="Example: glm train weights/recipe.toml")
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file: the model, its data, and how long.")],
) -> None:
    """Train a small model from nothing, or go on where it stopped."""
    from glm.training import train as run

    run(recipe)
