# %% [markdown]
# # Benchmark a kernel
#
# How is a new kernel measured beside those that are there already? A kernel is one more *subject* of
# `glm_kernels.bench`: a file that says which cases there are, who computes them, and what is right. What then happens
# is the same for all: who is wrong is not timed; the others are timed in turn, in one process, on inputs that the
# cache has forgotten; and the figure stands beside the floor that memory and arithmetic set (chapter 13).
#
# This page writes a subject, and runs it on the CPU, where the pipeline works and figures mean little.

# %%
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from glm_kernels.bench import machine, report, roofs
from glm_kernels.bench.command import SUBJECTS, main
from glm_kernels.bench.goals import Goal, at_read_roof
from glm_kernels.bench.peers import OURS, find
from glm_kernels.bench.results import Results, of_device, read
from glm_kernels.bench.run import Bench, measure, run
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, MissingError, Side, Subject, Work, generator
from glm_kernels.bench.timing import WallClock
from IPython.display import Markdown
from torch import Tensor

torch.set_num_threads(1)
print("subjects so far:", ", ".join(SUBJECTS))

# %% [markdown]
# ## The kernel
#
# It is written as all of `glm_kernels` are: the equation, a reference in plain torch with the same signature, and the
# kernel. Here is the squared ReLU, $y = \max(x, 0)^2$, in torch alone, as if it were a kernel, and a wrong one beside
# it.


# %%
def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return x.relu().square()


def forgets_the_rest(x: Tensor) -> Tensor:
    """A kernel for whole blocks of 256 columns, which leaves out those that fill none."""
    whole = x.shape[-1] // 256 * 256
    return torch.nn.functional.pad(squared_relu(x[..., :whole]), (0, x.shape[-1] - whole))


# %% [markdown]
# ## Cases, and their bytes
#
# A case is a shape of a published model: a frozen dataclass, whose fields tell it from others and are what a result is
# filed under. `work` counts what no implementation can do without. `importance` 0 is what `--quick` measures.


# %%
@dataclass(frozen=True, kw_only=True)
class ReluCase(Case):
    """N rows of width F."""

    rows: int
    width: int


def cases() -> list[ReluCase]:
    """One token of GLM-4-9B, some, and a short prompt."""
    shape = {"model": "GLM-4-9B", "dtype": "bfloat16", "width": 13696}
    return [ReluCase(**shape, rows=rows, importance=0 if rows == 1 else 1) for rows in (1, 64, 512)]


def inputs(case: ReluCase, device: torch.device, seed: int) -> Inputs:
    """x, on the meta device without numbers."""
    random = generator(device, seed)
    return {"x": torch.randn(case.rows, case.width, generator=random, device=device, dtype=case.torch_dtype)}


def outputs(case: ReluCase) -> float:
    """Bytes of y."""
    return case.rows * case.width * case.torch_dtype.itemsize


def work(case: ReluCase) -> Work:
    """x read, y written; a comparison and a product each."""
    return Work(2 * outputs(case), 2 * case.rows * case.width)


# %% [markdown]
# ## Sides
#
# A side makes a call of the inputs; only the call is timed. A side that cannot be had here raises `MissingError` with
# the reason, which then stands in the table. `find` does that for packages that are not installed.


# %%
def ours(function, case: ReluCase, given: Inputs) -> Call:
    """The kernel."""
    return partial(function, given["x"])


def somebody(case: ReluCase, given: Inputs) -> Call:
    """A peer that may not be there."""
    return partial(find("a_package_of_kernels", "squared_relu"), given["x"])


def elsewhere(case: ReluCase, given: Inputs) -> Call:
    """A peer that needs a GPU."""
    if not given["x"].is_cuda:
        raise MissingError("runs on a GPU only")
    return partial(squared_relu, given["x"])


def sides(function, case: ReluCase) -> list[Side]:
    """Ours first."""
    return [
        Side(OURS, partial(ours, function, case)),
        Side("torch", lambda given: lambda: given["x"].clamp(min=0).pow(2)),
        Side("somebody", partial(somebody, case)),
        Side("elsewhere", partial(elsewhere, case)),
    ]


# %% [markdown]
# ## What is right
#
# For each part of the output, what plain torch gives in the dtype of the case, and what is true in float64. A side may
# have at most twice the error of plain torch. Nobody types a tolerance.


# %%
def expected(case: ReluCase, given: Inputs) -> list[Expected]:
    """All of y."""
    x = given["x"]
    return [Expected("y", lambda y: y, squared_relu(x), squared_relu(x.double()))]


def subject(function) -> Subject[ReluCase]:
    """All of it, with `function` as ours."""
    return Subject(
        "relu", "Squared ReLU", cases, inputs, outputs, work, partial(sides, function), expected,
        lambda case: f"{case.model} squared ReLU", lambda case: ("rows", case.rows),
    )  # fmt: skip


