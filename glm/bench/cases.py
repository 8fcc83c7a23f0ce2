"""Cases: what is measured of which model, and the set of them that `glm bench all` runs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from glm_kernels.bench.subject import Case

from glm.errors import ConfigError, GLMError
from glm.grouped import Grouped
from glm.info import named
from glm.linear import Dense, Weights
from glm.model import GLM
from glm.spec import Spec

WEIGHTS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int8": "", "int4": ""}
"""How matrices are stored; what it says of the dtype of everything else, if anything."""
STORED = "stored"  # as a folder has them, whose start is timed
SUBJECTS = "decode", "prefill", "memory", "start", "serve"
GROUPS = 128, 64, 32, None  # of integers; the first that divides every row is taken


@dataclass(frozen=True, kw_only=True)
class RuntimeCase(Case):
    """One measurement of one model.

    model    a name from `glm releases`, or a folder whose config.json says the shape
    dtype    of the stream, the cache, embedding and head
    what     one of SUBJECTS
    weights  one of WEIGHTS, or STORED
    batch    rows side by side, for "serve" at most
    context  tokens before those that are timed, or read
    layers   None is all; fewer are another, smaller model
    rate     requests that arrive in a second, where it is served
    count    of requests
    """

    what: str
    weights: str
    batch: int = 1
    context: int = 1024
    layers: int | None = None
    rate: float = 0.0
    count: int = 0

    @property
    def spec(self) -> Spec:
        """Of the model that is measured."""
        return shape(self.model, self.weights, self.layers)

    @property
    def label(self) -> str:
        """As "glm-4-9b int4 ×1"."""
        few = "" if self.layers is None else f", {self.layers} layers"
        rate = f" {self.rate:g}/s" if self.rate else ""
        return f"{self.model.rstrip('/').rsplit('/', 1)[-1]}{few} {self.weights} ×{self.batch}{rate}"


def case(what: str, model: str, weights: str, device: torch.device, **sizes: object) -> RuntimeCase:
    """A case for this device: beside integers everything is bfloat16, on the CPU float32.

    Raises GLMError for a model or weights that there are not, or sizes out of range.
    """
    if weights not in (*WEIGHTS, STORED):
        raise GLMError(f"weights are {', '.join(WEIGHTS)}, not {weights!r}")
    if weights == STORED and (what != "start" or sizes.get("layers") is not None):
        raise GLMError("only the start of a folder is measured with its own weights, and then with all of its layers")
    dtype = WEIGHTS.get(weights) or ("float32" if device.type == "cpu" else "bfloat16")
    made = RuntimeCase(model=model, dtype=dtype, what=what, weights=weights, **sizes)  # type: ignore[arg-type]
    if min(made.batch, made.context) < 1 or made.rate < 0:
        raise GLMError(f"batch and context are whole numbers from 1, not {made.batch} and {made.context}")
    if made.context > made.spec.context:
        raise GLMError(f"{model} takes {made.spec.context} tokens, and the context asked for is {made.context}")
    return made


@cache
def shape(model: str, weights: str, layers: int | None) -> Spec:
    """The spec of a release or folder with so many layers, its matrices stored as `weights` says. Raises GLMError."""
    spec = named(model).spec
    if layers is not None and not 1 <= layers <= len(spec.blocks):
        raise GLMError(f"{model} has {len(spec.blocks)} layers, of which {layers} cannot be measured")
    if weights == STORED:
        return spec
    spec = replace(spec, blocks=spec.blocks[:layers], weights=Dense(), head=Dense())
    return spec if WEIGHTS[weights] else replace(spec, weights=fitting(spec, int(weights.removeprefix("int"))))


def fitting(spec: Spec, bits: int) -> Weights:
    """Integers of `bits` in groups as large as all rows allow, up to 128. Raises ConfigError where none do."""
    few = replace(spec, blocks=tuple(dict.fromkeys(spec.blocks)))
    for group in GROUPS:
        form = Grouped(bits, group, symmetric=True)
        try:
            GLM(replace(few, weights=form), device="meta")
        except ConfigError:
            if group is None:
                raise
            continue
        return form
    raise AssertionError


MEASURED = ("chatglm-6b", ("bf16", "int4")), ("chatglm3-6b", ("bf16", "int4")), ("glm-4-9b", ("bf16", "int4"))
LARGE = "glm-4-32b-0414", ("int4",)
CONTEXTS = 256, 1024, 2048, 4096, 8192, 32768
BATCHES = 2, 4, 8, 16


def all_cases(device: torch.device) -> list[RuntimeCase]:
    """The set, the most important first: those of the goals, then the sweeps of contexts and batches."""

    def everything() -> Iterator[RuntimeCase]:
        for model, kinds in (*MEASURED, LARGE):
            most = named(model).spec.context
            for weights in kinds:
                for batch in (1, 32):
                    yield case("decode", model, weights, device, batch=batch, importance=0)
                yield case("memory", model, weights, device, context=min(8192, most), importance=0)
                yield case("prefill", model, weights, device, context=min(2048, most), importance=0)
                for context in (context for context in CONTEXTS if context < most or context == most > 8192):
                    yield case("decode", model, weights, device, context=context, importance=1)
                    yield case("prefill", model, weights, device, context=context, importance=2)
                for batch in BATCHES:
                    yield case("decode", model, weights, device, batch=batch, importance=2)
            yield case("start", model, "int4", device, context=32, importance=0)
            yield case("serve", model, "int4", device, batch=32, context=1024, rate=4.0, count=64, importance=1)
        yield case("memory", "chatglm2-6b", "int4", device, context=8192, importance=0)

    return sorted(dict.fromkeys(everything()), key=lambda each: each.importance)
