"""What every kernel needs of every device: registers, spills and shared memory, from the compiler alone.

Run as `python kernels/bench/resources.py`; it takes no GPU and writes results/resources.json, to which the tests hold
the kernels.
"""

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glm_kernels import decode, norms, packed_matmul
from glm_kernels.bench import machine
from glm_kernels.variants import TARGETS, Compiled, Variant, compile

MODULES = (norms, decode, packed_matmul)  # every file with kernels


def everything() -> list[tuple[int, int, int]]:
    """(module, target, variant) by their places in the lists."""
    return [
        (m, t, v)
        for m, module in enumerate(MODULES)
        for t, target in enumerate(TARGETS)
        for v in range(len(module.variants(target)))
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


def main() -> None:
    """Compile everything and write the table."""
    rows = table(everything())
    result: dict[str, Any] = {"versions": {"triton": version("triton")}, "commit": machine.commit()}
    result["columns"] = ["registers", "spilled", "shared"]
    result["variants"] = rows
    print(machine.write("resources", result))


if __name__ == "__main__":
    main()
