"""The commands `glm bench …`, a few lines around `run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from glm.bench.cases import RuntimeCase
    from glm.bench.results import Row, RuntimeResults

app = typer.Typer(
    name="bench", help="Measure the engine beside other implementations, on random weights at a release's shape.",
    epilog="Example: glm bench decode glm-4-9b", rich_markup_mode=None,
)  # fmt: skip

Release = Annotated[str, typer.Argument(metavar="RELEASE", help="A name from `glm releases`, or a folder.")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="WEIGHTS", help="bf16, fp16, fp32, int8, int4.", show_default="bf16; fp32 on CPU"),
]
Batch = Annotated[str, typer.Option(metavar="LIST", help="Rows side by side, as 1 or 1,8,32.")]
Contexts = Annotated[str, typer.Option(metavar="LIST", help="Tokens before those that are timed, or read.")]
Layers = Annotated[int | None, typer.Option(metavar="N", help="Only the first so many layers.", show_default="all")]
Rounds = Annotated[int, typer.Option(metavar="N", min=1, help="How often each side has its turn.")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, …", show_default="cuda if there is one")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for runtime_<device>.json and the plots.", show_default="none"),
]
Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a turn.")]


@app.command(epilog="Example: glm bench decode glm-4-9b --weights int4 --context 1024,4096")
def decode(
    release: Release, weights: Weights = None, batch: Batch = "1", context: Contexts = "1024", layers: Layers = None,
    rounds: Rounds = 5, steps: Steps = 64, device: Device = None, out: Out = None,
) -> int:  # fmt: skip
    """Tokens a second, bytes against the floor, and where the time of a step goes."""
    return one("decode", release, weights, batch, context, layers, rounds, device, out, steps=steps)


@app.command(epilog="Example: glm bench prefill chatglm3-6b --context 2048")
def prefill(
    release: Release, weights: Weights = None, batch: Batch = "1", context: Contexts = "2048", layers: Layers = None,
    rounds: Rounds = 5, device: Device = None, out: Out = None,
) -> int:  # fmt: skip
    """Tokens a second of a prompt, and flops against those of a matrix product."""
    return one("prefill", release, weights, batch, context, layers, rounds, device, out)


@app.command(epilog="Example: glm bench memory chatglm2-6b --weights int4 --context 8192")
def memory(
    release: Release, weights: Weights = None, batch: Batch = "1", context: Contexts = "8192", layers: Layers = None,
    device: Device = None, out: Out = None,
) -> int:  # fmt: skip
    """Peak memory of a process of its own, over weights, cache and logits."""
    return one("memory", release, weights, batch, context, layers, 1, device, out)


@app.command(epilog="Example: glm bench start chatglm3-6b --weights int4")
def start(
    release: Release, weights: Weights = None, context: Contexts = "32", layers: Layers = None,
    rounds: Rounds = 3, device: Device = None, out: Out = None,
) -> int:  # fmt: skip
    """Seconds from the start of a process to the first token.

    A folder is read as it is; of a release one is written with random weights.
    """
    weights = weights or ("stored" if Path(release).is_dir() else None)
    return one("start", release, weights, "1", context, layers, rounds, device, out)


@app.command(epilog="Example: glm bench serve glm-4-9b --weights int4 --batch 32 --rate 8")
def serve(
    release: Release, weights: Weights = None, batch: Batch = "8", context: Contexts = "1024", layers: Layers = None,
    rate: Annotated[float, typer.Option(metavar="X", min=0.001, help="Requests that arrive in a second.")] = 4.0,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Requests in all.")] = 64,
    device: Device = None, out: Out = None,
) -> int:  # fmt: skip
    """Requests that come when they like: tokens a second, what they wait for, and how many wait."""
    return one("serve", release, weights, batch, context, layers, 1, device, out, rate=rate, count=count)


@app.command("all", epilog="Example: glm bench all --out kernels/results/ --minutes 30")
def everything(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results and plots.")],
    minutes: Annotated[float | None, typer.Option(metavar="X", help="Stop in time.", show_default="never")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the cases of the goals, with fewer turns.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what was measured at this commit.")] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only cases whose name contains this.")] = "",
    commit: Annotated[
        str | None, typer.Option(metavar="HASH", help="The commit measured.", show_default="asks git")
    ] = None,
    device: Device = None,
) -> int:  # fmt: skip
    """The cases of all models, the most important first, on a GPU. The file is written after each."""
    from glm.bench.cases import all_cases
    from glm.bench.turns import Place
    from glm.cli import placed
    from glm.errors import GLMError

    place = Place(placed(device), *((2, 32) if quick else ()))
    if place.device.type != "cuda":
        raise GLMError("models of this size are measured on a GPU; the other commands run on the CPU too")
    cases = [case for case in all_cases(place.device) if case.importance == 0 or not quick]
    return measure(cases, place, out, minutes=minutes, resume=resume, only=only, commit=commit)


def one(
    what: str, release: str, weights: str | None, batches: str, contexts: str, layers: int | None, rounds: int,
    device: str | None, out: Path | None, steps: int = 64, **more: Any,
) -> int:  # fmt: skip
    """A subject at every batch and context."""
    from glm.bench.cases import case
    from glm.bench.turns import Place
    from glm.cli import placed

    where = placed(device)
    kind = weights or ("fp32" if where.type == "cpu" else "bf16")
    cases = [
        case(what, release, kind, where, batch=batch, context=context, layers=layers, **more)
        for batch in numbers(batches)
        for context in numbers(contexts)
    ]
    return measure(cases, Place(where, rounds, steps), out)


def numbers(text: str) -> list[int]:
    """As 1,8,32. Raises BadParameter."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(f"{text!r} is no number, nor several with commas between them.")
    return [int(part) for part in parts]


