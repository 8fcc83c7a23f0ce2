"""Every field of every spec, changed, makes `glm verify` fail on some golden.

Mutants are generated from the specs themselves: each leaf, each choice of a part, in the whole model, in all blocks
(of one kind, where there are several) and in one block in the middle. A mutant gets the weights of the golden's own
file; if they do not fit, it is caught by that. Those that no reference can see are listed in INVISIBLE with the
reason, and the list must be exact.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from golden_folders import HERE

from glm.checkpoint import Checkpoint, fill, match
from glm.errors import GLMError
from glm.family import GENERATIONS, recognise
from glm.family.generation import Generation
from glm.feed_forward import ACTIVATIONS
from glm.grouped import Grouped
from glm.layout import Blank, Causal, InTurn
from glm.linear import Dense, RowScaled
from glm.model import GLM
from glm.norms import LayerNorm, RMSNorm
from glm.positions import PAIRINGS, Interpolation, Learned, Plain, Rotary, Unturned, Yarn
from glm.prefix import Prefix
from glm.residual import Deep, Pre, Sandwich, Scaled
from glm.spec import Spec, leaves
from glm.verify import Golden, check

NAMES = [generation.name for generation in GENERATIONS]

CONTEXT = "nothing is computed from it: it documents the release and sizes the memory estimate"
PAD = "padding is never seen, so any id will do"
STOP = "greedy ids are compared up to the reference's own stop, and no golden generates one"
ROUNDING = "the order of rounding, which float64 cannot see; test_half_precision.py holds it to the bit"

INVISIBLE: dict[str, dict[str, str]] = {  # a field, or one change of it, and why no reference sees it
    "chatglm": {"context": CONTEXT, "pad": PAD, "stop: never": STOP},
    "chatglm2": {
        "context": CONTEXT,
        "pad": PAD,
        "stop: never": STOP,
        "final_norm.weight_first": ROUNDING,
        "blocks[middle].norm.weight_first": ROUNDING,
        "blocks[all].norm.weight_first": ROUNDING,
    },
}
INVISIBLE["glm_10b"] = {
    "context": CONTEXT,
    "pad": PAD,
    "stop: never": STOP,
    "reading.masks: backwards": "blanks of all kinds are filled from left to right, whatever their kind",
}
ONE_BLANK = "no row of the reference has two blanks or two kinds of them; test_layout.py tells these rules apart"
INVISIBLE["glm_130b"] = {
    "context": CONTEXT,
    "pad": PAD,
    "stop: never": STOP,
    "reading.masks: backwards": ONE_BLANK,
    "reading: in turn": ONE_BLANK,
}
INVISIBLE["glm4"] = INVISIBLE["glm4_0414"] = INVISIBLE["chatglm2"]


def roundings(*norms: str) -> dict[str, str]:
    """The order of rounding of these norms of a block, in the middle and in both kinds of blocks."""
    return {f"blocks[{at}].{norm}.weight_first": ROUNDING for at in ("middle", "kind0", "kind1") for norm in norms}


EXPERTS = {"context": CONTEXT, "pad": PAD, "stop: never": STOP, "final_norm.weight_first": ROUNDING}
INVISIBLE["glm4_moe"] = EXPERTS | roundings("norm", "mixer.qk_norm")
INVISIBLE["glm4_moe_lite"] = EXPERTS | roundings("norm", "mixer.norm")
INVISIBLE["glm_moe_dsa"] = EXPERTS | roundings("norm", "mixer.attention.norm")
INVISIBLE["glm_moe_dsa"] |= {
    f"blocks[{at}].mixer.indexer.norm.eps": "it moves scores too little for another choice; test_latent_attention.py"
    for at in ("middle", "kind0", "kind1")
}
WHOLE = "an exception among integers, and these references have none; test_quantized_files.py reads some"
for generation in ("glm_10b", "glm_130b", "glm4", "glm4_0414"):
    INVISIBLE[generation] = INVISIBLE[generation] | {f"blocks[{at}].dense": WHOLE for at in ("middle", "all")}
for generation in ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"):
    INVISIBLE[generation] |= {f"blocks[{at}].dense": WHOLE for at in ("middle", "kind0", "kind1")}

# ----------------------------------------------------------------------------- mutants


class Mutant(NamedTuple):
    """A spec with one thing changed; the label says which, without numbers that differ between goldens."""

    label: str
    spec: Spec


def mutants(spec: Spec) -> Iterator[Mutant]:
    """Every mutant of a spec."""
    for field in dataclasses.fields(spec):
        if field.name != "blocks":
            for label, value in changes(field.name, getattr(spec, field.name), spec):
                yield Mutant(label, replace(spec, **{field.name: value}))
    middle, last = len(spec.blocks) // 2, len(spec.blocks) - 1
    yield Mutant("blocks: one more", replace(spec, blocks=(*spec.blocks, spec.blocks[0])))
    yield Mutant("blocks: one less", replace(spec, blocks=spec.blocks[:last]))
    for label, block in inside("blocks[middle]", spec.blocks[middle], spec):
        yield Mutant(label, replace(spec, blocks=(*spec.blocks[:middle], block, *spec.blocks[middle + 1 :])))
    kinds = list(dict.fromkeys(spec.blocks))
    for number, kind in enumerate(kinds):
        for label, block in inside("blocks[all]" if len(kinds) == 1 else f"blocks[kind{number}]", kind, spec):
            yield Mutant(label, replace(spec, blocks=tuple(block if old == kind else old for old in spec.blocks)))


def inside(path: str, part: Any, spec: Spec) -> Iterator[tuple[str, Any]]:
    """(label, part) with one field of a dataclass changed."""
    for field in dataclasses.fields(part):
        for label, value in changes(f"{path}.{field.name}", getattr(part, field.name), spec):
            yield label, replace(part, **{field.name: value})


def changes(path: str, value: Any, spec: Spec) -> Iterator[tuple[str, Any]]:
    """(label, value) of every change to the value at `path`."""
    for label, other in alternatives(path.rpartition(".")[2], value, spec):
        yield f"{path}: {label}", other
    if dataclasses.is_dataclass(value):
        yield from inside(path, value, spec)


def alternatives(field: str, value: Any, spec: Spec) -> Iterator[tuple[str, Any]]:
    """(label, value) of what else the field could be: other parts, other names, numbers that are off."""
    for kind, part in parts(field, spec).items():
        if type(part) is not type(value) and not (field == "rotary" and isinstance(value, int)):  # a width, not a part
            yield kind, part
    for option in OPTIONS.get(field, ()):
        if option != value:
            yield str(option), option
    if field == "branches":
        for i, name in enumerate(value):
            for other in ACTIVATIONS.keys() - {name}:
                yield f"{i} is {other}", (*value[:i], other, *value[i + 1 :])
    elif field == "widths":
        yield "half", tuple(width // 2 for width in value)
        yield "one axis more or less", (*value, value[0]) if len(value) == 1 else (sum(value),)
    elif field in ("masks", "fixed"):
        if field == "masks":  # the other is a set
            yield "backwards", value[::-1]
        yield from ((f"without {i}", (*value[:i], *value[i + 1 :])) for i in range(len(value)))
    elif field == "stop":
        yield "never", (spec.vocabulary,)
        yield "always", tuple(range(spec.vocabulary))
    elif field == "dense":
        yield from ((name, (name,)) for name in ("mixer", "feed_forward"))
    elif field == "projected":
        yield "the other way", (spec.width, spec.width) if value is None else None
    elif isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, float):
        yield "a bit more", value * (2 if field == "eps" else 1.001)
    elif isinstance(value, int):
        yield from ((f"{step:+}", value + step) for step in (-1, 1) if value + step > 0)


OPTIONS: dict[str, tuple[str | None, ...]] = {
    "pairing": tuple(PAIRINGS),
    "rounding": (None, "float16", "bfloat16"),
}


def parts(field: str, spec: Spec) -> dict[str, Any]:
    """One part of each kind that can stand in a field."""
    norms = {"layer": LayerNorm(1e-5), "rms": RMSNorm(1e-5, weight_first=True)}
    yarn = Yarn(1.1, spec.context, beta_fast=32.0, beta_slow=1.0, gain=1.0, truncate=True)
    turn = Rotary(widths=(2, 2), pairing="halves", base=1e4, scaling=Plain(), rounding=None)
    ids = vars(spec.reading) if isinstance(spec.reading, Blank) else {"sop": 1, "masks": (2,), "axes": 1, "fixed": ()}
    kinds: dict[str, dict[str, Any]] = {
        "wiring": {"pre": Pre(), "sandwich": Sandwich(), "scaled": Scaled(1.0), "deep": Deep(1.0)},
        "norm": norms,
        "final_norm": norms | {"none": None},
        "qk_norm": norms | {"none": None},
        "scaling": {"plain": Plain(), "interpolation": Interpolation(1.001), "yarn": yarn},
        "reading": {"causal": Causal(), "blank": Blank(**ids), "in turn": InTurn(**ids)},
        "rotary": {"unturned": Unturned(), "turned": turn},
        "learned": {"none": None, "some": Learned(spec.context, 2)},
        "weights": {"dense": Dense(), "row scaled": RowScaled(8), "grouped": Grouped(8, None, True)},
        "head": {"dense": Dense(), "row scaled": RowScaled(8)},
        "prefix": {"none": None, "some": Prefix(2, None)},
        "pad": {"none": None, "some": 0},
    }
    return kinds.get(field, {})


# ----------------------------------------------------------------------------- what catches them


class Case(NamedTuple):
    """One golden and its checkpoint, read once."""

    golden: Golden
    checkpoint: Checkpoint
    generation: Generation
    spec: Spec


@cache
def cases(generation: str) -> list[Case]:
    """The goldens of a generation; those that see most come first."""
    found = []
    for folder in sorted(HERE, key=lambda folder: ("sensitive" not in folder.name, folder.name)):
        checkpoint = Checkpoint.open(folder)
        its = recognise(checkpoint.config)
        if its.name == generation:
            golden = Golden(folder, torch.float64)
            golden.scenarios.sort(key=lambda scenario: scenario.ids.numel())
            found.append(Case(golden, checkpoint, its, its.spec(checkpoint.config, folder.name)))
    return found


def caught(spec: Spec, case: Case) -> bool:
    """Whether `glm verify` would fail with this spec instead of the golden's own."""
    try:
        model = GLM(spec, device="meta")
        table = case.generation.table(spec, case.checkpoint.config, model.state_dict())
        ignorable = case.generation.unused(spec)
        match(model, case.checkpoint, table, ignorable)
        fill(model, case.checkpoint, table, ignorable, dtype=torch.float64, device="cpu")
        return any(not row.ok for row in check(model, case.golden))
    except (GLMError, RuntimeError, ValueError):
        return True


