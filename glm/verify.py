"""Verification: does this code compute what the official code computed?

A folder in the golden format is a small checkpoint (config.json, model.safetensors) together with what the
release's own code made of it:

    reference.safetensors        inputs, and outputs computed in float32
    reference64.safetensors      logits of the same inputs, computed in float64
    reference_bf16.safetensors   logits computed in bfloat16, and in float64 on the weights rounded to bfloat16
    reference_fp16.safetensors   the same for float16
    meta.json                    how they were made, and how far off the reference itself is

Tensors are called `<scenario>.<what>`. A scenario is whatever has `input_ids`; checked is whatever it has of
`logits`, `hidden.*`, `decode.tokens` with `decode.logits` and `decode.position_ids`, `generated`, `labels` with
`loss`, and `logits_tanh_gelu` (the same weights with the other form of GELU). The inputs
`position_ids` and `attention_mask` are fed as they are; where they are what the release itself makes of the ids,
they are also left out, and the model has to find them. Padding is fed, but what comes out there is undefined and
not compared.

In float64 the logits must agree to 1e-9 of their rms, in float32 to ten times the reference's own rounding. In half
precision no two correct programs agree: there the rms error against float64 may be 1.5 times the reference's own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain, groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich import box
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from glm.cache import Cache
from glm.errors import CheckpointError
from glm.experts import RouterModule
from glm.family import recognise
from glm.fields import Fields, read_object
from glm.generation import generate
from glm.infilling import loss
from glm.layout import Layout
from glm.linear import RowScaledLinear
from glm.model import GLM
from glm.positions import Rotary
from glm.spec import Block, Spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from glm.runtime import Engine

FLOAT64_RELATIVE = 1e-9
FLOAT32_ABSOLUTE = 2e-4  # what two correct float32 programs may differ by where logits and states are of size 1 to 10
FLOAT32_SIZE = 10.0  # where states are larger than that, in proportion
FLOAT32_NOISES = 10.0  # the same in units of the reference's own float32 error, where that was measured
HALF_RATIO = 1.5  # errors of two correct half precision programs differ by 10 to 25 %
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}


# ----------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """One line of a report: the worst of the tensors that a scenario has of one quantity.

    absolute  the largest difference; of ids and positions how many are wrong; in half precision the rms error
    relative  that over the rms of what was expected; of ids the fraction that is wrong; in half precision the rms
              error over the reference's own
    layer     the first hidden state over the tolerance; None if there is none
    """

    scenario: str
    quantity: str
    absolute: float
    relative: float
    ok: bool
    layer: str | None = None


@dataclass(frozen=True)
class Report:
    """What `verify` found in one folder; `rich.print(report)` shows it as a table."""

    folder: Path
    generation: str
    dtype: torch.dtype
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is within its tolerance."""
        return all(row.ok for row in self.rows)

    def __rich__(self) -> Table:
        """The table: a line for every row, the scenario named once."""
        half = self.dtype in HALF
        title = f"{self.folder.name} · {self.generation} · {str(self.dtype).removeprefix('torch.')}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("scenario", no_wrap=True)
        table.add_column("quantity", no_wrap=True)
        table.add_column("rms\nerror" if half else "worst\nabsolute", justify="right", no_wrap=True)
        table.add_column("over the\nreference's" if half else "worst\nrelative", justify="right", no_wrap=True)
        table.add_column("first layer\nover")
        table.add_column("")
        for scenario, rows in groupby(self.rows, key=lambda row: row.scenario):
            for i, row in enumerate(rows):
                table.add_row(
                    "" if i else scenario,
                    row.quantity,
                    f"{row.absolute:.1e}",
                    f"{row.relative:.2f}" if half else f"{row.relative:.1e}",
                    row.layer or "",
                    "[green]ok[/]" if row.ok else "[red]over[/]",
                )
        return table


# ----------------------------------------------------------------------------- the references


