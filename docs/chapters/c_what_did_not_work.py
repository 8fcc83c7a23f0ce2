# %% [markdown]
# # What did not work
#
# What was tried without gain is as much a result as what was kept, and it is what the next person would otherwise try
# again. This page shows all that the repository has logged of it: notes of single trials, measurements in which the
# idea lost, forms of kernels that are not as wanted, and decisions against. Everything is read from the files that
# hold it, with their dates.

# %%
import json
import re
from itertools import pairwise
from pathlib import Path

import glm_kernels
from glm_kernels.bench import ladders
from glm_kernels.bench.report import read_remarks
from glm_kernels.bench.results import read_all
from IPython.display import Markdown, display

KERNELS = Path(glm_kernels.__file__).parents[1]
ROOT = KERNELS.parent
RESULTS = KERNELS / "results"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """In Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))


def result(name: str) -> dict:
    """A file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(found: dict) -> str:
    """Where it comes from."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    parts = [f"{found['device']}, {found['cores']} cores" if "device" in found else "", versions]
    parts += [f"commit {found['commit']}" if "commit" in found else "", found.get("date", "")]
    return "; ".join(part for part in parts if part)


# %% [markdown]
# ## Single trials
#
# Of most trials nothing is left but a note: the code went away with them, and no command can repeat them. The notes are
# data, `docs/results/tried.json`.

# %%
tried = json.loads((ROOT / "docs" / "results" / "tried.json").read_text(encoding="utf-8"))
for what, log in tried.items():
    where = {"cpu": "On the CPU", "kernels": "Of the kernels"}.get(what, what)
    display(Markdown(f"**{where}** ({source(log)}). {log['how']}"))
    table(("tried", "found"), [(row["tried"], row["found"]) for row in log["rows"]])
    assert log["date"]
    assert log["rows"]

# %% [markdown]
# ## Measured, and lost
#
# ### Integer weights by text
#
# GPTQ adjusts the integers of a matrix to what it multiplies in a text; the search needs no text, and looks for the
# scale of each group with the least error. Where did GPTQ come out worse, by the divergence of the logits?
# (`docs/accuracy.md` has all cases.)

# %%
accuracy = result("accuracy")
rows = []
for case in accuracy["cases"]:
    by_form: dict[tuple, dict[str, float]] = {}
    for row in case["rows"]:
        by_form.setdefault((row["weights"], str(row["group"]), row["symmetric"]), {})[row["method"]] = row["KL"]
    for (weights, group, symmetric), found in by_form.items():
        if "gptq" in found and "search" in found and found["gptq"] > found["search"]:
            zeros = "without" if symmetric else "with"
            ratio = found["gptq"] / found["search"]
            rows.append(
                (case["what"].rstrip(":"), f"{weights}, groups {group}, {zeros} zero points", f"{ratio:.2f} times")
            )
compared = sum(row["method"] == "gptq" for case in accuracy["cases"] for row in case["rows"])
display(Markdown(f"In {len(rows)} of {compared} forms, {source(accuracy)}:"))
table(("case", "form", "divergence of GPTQ, by that of the search"), rows)

# %% [markdown]
# ### Against transformers on the CPU
#
# Contexts at which the pure model was not faster than the better of transformers' two caches:

# %%
for dtype in ("float32", "bfloat16"):
    found = result(f"cpu_speed_{dtype}")
    slower = [
        (what, str(row["context"]), f"{row[f'{what} ratio']:.3f}")
        for row in found["rows"]
        for what in ("prefill", "decode")
        if row[f"{what} ratio"] <= 1
    ]
    display(Markdown(f"{dtype}; {source(found)}"))
    table(("what", "context", "times the speed"), slower or [("none", "–", "–")])

# %% [markdown]
# ## Ladders
#
# A step of a ladder (chapter 14) that is slower than the step before is an idea that did not work by itself, at least
# on that device.

# %%
devices = read_all(RESULTS)
found = ladders.figures(devices)
if not found:
    print("not yet measured: no step of a ladder has a figure")
for device in devices:
    for row in device.rows:
        if row["subject"] != "ladders":
            continue
        steps = [
            (name, side["seconds"])
            for name, side in sorted(row["sides"].items())
            if name[:2].isdigit() and "seconds" in side
        ]
        for (earlier, before), (later, after) in pairwise(steps):
            if after > before:
                run = device.run_of(row)
                print(f"{device.device['device']}, {run['commit']}, {run['date']}: {row['label']}: {later} takes "
                      f"{after / before:.2f} times as long as {earlier}")  # fmt: skip

# %% [markdown]
# ## Goals that were missed
#
# A miss of a goal has a reason beside it, in `kernels/results/remarks.toml`, as soon as something was measured.

# %%
noted = read_remarks(RESULTS)
if noted:
    table(("device", "case", "why"), [(each["device"], each["case"], each["text"]) for each in noted])
else:
    print("no remarks yet")

# %% [markdown]
# ## Kernels that spill
#
# Forms whose registers do not suffice, on any of the devices they are compiled for: what a thread spills, in bytes, on
# AMD in registers.

# %%
resources = result("resources")
targets = ("80", "89", "90", "100", "gfx942")
rows = [
    (f"`{name}`", *(str(on[target][1]) if target in on else "–" for target in targets))
    for name, on in resources["variants"].items()
    if any(numbers[1] for numbers in on.values())
]
display(Markdown(f"{len(rows)} of {len(resources['variants'])} forms; {source(resources)}"))
table(("form", *(f"sm_{t}" if t.isdigit() else t for t in targets)), rows)

# %% [markdown]
# ## Decided against
#
# From `docs/design.md`:

# %%
design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
[against] = re.findall(r"^## What is deliberately not here\n\n(.*?)(?=^## )", design, flags=re.M | re.S)
[refused] = re.findall(r"^## What integer checkpoints may be\n\n(.*?)(?=^## )", design, flags=re.M | re.S)
display(Markdown(against))
display(Markdown(f"**What integer checkpoints may not be**\n\n{refused}"))
assert against.count("\n- ") >= 2

# %% [markdown]
# ## Read the code
#
# - `docs/results/tried.json`: add a row when an idea does not work; `python docs/tables.py` writes it into
#   `docs/design.md` too.
# - `kernels/results/`: what commands have measured.
