"""Memory: the peak of a process that makes a model, composes an engine of it, and answers one long prompt.

On a GPU it is what torch had allocated at most, the making of the model included. On the CPU it is the resident memory
of the process over what it was after the imports, which is less exact: pages that were freed may count.
"""

from typing import Any

from glm.bench.cases import RuntimeCase
from glm.bench.child import ask
from glm.bench.goals import OURS
from glm.bench.turns import Place

NEW = 8  # tokens that are written behind the prompt


def measure(case: RuntimeCase, place: Place) -> dict[str, Any]:
    """The figures of a case, in bytes: the peak, and what it is held to."""
    from dataclasses import asdict

    found = ask("memory", case=asdict(case), device=str(place.device))
    needed = sum(found[part] for part in ("weights", "cache", "logits"))
    return {"needed": needed, "sides": {OURS: found | {"over needed": found["peak"] / needed}}}


def inside(case: dict[str, Any], device: str, **_: Any) -> dict[str, Any]:
    """In the process that is measured."""
    import torch

    from glm.bench.prompts import prompts
    from glm.bench.weights import random_model
    from glm.info import cache_bytes_per_token, weight_bytes
    from glm.runtime import Engine

    made, where = RuntimeCase(**case), torch.device(device)
    gpu = where.type == "cuda"
    before = 0 if gpu else resident()
    spec, dtype = made.spec, made.torch_dtype
    engine = Engine(random_model(made, where), max_batch=made.batch, max_length=made.context, release=True)
    new = min(NEW, made.context - 1)
    texts = prompts(spec, made.batch, made.context - new, 3)
    written = engine.generate(texts, max_new_tokens=new, stop=())
    assert all(len(row) == new for row in written)
    peak = torch.cuda.max_memory_allocated(where) if gpu else most_resident() - before
    return {
        "peak": peak,
        "weights": weight_bytes(spec, dtype),
        "cache": made.batch * made.context * cache_bytes_per_token(spec, dtype),
        "logits": made.batch * spec.vocabulary * torch.float32.itemsize,
    }


def resident() -> int:
    """Bytes of this process in memory now, on Linux; elsewhere the most so far."""
    try:
        with open("/proc/self/statm") as file:
            import os

            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return most_resident()


def most_resident() -> int:
    """The most bytes of this process that were in memory."""
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