class Golden:
    """The references of one folder for one dtype, cut into scenarios."""

    def __init__(self, folder: str | PathLike[str], dtype: torch.dtype) -> None:
        """Raises CheckpointError for a folder that is not in the golden format or has nothing for `dtype`."""
        self.folder, self.dtype = Path(folder), dtype
        self.half = HALF.get(dtype)
        if self.half is None and dtype not in (torch.float64, torch.float32):
            raise CheckpointError(f"{self.folder}: no reference was computed in {dtype}")
        self.logits = "logits" if self.half is None else f"logits_float64_of_{self.half}_weights"
        self.config = read_object(self.folder / "config.json")
        self.meta = read_object(self.folder / "meta.json")
        self.tensors = self.read(f"reference_{self.half}.safetensors" if self.half else "reference.safetensors")
        if not self.half and (self.folder / "reference64.safetensors").exists():
            self.tensors |= self.read("reference64.safetensors")  # its logits take the place of the float32 ones
        names = [name.removesuffix(".input_ids") for name in self.tensors if name.endswith(".input_ids")]
        if not names:
            raise CheckpointError(f"{self.folder}: the reference has no scenario: no tensor is called *.input_ids")
        self.scenarios = [Scenario(self, name) for name in sorted(names)]

    def read(self, name: str) -> dict[str, Tensor]:
        """All tensors of one of the folder's files."""
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file, so there is nothing to verify against")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error})") from None

    def expect(self, name: str, *shape: int | None, whole: bool = False) -> Tensor:
        """A tensor of this shape (None is any length) and kind, or a CheckpointError that names it."""
        x = self.tensors.get(name)
        if x is None:
            raise CheckpointError(f"{self.folder}: the reference has no tensor {name}")
        fits = x.dim() == len(shape) and all(b in (None, a) for a, b in zip(x.shape, shape, strict=True))
        if not fits or x.numel() == 0 or x.is_complex() or x.is_floating_point() is whole:
            wanted = f"{'integers' if whole else 'numbers'} [{', '.join(str(n or 'any') for n in shape)}]"
            raise CheckpointError(f"{self.folder}: {name} should be {wanted}, not {x.dtype} {list(x.shape)}")
        return x.long() if whole else x

    @property
    def noise(self) -> float | None:
        """The reference's own float32 error relative to the logits' rms; None where it was not measured."""
        noise = self.meta.get("float32_noise_relative_to_logit_rms")
        return noise if isinstance(noise, float) and noise > 0 else None


class Pair(NamedTuple):
    """A tensor of ours, and the reference's that goes by `name`."""

    quantity: str
    name: str
    ours: Tensor
    expected: Tensor


