# %% [markdown]
# # Blank infilling
#
# A masked language model reads in both directions and cannot write. A causal language model writes and reads in one
# direction only. GLM does both in one transformer: it reads a text with blanks, and behind the text it writes what
# belongs in the blanks. All it takes is a choice of **position ids** and of **who may see whom**. Both are in one
# object, `glm.Layout`, and this chapter is about that object.

# %%
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

import glm
from docs import drawing
from glm.family.text_chatglm2 import ADDED
from glm.infilling import IGNORED, Marks, Sample, blanked, continued, loss, plain, units
from glm.layout import Blank, Layout

model = glm.GLM.from_pretrained(glm.embedded(), dtype=torch.float64)
tokenizer = glm.Tokenizer.from_pretrained(glm.embedded())
marks = Marks.of(model.spec)

# %% [markdown]
# ## A text loses its spans
#
# Take a text, cut out some spans, and put one `[MASK]` in the place of each. That is what the model **reads**. What
# it **writes** comes behind: the spans, one after another, each behind a token `<sop>` (start of piece). The model is
# to end each with `<eop>` (end of piece).
#
# `blanked` makes such a sample. The spans are given in words of the text; the order of writing is drawn at random.

# %%
text = "Attention is a lookup that never quite decides."
words = units(text)
sample = blanked(words, [(1, 2), (4, 6)], plain(tokenizer), marks, Random(1))
NAMES = {marks.mask: "[MASK]", marks.gmask: "[gMASK]", marks.sop: "<sop>", marks.eop: "<eop>", IGNORED: "-"}


def named(ids: list[int]) -> list[str]:
    """Each token as it is read."""
    return [NAMES[id] if id in NAMES else tokenizer.decode([id]).strip() for id in ids]


def table(ids: list[int], targets: list[int], layout: Layout) -> str:
    """One token a line: what it is, what should be said behind it, and where it stands on both axes."""
    rows = zip(named(ids), named(targets), layout.positions[0].tolist(), strict=True)
    head = f"{'token':9} {'target':9} place inside"
    return "\n".join([head, *(f"{id:9} {target:9} {place:5} {inside:6}" for id, target, (place, inside) in rows)])


print(table(sample.ids, sample.targets, sample.layout))

# %% [markdown]
# Read the table from the top. The tokens that are read have the places 0, 1, 2 … and stand at 0 inside. Then the
# first `<sop>` begins: it and the tokens behind it all have the **place of their blank**, and count 1, 2, 3 …
# **inside** it. The next `<sop>` goes to another place and counts from 1 again.
#
# The same, written without the package:

# %%
ids, targets = list(sample.read), [IGNORED] * len(sample.read)
place, inside = list(range(len(sample.read))), [0] * len(sample.read)
for blank, span in sample.written:
    ids += [marks.sop, *span]
    targets += [*span, marks.eop]
    length = 1 + len(span)  # <sop> and the span; <eop> is a target only
    place += [blank] * length
    inside += range(1, length + 1)
assert (sample.ids, sample.targets) == (ids, targets)
assert sample.layout.positions.tolist() == [[list(pair) for pair in zip(place, inside, strict=True)]]

# %% [markdown]
# Two things are easily got wrong. `<sop>` is a written token: it stands at the place of the blank, and at 1 inside,
# not at 0. And a blank is one token for the first axis, however long the span is that belongs there.
#
# ## Why two axes
#
# With one axis the model would have to be told how long a blank is: either the tokens behind it keep their places in
# the whole text, and the gap tells the length, or the written tokens stand at places that others already have. With
# two axes, nothing that is known before writing depends on what will be written:

# %%
short = Sample(sample.read, [(sample.written[0][0], [7])], marks)
long = Sample(sample.read, [(sample.written[0][0], [7, 8, 9, 10, 11])], marks)
known = len(sample.read) + 2  # what is read, <sop>, and the first token written
assert torch.equal(short.layout.positions[:, :known], long.layout.positions[:, :known])

# %% [markdown]
# ## Who sees whom
#
# What is read sees all of what is read, in both directions. What is written sees all of what is read, and what was
# written before it, itself included. With $C$ tokens read, token $t$ sees token $j$ if and only if
#
# $$ j < C \quad\text{or}\quad j \le t . $$

# %%
T, C = len(sample), len(sample.read)
visible = sample.layout.visible
assert visible.tolist() == [[[j < C or j <= t for j in range(T)] for t in range(T)]]
drawing.mask(sample.layout, named(sample.ids))

