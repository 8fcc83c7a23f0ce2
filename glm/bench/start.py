"""Start: from a command to the first token, in a process of its own, on files that the system has read lately.

    python    until the first line of ours runs
    import    torch, this package and its kernels
    load      the checkpoint, onto the device
    compose   the engine, its cache among it
    first     a prompt read and the first token chosen; kernels that Triton has not compiled before are compiled here

The files are random, as `glm synthesize` writes them, unless a folder is given. "cold" is with an empty Triton cache.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from glm.bench.cases import STORED, RuntimeCase
from glm.bench.child import ask
from glm.bench.goals import OURS
from glm.bench.turns import Place

PARTS = "python", "import", "load", "compose", "first"


def measure(case: RuntimeCase, place: Place) -> dict[str, Any]:
    """The figures of a case: seconds, those of the median run with its parts."""
    with tempfile.TemporaryDirectory(prefix="glm-bench-") as temporary:
        folder = Path(case.model) if case.weights == STORED else synthesized(case, Path(temporary) / "files")
        arguments = {"folder": str(folder), "context": case.context, "device": str(place.device), "dtype": case.dtype}
        found: dict[str, Any] = {}
        if place.device.type == "cuda":
            found["cold"] = once(arguments | {"triton": str(Path(temporary) / "triton")})
        else:
            once(arguments)  # so that the files have been read
        runs = [once(arguments) for _ in range(max(1, place.rounds))]
    total = [sum(run.values()) for run in runs]
    middle = runs[total.index(statistics.median_low(total))]
    found |= {
        "seconds": sum(middle.values()),
        "low": min(total),
        "high": max(total),
        "rounds": len(runs),
        "parts": middle,
    }
    return {"sides": {OURS: found}}


def once(arguments: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part."""
    found = ask("start", **arguments)
    return {part: float(found[part]) for part in PARTS}


def synthesized(case: RuntimeCase, folder: Path) -> Path:
    """Random files of a case; integers are laid out beforehand, as `glm quantize` leaves them."""
    from glm.linear import Dense
    from glm.runtime.prepacked import prepack
    from glm.synthesize import synthesize

    weights = case.spec.weights
    synthesize(
        case.model, folder, layers=case.layers, dtype=case.torch_dtype, weights=None if weights == Dense() else weights
    )
    if weights != Dense():
        prepack(folder)
    return folder


def inside(
    folder: str, context: int, device: str, dtype: str, begun: float, began: float, triton: str | None = None
) -> dict[str, float]:
    """In the process that is measured."""
    import time

    if triton is not None:
        os.environ["TRITON_CACHE_DIR"] = triton

    import torch

    from glm.bench.prompts import prompts
    from glm.runtime import Engine

    where = torch.device(device)

    def moment() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.time()

    class Timed(Engine):
        """Knows when its model was loaded."""

        def __init__(self, *model: Any, **options: Any) -> None:
            self.loaded = moment()
            super().__init__(*model, **options)

    imported = moment()
    engine = Timed.from_pretrained(
        folder, dtype=getattr(torch, dtype), device=where, max_batch=1, max_length=context + 1
    )
    assert isinstance(engine, Timed)
    loaded, composed = engine.loaded, moment()
    [new] = engine.generate(prompts(engine.spec, 1, context, 4), max_new_tokens=1, stop=())
    first = moment()
    assert len(new) == 1
    times = begun, began, imported, loaded, composed, first
    return {part: after - before for part, before, after in zip(PARTS, times, times[1:], strict=False)}