class Scenario:
    """Some ids [B, T], how they are laid out, the tokens [B, n] decoded after them, and what came of it."""

    def __init__(self, golden: Golden, name: str) -> None:
        """Raises CheckpointError where the inputs do not fit together."""
        self.golden, self.name = golden, name
        self.ids = golden.expect(f"{name}.input_ids", None, None, whole=True)
        self.tokens = self.ids[:, :0]
        if "decode.tokens" in self:
            self.tokens = golden.expect(f"{name}.decode.tokens", len(self.ids), None, whole=True)
        self.visible, self.real = self.sight()
        self.positions = self.places("position_ids", self.ids.shape[1])
        if not bool(self.real.any()):
            raise CheckpointError(f"{golden.folder}: {name}.attention_mask hides every token")

    def __contains__(self, what: str) -> bool:
        return f"{self.name}.{what}" in self.golden.tensors

    def sight(self) -> tuple[Tensor, Tensor]:
        """Who sees whom [B, T, T] and which tokens are no padding [B, T], from `attention_mask`.

        It comes in four kinds: none; [B, T], 0 on padding; [B], lengths of prefixes that see all of themselves;
        and [B or 1, 1, T, T], where 1 is hidden in the unsigned bytes of ChatGLM-6B and GLM-130B, but visible in
        the integers of GLM-10B. The first three are causal otherwise; in the last, real tokens see themselves.
        """
        (B, T), name = self.ids.shape, f"{self.name}.attention_mask"
        past = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
        everything = torch.ones(B, T, dtype=torch.bool)
        mask = self.golden.tensors.get(name)
        if mask is None:
            return past, everything
        if mask.dim() == 1:
            read = self.golden.expect(name, B, whole=True)[:, None, None]
            return past | (torch.arange(T) < read), everything
        if mask.dim() == 2:
            real = self.golden.expect(name, B, T, whole=True).bool()
            return past & real[:, None], real
        rows = B if mask.shape[0] == B else 1
        ones = self.golden.expect(name, rows, 1, T, T, whole=True)[:, 0].bool().expand(B, T, T)
        visible = ~ones if mask.dtype == torch.uint8 else ones
        return visible, visible.diagonal(dim1=1, dim2=2)

    def places(self, what: str, length: int) -> Tensor | None:
        """Position ids as [B, length, A], None if there are none; stored as [B, T] for one axis, else [B, A, T]."""
        if what not in self:
            return None
        B, name = len(self.ids), f"{self.name}.{what}"
        if self.golden.tensors[name].dim() == 2:
            return self.golden.expect(name, B, length, whole=True)[..., None]
        return self.golden.expect(name, B, None, length, whole=True).transpose(1, 2)

    @property
    def natural(self) -> bool:
        """Whether the release itself lays the ids out like this: places start at 0 and leave no gap.

        Also, the second axis never falls (it does where several blanks are filled one after another), and no
        lengths of prefixes were given.
        """
        if self.positions is None:
            return True
        mask = self.golden.tensors.get(f"{self.name}.attention_mask")
        rows = [places[real].T.tolist() for places, real in zip(self.positions, self.real, strict=True)]
        return (mask is None or mask.dim() > 1) and all(
            set(at) == set(range(max(at, default=-1) + 1)) and (axis == 0 or at == sorted(at))
            for row in rows
            for axis, at in enumerate(row)
        )

    def layout(self, device: torch.device) -> Layout | None:
        """The layout that was given to the reference; None if it got none."""
        return None if self.positions is None else Layout(self.positions.to(device), self.visible.to(device))

    def following(self, device: torch.device) -> Layout | None:
        """The layout of the decoded tokens that was given to the reference; None if it got none."""
        B, n = self.tokens.shape
        positions = self.places("decode.position_ids", n)
        if positions is None:
            return None
        among = torch.ones(n, n, dtype=torch.bool).tril().expand(B, n, n)
        visible = torch.cat((self.visible[:, -1:].expand(-1, n, -1), among), dim=-1)
        return Layout(positions.to(device), visible.to(device))

    def pair(self, quantity: str, what: str, ours: Tensor) -> Pair:
        """`ours` [B, T or n, …] beside the reference's tensor of that name; of a prompt without its padding."""
        if what.endswith("position_ids"):
            expected = self.places(what, ours.shape[1])
            assert expected is not None
        else:
            expected = self.golden.expect(f"{self.name}.{what}", *ours.shape)
        if what.startswith("decode."):
            return Pair(quantity, what, ours.cpu(), expected)
        return Pair(quantity, what, ours.cpu()[self.real], expected[self.real])


# ----------------------------------------------------------------------------- our outputs beside them


