# %% [markdown]
# # The family
#
# What is a GLM? Several dozen checkpoints bear the name, and their code was published in as many files. Yet the models
# are made of few parts, and each release changes few of them. This chapter says which, and lets the releases say it
# themselves.

# %%
import rich
import torch
from rich.tree import Tree

import glm
from docs import drawing
from docs.writing import Markdown, table
from glm.cards import sizes
from glm.experts import Experts
from glm.feed_forward import FeedForward
from glm.info import cache_bytes_per_token, parameters

releases = glm.releases()
years = [release.year for release in releases.values()]
Markdown(f"This package has {len(releases)} of them, published from {min(years)} to {max(years)}.")

# %% [markdown]
# ## A release is data
#
# A `Spec` is the complete description of a model: every size, every norm, how positions enter, who may see whom. It is
# a tree of frozen dataclasses, and each of them builds one module. This is ChatGLM-6B:

# %%
print(releases["chatglm-6b"].spec)

# %% [markdown]
# Nothing else is needed to build the model. On the meta device that takes no memory, so that one can count what a
# release has learnt without its files.

# %%
model = glm.GLM.from_release("chatglm-6b", device="meta")
count = sum(p.numel() for p in model.parameters())
assert count == parameters(releases["chatglm-6b"].spec)
print(f"{count:,} parameters in {len(model.blocks)} blocks")

# %% [markdown]
# ## The parts
#
# Leave the sizes out, and what is left of a spec fits in one line. One release of each kind:

# %%
KINDS = {
    "GLM": "glm-10b",
    "GLM-130B": "glm-130b",
    "ChatGLM-6B": "chatglm-6b",
    "ChatGLM2-6B": "chatglm2-6b",
    "GLM-4-9B": "glm-4-9b-chat",
    "GLM-4-0414": "glm-4-9b-0414",
    "GLM-4.5": "glm-4.5",
    "GLM-4.7-Flash": "glm-4.7-flash",
    "GLM-5": "glm-5",
}


def attention(mixer: object) -> str:
    """What kind of mixer it is; attention is told apart by how many query heads share a key head."""
    if type(mixer).__name__ != "Attention":
        return type(mixer).__name__
    return "Attention" if mixer.groups == mixer.heads else "Attention, shared keys"


def parts(spec: glm.Spec) -> dict[str, str]:
    """What a model is made of, whatever its size; of blocks that differ the last one speaks."""
    block, rotary = spec.blocks[-1], spec.rotary
    turned = getattr(rotary, "widths", ())
    experts = block.feed_forward if isinstance(block.feed_forward, Experts) else None
    inner = block.feed_forward if experts is None else experts.expert
    assert isinstance(inner, FeedForward)
    return {
        "reads": type(spec.reading).__name__,
        "positions": f"rotary, {len(turned)} axes" if len(turned) > 1 else "rotary" if turned else "tables",
        "pairs": getattr(rotary, "pairing", "–"),
        "wiring": type(block.wiring).__name__,
        "norm": type(block.norm).__name__,
        "mixer": attention(block.mixer),
        "feed-forward": " · ".join(sorted(inner.branches)).replace("_tanh", ""),
        "experts": "experts" if experts else "–",
    }


made = {name: parts(releases[release].spec) for name, release in KINDS.items()}
table(["", *made["GLM"]], [[name, *of.values()] for name, of in made.items()])

# %% [markdown]
# Two things in the table are GLM's own. `Blank` and `InTurn` are reading rules: a text with blanks is read as a whole,
# and the blanks are written behind it, which [chapter 2](02_blank_infilling.py) explains; everything since ChatGLM2 is
# `Causal`. And positions once had two axes, [chapter 3](03_positions.py). The rest is what other models have as well,
# at other times: the reasons are in the chapters on [attention](04_attention.py), [wiring](05_wiring.py),
# [feed-forwards](06_feed_forward.py), [experts](07_experts.py), [latent](08_latent_attention.py) and
# [sparse attention](09_sparse_attention.py).
#
# ## A tree
#
# Who comes from whom? Take for each kind the earlier one from which the fewest parts differ, of equals the latest. The
# branches are what changed.

# %%
names = list(made)


def changed(one: str, other: str) -> list[str]:
    """The parts in which two kinds differ."""
    return [part for part in made[one] if made[one][part] != made[other][part]]


parent = {
    name: min(reversed(names[:i]), key=lambda earlier, name=name: len(changed(earlier, name)))
    for i, name in enumerate(names)
    if i
}
trees = {names[0]: Tree(names[0])}
for name, before in parent.items():
    trees[name] = trees[before].add(f"{name}  [dim]{', '.join(changed(before, name)) or 'sizes only'}[/]")
rich.print(trees[names[0]])

# %% [markdown]
# The same tree over the years. In brackets: how many of the parts in the table changed.