# %% [markdown]
# ## One case
#
# On a GPU a `GraphTimer` replays recorded graphs; on a CPU there is the `WallClock`. `Bench` also says how much memory
# there is and how large the last cache, from which follows through how many copies of the inputs a timing goes.

# %%
bench = Bench(torch.device("cpu"), WallClock(3), memory=2e9, l2=1e6)
row = measure(subject(squared_relu), cases()[1], bench)
for name, side in row["sides"].items():
    print(f"{name:12}", side if "seconds" not in side else f"{side['copies']} copies, {side['rounds']} rounds, passed")
assert {name for name, side in row["sides"].items() if "seconds" in side} == {OURS, "torch"}
assert row["sides"]["somebody"]["missing"] == "a_package_of_kernels is not installed"

# %% [markdown]
# A kernel that is wrong has no figure, however fast it is:

# %%
wrong = measure(subject(forgets_the_rest), cases()[1], bench)
print(wrong["sides"][OURS])
assert "refused" in wrong["sides"][OURS]
assert "seconds" not in wrong["sides"][OURS]
assert "seconds" in wrong["sides"]["torch"]

# %% [markdown]
# ## A run
#
# `run` measures the roofs first, then case after case in the order of importance, within a budget of minutes if there
# is one, and writes the file of the device after each. A case measured again takes the place of the old one.

# %%
with tempfile.TemporaryDirectory() as folder:
    results: Results = of_device(Path(folder), {"device": machine.processor(), "kind": "cpu"})
    entries = [(subject(squared_relu), case) for case in cases()]
    facts = {"commit": machine.commit(), "driver": None, "cuda": None, "quick": True}
    ending = run(entries, bench, results, Path(folder), facts=facts, roof_sizes=(0.03, 256))
    [path] = Path(folder).glob("*.json")
    found = read(path)
assert ending.measured == len(found.rows) == 3
assert not ending.failed

lines = ["| case | at the roof | ours | of the roof |", "| --- | --- | --- | --- |"]
for row in found.rows:
    roof = found.run_of(row)["roofs"]
    least, bound = Work(row["bytes"], row["flops"]).floor(roof["read"], roof["multiply"])
    mine = row["sides"][OURS]["seconds"]
    lines.append(
        f"| {row['label']}, {row['axis'][0]} {row['axis'][1]} | {1e6 * least:.1f} µs ({bound}) | {1e6 * mine:.1f} µs "
        f"| {least / mine:.0%} |"
    )
Markdown("\n".join(lines))

# %% [markdown]
# These are figures of the CPU that built this page; memory written counts like memory read, which costs more.
#
# ## A goal
#
# What is aimed at stands beside what was measured, and a miss beside its reason (`kernels/results/remarks.toml`). A
# goal says which cases it covers, what it is held against, and two levels: accepted at first, and the goal.

# %%
goal = Goal("relu", "1 row", lambda row: row["fields"]["rows"] == 1, "R", at_read_roof, goal=0.90, accept=0.80)
one = next(row for row in found.rows if goal.covers(row))
value = goal.value(one, found)
assert value == one["bytes"] / found.run_of(one)["roofs"]["read"] / one["sides"][OURS]["seconds"]
assert [goal.verdict(level) for level in (0.95, 0.85, 0.5)] == ["goal", "accepted", "miss"]

# %% [markdown]
# ## In the package
#
# Put the functions above into `kernels/glm_kernels/bench/relu.py` with `SUBJECT = Subject(…)` at its end, name the
# module in `command.SUBJECTS`, and the goals in `goals.GOALS`. Then, on a machine with a GPU,
#
#     python -m glm_kernels.bench relu --quick              # the most important cases
#     python -m glm_kernels.bench all --out kernels/results/ --minutes 20
#     python -m glm_kernels.bench all --resume              # go on where that ended
#     python -m glm_kernels.bench all --tables              # only tables and plots, from the files
#
# Without a GPU the command says so, and measures nothing:

# %%
assert roofs.SIDE == 8192
if not torch.cuda.is_available():
    assert main(["norms", "--quick"]) == 1
    print("kernels/README.md then says:", report.markdown(Path("/nowhere"), Path("/nowhere")).split(".")[0])

# %% [markdown]
# Two more things belong to a kernel. Its `variants(target)` list every form that a launch can ask for, so that tests
# compile all of them without a GPU and hold them to `kernels/results/resources.json` (chapter 14). And its tests run
# it in Triton's interpreter against the reference, amid NaN, between guard bands, with broken kernels that must fail.
#
# ## Read the code
#
# - `kernels/glm_kernels/bench/norms.py`: a short subject with peers.
# - `kernels/glm_kernels/bench/subject.py`: all that a subject is made of.
# - `kernels/glm_kernels/bench/timing.py`: how time is taken.
# - `tests/kernels/test_norms.py`: how a kernel is tested.