@torch.inference_mode()
def pairs(model: GLM, s: Scenario) -> Iterator[Pair]:
    """What the model makes of a scenario, beside everything the reference has of it."""
    for what, ids in (("input_ids", s.ids), ("decode.tokens", s.tokens)):
        if bool(((ids < 0) | (ids >= model.spec.vocabulary)).any()):
            raise CheckpointError(f"{s.golden.folder}: {s.name}.{what} holds ids outside the vocabulary")
    ids, tokens, device = s.ids.to(model.device), s.tokens.to(model.device), model.device
    cache = model.new_cache(len(ids), ids.shape[1] + tokens.shape[1])

    layout = s.layout(device)
    own = model.layout(ids, None if bool(s.real.all()) else s.real.to(device)) if s.natural else None
    if layout is not None and own is not None:
        layout.step = own.step  # how places go on is not among what the reference was given
    logits, states = model(ids, layout, cache, hidden=True)
    yield s.pair("logits", s.golden.logits, logits)
    for what, state in hidden(s, states):
        yield s.pair("hidden states", what, state)
    if own is not None:
        yield s.pair("logits, own layout", s.golden.logits, model(ids, own))
        if s.positions is not None:
            yield s.pair("positions", "position_ids", own.positions)
    if "labels" in s and not s.golden.half:
        labels = s.golden.expect(f"{s.name}.labels", *ids.shape, whole=True)
        yield Pair("loss", "loss", loss(logits.cpu(), labels)[None], s.golden.expect(f"{s.name}.loss", 1))
    share = hasattr(model.embedding.weight, "full_tensor")  # of a model dealt out, which cannot be built anew
    if (what := f"{s.golden.logits}_tanh_gelu") in s and not share:
        other = model_with(replace(model.spec, blocks=tuple(map(with_tanh, model.spec.blocks))), model)
        yield s.pair("logits, tanh GELU", what, other(ids, layout))
    if tokens.numel():
        yield from decoded(model, s, ids, tokens, cache)
    if "generated" in s:
        yield greedy(model, s, ids)


@torch.inference_mode()
def engine_pairs(engine: "Engine | None", s: Scenario) -> Iterator[Pair]:
    """What an engine makes of a scenario, one row at a time and without its padding; nothing where there is none."""
    if engine is None:
        return
    logits = torch.zeros(*s.ids.shape, engine.spec.vocabulary, dtype=engine.dtype)
    prompts = [row[real].tolist() for row, real in zip(s.ids, s.real, strict=True)]
    for b, (prompt, real) in enumerate(zip(prompts, s.real, strict=True)):
        layout = None
        if not s.natural:
            assert s.positions is not None
            layout = Layout(s.positions[b : b + 1, real], s.visible[b : b + 1, real][:, :, real])
        logits[b, real] = engine.read(prompt, layout).cpu()
    yield s.pair("logits, engine", s.golden.logits, logits)
    if "generated" in s and s.natural:
        yield ids_beside(engine.spec, s, lambda count: engine.generate(prompts, max_new_tokens=count), "greedy, engine")