# %% [markdown]
# A line is a token that looks, a column a token that is looked at; at the right are its two position ids. The rule
# has no exception for the spans: a span sees the spans written before it, and not those after it.
#
# A mask is a promise about dependence, so it can be tested without looking at it. Change the last written token:
# nothing before it may change. Change the first token that is read: everything may.

# %%
ids = torch.tensor([sample.ids])
with torch.inference_mode():
    logits = model(ids, sample.layout)
    last, first = ids.clone(), ids.clone()
    last[0, -1] = first[0, 0] = marks.mask
    after_last, after_first = model(last, sample.layout), model(first, sample.layout)

assert (after_last != logits).any(-1)[0].tolist() == [False] * (T - 1) + [True]
assert (after_first != logits).any(-1).all()

# %% [markdown]
# ## What is learnt
#
# The objective is the log-probability of the spans, given what is read, one token after another in the order of
# writing. With $s_1 \dots s_n$ all written tokens ($n$ counts each `<eop>`) and $x$ what is read,
#
# $$ \log p(s \mid x) = \sum_{i=1}^{n} \log p(s_i \mid x, s_1, \dots, s_{i-1}) . $$
#
# The sum comes out of **one** pass, because the mask hides from each token what it must not know. To see that it
# does, compute each term by itself, from a row that ends where the term begins.

# %%
targets = torch.tensor([sample.targets])
terms = []
with torch.inference_mode():
    for t in range(C, T):
        row = model(ids[:, : t + 1], sample.layout.without_last(T - 1 - t))
        terms.append(-row[0, -1].log_softmax(-1)[sample.targets[t]])
one_pass, one_by_one = loss(logits, targets), torch.stack(terms).mean()
# what rounding may do: two sublayers a block, whose longest sums have as many terms as the feed-forward has channels
rounding = 2 * len(model.blocks) * model.spec.blocks[0].feed_forward.inner * torch.finfo(torch.float64).eps
assert abs(one_pass - one_by_one) < rounding * one_by_one

# %% [markdown]
# The targets are **not shifted**: the target of `<sop>` is the span's first token, the target of the span's last
# token is `<eop>`. Whoever shifts them once more, as is usual for causal models, trains the wrong thing.
#
# ## Generation is one blank at the end
#
# A prompt is a text whose only blank is at its end. GLM has a token for such a blank, `[gMASK]`: it stands for a text
# of any length, while `[MASK]` stands for a few words within a text. (The two oldest GLMs also
# have `[sMASK]`, for a sentence.) Besides that there is nothing new:

# %%
prompt = continued(words, 5, plain(tokenizer), marks)
print(table(prompt.ids, prompt.targets, prompt.layout))

# %% [markdown]
# The prompt is read in both directions, `[gMASK]` is its last token, and the answer is written with `<sop>` before
# it: every token of the answer has the place of `[gMASK]`, and counts 1, 2, 3 … inside.
#
# So does a prompt of ChatGLM-6B. A release knows what to make of ids: that is its spec's `reading`. The ids of the
# special tokens are in there; the ids of the text below are any.

# %%
chatglm = glm.release("chatglm-6b").spec.reading
gmask, mask = chatglm.masks
ids = torch.tensor([[1001, 1002, 1003, gmask, chatglm.sop, 2001, 2002]])
layout = chatglm.read(ids)
print(layout.positions[0].T)
same = Layout.prefix(batch=1, length=7, read=4, blank=3)
assert torch.equal(layout.positions, same.positions)
assert torch.equal(layout.visible, same.visible)
drawing.mask(layout, ["x1", "x2", "x3", "[gMASK]", "<sop>", "y1", "y2"])

# %% [markdown]
# So all of it can be predicted without a table. Let $C$ be the index of the first `<sop>`, and $M$ that of the first
# `[gMASK]`, or of the first `[MASK]` in a row that has no `[gMASK]`. Token $t$ stands at
#
# $$ (t, 0) \quad\text{if}\quad t < C, \qquad (M,\ t - C + 1) \quad\text{if}\quad t \ge C, $$
#
# and sees $j$ if $j < C$ or $j \le t$. Held to the rule of the release, on random rows:

