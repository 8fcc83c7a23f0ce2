# %% [markdown]
# # Positions
#
# Attention compares a query with keys, and a set of keys has no order. The order has to be put into the vectors. The
# layout of the last chapter gives every token a position id on each axis, `[B, T, A]`. This chapter is about what a
# model makes of these numbers: first a table, then a rotation, and then less and less of it.

# %%
import math
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.patches import Patch
from safetensors.torch import load_file

import glm
from docs import drawing
from glm.attention import Attention
from glm.family import GENERATIONS
from glm.positions import Interpolation, Learned, Plain, Rotary, Unturned, Yarn

torch.manual_seed(0)
EPS = torch.finfo(torch.float64).eps
SPECS = {name: release.spec for name, release in glm.releases().items()}


def heads(*shape: int) -> torch.Tensor:
    """Random queries or keys in float64."""
    return torch.randn(*shape, dtype=torch.float64)


# %% [markdown]
# ## A table for each axis
#
# GLM of 2021 learns one row for each place that a text can have, and one for each place inside a blank. A token
# starts as
#
# $$ x = E_{\text{id}} + P^{(0)}_{p_0} + P^{(1)}_{p_1} . $$

# %%
places = Learned(length=9, axes=2).build(width=8).double()
torch.nn.init.normal_(places.tables[0].weight)
torch.nn.init.normal_(places.tables[1].weight)
positions = torch.tensor([[[0, 0], [1, 0], [2, 0], [1, 1], [1, 2]]])  # [1, T, 2]
first, second = (table.weight for table in places.tables)
expected = torch.stack([first[p] + second[q] for p, q in positions[0].tolist()])
assert torch.equal(places(positions)[0], expected)

# %% [markdown]
# A table ends. The model has never seen place 9 of this one, and says so:

# %%
try:
    places(torch.tensor([[[9, 0]]]))
except glm.LayoutError as error:
    print(error)
print("rows of GLM-10B's tables:", SPECS["glm-10b"].learned.length)

# %% [markdown]
# And a table says *where* a token is. What attention mostly asks is *how far away* it is.
#
# ## A rotation
#
# Rotary embedding turns pairs of channels $(a, b)$ of every query and every key by an angle that grows with the
# position $p$:
#
# $$ \begin{pmatrix} a \\ b \end{pmatrix} \to
#    \begin{pmatrix} a \cos p\,\omega - b \sin p\,\omega \\ a \sin p\,\omega + b \cos p\,\omega \end{pmatrix},
#    \qquad \omega_i = \text{base}^{-2i/w}, \quad i = 0 \dots \tfrac{w}{2} - 1 . $$
#
# As a complex number, $a + ib$ is multiplied by $e^{ip\omega}$. One pair at a time, that is all:

# %%
rotary = Rotary(widths=(8,), pairing="interleaved", base=10000.0, scaling=Plain(), rounding=None)
q = heads(1, 5, 1, 8)  # [B T heads K]
p = torch.arange(5)
turned = rotary.rotation(p[None, :, None], q.dtype)(q)

omega = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
as_complex = torch.view_as_complex(q.unflatten(-1, (4, 2))) * torch.exp(1j * p[None, :, None, None] * omega)
assert (turned - torch.view_as_real(as_complex).flatten(-2)).abs().max() < 8 * EPS * q.abs().max()

# %% [markdown]
# Why this? Because the product of a turned query and a turned key depends on the two positions **only through their
# difference**: for $q, k \in \mathbb{C}$ one has
# $\operatorname{Re}(q e^{im\omega} \overline{k e^{in\omega}}) = \operatorname{Re}(q \bar{k} e^{i(m-n)\omega})$.
# So moving a whole text changes no score:


# %%
def scores(rotary: Rotary, q: torch.Tensor, k: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """q·k of all pairs of tokens, [T, T], for one head and position ids [T, A]."""
    turn = rotary.rotation(places[None], q.dtype)
    return (turn(q)[0, :, 0] @ turn(k)[0, :, 0].T).detach()


k = heads(1, 5, 1, 8)
here, there = scores(rotary, q, k, p[:, None]), scores(rotary, q, k, p[:, None] + 1000)
# at position 1000 the angle itself is rounded by 1000 eps
assert (here - there).abs().max() < 8 * 1000 * EPS * q.norm(dim=-1).max() * k.norm(dim=-1).max()
assert (here - scores(rotary, q, k, 2 * p[:, None])).abs().max() > 0.1  # what counts are distances, and these doubled

# %% [markdown]
# Nothing is added to the values, and nothing is learnt. Keys are turned once, when they are made, and lie turned in
# the cache.
#
# ## Two axes
#
# ChatGLM-6B has two position ids a token and no table. It gives each axis half of a head: the first 64 channels are
# turned by the place, the other 64 by the place inside the blank. A score then depends on two differences, and is the
# sum of two scores:

# %%
print(SPECS["chatglm-6b"].rotary)
two = Rotary(widths=(4, 4), pairing="halves", base=10000.0, scaling=Plain(), rounding=None)
one = replace(two, widths=(4,))
place, inside = torch.tensor([0, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 2])
both = scores(two, q, k, torch.stack((place, inside), -1))
by_place = scores(one, q[..., :4], k[..., :4], place[:, None])
by_inside = scores(one, q[..., 4:], k[..., 4:], inside[:, None])
assert (both - (by_place + by_inside)).abs().max() < 8 * EPS * both.abs().max()

# %% [markdown]
# For tokens that are read the second id is always 0: among them the second half of a head is not turned at all. For
# the tokens of an answer the first id is always the same: among *them* the first half tells nothing. Each half of a
# head tells one thing.
#
# One detail must be kept to get ChatGLM-6B's numbers: its frequencies are **rounded to float16** when the model is
# made. The rounded ones are what the golden files hold:

# %%
golden = Path(glm.__file__).parents[1] / "tests" / "goldens" / "chatglm1-base"
stored = load_file(golden / "reference.safetensors")["rotary.inv_freq"].double()
small = replace(two, widths=(6, 6), rounding="float16")
assert torch.equal(small.frequencies(6), stored)
exact = replace(small, rounding=None).frequencies(6)
assert not torch.equal(exact, stored)

width = SPECS["chatglm-6b"].rotary.widths[0]
rounded = SPECS["chatglm-6b"].rotary.frequencies(width)
off = (rounded - replace(SPECS["chatglm-6b"].rotary, rounding=None).frequencies(width)).abs().max()
last = SPECS["chatglm-6b"].context - 1
print(f"at position {last} the rounded angles are up to {off * last:.2f} radians off")

# %% [markdown]
# ## Half of it
#
# ChatGLM2 has one axis. It could turn all 128 channels by it, as GLM-130B does. Instead the half that belonged to the
# second axis is **not turned**: `widths` is `(64,)` for a head of 128. What the unturned half contributes to a score
# does not depend on positions at all. It can ask for a token wherever that is.

# %%
half = Rotary(widths=(4,), pairing="interleaved", base=10000.0, scaling=Plain(), rounding=None)
turned = half.rotation(p[None, :, None], q.dtype)(q)
assert torch.equal(turned[..., 4:], q[..., 4:])
content = q[0, :, 0, 4:] @ k[0, :, 0, 4:].T
rest = scores(half, q, k, p[:, None]) - scores(half, q[..., :4], k[..., :4], p[:, None])
assert (rest - content).abs().max() < 16 * EPS * q.norm(dim=-1).max() * k.norm(dim=-1).max()

# %% [markdown]
# Every GLM since then whose heads are of the usual kind turns half of them; only the two small GLM-Edge turn all.

# %%
for name, spec in SPECS.items():
    if isinstance(mixer := spec.blocks[0].mixer, Attention) and spec.rotary != Unturned() and "130b" not in name:
        share = sum(spec.rotary.widths) / mixer.head_width
        assert share == (1.0 if "edge" in name or len(spec.rotary.widths) == 2 else 0.5)

# %% [markdown]
# What turns which channels of a head, drawn from the specs, in the order of publication:

# %%
SHOWN = ("glm-10b", "glm-130b", "chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b", "glm-4-9b-0414", "glm-4.5")
picture, ax = drawing.figure(5, 3.4)
for row, name in enumerate(SHOWN):
    rotary, width = SPECS[name].rotary, SPECS[name].blocks[0].mixer.head_width
    runs = [*getattr(rotary, "widths", ())]
    ax.barh(row, width, color=drawing.PALE)
    for axis, run in enumerate(runs):
        ax.barh(row, run, left=sum(runs[:axis]), color=drawing.PALETTE[axis])
ax.set_yticks(range(len(SHOWN)), SHOWN)
ax.invert_yaxis()
ax.set_xlabel("channel of a head")
colours = {"by the first axis": drawing.BLUE, "by the second": drawing.ORANGE, "not turned": drawing.PALE}
handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
picture.legend(handles=handles, loc="outside upper center", ncols=3)
picture

# %% [markdown]
# ## Which two channels are a pair
#
# The equation speaks of pairs and does not say which channels they are. Two conventions exist, and GLM has used both:
# **halves** pairs channel $i$ with channel $i + w/2$, **interleaved** pairs $2i$ with $2i + 1$.

# %%
pairings = {}
for generation in GENERATIONS:
    for release in generation.releases:
        pairings.setdefault(getattr(release.spec.rotary, "pairing", "none: tables"), {})[generation.name] = True
for pairing, generations in pairings.items():
    print(f"{pairing:13}", ", ".join(generations))

# %% [markdown]
# The two differ by an order of channels. With $\pi$ the permutation that puts the even channels first, interleaved
# rotation is halves rotation of the permuted vector, permuted back:
#
# $$ R_{\text{interleaved}}(x) = \pi^{-1} R_{\text{halves}}(\pi x) . $$

# %%
order = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2)))  # π
back = order.argsort()
interleaved = Rotary((8,), "interleaved", 10000.0, Plain(), None).rotation(p[None, :, None], q.dtype)
halves = Rotary((8,), "halves", 10000.0, Plain(), None).rotation(p[None, :, None], q.dtype)
assert torch.equal(interleaved(q), halves(q[..., order])[..., back])

