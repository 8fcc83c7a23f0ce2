"""What the pages on loading checkpoints say, found out while they are built: releases, memory, prompts, conversion.

Everything returned shows itself as Markdown where it is the last value of a cell.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import glm
from docs.writing import Markdown, table
from glm.cards import CONTEXT, Sizes, shortly, sizes
from glm.chat import Conversation, TextFormat, shown
from glm.convert import convert
from glm.family import GENERATIONS
from glm.family.generation import Release
from glm.info import cache_bytes_per_token, weight_bytes
from glm.linear import Dense
from glm.verify import verify

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"


def of(generation: str) -> list[Release]:
    """The releases of a generation, by the name of its file in glm/family."""
    [found] = (each for each in GENERATIONS if each.name == generation)
    return list(found.releases)


def files(generation: str) -> Markdown:
    """Where the files of each release are: its place on the hub, how many files, and the dtype of what they hold."""
    head = ["release", "year", "on the hub", "files", "dtype"]
    return table(head, ([f"`{r.name}`", str(r.year), f"[{r.hub}](https://huggingface.co/{r.hub})", str(r.shards),
                         str(r.dtype).removeprefix("torch.")] for r in of(generation)))  # fmt: skip


def memory(generation: str) -> Markdown:
    """What each release needs: weights as published, in bfloat16 and in int4, and the cache of `CONTEXT` tokens."""
    cache = f"cache of {shortly(CONTEXT)}, GB"
    head = ["release", "as published, GB", "bf16, GB", "int4, GB", cache, "card for bf16, GiB", "for int4, GiB"]
    return table(head, map(needs, of(generation)))


def needs(release: Release) -> list[str]:
    """One line of it; sizes in 10⁹ bytes, cards in GiB."""
    found: Sizes = sizes(release)
    tokens = min(CONTEXT, release.spec.context)
    cache = cache_bytes_per_token(replace(release.spec, weights=Dense()), torch.bfloat16) * tokens
    stored = weight_bytes(release.spec, release.dtype)
    gigabytes = [f"{size / 1e9:.1f}" for size in (stored, found.bf16, found.int4, cache)]
    return [f"`{release.name}`", *gigabytes, found.card_bf16, found.card_int4]


TALK = (
    {"role": "user", "content": "What is a blank?"},
    {"role": "assistant", "content": "A place to write."},
    {"role": "user", "content": "And a mask?"},
)


def prompt(form: TextFormat, messages: Iterable[dict[str, str]] = TALK) -> Markdown:
    """The prompt that a release's format makes of some messages, special tokens by their names."""
    text = shown(form.prompt(Conversation([dict(message) for message in messages], [])))
    return Markdown(f"```text\n{text}\n```")


def fill(form: TextFormat, text: str) -> Markdown:
    """The prompt that has a blank of a text filled."""
    assert form.fills is not None
    return Markdown(f"```text\n{''.join(form.before)}{text}{''.join(form.fills)}\n```")


def verified(golden: str) -> Markdown:
    """Load a small model in a release's layout, and hold it to what the release's own code made of it."""
    report = verify(GOLDENS / golden)
    assert report.ok
    worst = max(row.relative for row in report.rows if "logits" in row.quantity)
    return Markdown(
        f"`{golden}`, a small model in this layout, was loaded and run in float64: it computes what the release's own "
        f"code computed, the logits to {worst:.0e} of their rms."
    )


def converted(golden: str, names: str | None = None) -> Markdown:
    """Write a small model as the `.bin` file such releases were published as, convert it, and load both: equal."""
    with tempfile.TemporaryDirectory() as place:
        old, new = Path(place) / "old", Path(place) / "new"
        if names is None:
            old.mkdir()
            torch.save(load_file(GOLDENS / golden / "model.safetensors"), old / "pytorch_model.bin")
            (old / "config.json").write_bytes((GOLDENS / golden / "config.json").read_bytes())
        else:
            old = GOLDENS / golden
        convert(old, new, names=names, quiet=True)
        before, after = (glm.GLM.from_pretrained(folder).state_dict() for folder in (GOLDENS / golden, new))
        written = sorted(path.name for path in new.iterdir())
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    options = f" --names {names}" if names else ""
    return Markdown(
        f"`glm convert{options}` wrote {', '.join(f'`{name}`' for name in written)}, and the model loaded from there "
        f"has the same {len(after)} tensors, bit for bit."
    )
