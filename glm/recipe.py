"""A recipe: one TOML file that says all that decides how a small model is trained.

    name = "tiny-glm"
    out = "."                      # where the finished checkpoint goes, from the recipe's folder
    seed = 1

    [tokenizer]                    # a byte-level BPE, learnt from the texts
    vocabulary = 3584              # tokens, with the special ones

    [model]                        # ChatGLM-6B's architecture
    layers = 4
    width = 256
    …

    [training]
    steps = 2400
    …

    [[objective]]                  # one or more: a text, and how it is asked (`glm.curriculum`)
    kind = "chat"
    text = "glossary.md"
    share = 30

A field that is missing, unknown or out of range is a ConfigError that names it. `weights/tiny-glm/recipe.toml` is a
complete one.
"""

import hashlib
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from glm.errors import ConfigError
from glm.fields import Fields, shown

KINDS = (
    "chat",  # answers to questions
    "cuts",  # passages with blanks as a person would make them
    "short",  # with the paper's: Poisson lengths, 15 % of the text
    "sentences",  # with whole sentences, 15 % of the text
    "long",  # with one span of half the text or more, to its end
    "continue",  # with one span from anywhere to the end
)


@dataclass(frozen=True)
class Objective:
    """One way to ask one text."""

    kind: str  # one of `KINDS`
    text: str  # a file, named from the recipe's folder
    share: float  # of all samples, in proportion to the other objectives'
    history: float  # chat: the part of the questions that follow earlier rounds
    careless: float  # chat: the part of the questions without their question mark, or in lower case
    excerpt: float  # cuts: the part of the passages of which only some sentences are shown


@dataclass(frozen=True)
class Recipe:
    """A recipe file, read and checked."""

    folder: Path  # that of the file: `out` and the texts are named from there
    name: str
    out: str
    seed: int
    vocabulary: int  # tokens at most, with the special ones
    layers: int
    width: int
    inner: int
    heads: int
    context: int
    steps: int
    tokens: int  # of a batch at most, padding included
    learning_rate: float  # at the top of the schedule
    warm_up: int  # steps on the way up
    beta1: float
    beta2: float
    weight_decay: float  # of matrices
    clip: float  # the norm that gradients are cut to
    threads: int  # of the CPU; 0 leaves it to torch
    precision: str  # of matrix products: "float32", or "bfloat16" where the processor is fast at it
    checkpoint_every: int  # steps
    exam: int  # fresh cuts that the finished model is examined with
    objectives: tuple[Objective, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Recipe":
        """The recipe in a file. Raises ConfigError."""
        path = Path(path)
        try:
            whole = Fields(tomllib.loads(path.read_text(encoding="utf-8")), path.name)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        tokenizer, model, training = (table(whole, name) for name in ("tokenizer", "model", "training"))
        recipe = cls(
            folder=path.parent,
            name=whole.text("name"),
            out=whole.text("out"),
            seed=whole.integer("seed", 0, 1 << 31),
            vocabulary=tokenizer.integer("vocabulary", 300, 1 << 20),
            layers=model.integer("layers", 1, 1000),
            width=model.integer("width", 4, 1 << 15),
            inner=model.integer("inner", 1, 1 << 17),
            heads=model.integer("heads", 1, 1024),
            context=model.integer("context", 1, 1 << 20),
            steps=training.integer("steps", 1, 1 << 31),
            tokens=training.integer("tokens", 1, 1 << 24),
            learning_rate=training.number("learning_rate", 0, 10),
            warm_up=training.integer("warm_up", 0, 1 << 31),
            beta1=training.number("beta1", 0, 0.99999),
            beta2=training.number("beta2", 0, 0.99999),
            weight_decay=training.number("weight_decay", 0, 10),
            clip=training.number("clip", 0, 1e9),
            threads=training.integer("threads", 0, 1024, default=0),
            precision=training.choice("precision", ("float32", "bfloat16"), default="float32"),
            checkpoint_every=training.integer("checkpoint_every", 1, 1 << 31),
            exam=training.integer("exam", 0, 1 << 20, default=500),
            objectives=tuple(objectives(whole)),
        )
        for fields in (whole, tokenizer, model, training):
            complete(fields)
        return recipe

    def text(self, objective: Objective) -> str:
        """What an objective asks. Raises ConfigError."""
        path = self.folder / objective.text
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the text cannot be read ({error})") from None

    def fingerprint(self) -> str:
        """A hash of all that decides how the training goes: the recipe, wherever it lies, and its texts."""
        digest = hashlib.sha256(repr(replace(self, folder=Path(), out="")).encode())
        for objective in self.objectives:
            digest.update(self.text(objective).encode())
        return digest.hexdigest()


def table(whole: Fields, name: str) -> Fields:
    """A table of the recipe. Raises ConfigError where it is missing."""
    if (section := whole.section(name)) is None:
        raise ConfigError(f"{whole.source}: the table [{name}] is missing")
    return section


def objectives(whole: Fields) -> Iterator[Objective]:
    """The [[objective]] tables."""
    tables = whole.values.get("objective")
    whole.read.add("objective")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{whole.source}: it needs a table [[objective]] or more, with kind, text and share")
    for number, fields in enumerate(tables, 1):
        f = Fields(fields, f"{whole.source}: objective {number}")
        yield Objective(
            kind=f.choice("kind", KINDS),
            text=f.text("text"),
            share=f.number("share", 1e-9, 1e9),
            history=f.number("history", 0, 1, default=0.0),
            careless=f.number("careless", 0, 1, default=0.0),
            excerpt=f.number("excerpt", 0, 1, default=0.0),
        )
        complete(f)


def complete(fields: Fields) -> None:
    """Raises ConfigError for a field that no recipe has: mistyped, it would otherwise do nothing."""
    if unknown := fields.unread():
        raise ConfigError(f"{fields.source}: there is no field {shown(unknown[0])}")
