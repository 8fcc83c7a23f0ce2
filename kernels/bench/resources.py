"""What every kernel needs of every device: registers, spills and shared memory, from the compiler alone.

Run as `python kernels/bench/resources.py [MODULE …]`; it takes no GPU and writes results/resources.json, to which the
tests hold the kernels. With names of modules, as "attention", only their kernels are compiled anew.
"""

import json
import os
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glm_kernels.bench import machine
from glm_kernels.variants import TARGETS, Compiled, Variant, compile

NAMES = (  # every file with kernels
    "acceptance", "activations", "attention", "choice", "decode", "dense_matmul", "norms", "packed_matmul", "rotary",
)  # fmt: skip
MODULES = [import_module(f"glm_kernels.{name}") for name in NAMES]
PATH = machine.RESULTS / "resources.json"


def everything(
    names: Collection[str] = NAMES, twins: bool = True, archs: Collection[str] | None = None
) -> list[tuple[int, int, int]]:
    """(module, target, variant) by their places in the lists, of some devices; those marked `twin` can be left out."""
    return [
        (m, t, v)
        for m, module in enumerate(MODULES)
        if NAMES[m] in names
        for t, target in enumerate(TARGETS)
        if archs is None or str(target.arch) in archs
        for v, variant in enumerate(module.variants(target))
        if twins or not variant.twin
    ]


def measure(place: tuple[int, int, int]) -> tuple[str, str, Compiled]:
    """(name of the variant, name of the target, what it came to)."""
    m, t, v = place
    target = TARGETS[t]
    variant: Variant = MODULES[m].variants(target)[v]
    return variant.name, str(target.arch), compile(variant, target)


def table(places: list[tuple[int, int, int]], processes: int | None = None) -> dict[str, dict[str, list[int]]]:
    """{variant: {target: [registers, spilled, shared]}}, compiled anew by so many processes (default one a core)."""
    rows: dict[str, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
            for name, arch, built in pool.map(measure, places):
                rows.setdefault(name, {})[arch] = [built.registers, built.spilled, built.shared]
    return dict(sorted(rows.items()))


def main(names: Collection[str]) -> None:
    """Compile the kernels of these modules and write the table."""
    kept = {}
    if set(names) != set(NAMES):
        known = {v.name for name, m in zip(NAMES, MODULES, strict=True) if name not in names for v in listed(m)}
        kept = {name: row for name, row in json.loads(PATH.read_text())["variants"].items() if name in known}
    rows = kept | table(everything(names))
    result: dict[str, Any] = {"versions": {"triton": version("triton")}, "commit": machine.commit()}
    result["columns"] = ["registers", "spilled", "shared"]
    result["variants"] = dict(sorted(rows.items()))
    print(machine.write("resources", result))


def listed(module: Any) -> list[Variant]:
    """All variants of a module on all targets."""
    return [variant for target in TARGETS for variant in module.variants(target)]


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)
