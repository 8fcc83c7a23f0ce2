"""The command line: which subjects, where to, how long."""

import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from glm_kernels.bench import (
    activations,
    append,
    attention,
    choice,
    decode,
    dense,
    int4,
    ladders,
    machine,
    norms,
    plots,
    report,
    rotary,
)
from glm_kernels.bench.results import Results, Row, of_device, read_all
from glm_kernels.bench.run import Bench, Budget, Ending, plan, run
from glm_kernels.bench.subject import Subject
from glm_kernels.bench.timing import GraphTimer

SUBJECTS: dict[str, Subject[Any]] = {
    module.SUBJECT.name: module.SUBJECT
    for module in (attention, decode, append, norms, rotary, activations, dense, int4, choice, ladders)
}
ALL = "all"

app = typer.Typer(
    name="glm_kernels.bench", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
Refusal: Any = typer.BadParameter.__mro__[2]  # what any fault in a command line is raised as
errors = Console(stderr=True, soft_wrap=True)


class UnusableError(Exception):
    """Nothing can be measured; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default that of `sys.argv`, and return its exit status."""
    try:
        return int(app(arguments, prog_name="python -m glm_kernels.bench", standalone_mode=False) or 0)
    except UnusableError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Refusal as error:
        errors.print(f"[red]error:[/red] {escape(error.format_message())}")
        return 2


@app.command()
def bench(
    subjects: Annotated[list[str], typer.Argument(help=f"{', '.join(SUBJECTS)}, or {ALL}", metavar="SUBJECT…")],
    out: Annotated[
        Path | None, typer.Option(help="folder for <device>.json and the plots [default: of this checkout, or results]")
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="file whose benchmark block is written anew [default: README.md beside --out]")
    ] = None,
    quick: Annotated[bool, typer.Option(help="only the most important cases, with fewer rounds")] = False,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="stop starting cases in time to end by then")] = None,
    resume: Annotated[bool, typer.Option(help="leave out what was measured at this commit already")] = False,
    only: Annotated[str, typer.Option(help="only cases whose name contains this")] = "",
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no git to ask")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="measure nothing: tables and plots from the files")] = False,
) -> int:
    """Measure our kernels and their peers on this machine's GPU, the most important cases first.

    The results are written after every case, so an interrupted run (Ctrl-C, or the end of --minutes) keeps what it
    measured; --resume goes on from there.
    """
    chosen = chosen_subjects(subjects)
    out = out or (machine.RESULTS if machine.RESULTS.is_dir() else Path("results"))
    document = document or out.absolute().parent / "README.md"
    if tables:
        return publish(out, document, None)
    device = gpu()
    facts = machine.gpu(device)
    known = {"commit": commit or machine.commit(), "driver": facts["driver"], "cuda": facts["cuda"], "quick": quick}
    results = of_device(out, facts)
    entries = [
        (subject, case)
        for subject, case in plan(chosen, 0 if quick else None)
        if only.lower() in name_of(subject, case).lower()
        and not (resume and results.has(subject.name, case, known["commit"]))
    ]
    if not entries:
        errors.print("nothing to measure: no case has such a name, or all were measured at this commit")
        return publish(out, document, None)
    timer = GraphTimer((9, 5), 0.3) if quick else GraphTimer()
    where = Bench(device, timer, free_memory(device), facts["l2"])
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=errors
    ) as progress:
        task = progress.add_task("roofs", total=len(entries))
        ending = run(
            entries, where, results, out, facts=known, budget=Budget(minutes),
            say=partial(tell, progress, task, [name_of(*entry) for entry in entries], results),
        )  # fmt: skip
    return publish(out, document, ending)


def chosen_subjects(names: Sequence[str]) -> list[Subject[Any]]:
    """The subjects of these names."""
    if strange := [name for name in names if name not in (*SUBJECTS, ALL)]:
        raise typer.BadParameter(f"no subject {strange[0]!r}; there are {', '.join(SUBJECTS)} and {ALL}")
    return [subject for name, subject in SUBJECTS.items() if name in names or ALL in names]


def gpu() -> torch.device:
    """The GPU to measure on."""
    if not torch.cuda.is_available():
        raise UnusableError(
            "no GPU: torch finds no CUDA or ROCm device here. Run this on a machine with one, with a torch that "
            "is built for it; `--tables` writes tables and plots from results that are there already."
        )
    from glm_kernels.dispatch import INTERPRETED, triton

    if triton is None or INTERPRETED:
        raise UnusableError("no kernels: install triton, and leave TRITON_INTERPRET unset")
    return torch.device("cuda", torch.cuda.current_device())


def free_memory(device: torch.device) -> float:
    """Bytes that nobody uses now."""
    return float(torch.cuda.mem_get_info(device)[0])


def name_of(subject: Subject[Any], case: Any) -> str:
    """As "decode GLM-4-9B ×1 S=1024"."""
    name, size = subject.axis(case)
    return f"{subject.name} {subject.label(case)} {name}={size}"


def tell(progress: Progress, task: Any, names: Sequence[str], results: Results, row: Row | None, done: int) -> None:
    """A line for a finished case, and the name of the next one beside the bar."""
    if row is None:
        roofs = results.runs[-1]["roofs"]
        progress.console.print(f"R {roofs['read'] / 1e12:.2f} TB/s, C {roofs['multiply'] / 1e12:.0f} TFLOP/s")
    else:
        cells = report.figure(row | {"run": results.runs[-1]["id"]}, results)
        progress.console.print(escape(f"{names[done - 1]}: {' · '.join(cell for cell in cells if cell != '–')}"))
    progress.update(task, completed=done, description=escape(names[done]) if done < len(names) else "tables")


def publish(out: Path, document: Path, ending: Ending | None) -> int:
    """Plots and tables; a few words on the run; the exit status."""
    console = Console()
    found = read_all(out) if out.is_dir() else []
    try:
        for results in found:
            for picture in plots.draw(results, out):
                console.print(f"wrote {picture}", soft_wrap=True)
    except ModuleNotFoundError:
        errors.print("no plots: matplotlib is not installed (pip install matplotlib, then --tables)")
    if document.is_file() and report.write(document, out):
        console.print(f"wrote {document}", soft_wrap=True)
    else:
        path = machine.save_text(out / "README.md", f"{report.markdown(out, out)}\n") if found else None
        console.print(f"wrote {path}" if path else "no results yet", soft_wrap=True)
    if ladders.write(found):
        console.print("wrote the figures of the ladders", soft_wrap=True)
    for results in found:
        console.print(summary(results))
    if ending is None:
        return 0
    left = f", {ending.left} left ({ending.why}); go on with --resume" if ending.left or ending.why else ""
    console.print(f"{ending.measured} cases measured{left}", soft_wrap=True)
    return 1 if ending.failed else 130 if ending.why == "interrupted" else 0


def summary(results: Results) -> Table:
    """The goals of a device, as a table for the terminal."""
    table = Table(*report.GOAL_HEAD, title=results.device["device"])
    for row in report.goal_rows(results):
        table.add_row(*(cell.replace("**", "") for cell in row), style="red" if "miss" in row[-1] else None)
    return table


if __name__ == "__main__":
    sys.exit(main())
