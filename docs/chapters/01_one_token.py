# %% [markdown]
# # One token, end to end
#
# What happens between a question and the first word of the answer? A language model turns a row of tokens into one
# number for every token of its vocabulary: how likely each is to come next. This chapter follows the numbers all the
# way, through tiny-glm, a model with ChatGLM-6B's architecture that lies in this repository. Nothing is left out, and
# nothing is drawn by hand: `glm.trace` runs the model as it is and keeps every tensor on the way, by name.

# %%
from dataclasses import replace
from html import escape
from itertools import groupby
from pathlib import Path
from textwrap import fill

import torch
from IPython.display import HTML, display
from rich.console import Console
from torch.nn.functional import gelu

import glm
from docs import drawing
from glm.tracing import Trace

torch.set_grad_enabled(False)
model = glm.GLM.from_pretrained(glm.embedded(), dtype=torch.float64)
tokenizer = glm.Tokenizer.from_pretrained(glm.embedded())
spec, block = model.spec, model.spec.blocks[0]

question = "What is blank infilling?"
prompt = tokenizer.chat([{"role": "user", "content": question}])
trace = glm.trace(model, prompt, tokenizer)
print(f"{len(trace)} steps for {len(prompt)} tokens")


# %% [markdown]
# Beside each step below stands its equation, and each equation is computed a second time, by hand, from the steps
# before it. The two must agree to rounding: a sum of $n$ products in float64 is off by at most $n\,\varepsilon$ times
# the sum of their sizes; `close` asks for more, $n\,\varepsilon$ of the largest result.


# %%
def close(x: torch.Tensor, y: torch.Tensor, terms: int) -> bool:
    rounding = terms * torch.finfo(torch.float64).eps
    return bool((x - y).abs().max() <= rounding * y.abs().max())


def show(pattern: str) -> None:
    Console(width=80, highlight=False).print(trace.only(pattern))


# %% [markdown]
# ## Text becomes ids, ids get places
#
# The tokenizer cuts the text into pieces of its vocabulary. The question is followed by `[gMASK]`, which marks a
# blank of any length, and `<sop>`, which says: here begins what fills it. Every token has two position ids, its
# *place* in the text and where it stands *inside* of a blank. `<sop>` stands at the place of the blank, as the first
# token inside.

# %%
for t, (place, inside) in enumerate(trace["positions"][0].tolist()):
    print(f"{prompt[t]:5} {trace.pieces[t]!r:12} place {place}, inside {inside}")

# %% [markdown]
# With the places comes a rule of who may see whom. What is read, the question with its blank, sees all of itself;
# what is written sees that and what was written before. The next chapter is about this picture.

# %%
pieces = [piece.replace(" ", "␣") for piece in trace.pieces]
drawing.mask(trace.layout, pieces)

# %% [markdown]
# ## A row of the embedding
#
# A token enters the model as one row of a table. From here on it is a vector of $D$ numbers, and the vectors of all
# tokens, $[B, T, D]$, are the *stream*: every block reads it and adds to it.
#
# $$ x_t = E_{\text{id}_t} $$

# %%
x = model.embedding.weight[trace.ids]
assert torch.equal(trace["embedding"], x)
assert torch.equal(trace["stream"], x)
show("[es]*")

# %% [markdown]
# ## Attention: each token asks all it may see
#
# A block has two sublayers. The first is attention, the only place where tokens exchange anything. These are its
# steps in the first block.

# %%
show("block 0 / attention / *")

# %% [markdown]
# What it reads is the stream after a norm, which brings every token's vector to one size:
#
# $$ h = \frac{x - \operatorname{mean} x}{\sqrt{\operatorname{var} x + \epsilon}} \odot w + b $$

# %%
norm = model.blocks[0].wire_mixer.before
mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
h = (x - mean) / (variance + block.norm.eps).sqrt() * norm.weight + norm.bias
assert close(trace["block 0 / attention / input"], h, spec.width)

# %% [markdown]
# One matrix makes a query $q$, a key $k$ and a value $v$ of it, for every head. Queries and keys are then turned by
# angles that depend on the positions, so that a query meets a key according to how far apart they stand. (Chapter 3
# says how; turning changes no length.)

# %%
H, K = block.mixer.heads, block.mixer.head_width
matrix = model.blocks[0].mixer.qkv
qkv = h @ matrix.weight.T + matrix.bias
assert close(trace["block 0 / attention / qkv"], qkv, spec.width)

parts = qkv.unflatten(-1, (-1, K)).split(H, dim=2)
q, k, v = (part.transpose(1, 2) for part in parts)  # [B H T K]
assert close(trace["block 0 / attention / v"], v, spec.width)
for name, unturned in (("q", q), ("k", k)):
    turned = trace[f"block 0 / attention / {name}"]
    assert close(turned.norm(dim=-1), unturned.norm(dim=-1), spec.width)