def measure(
    cases: "list[RuntimeCase]", place: Any, out: Path | None, *, minutes: float | None = None, resume: bool = False,
    only: str = "", commit: str | None = None,
) -> int:  # fmt: skip
    """Measure, print, and write what was found; the exit status, 1 where the engine failed a check or has no figure."""
    from glm_kernels.bench import machine
    from glm_kernels.bench.run import Budget

    from glm.bench.results import RuntimeResults, of_device
    from glm.bench.run import facts, run
    from glm.cli import busy, note

    about, known = facts(place.device), commit or machine.commit()
    results = RuntimeResults(about, [], []) if out is None else of_device(out, about)
    left = [case for case in cases if only.lower() in f"{case.what} {case.label}".lower()]
    if resume:
        left = [case for case in left if not results.has(case.what, case, known)]
    if not left:
        note("nothing to measure: no case has such a name, or all were measured at this commit")
        return 0
    seen: list[Row] = []

    def say(row: "Row | None", done: int) -> None:
        if row is None:
            return
        seen.append(row)
        show_row(row, results)

    with busy("measuring …"):
        ending = run(left, place, results, out, commit=known, budget=Budget(minutes), say=say)
    if out is not None:
        publish(results, out)
    if ending.why:
        note(f"{ending.measured} cases measured, {ending.left} left ({ending.why}); go on with --resume")
    without = any(not {"seconds", "peak"} & row.get("sides", {}).get("glm", {}).keys() for row in seen)
    return 130 if ending.why == "interrupted" else int(ending.failed or without)


def show_row(row: "Row", results: "RuntimeResults") -> None:
    """What was found of one case."""
    from rich.markup import escape

    from glm.bench import report
    from glm.bench.goals import speed
    from glm.cli import columns, show

    head, cells = report.TABLES[row["subject"]]
    print(f"\n{row['subject']} {report.case_of(row)}")
    table = columns("", "")
    for name, value in zip(head, cells(row, results), strict=True):
        table.add_row(name, escape(value.replace("**", "")))
    for name, side in row.get("sides", {}).items():
        taken = speed(row, name) if "tokens" in row else None
        said = report.why(side) if taken is None else f"{taken:.1f} tokens/s"
        if said != "–":
            table.add_row(name, escape(said))
    for line in report.goal_lines(row, results):
        table.add_row("goal", escape(line))
    show(table)
    if "table" in row.get("kernels", {}):
        kernels = columns(f"{row['kernels']['what']} of a step", "calls>", "µs>", "of all>")
        for line in row["kernels"]["table"][: report.KERNELS]:
            cells_of = f"{line['count']:.1f}", f"{1e6 * line['seconds']:.1f}", report.share(line, row["kernels"])
            kernels.add_row(escape(line["name"][:70]), *cells_of)
        show(kernels)


def publish(results: "RuntimeResults", out: Path) -> None:
    """Plots beside the results; tables come into the documents of a checkout by docs/tables.py."""
    from glm.bench import plots
    from glm.cli import note

    note(f"{out / results.name}.json is written")
    try:
        for picture in plots.draw(results, out):
            note(f"{picture} is written")
    except ModuleNotFoundError:
        note("no plots: matplotlib is not installed")
    note("python docs/tables.py puts the tables into the documents of a checkout")