def hidden(s: Scenario, states: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """(name, our state) of each hidden state that the reference has, from the embedding upwards."""
    blocks, found = len(states) - 2, {}
    for name in s.golden.tensors:
        if name.startswith(f"{s.name}.hidden."):
            where = name.removeprefix(f"{s.name}.hidden.")
            number = where.removeprefix("layer_")
            if number.isdecimal() and int(number) >= blocks:
                raise CheckpointError(f"{s.golden.folder}: {name}: the model has {blocks} blocks")
            at = int(number) + 1 if number.isdecimal() else blocks + 1 if where.startswith("final") else 0
            found[at] = f"hidden.{where}"
    return [(found[at], states[at]) for at in sorted(found)]


def with_tanh(block: Block) -> Block:
    """The same block with the tanh form of GELU in place of the exact one."""
    branches = tuple("gelu_tanh" if name == "gelu" else name for name in block.feed_forward.branches)
    return replace(block, feed_forward=replace(block.feed_forward, branches=branches))


def model_with(spec: Spec, model: GLM) -> GLM:
    """A model of another spec with the very parameters of this one."""
    other = GLM(spec, device="meta", dtype=model.dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.train(False)


def decoded(model: GLM, s: Scenario, ids: Tensor, tokens: Tensor, cache: Cache) -> Iterator[Pair]:
    """Feed the given tokens behind the prompt in `cache`, one by one, then all at once behind a fresh one."""
    logits, positions = [], []
    for t in range(tokens.shape[1]):
        logits.append(model(tokens[:, t : t + 1], cache=cache))
        assert cache.layout is not None
        positions.append(cache.layout.positions)
    yield s.pair("decode logits", f"decode.{s.golden.logits}", torch.cat(logits, dim=1))
    given = s.following(model.device)
    if given is not None:
        yield s.pair("decode positions", "decode.position_ids", torch.cat(positions, dim=1))
        cache = model.new_cache(cache.batch, cache.length)
        model(ids, s.layout(model.device), cache)
        yield s.pair("decode logits, at once", f"decode.{s.golden.logits}", model(tokens, given, cache))


def greedy(model: GLM, s: Scenario, ids: Tensor) -> Pair:
    """The likeliest ids after the prompt."""

    def written(count: int) -> list[list[int]]:
        if s.natural:
            prompts = [row[real].tolist() for row, real in zip(s.ids, s.real, strict=True)]
            return generate(model, prompts, max_new_tokens=count)
        cache = model.new_cache(len(ids), ids.shape[1] + count)
        new = [model(ids, s.layout(model.device), cache)[:, -1:].argmax(-1)]
        while len(new) < count:
            new.append(model(new[-1], cache=cache).argmax(-1))
        return [until(row, model.spec.stop) for row in torch.cat(new, dim=1).tolist()]

    return ids_beside(model.spec, s, written, "greedy")


def ids_beside(spec: Spec, s: Scenario, written: Callable[[int], list[list[int]]], quantity: str) -> Pair:
    """As many ids as the reference has, `written` by us, beside them, up to what stops a row; behind that stands -1."""
    B, T = s.ids.shape
    generated = s.golden.expect(f"{s.name}.generated", B, None, whole=True)[:, T:]
    count = generated.shape[1]
    if not count:
        raise CheckpointError(f"{s.golden.folder}: {s.name}.generated is no longer than its prompt")
    config = s.golden.config
    own = recognise(config).spec(config, s.golden.folder.name)
    stop = Fields(config, "config.json").ids("eos_token_id") or own.stop
    theirs = [until(row, stop) for row in generated.tolist()]
    filled = [torch.tensor([row + [-1] * (count - len(row)) for row in rows]) for rows in (written(count), theirs)]
    return Pair(quantity, "generated", *filled)


def until(ids: list[int], stop: Sequence[int]) -> list[int]:
    """The ids before the first of `stop`."""
    return ids[: next((i for i, id in enumerate(ids) if id in stop), len(ids))]


@torch.inference_mode()
def model_pairs(model: GLM, golden: Golden) -> Iterator[Pair]:
    """What the reference holds of the model itself: dequantised weights, the learned prefix, rotary frequencies."""
    table = recognise(golden.config).table(model.spec, golden.config, model.state_dict())
    stored = {f"dequantised.{line.name}": line for line in table}
    for name in sorted(name for name in golden.tensors if name.startswith("dequantised.")):
        if name not in stored:
            raise CheckpointError(f"{golden.folder}: {name}: the model has no such weight")
        module = model.get_submodule(stored[name].parameter.rpartition(".")[0])
        weight = module.dense(golden.dtype) if isinstance(module, RowScaledLinear) else module.weight
        assert isinstance(weight, Tensor)
        ours = stored[name].on_disk(weight).reshape(stored[name].part(weight).shape)
        yield Pair("dequantised weights", name, ours.cpu(), golden.expect(name, *ours.shape))
    if (name := "prefix.past_key_values") in golden.tensors:
        if model.prefix is None:
            raise CheckpointError(f"{golden.folder}: {name}: the model has no prefix")
        ours = torch.stack([torch.stack(layer) for layer in model.prefix()])  # [L 2 1 G p K]
        ours = ours.permute(0, 1, 4, 2, 3, 5)
        yield Pair("learned prefix", name, ours.cpu(), golden.expect(name, *ours.shape))
    if (name := "rotary.inv_freq") in golden.tensors:
        assert isinstance(model.spec.rotary, Rotary)
        ours = model.spec.rotary.frequencies(model.spec.rotary.widths[0])
        yield Pair("rotary frequencies", name, ours, golden.expect(name, *ours.shape))


# ----------------------------------------------------------------------------- the judgement


def verify(
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
    mesh: "DeviceMesh | None" = None,
    engine: bool = False,
) -> Report:
    """Load the model in `folder` and hold it to the reference outputs that lie there.

    tolerance  for logits, relative to their rms; in half precision for the rms error as a multiple of the
               reference's. None is what the head of this file says. Hidden states, of which there are only
               float32 references, keep the float32 tolerance, and ids and positions must be equal.
    engine     holds an engine of the model (`glm.Engine`) to the same logits and greedy ids as well.
    mesh       deals the model out to the mesh's ranks, all of which call this; what the reference holds of the
               weights themselves is then left to a run with one process.

    Raises CheckpointError for a folder that is not in the golden format or has no reference for `dtype`.
    """
    golden = Golden(folder, dtype)
    model = GLM.from_pretrained(folder, dtype=dtype, device=device, mesh=mesh)
    rows = tuple(
        check(model, golden, tolerance, whole=mesh is None, engine=engine_for(model, golden) if engine else None)
    )
    return Report(golden.folder, recognise(golden.config).name, dtype, rows)


def engine_for(model: GLM, golden: Golden) -> "Engine":
    """An engine with room for every text of a golden and what is written behind it."""
    from glm.runtime import Engine

    rows = [s.ids.shape[1] for s in golden.scenarios]
    rows += [x.shape[1] for name, x in golden.tensors.items() if name.endswith(".generated")]
    return Engine(model, max_batch=2, max_length=max(rows))


def check(
    model: GLM,
    golden: Golden,
    tolerance: float | None = None,
    whole: bool = True,
    engine: "Engine | None" = None,
) -> Iterator[Row]:
    """The rows of a report, each as soon as it is known. `model` is what the golden's folder holds, in its dtype.

    A model that is not `whole` is a rank's share of it.
    """
    if golden.half:
        yield from half_rows(model, golden, HALF_RATIO if tolerance is None else tolerance, engine)
        return
    for scenario in golden.scenarios:
        found = chain(pairs(model, scenario), engine_pairs(engine, scenario))
        yield from exact_rows(scenario.name, found, golden, tolerance)
    if whole:
        yield from exact_rows("the model itself", model_pairs(model, golden), golden, tolerance)


def exact_rows(scenario: str, found: Iterator[Pair], golden: Golden, tolerance: float | None) -> Iterator[Row]:
    """Rows in float64 or float32: every tensor within its tolerance."""
    for quantity, group in groupby(found, key=lambda pair: pair.quantity):
        worst, worst_relative, over = 0.0, 0.0, []
        for pair in group:
            absolute, relative = distance(pair)
            most, most_relative = allowed(pair, golden, tolerance)
            worst, worst_relative = max(worst, absolute), max(worst_relative, relative)
            if not (absolute <= most and relative <= most_relative):  # NaN is neither
                over.append(pair.name)
        layer = over[0].removeprefix("hidden.") if over and quantity == "hidden states" else None
        yield Row(scenario, quantity, worst, worst_relative, ok=not over, layer=layer)


def distance(pair: Pair) -> tuple[float, float]:
    """The largest difference, and that over the rms of what was expected; infinite where ours is NaN.

    Of integers, how many differ, and which fraction that is.
    """
    if pair.ours.shape != pair.expected.shape:
        return math.inf, math.inf
    error = (pair.ours.double() - pair.expected.double()).abs().nan_to_num(nan=math.inf)
    if not pair.expected.is_floating_point():
        wrong = int((error > 0).sum())
        return float(wrong), wrong / error.numel()
    largest, scale = float(error.max()), rms(pair.expected)
    return largest, largest / scale if scale else math.inf if largest else 0.0


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.double().square().mean().sqrt())


def allowed(pair: Pair, golden: Golden, tolerance: float | None) -> tuple[float, float]:
    """The largest difference that is allowed, absolute and relative."""
    if not pair.expected.is_floating_point() or pair.quantity in ("dequantised weights", "rotary frequencies"):
        return 0.0, 0.0
    noises = math.inf if golden.noise is None else FLOAT32_NOISES * golden.noise
    if "logits" not in pair.quantity and pair.quantity != "loss":
        return FLOAT32_ABSOLUTE * max(1.0, rms(pair.expected) / FLOAT32_SIZE), noises
    if tolerance is not None:
        return math.inf, tolerance
    if golden.dtype == pair.expected.dtype == torch.float64:
        return math.inf, FLOAT64_RELATIVE
    return (FLOAT32_ABSOLUTE, math.inf) if golden.noise is None else (math.inf, noises)


def half_rows(model: GLM, golden: Golden, most: float, engine: "Engine | None" = None) -> Iterator[Row]:
    """Rows in half precision: the rms error of each tensor and of all together, beside the reference's own.

    All together is what is judged; a tensor alone, a few hundred numbers, may be twice as far off. Where rounding made
    a router choose another expert than in float64, that token and all that see it are another computation: it is
    reported, and the tensors of that scenario are judged only together with the others.
    """
    reference = reference_errors(golden)
    count, squares, reference_squares = 0, 0.0, 0.0
    for scenario in golden.scenarios:
        chosen: list[Tensor] = []
        with recorded(model, chosen):
            found = list(pairs(model, scenario))
        found += engine_pairs(engine, scenario)
        changed = rechosen(model, scenario, chosen)
        if chosen:
            yield Row(scenario.name, "experts chosen otherwise", changed, changed / sum(map(len, chosen)), ok=True)
        for pair in found:
            if not pair.expected.is_floating_point():
                wrong, fraction = distance(pair)
                yield Row(scenario.name, pair.quantity, wrong, fraction, ok=wrong == 0)
                continue
            name = f"{scenario.name}.{pair.name.removesuffix(f'_float64_of_{golden.half}_weights')}"
            error, theirs = rms(pair.ours.double() - pair.expected), reference[name]
            over = error > 2 * most * theirs and not changed
            yield Row(scenario.name, pair.quantity, error, error / theirs, ok=not over)
            if pair.quantity in ("logits", "decode logits"):
                count += pair.ours.numel()
                squares += error**2 * pair.ours.numel()
                reference_squares += theirs**2 * pair.ours.numel()
    ratio = math.sqrt(squares / reference_squares)
    yield Row("all scenarios", "all logits", math.sqrt(squares / count), ratio, ok=ratio <= most)


@contextmanager
def recorded(model: GLM, chosen: list[Tensor]) -> Iterator[None]:
    """Puts which experts each token of a router was sent to into `chosen`, [N, k] a call, in ascending order."""
    routers = [module for module in model.modules() if isinstance(module, RouterModule)]
    hooks = [
        router.register_forward_hook(lambda _, __, out: chosen.append(out[0].sort(-1).values.cpu()))
        for router in routers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rechosen(model: GLM, scenario: "Scenario", chosen: list[Tensor]) -> int:
    """For how many tokens a half precision model chose other experts than its weights choose in float64."""
    if not chosen:
        return 0
    exact: list[Tensor] = []
    twin = deepcopy(model).double()
    with recorded(twin, exact):
        for _ in pairs(twin, scenario):
            pass
    return sum(int((a != b).any(-1).sum()) for a, b in zip(chosen, exact, strict=True))


def reference_errors(golden: Golden) -> dict[str, float]:
    """The rms error of each of the reference's own half precision tensors, in the best of its runs in meta.json.

    ChatGLM-6B is why there are several: as published it builds its rotary table in bfloat16, which cannot tell
    positions above 256 apart; one of its runs has a float32 table.
    """
    names = [f"{s.name}.{what}" for s in golden.scenarios for what in ("logits", "decode.logits")]
    names = [name for name in names if f"{name}_float64_of_{golden.half}_weights" in golden.tensors]
    try:
        record = golden.meta["half_precision"][golden.half]
        runs = [
            {name: float(run["per_tensor"][name]["rms_error"]) for name in names}
            for run in (record["reference_error"], *record.get("alternatives", {}).values())
            if "per_tensor" in run
        ]
        if not all(error > 0 for run in runs for error in run.values()):
            raise ValueError
        return min(runs, key=lambda run: sum(error**2 for error in run.values()))
    except (AttributeError, KeyError, TypeError, ValueError):
        path = golden.folder / "meta.json"
        raise CheckpointError(f"{path}: lacks the reference's own errors in {golden.half}") from None