# %% [markdown]
# The score of a query for a key is their product. Over the keys that a token may see, scores become probabilities,
# and the head's answer is the mean of the values with these weights:
#
# $$ p = \operatorname{softmax}\left(\frac{q\,k^\top}{\sqrt K} + \text{mask}\right), \qquad
#    a = W_o \operatorname{concat}_h\, p\, v + b $$
#
# The model leaves these lines to one fused call of torch, so that scores and probabilities never stand in memory. The
# trace computes them anew from the queries, keys and mask that were handed to that call, and refuses if their product
# with the values is not what came back.

# %%
q, k, v = (trace[f"block 0 / attention / {name}"] for name in "qkv")
scores = q @ k.transpose(-1, -2) / K**0.5
p = scores.masked_fill(~trace["visible"][:, None], -torch.inf).softmax(-1)
assert close(trace["block 0 / attention / scores"], scores, K)
assert close(trace["block 0 / attention / probabilities"], p, K)
assert close(trace["block 0 / attention / heads"], p @ v, len(prompt) + K)

out = model.blocks[0].mixer.out
a = (p @ v).transpose(1, 2).flatten(2) @ out.weight.T + out.bias
assert close(trace["block 0 / attention / output"], a, spec.width + K)

# %% [markdown]
# One head of the last block, a row a query: `<sop>`, which has to begin the answer, is the last row.

# %%
last = len(spec.blocks) - 1
p = trace[f"block {last} / attention / probabilities"][0, 0]
drawing.heat(p, pieces, pieces, label="probability", width=4.6)

# %% [markdown]
# ## Back into the stream
#
# What attention answers is added to the stream. How, is the *wiring*, and generations differ in it. In ChatGLM-6B,
# and so in tiny-glm, the normalised input carries on, $\alpha$ times as heavy, with $\alpha = \sqrt{2L}$ for the $L$
# blocks of ChatGLM-6B, whose number tiny-glm keeps although it has fewer:
#
# $$ x' = \alpha\, h + a $$

# %%
alpha = block.wiring.alpha
between = alpha * h + a
assert close(trace["block 0 / stream between"], between, 2 * spec.width)
assert alpha == (2 * len(glm.release("chatglm-6b").spec.blocks)) ** 0.5
size_of_h, size_of_a = (part.square().mean().sqrt() for part in (h, a))
print(f"α = {alpha:.3f} = √{alpha**2:.0f}")
print(f"rms of h {size_of_h:.2f}, of a {size_of_a:.2f}")

# %% [markdown]
# ## The feed-forward: each token by itself
#
# The second sublayer treats every token alone: a wide matrix, a function that is applied to each number, and a matrix
# back. Between blocks the wiring is the same.
#
# $$ a = W_\text{down}\, \operatorname{gelu}(W_\text{up} h + b_1) + b_2 $$

# %%
show("block 0 / feed-forward / *")
module = model.blocks[0].feed_forward
h = trace["block 0 / feed-forward / input"]
u = gelu(h @ module.up.weight.T + module.up.bias, approximate="tanh")
a = u @ module.down.weight.T + module.down.bias
assert close(trace["block 0 / feed-forward / product"], u, spec.width)
F = block.feed_forward.inner
assert close(trace["block 0 / feed-forward / output"], a, F)
assert close(trace["block 0 / stream"], alpha * h + a, F)

# %% [markdown]
# The other blocks do the same with other numbers. From block to block only the stream is handed on: what a block
# computes depends on nothing else but the positions and the mask, which are the same for all. Here is how large the
# vector of the last token is after each, and what the two sublayers answered it.


# %%
def steps_of(found: Trace, i: int) -> list[str]:
    start = f"block {i} / "
    return [name.removeprefix(start) for name in found if name.startswith(start)]


def rms(step: str) -> list[float]:
    return [trace[f"block {i} / {step}"][0, -1].square().mean().sqrt().item() for i in blocks]


blocks = range(last + 1)
assert all(steps_of(trace, i) == steps_of(trace, 0) for i in blocks)
sizes = {
    "stream": rms("stream"),
    "attention answers": rms("attention / output"),
    "feed-forward answers": rms("feed-forward / output"),
}
drawing.bars([f"block {i}" for i in blocks], sizes, number="{:.2f}")

# %% [markdown]
# ## The stream becomes a token
#
# After the last block comes a last norm, and a matrix with a row for every token of the vocabulary: the *head*. Its
# products with the last token's vector are the *logits*. The softmax of them is what the model believes of the next
# token, and the likeliest is the first word of the answer.
#
# $$ \text{logits} = W_\text{head}\, n(x) $$