# %% [markdown]
# So a checkpoint can be converted from one to the other by moving rows of the query and key matrices, and the scores
# do not change. And a checkpoint that is read with the wrong one computes nonsense from the second token on, with no
# error of any shape. (The first token stands at 0, and nothing turns there.)

# %%
assert (interleaved(q)[:, 0] - halves(q)[:, 0]).abs().max() == 0
assert (interleaved(q)[:, 1:] - halves(q)[:, 1:]).abs().max() > 0.1

# %% [markdown]
# ## Base, and how far a position reaches
#
# Pair $i$ comes round after $\lambda_i = 2\pi/\omega_i = 2\pi\,\text{base}^{2i/w}$ tokens. Fast pairs tell neighbours
# apart; slow pairs tell the beginning of a text from its end. A pair that has not come round within the texts of the
# training shows the model, in a longer text, angles that it has never seen. The base decides how slow the slowest is:


# %%
def longest(rotary: Rotary) -> float:
    """The longest wavelength, in tokens."""
    return 2 * math.pi / float(rotary.frequencies(rotary.widths[0]).min())


print(f"{'release':18} {'context':>9} {'base':>12} {'divided by':>10} {'longest wavelength':>19}")
for name in ("chatglm2-6b", "chatglm2-6b-32k", "chatglm3-6b-32k", "chatglm3-6b-128k", "glm-4-9b-chat-1m", "glm-4.5"):
    rotary = SPECS[name].rotary
    factor = getattr(rotary.scaling, "factor", 1.0)
    print(f"{name:18} {SPECS[name].context:9,} {rotary.base:12,.0f} {factor:10g} {longest(rotary):19,.0f}")

# %% [markdown]
# ## One field, two meanings
#
# A config file of ChatGLM2 or of a later model in its format can have a field `rope_ratio`, a number $r$. In
# ChatGLM2-6B-32k it means **interpolation**: positions are divided by it, $p \to p/r$. From ChatGLM3-6B-32k on it
# means a **larger base**: base $\to r \cdot$ base. Same name, other model.
#
# Interpolation slows every pair down alike. A larger base leaves the fastest pair as it is, $\omega_0 = 1$, and slows
# pair $i$ down by $r^{2i/w}$, so that neighbours stay as easy to tell apart as they were:

