"""Writes every figure that README.md, kernels/README.md and the model card quote, from the results in the repository.

    python docs/tables.py            # rewrite the blocks between <!-- begin NAME --> and <!-- end NAME -->
    python docs/tables.py --check    # exit 1 if a block is not what this script would write

No figure stands in a document that does not come from a committed result file or from the package itself.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from glm_kernels.bench import report  # noqa: E402
from glm_kernels.bench.report import table  # noqa: E402

from glm.bench import report as runtime  # noqa: E402

RESULTS = ROOT / "kernels" / "results"
DOCUMENTS = (
    "README.md",
    "kernels/README.md",
    "weights/README.md",
    "weights/tiny-glm/README.md",
    "docs/accuracy.md",
    "docs/design.md",
    "docs/api/index.md",
)


def result(name: str) -> dict[str, Any]:
    """A committed result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def source(found: dict[str, Any]) -> str:
    """One line on where figures come from."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{found['device']}, {found['cores']} cores; {versions}; commit {found['commit']}; {found['date']}"


def demo() -> str:
    """What `make demo` prints: its commands, run here and now."""
    commands = re.findall(r"\$\(call run,(.*)\)$", (ROOT / "Makefile").read_text(), flags=re.M)
    place = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = [
        f"$ {command}\n"
        + subprocess.run(command, shell=True, cwd=ROOT, env=place, check=True, stdout=subprocess.PIPE, text=True).stdout
        for command in commands
    ]
    return "```\n" + "\n".join(said) + "```"


def cpu_speed(dtype: str) -> str:
    """This package against transformers on the CPU."""
    found = result(f"cpu_speed_{dtype}")
    head = ["context", "prefill tok/s", "transformers", "ratio", "decode tok/s", "transformers", "ratio"]
    rows = []
    for row in found["rows"]:
        cells = [str(row["context"])]
        for what in ("prefill", "decode"):
            speeds = row[f"{what} tokens/s"]
            best = max(value for name, value in speeds.items() if name != "glm")
            cells += [f"{speeds['glm']:.1f}", f"{best:.1f}", f"**{row[f'{what} ratio']:.2f}×**"]
        rows.append(cells)
    note = (
        f"{found['dtype']}, {found['threads']} threads, medians of {found['rounds']} rounds in turn in one process; "
        f"transformers with the better of its dynamic and static cache. {source(found)}. "
        f"Written by `python kernels/bench/cpu_speed.py --dtype {dtype}`."
    )
    return f"{table(head, rows)}\n\n{note}"


def load_memory() -> str:
    """Peak memory of loading."""
    found = result("load_memory")
    sizes = ("weights", "largest tensor", "beyond the weights", "bound")
    gigabytes = {key: f"{found[key] / 1e9:.2f} GB" for key in sizes}
    return (
        f"Loading `{found['release']}` ({gigabytes['weights']} in {found['dtype']}) on the CPU peaks at "
        f"{gigabytes['beyond the weights']} beyond the weights, file pages, Python and torch included "
        f"(bound: largest tensor + 0.5 GB = {gigabytes['bound']}), in {found['seconds']:.0f} s.\n\n"
        f"{source(found)}. Written by `python kernels/bench/load_memory.py`."
    )


def releases() -> str:
    """The family table: what `glm releases` prints, releases of the same sizes in one row."""
    from glm.cards import HEAD, family_table

    names: dict[tuple[str, ...], list[str]] = {}
    for line in family_table():
        names.setdefault(line.cells, []).append(f"`{line.release.name}`")
    head = ["release", *(" ".join((above, below)).strip() for above, below in HEAD)]
    return table(head, [[" ".join(same), *cells] for cells, same in names.items()])


def diff() -> str:
    """What `glm diff` prints of two releases."""
    from glm.changes import diff as compared

    names = "chatglm3-6b", "chatglm3-6b-32k"
    return f"```\n$ glm diff {' '.join(names)}\n{compared(*names)}\n```"


def parity() -> str:
    """What `glm verify` finds on the reference outputs in the repository."""
    found = result("parity")
    rows = [
        [f"`{row['case']}`", str(row["scenarios"]), f"{row['logits']:.0e}", f"{row['hidden']:.0e}", row["greedy"]]
        for row in found["rows"]
    ]
    head = ["golden", "scenarios", "logits, float64 (÷ rms)", "hidden states (absolute)", "greedy ids"]
    return f"{table(head, rows)}\n\n{source(found)}. Written by `python docs/parity.py`."


def accuracy(groups: tuple[str, ...], cases: slice) -> str:
    """What integer weights cost in some of the cases, in groups of these sizes."""
    found = result("accuracy")
    parts = []
    for case in found["cases"][cases]:
        head = ["weights", "group", "zero points", "method", "last layer (rms)", "KL", "perplexity", "same token"]
        rows = []
        for row in (row for row in case["rows"] if row["group"] in ("", *groups)):
            zeros = {True: "no", False: "yes", None: ""}[row["symmetric"]]
            figures = [f"{row['layers'][-1]:.1e}", f"{row['KL']:.1e}", f"{row['perplexity']:.5g}"]
            rows.append([row["weights"], row["group"], zeros, row["method"], *figures, f"{row['agreement']:.1%}"])
        parts.append(f"{case['what']}\n\n{table(head, rows)}")
    note = f"{source(found)}. Written by `python kernels/bench/accuracy.py`, which has all layers."
    return "\n\n".join([*parts, note])


def public_names() -> str:
    """Every name of both packages with the first sentence of its docstring, linked to its place in the reference."""
    import glm_kernels

    import glm

    lines = []
    for package in (glm, glm_kernels):
        lines.append(f"`import {package.__name__}`:\n")
        for name in package.__all__:
            thing = getattr(package, name)
            said = re.split(r"(?<=[.:])\s", " ".join((thing.__doc__ or "").split()))[0].rstrip(":.")
            lines.append(f"- {{py:obj}}`{name} <{thing.__module__}.{name}>` – {said}")
        lines.append("")
    return "\n".join(lines).strip()


def tried(where: str) -> str:
    """What was tried once, and what was found: a log, since no command can find it again."""
    found = json.loads((ROOT / "docs" / "results" / "tried.json").read_text(encoding="utf-8"))[where]
    lines = "\n".join(f"| {row['tried']} | {row['found']} |" for row in found["rows"])
    place = f"{found['device']}, {found['cores']} cores; " if "device" in found else ""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"| tried | found |\n| --- | --- |\n{lines}\n\n{found['how']} {place}{versions}; {found['date']}."


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "cpu-speed-float32": partial(cpu_speed, "float32"),
    "cpu-speed-bfloat16": partial(cpu_speed, "bfloat16"),
    "load-memory": load_memory,
    "releases": releases,
    "diff": diff,
    "parity": parity,
    report.BLOCK: lambda: report.markdown(RESULTS, ROOT / "kernels"),
    runtime.BLOCK: lambda: runtime.markdown(RESULTS, ROOT / "kernels"),
    runtime.GOALS_BLOCK: lambda: runtime.goals_markdown(RESULTS),
    "accuracy": partial(accuracy, ("128",), slice(1, 2)),
    "accuracy-all": partial(accuracy, ("32", "64", "128", "row"), slice(None)),
    "public-names": public_names,
    "tried-cpu": partial(tried, "cpu"),
    "tried-kernels": partial(tried, "kernels"),
}


def rewritten(text: str) -> str:
    """`text` with every block written anew."""
    return report.rewritten(text, BLOCKS)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        if not path.exists():
            continue
        before = path.read_text()
        after = rewritten(before)
        if after != before:
            stale.append(name)
            if not check:
                path.write_text(after)
    print(f"{'stale' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