# %%
logits = trace["final norm"] @ model.head.weight.T
assert close(trace["logits"], logits, spec.width)
likely = trace["logits"][0, -1].softmax(-1).topk(5)
for probability, id in zip(*likely, strict=True):
    print(f"{tokenizer.piece(int(id))!r:10} {probability:.4f}")

[answer] = glm.generate(model, [prompt], max_new_tokens=40)
assert answer[0] == likely.indices[0]
print(fill(tokenizer.decode(answer), 80))

# %% [markdown]
# That the trace changed nothing can be checked to the last bit.

# %%
assert torch.equal(trace["logits"], model(torch.tensor([prompt])))

# %% [markdown]
# ## What each layer would say
#
# Norm and head fit any vector of the stream, so one can ask after every block: what would the model say if it ended
# here? This is called the *logit lens*. It is a way of looking, not a step of the model: only the last line is what
# the model was trained to say.

# %%
lens = trace.lens(4)
for layer, (ids, probabilities) in enumerate(zip(*lens, strict=True)):
    said = zip(ids[0, -1].tolist(), probabilities[0, -1].tolist(), strict=True)
    line = "  ".join(f"{tokenizer.piece(id)!r:>9} {p:.2f}" for id, p in said)
    print(f"after block {layer - 1}" if layer else "embedding    ", line)

p = trace["logits"].softmax(-1).topk(4)
assert torch.equal(lens.ids[-1], p.indices)
assert close(lens.probabilities[-1], p.values, spec.width)

# %% [markdown]
# ## Step through it
#
# Below is the same pass with the first tokens of the answer, as a page to step through: each token's positions, each
# step's equation and size, the attention of every head, the stream, and the lens. `glm trace TEXT --html FILE` writes
# such a page for any model; the file needs nothing else.

# %%
page = glm.trace(model, prompt + answer[:8], tokenizer).page()
style = "width: 100%; height: 1150px; border: 1px solid #d0d7de"
frame = f'<iframe title="a forward pass" srcdoc="{escape(page)}" style="{style}">'
display(HTML(f"<div>{frame}</iframe></div>"))

# %% [markdown]
# ## The other generations
#
# The names are the same for all of them, and what a generation has of its own has names of its own. Here are the
# steps of a block for three kinds of models, from small ones with random weights that lie among the tests.

# %%
goldens = Path(glm.__file__).parents[1] / "tests" / "goldens"
for golden, kind in (
    ("chatglm3-base", "few key heads, half of each head turned"),
    ("hf_glm4_moe-air", "experts"),
    ("hf_glm_moe_dsa-base", "latent attention to chosen keys, and experts"),
):
    other = glm.GLM.from_pretrained(goldens / golden, dtype=torch.float64)
    found = glm.trace(other, list(range(5, 25)))
    print(kind)
    steps = [name.split(" / ") for name in steps_of(found, 1) if "expert " not in name]
    for sublayer, paths in groupby(steps, key=lambda path: path[0]):
        line = f"    {sublayer}: " + ", ".join(" ".join(path[1:]) for path in paths)
        print(fill(line.removesuffix(": "), 80, subsequent_indent="        "))
    assert steps[-1] == ["stream"]

# %% [markdown]
# The trace is also a way to find what is wrong with a model. Two models that should be equal are traced with the same
# ids, and the first step that differs says where to look. Here is a tiny-glm whose norms have another $\epsilon$:

# %%
other_block = replace(block, norm=replace(block.norm, eps=1e-6))
other_spec = replace(spec, blocks=(other_block,) * len(spec.blocks))
broken = glm.GLM(other_spec, dtype=torch.float64)
broken.load_state_dict(model.state_dict())
other = glm.trace(broken, prompt)
different = [name for name in trace if not torch.equal(trace[name], other[name])]
print(different[0])
assert different[0] == "block 0 / attention / input"

# %% [markdown]
# ## Exercises
#
# Write them in `docs/exercises/e01_one_token.py`.
#
# - `python -m docs.check 1.1`: attention, with a mask and with fewer key heads than query heads.
# - `python -m docs.check 1.2`: what each sublayer has added to the stream.
# - `python -m docs.check 1.3`: the logit lens.
# - `python -m docs.check 1.4`: the first step in which two passes differ.
# - `python -m docs.check 1.5`: which field of a model's spec is broken, by its trace.
#
# ## Read the code
#
# - `glm/model.py`: the whole pass, in one file.
# - `glm/attention.py`, `glm/feed_forward.py`, `glm/residual.py`, `glm/norms.py`: the parts, each with its
#   equation on top.
# - `glm/tracing.py` and `glm/traced_names.py`: how a pass is watched, and what its steps are called.
