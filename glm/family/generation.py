"""What a generation file says: how its checkpoints are recognised, read and named, and which were published."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from glm import quantized_files
from glm.checkpoint import Checkpoint, Packing, Stored
from glm.errors import ConfigError
from glm.fields import shown
from glm.grouped import Grouped
from glm.linear import Dense, RowScaled
from glm.parts import Cut
from glm.quantized_files import CONFIG, Scheme
from glm.spec import Spec

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Name:
    """One line of a tensor-name table: the module `file` of a checkpoint is (part of) the module `ours`.

    `{i}` stands for the layer. `rows` says which rows of our tensors it is, `packing` in which order they lie
    on disk; None is all rows, as they are. Every tensor of a module (weight, bias, scale) goes by the same line.

    Where `stack` says that our tensors are so many of the disk's, one on another, `{e}` stands for which it is. With
    `whole` the line is about one tensor, and both names are complete. `at_least` is a dtype it is never narrower than.
    """

    file: str
    ours: str
    rows: Callable[[Spec], slice] | None = None
    packing: Callable[[Spec, Config], Packing | None] | None = None
    stack: Callable[[Spec], int] | None = None
    whole: bool = False
    at_least: torch.dtype | None = None


@dataclass(frozen=True)
class Release:
    """A published checkpoint: its hub id, complete spec, the dtype and number of files it was published in."""

    name: str
    hub: str
    year: int
    spec: Spec
    dtype: torch.dtype
    shards: int


@dataclass(frozen=True)
class Generation:
    """One family of checkpoints that share a config format and a table of tensor names.

    `spec(config, name)` reads a config.json (`name` is the folder's, for what the config leaves out) and raises
    ConfigError; `config(spec, dtype)` writes it back. Neither knows of a `quantization_config`, which is the same in
    every generation: `read` and `write` do. `ignorable` are patterns of tensor names that published files carry and
    the model does not use, with `{L}` for the number of layers. `following` names, as if it were one of the blocks,
    what a block behind the last has besides (`glm.drafting.NextToken`); most have no such block.

    Where the training code's own files were published, `cuts` say how it cut tensors for several devices, `original`
    makes a config.json of the shapes of all whole tensors, and `mended` gives a whole tensor (by config, name and what
    was stored) the form that the later, official files have.
    """

    name: str
    recognises: Callable[[Config], bool]
    spec: Callable[[Config, str], Spec]
    config: Callable[[Spec], dict[str, Any]]
    names: tuple[Name, ...]
    ignorable: tuple[str, ...]
    releases: tuple[Release, ...]
    cuts: tuple[Cut, ...] = ()
    original: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    mended: Callable[[Config, str, torch.Tensor], torch.Tensor] | None = None
    following: tuple[Name, ...] = ()

    def read(self, config: Config, name: str) -> Spec:
        """The spec of a config.json, quantised or not. Raises ConfigError."""
        spec, scheme = self.spec(config, name), self.scheme(config)
        if scheme is None:
            return spec
        if spec.weights != Dense():
            raise ConfigError("config.json: has both quantization_config and quantization_bit; one of them is stale")
        head = Dense() if spec.tied or scheme.ignores(self.file("head")) else scheme.form
        spec = replace(spec, weights=scheme.form, head=head)
        return spec if scheme.ignore in ((), (self.file("head"),)) else self.left_dense(spec, config, scheme)

    def left_dense(self, spec: Spec, config: Config, scheme: Scheme) -> Spec:
        """The spec with those sublayers dense that are ignored. Raises ConfigError for one that is in part only."""
        blocks = list(spec.blocks)
        for i, sublayer, modules in self.matrices(spec, config):
            ignored = [module for module in modules if scheme.ignores(module)]
            if ignored and ignored != modules:
                other = next(module for module in modules if module not in ignored)
                raise ConfigError(
                    f"config.json: {CONFIG}: {shown(ignored[0])} is to stay dense and {shown(other)} is not, but the "
                    "matrices of one attention or feed-forward are stored alike: quantise all of them, or none"
                )
            if ignored:
                blocks[i] = replace(blocks[i], dense=(*blocks[i].dense, sublayer))
        return replace(spec, blocks=tuple(blocks))

    def matrices(self, spec: Spec, config: Config) -> Iterator[tuple[int, str, list[str]]]:
        """(block, "mixer" or "feed_forward", what its matrices are called on disk), of those that can be integers."""

        @cache
        def scales(part: Any) -> list[str]:
            with torch.device("meta"):
                return [name for name in part.build(spec.width, RowScaled(8)).state_dict() if "weight_scale" in name]

        for i, block in enumerate(spec.blocks):
            for sublayer, part in (("mixer", block.mixer), ("feed_forward", block.feed_forward)):
                own = [f"blocks.{i}.{sublayer}.{name}" for name in scales(part)]
                yield i, sublayer, [line.name.rpartition(".")[0] for line in self.table(spec, config, own)]

    def write(self, spec: Spec) -> dict[str, Any]:
        """The config.json of a spec, quantised or not. Raises ConfigError where no words say how it is stored."""
        if not isinstance(spec.weights, Grouped):
            if spec.head != Dense():
                raise ConfigError("no format has an integer head with other matrices in another form")
            return self.config(spec)
        if spec.head not in (Dense(), spec.weights):
            raise ConfigError("no format has a head and other matrices in integers of two forms")
        plain = replace(spec, weights=Dense(), head=Dense(), blocks=tuple(replace(b, dense=()) for b in spec.blocks))
        dense, ignore = self.config(plain), [] if spec.head == spec.weights else [self.file("head")]
        if any(block.dense for block in spec.blocks):
            for i, sublayer, modules in self.matrices(spec, dense):
                ignore += modules if sublayer in spec.blocks[i].dense else []
        return dense | {quantized_files.CONFIG: quantized_files.write_scheme(spec.weights, ignore)}

    def scheme(self, config: Config) -> Scheme | None:
        """How a config.json says that matrices are quantised; None where it does not. Raises ConfigError."""
        return quantized_files.read_scheme(config, self.file("head"))

    def ours(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, with integers in the layouts of others seen as our own. Raises CheckpointError."""
        return quantized_files.ours(checkpoint, self.scheme(checkpoint.config))

    def file(self, module: str) -> str:
        """What our `module` is called on disk; "" where this format does not have it."""
        return next((name.file for name in self.names if name.ours == module), "")

    def table(self, spec: Spec, config: Config, parameters: Iterable[str]) -> list[Stored]:
        """Where each of our `parameters` lies on disk, in the order of the parameters."""
        return list(stored(self.names, spec, config, parameters))

    def next_table(self, spec: Spec, config: Config, parameters: Iterable[str]) -> list[Stored]:
        """Where each parameter of a `NextToken` lies on disk. Raises ConfigError where the format has no such block."""
        if not self.following:
            raise ConfigError(f"{self.name}: checkpoints of this format have no block that predicts one token further")
        place = f"blocks.{len(spec.blocks)}."
        ours = {place + parameter.removeprefix("block."): parameter for parameter in parameters}
        table = stored((*self.names, *self.following), spec, config, ours)
        return [replace(line, parameter=ours[line.parameter]) for line in table]

    def unused(self, spec: Spec) -> tuple[str, ...]:
        """Patterns of the tensor names that a file may carry and a model of `spec` does not use."""
        patterns = (pattern.replace("{L}", str(len(spec.blocks))) for pattern in self.ignorable)
        return (*patterns, *self.spare_head(spec))

    def spare_head(self, spec: Spec) -> list[str]:
        """Pattern of the head that a file may carry although the model's head is its embedding (GLM-Edge-1.5B does)."""
        heads = [name.file for name in self.names if spec.tied and name.ours == "head"]
        return [rf"{re.escape(head)}\.weight" for head in heads]


def stored(names: Iterable[Name], spec: Spec, config: Config, parameters: Iterable[str]) -> Iterator[Stored]:
    """The lines of `names` applied to every parameter. Raises ConfigError for one that has no line."""
    lines: dict[str, list[Name]] = {}
    for name in names:
        lines.setdefault(name.ours, []).append(name)
    for parameter in parameters:
        if parameter == "head.weight" and spec.tied:
            continue  # it is the embedding, which is stored
        layer = re.match(r"blocks\.(\d+)\.", parameter)
        number = layer[1] if layer else ""
        template = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", parameter)
        module, _, tensor = template.rpartition(".")
        found = lines.get(template) or lines.get(module)
        if found is None:
            raise ConfigError(f"this format has no name for {parameter}: it cannot hold such a model")
        for name in found:
            file = name.file.replace("{i}", number) + ("" if name.whole else f".{tensor}")
            rows = () if name.rows is None else (name.rows(spec),)
            places = [()] if name.stack is None else [(e,) for e in range(name.stack(spec))]
            for place in places:
                yield Stored(
                    name=file.replace("{e}", str(*place)),
                    parameter=parameter,
                    index=(*place, *rows),
                    packing=None if name.packing is None else name.packing(spec, config),
                    at_least=name.at_least,
                )


def divided(what: int, by: int, names: str) -> int:
    """`what / by`, or a ConfigError when it does not divide."""
    if what % by:
        raise ConfigError(f"config.json: {names}: {what} is not a multiple of {by}")
    return what // by