# %%
picture, axes = drawing.figure(5, 3.4)
year = {name: releases[release].year for name, release in KINDS.items()}
at = {name: (year[name] + 0.23 * names[:i].count(name), -i) for i, name in enumerate(names)}
for name, before in parent.items():
    (x0, y0), (x1, y1) = at[before], at[name]
    axes.plot([x0, x0, x1], [y0, y1, y1], color=drawing.INK, linewidth=0.8, zorder=1)
for name, (x, y) in at.items():
    spec = releases[KINDS[name]].spec
    colour = drawing.ORANGE if type(spec.reading).__name__ != "Causal" else drawing.BLUE
    axes.scatter([x], [y], s=44, color=colour, zorder=2)
    count = f" ({len(changed(parent[name], name))})" if name in parent else ""
    axes.text(x + 0.13, y, name + count, va="center", bbox={"color": "white", "pad": 0.8}, zorder=1.5)
axes.scatter([], [], color=drawing.ORANGE, label="reads both ways")
axes.scatter([], [], color=drawing.BLUE, label="causal")
axes.legend(loc="lower left")
axes.set_xticks(sorted(set(year.values())))
axes.set_xlim(min(years) - 0.3, max(years) + 1.9)
axes.set_yticks([])
axes.spines["left"].set_visible(False)
picture

# %% [markdown]
# ## The history, field by field
#
# `glm.diff` compares two specs whole, sizes included. From ChatGLM-6B to its successor almost everything changed:

# %%
print(glm.diff("chatglm-6b", "chatglm2-6b"))

# %% [markdown]
# After that, hardly anything. ChatGLM3-6B is built like ChatGLM2-6B; only the length it was published for differs.

# %%
print(glm.diff("chatglm2-6b", "chatglm3-6b"))
assert {change.field for change in glm.diff("chatglm2-6b", "chatglm3-6b").changes} == {"context"}

# %% [markdown]
# GLM-4-9B has more layers, another vocabulary, a larger base of its rotations and a smaller epsilon. The successor
# puts a second norm behind each sublayer. Prompts changed as well, but a prompt is text: it is not in the spec.

# %%
print(glm.diff("chatglm3-6b", "glm-4-9b-chat"))

# %%
print(glm.diff("glm-4-9b", "glm-4-9b-0414"))

# %% [markdown]
# Releases can also be equal. These have the same spec, and differ in what they were trained on, or in how their files
# are written:

# %%
alike: dict[glm.Spec, list[str]] = {}
for name, release in releases.items():
    alike.setdefault(release.spec, []).append(name)
print(f"{len(releases)} releases, {len(alike)} specs")
for same in alike.values():
    if len(same) > 1:
        print("  ", " = ".join(same))

# %% [markdown]
# ## What the changes were for
#
# Two costs decide which machine a model runs on: its weights, and what it remembers of each token. Sharing key heads
# and, later, latents are about the second. A block with $G$ key heads of $K$ channels remembers a key and a value, so
# that $L$ blocks take
#
# $$ 2 \cdot L \cdot G \cdot K \cdot 2 \ \text{bytes} $$
#
# a token in bfloat16.

# %%
for name in ("chatglm-6b", "chatglm2-6b", "glm-4.5"):
    spec = releases[name].spec
    mixer = spec.blocks[0].mixer
    assert 2 * len(spec.blocks) * mixer.groups * mixer.head_width * 2 == cache_bytes_per_token(spec, torch.bfloat16)

kibibytes = [cache_bytes_per_token(releases[release].spec, torch.bfloat16) / 1024 for release in KINDS.values()]
drawing.bars(names, {"cache of one token, KiB (bfloat16)": kibibytes}, number="{:.0f}")

# %% [markdown]
# Weights went the other way. But an expert model computes with a small part of itself at a time: a token meets only
# those experts that are chosen for it.

# %%
lines = [sizes(releases[release]) for release in KINDS.values()]
drawing.bars(
    names,
    {
        "parameters, 10⁹": [line.parameters / 1e9 for line in lines],
        "of these met by one token": [line.active / 1e9 for line in lines],
    },
    log=True,
)

# %% [markdown]
# The table of all releases is `glm releases`; [how to load them](../load/index.md) has a page for each generation.
#
# ## Exercises
#
# The stubs are in `docs/exercises/e00_family.py`. `python -m docs.check 0.1` says whether you are right.
#
# - Exercise 0.1, `cache_of_a_token`: what one more token costs.
# - Exercise 0.2, `changed`: which fields of two specs differ.
# - Exercise 0.3, `broken_field`: a spec that is wrong in one field. Which one?
# - Exercise 0.4, `to_chatglm2`: what ChatGLM2-6B has instead of what ChatGLM-6B had.
#
# ## Read the code
#
# - `glm/spec.py`: `Spec` and `Block`, the whole of what was printed above.
# - `glm/family/chatglm.py`: one generation: its specs, how its `config.json` is read, how its tensors are called.
# - `glm/changes.py`: `glm.diff`.