@pytest.mark.parametrize("generation", NAMES)
def test_the_spec_itself_is_not_caught(generation: str) -> None:
    assert cases(generation)
    for case in cases(generation):
        assert not caught(case.spec, case)


@pytest.mark.parametrize("generation", NAMES)
def test_every_mutant_is_caught_or_listed(generation: str) -> None:
    seen: dict[str, bool] = {}
    for case in cases(generation):
        for label, spec in mutants(case.spec):
            if not seen.get(label):
                seen[label] = caught(spec, case)
    listed = INVISIBLE[generation]
    expected = {label: label not in listed and label.partition(":")[0] not in listed for label in seen}
    assert {label for label in seen if seen[label] is not expected[label]} == set()
    assert {key for key in listed if not any(label.startswith(key) for label in seen)} == set()


def field_of(path: str) -> str:
    """'blocks[2].norm.eps' -> 'blocks.norm.eps'; a mutant's label likewise."""
    return re.sub(r"\[\w+\]", "", path.partition(":")[0])


@pytest.mark.parametrize("generation", NAMES)
def test_every_leaf_has_a_mutant(generation: str) -> None:
    for case in cases(generation):
        mutated = {field_of(mutant.label) for mutant in mutants(case.spec)}
        for path, _ in leaves(case.spec):
            assert field_of(path) in mutated, path


@pytest.mark.parametrize("generation", NAMES)
def test_a_mutant_differs_in_what_it_says(generation: str) -> None:
    for case in cases(generation):
        for mutant in mutants(case.spec):
            assert mutant.spec != case.spec, mutant.label