# %%
rng = Random(2)
for _ in range(100):
    row = [rng.choice((1001, 1002, mask, gmask)) for _ in range(rng.randint(0, 6))] + [rng.choice((mask, gmask))]
    row += [chatglm.sop] + [rng.choice((2001, 2002)) for _ in range(rng.randint(0, 4))]
    C, M = row.index(chatglm.sop), row.index(gmask if gmask in row else mask)
    T, found = len(row), chatglm.read(torch.tensor([row]))
    assert found.positions[0].tolist() == [[t, 0] if t < C else [M, t - C + 1] for t in range(T)]
    assert found.visible[0].tolist() == [[j < C or j <= t for j in range(T)] for t in range(T)]

# %% [markdown]
# With nothing read and one axis the same rule is that of an ordinary causal model: $j < 0$ never holds, $j \le t$ is
# left.

# %%
assert torch.equal(Layout.causal(1, 5).visible, Layout.rule(torch.zeros(1, 5, 1, dtype=torch.long)).visible)
assert torch.equal(Layout.causal(1, 5).visible[0], torch.ones(5, 5, dtype=torch.bool).tril())

# %% [markdown]
# ### The next token
#
# While an answer is generated, a token is added at the end. Its place stays, its number inside goes up by one, and it
# sees everything so far and itself:

# %%
following = chatglm.following(layout, 1)
assert following.positions.tolist() == [[[3, 4]]]
assert following.visible.tolist() == [[[True] * 8]]

# %% [markdown]
# ### Padding
#
# ChatGLM-6B pads the rows of a batch on the left. Padding is not seen by anybody, and the tokens of the row do not
# notice it: their places count from the first real token.

# %%
padded = torch.tensor([[3, 3, *ids[0].tolist()]])
real = torch.tensor([[False] * 2 + [True] * 7])
with_padding = chatglm.read(padded, real)
assert torch.equal(with_padding.positions[:, 2:], layout.positions)
assert torch.equal(with_padding.visible[:, 2:, 2:], layout.visible)
assert not with_padding.visible[:, :, :2].any()

# %% [markdown]
# ### Is that what the official code does?
#
# The golden files hold what ChatGLM-6B's own code made of some ids (in a small model, with smaller ids): its position
# ids as `[B, 2, T]`, and its mask with True for *hidden*. For four prompts they must be ours.

# %%
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"
golden = load_file(GOLDENS / "chatglm1-base" / "reference.safetensors")
reading = glm.GLM.from_pretrained(GOLDENS / "chatglm1-base", dtype=torch.float64).spec.reading
for scenario in ("gmask", "mask", "mask_and_gmask", "batch_equal_len"):
    ours = reading.read(golden[f"{scenario}.input_ids"].long())
    assert torch.equal(ours.positions, golden[f"{scenario}.position_ids"].long().mT)
    assert torch.equal(ours.visible, ~golden[f"{scenario}.attention_mask"][:, 0].bool())
    print(f"{scenario:15} position ids and mask of {list(ours.visible.shape)}: the same")

# %% [markdown]
# ## Not every GLM reads alike
#
# Each release's rule for turning ids into a layout is a small frozen dataclass. Four of them, for the same row:
# a text with a `[MASK]`, a `[gMASK]` at its end, and two written pieces.

# %%
ROW = ["a", "[MASK]", "b", "[gMASK]", "sop", "c", "d", "sop", "e"]


def spelled(release: str, row: list[str]) -> torch.Tensor:
    """The row in the ids of a release, [1, T]; letters stand for text."""
    reading, kinds = glm.release(release).spec.reading, ADDED
    if isinstance(reading, Blank):
        mask, gmask, *_ = sorted(reading.masks)  # [MASK] has the lowest id in every vocabulary, [gMASK] the next
        kinds = {"[MASK]": mask, "[gMASK]": gmask, "sop": reading.sop}
    return torch.tensor([[kinds.get(token, 500 + i) for i, token in enumerate(row)]])


def places(release: str, row: list[str]) -> list[list[int]]:
    """The position ids of a row, an axis a line."""
    return glm.release(release).spec.reading.read(spelled(release, row)).positions[0].T.tolist()


RELEASES = ("glm-10b", "glm-130b", "chatglm-6b", "chatglm2-6b")
print(f"{'':8}" + "".join(f"{release:>13}" for release in RELEASES))
for token, *columns in zip(ROW, *(zip(*places(release, ROW), strict=True) for release in RELEASES), strict=True):
    print(f"{token:8}" + "".join(f"{', '.join(map(str, column)):>13}" for column in columns))