# %%
r, w = 16.0, 64
plain = Rotary((w,), "interleaved", 10000.0, Plain(), None)
divided = replace(plain, scaling=Interpolation(r))
larger = replace(plain, base=r * plain.base)
i = torch.arange(w // 2, dtype=torch.float64)
assert torch.equal(divided.frequencies(w), plain.frequencies(w) / r)
assert (larger.frequencies(w) * r ** (2 * i / w) / plain.frequencies(w) - 1).abs().max() < 64 * EPS

far, near = torch.tensor([[[3 * 16]]]), torch.tensor([[[3]]])
x = heads(1, 1, 1, w)
assert torch.equal(divided.rotation(far, x.dtype)(x), plain.rotation(near, x.dtype)(x))  # 48 stands where 3 stood
print(SPECS["chatglm2-6b-32k"].rotary)
print(SPECS["chatglm3-6b-32k"].rotary)

# %% [markdown]
# ## YaRN: between the two
#
# YaRN asks of each pair how many turns it makes within the context the model was trained on. Pairs that made many are
# kept: all their angles are known, however long the text. Pairs that made one turn or less are interpolated: any
# angle beyond would be new to the model. Between them is a ramp. No release ships with it, but a `config.json` may
# ask for it (`rope_type: yarn`), for texts longer than the model's context.

# %%
assert all(isinstance(getattr(spec.rotary, "scaling", Plain()), Plain | Interpolation) for spec in SPECS.values())
context, factor = SPECS["glm-4-9b-0414"].context, 4.0
before = SPECS["glm-4-9b-0414"].rotary
yarn = Yarn(factor, context, beta_fast=32, beta_slow=1, gain=0.1 * math.log(factor) + 1, truncate=False)
kept = replace(before, scaling=yarn).frequencies(w) / before.frequencies(w)
turns = context * before.frequencies(w) / (2 * math.pi)
assert (kept[turns >= 32] - 1).abs().max() < 4 * EPS
assert (kept[turns <= 1] * factor - 1).abs().max() < 4 * EPS
assert (kept.diff() <= 0).all()  # between the two, slower and slower

x = heads(1, 1, 1, w)
one, other = (replace(before, scaling=s).rotation(torch.tensor([[[0]]]), x.dtype)(x) for s in (Plain(), yarn))
assert (other - yarn.gain * one).abs().max() < 4 * EPS * x.abs().max()

picture, ax = drawing.figure(5, 3)
curves = {
    "positions divided": replace(before, scaling=Interpolation(factor)),
    "larger base": replace(before, base=factor * before.base),
    "YaRN": replace(before, scaling=yarn),
}
for colour, (label, rotary) in zip(drawing.PALETTE, curves.items(), strict=False):
    ax.plot(rotary.frequencies(w) / before.frequencies(w), label=label, color=colour)
ax.set_xlabel("pair of channels, fast to slow")
ax.set_ylabel("frequency, relative")
ax.set_ylim(0, 1.05)
ax.legend()
picture

# %% [markdown]
# YaRN also makes queries and keys longer, both by the `gain` (the last assertion). A softmax over more tokens is
# flatter, and this sharpens it again.
#
# ## Angles are large numbers
#
# The fastest pair turns by one radian a token, so at the end of a long text its angle is as large as the text is
# long. A number format that has no room for it loses just the digits that a cosine needs. ChatGLM2's first code
# counted positions in float16, which has no odd numbers above 2048. `glm` computes angles in float64, once a pass.

# %%
assert torch.tensor(2049.0, dtype=torch.float16) == 2048
long = SPECS["glm-4-9b-chat-1m"]
last, omega = long.context - 1, long.rotary.frequencies(w)
in_float32 = last * omega.float()
worst = (in_float32.double() - last * omega).abs().max()
print(f"at position {last:,} an angle in float32 is up to {worst:.2f} radians off")

# %% [markdown]
# ## What changed, by release
#
# `glm.diff` compares two specs. All that this chapter was about is in the lines that begin with `rotary` and
# `learned`.

# %%
for one, other in (
    ("glm-10b", "chatglm-6b"),
    ("chatglm-6b", "chatglm2-6b"),
    ("chatglm2-6b", "glm-4-9b-chat"),
    ("glm-4-9b-0414", "glm-4.5"),
):
    print(f"{one} → {other}")
    for change in glm.diff(one, other).changes:
        if change.field.startswith(("rotary", "learned")):
            print("   ", change)

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e03_positions.py`. `python -m docs.check 3.1` says whether you are right.
#
# - Exercise 3.1, `learned_places`: what tables add to the stream.
# - Exercise 3.2, `half_rotary`: the rotation of ChatGLM2.
# - Exercise 3.3, `rotary_2d`: the rotation of ChatGLM-6B.
# - Exercise 3.4, `stretched`: the frequencies that a `rope_ratio` makes, in both of its meanings.
# - Exercise 3.5, `which_field`: a model whose rotation is wrong in one field. Which one?
#
# ## Read the code
#
# - `glm/positions.py`: all of it; it is short.
# - `glm/family/rope.py`: how the fields of a config.json become a `Rotary`.