# %% [markdown]
# **GLM-10B** (`InTurn`) is the model of the paper: the first `<sop>` writes for the first blank, the second for the
# second, whatever their kinds, and each counts from 1.
#
# **GLM-130B** (`Blank` with one axis) has no second axis. For `[MASK]` all written tokens have *the same* position,
# and only the mask knows their order. For `[gMASK]` the positions go on counting.
#
# **ChatGLM-6B** (`Blank` with two axes) fills one blank a row. If both kinds are there, it is `[gMASK]` that is
# filled first, wherever it stands. A second `<sop>` is a token like any other, and counting goes on.
#
# **ChatGLM2** (`Causal`) has one axis, and reads nothing in both directions.

# %%
assert places("glm-10b", ROW) == [[0, 1, 2, 3, 1, 1, 1, 3, 3], [0, 0, 0, 0, 1, 2, 3, 1, 2]]
assert places("chatglm-6b", ROW) == [[0, 1, 2, 3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4, 5]]
assert places("chatglm2-6b", ROW) == [list(range(9))]
just_mask = ["a", "[MASK]", "b", "sop", "c", "d"]
assert places("glm-130b", just_mask) == [[0, 1, 2, 1, 1, 1]]
assert places("glm-130b", ["a", "[gMASK]", "sop", "c", "d"]) == [list(range(5))]

# %% [markdown]
# ## What changed to ChatGLM2
#
# ChatGLM2 gave blanks up. Its prompts still have `[gMASK]` and `<sop>`, but **in front** of the text, where they are
# two tokens that every prompt begins with. The rule of reading says the rest:

# %%
before, after = glm.release("chatglm-6b").spec, glm.release("chatglm2-6b").spec
print(before.reading)
print(after.reading)
ids = torch.tensor([[ADDED["[gMASK]"], ADDED["sop"], 1001, 1002, 1003, 2001, 2002]])  # 3 of text, 2 of an answer
layout = after.reading.read(ids)
assert layout.positions.tolist() == [[[t] for t in range(7)]]
assert torch.equal(layout.visible[0], torch.ones(7, 7, dtype=torch.bool).tril())
drawing.mask(layout, ["[gMASK]", "sop", "x1", "x2", "x3", "y1", "y2"])

# %% [markdown]
# What does that buy? In a causal model the keys and values of a token never depend on what comes after it. So a chat
# can go on from the cache of its last turn. With a prefix that is read in both directions, one more word of the user
# changes the states of *all* tokens before it, and the whole conversation is read anew. Both can be run, here on the
# small models of the goldens:


# %%
def first_states_stay(folder: str, ids: list[int], longer: list[int]) -> bool:
    """Whether the first token's last state is the same in both rows."""
    model = glm.GLM.from_pretrained(GOLDENS / folder, dtype=torch.float64)
    with torch.inference_mode():
        one, other = (model.stream(torch.tensor([row]))[0][:, 0] for row in (ids, longer))
    return bool((one - other).abs().max() < 1e-12)


gmask, _ = reading.masks
assert not first_states_stay("chatglm1-base", [5, 6, 7, gmask, reading.sop], [5, 6, 7, 8, 9, gmask, reading.sop])
assert first_states_stay("chatglm3-base", [5, 6, 7], [5, 6, 7, 8, 9])

# %% [markdown]
# What it costs is that a text can no longer be filled in the middle.
#
# ## Exercises
#
# The stubs are in `docs/exercises/e02_blank_infilling.py`. `python -m docs.check 2.1` says whether you are right.
#
# - Exercise 2.1, `cut_out`: from a text and its spans to ids and targets.
# - Exercise 2.2, `infilling_layout`: position ids `[1, T, 2]` and mask `[1, T, T]` of a sample with several spans.
# - Exercise 2.3, `chatglm_layout`: the same for a prompt of ChatGLM-6B, with as much of the answer as there is.
# - Exercise 2.4, `next_token`: where the next token of ChatGLM-6B stands, and what it sees.
# - Exercise 2.5, `chatglm2_layout`: the same conversation for ChatGLM2-6B: ids, position ids, mask.
#
# ## Read the code
#
# - `glm/layout.py`: the rule, and the three ways of reading.
# - `glm/infilling.py`: which spans are cut when a model is trained, and how a trained one fills the blanks of a text.
# - `glm/blanks.py`: batches of contexts, and candidates for one blank side by side in one row.
