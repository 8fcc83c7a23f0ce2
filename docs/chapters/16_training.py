# %% [markdown]
# # Training tiny-glm
#
# tiny-glm, the small model that comes with this package, has learnt two texts by heart: a glossary, as answers to
# questions, and a few passages, as texts with blanks. This chapter trains a much smaller model in the same way, from
# random weights to right answers, and shows what the committed run was.

# %%
import hashlib
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import torch
from IPython.display import Image

import glm
from docs import drawing
from glm.curriculum import lessons, pairs
from glm.infilling import IGNORED, Marks, blanked, fill, loss, units
from glm.norms import LayerNorm
from glm.recipe import KINDS, Recipe
from glm.training import LOUD, Run, initialised, rate, recalled, train

torch.manual_seed(0)
torch.set_num_threads(1)
FOLDER = glm.embedded()
recipe = Recipe.read(FOLDER / "recipe.toml")

# %% [markdown]
# ## A row to learn from
#
# A text loses some spans. The model reads what is left and writes the spans in any order, each started by `sop` and
# ended by `eop` (chapter 2). What it should say after each token is the **target**; nothing is learnt where it only
# reads.

# %%
tokenizer = glm.Tokenizer.from_pretrained(FOLDER)
model = glm.GLM.from_pretrained(FOLDER, dtype=torch.float32)
marks = Marks.of(model.spec)


def encode(text: str) -> list[int]:
    """Ids of a piece of text, and nothing else."""
    return tokenizer.encode(text, parse=False)


def named(ids: list[int]) -> list[str]:
    """Tokens as one can read them."""
    special = {marks.mask: "[MASK]", marks.sop: "sop", marks.eop: "eop", IGNORED: ""}
    return [special[id] if id in special else tokenizer.decode([id]).strip() for id in ids]


sentence = "In ChatGLM2 thirty-two query heads listen to only two pairs of keys and values."
pieces = units(sentence)
spans = [(5, 7), (11, 13)]  # in units: words and signs
print([pieces[start:end] for start, end in spans])
sample = blanked(pieces, spans, encode, marks, Random(2))
print(f"{'token':10} {'target':10} place inside")
for token, target, (place, inside) in zip(
    named(sample.ids), named(sample.targets), sample.layout.positions[0].tolist(), strict=True
):
    print(f"{token:10} {target:10} {place:5} {inside:6}")

# %%
drawing.mask(sample.layout, named(sample.ids), cell=0.2)

# %% [markdown]
# The loss is the mean of $-\log p(\text{target})$ over the tokens that have one, in nats. Targets stand where they are
# to be said. They are **not shifted**, as those of most language models are:
#
# $$ \mathcal{L} = - \frac{1}{|W|} \sum_{t \in W} \log \operatorname{softmax}(z_t)_{y_t}, \qquad
#    W = \text{what is written} . $$

# %%
with torch.no_grad():
    logits = model(torch.tensor([sample.ids]), sample.layout).double()
targets = torch.tensor([sample.targets])
written = [t for t, target in enumerate(sample.targets) if target != IGNORED]
by_hand = -sum(logits[0, t].log_softmax(-1)[sample.targets[t]] for t in written) / len(written)
assert abs(loss(logits, targets) - by_hand) < 1e-12
print(f"{by_hand:.4f} nats a token; a model that knows nothing has {math.log(model.spec.vocabulary):.2f}")

# %% [markdown]
# ## Objectives
#
# All of GLM's objectives are such rows. They differ in which spans are cut. The recipe says how often each comes up:

# %%
for objective in recipe.objectives:
    source = lessons(recipe.text(objective), objective, tokenizer, marks)
    rng = Random(1)
    samples = [source.sample(rng.randrange(len(source)), rng) for _ in range(200)]
    spans = [len(span) for each in samples for _, span in each.written]
    cut = sum(spans) / sum(spans + [len(each.read) for each in samples])
    print(
        f"{objective.kind:10} share {objective.share:3.0f}   of {len(source):3} items   "
        f"{len(spans) / len(samples):.1f} blanks of {sum(spans) / len(spans):4.1f} tokens   {100 * cut:.0f} % cut"
    )
assert {objective.kind for objective in recipe.objectives} == set(KINDS)

# %% [markdown]
# The paper's short spans have Poisson lengths and make up a fixed part of a text. A person who types `[MASK]` cuts
# otherwise: clauses, beginnings, a sentence and a half. The kind `cuts` is that, and the largest share.

# %%
short = next(objective for objective in recipe.objectives if objective.kind == "short")
source = lessons(recipe.text(short), short, tokenizer, marks)
rng = Random(3)
lengths, full = Counter(), 0
for i in range(2000):
    words, cut = source.chosen(source.passages[i % len(source)], rng)
    sizes = [end - start for start, end in cut]
    full += sum(sizes) == round(0.15 * len(words))
    lengths.update(sizes)
assert full > 1900  # nearly always just that part of a text is cut, which leaves less for its last span
total = sum(lengths.values())
picture, axes = drawing.figure(5, 2.4)
sizes = range(1, 11)
axes.bar(sizes, [lengths[n] / total for n in sizes], label="short spans of the passages, in words")
poisson = [math.exp(-3) * 3**n / math.factorial(n) for n in range(11)]
axes.plot(
    sizes, [poisson[0] + poisson[1], *poisson[2:]], "o", color=drawing.ORANGE, label="Poisson of mean 3, at least 1"
)
axes.set(xlabel="length", ylabel="part of the spans")
axes.legend()
picture

# %% [markdown]
# (There are more of the shorter ones, because the last span of a text gets only what is left of that part.)
#
# A sample is made anew each time its item comes up, with other blanks. All that is random is drawn from the recipe's
# seed and a count, so that a run that was interrupted goes on as it would have gone.
#
# ## The beginning
#
# tiny-glm has ChatGLM-6B's blocks, $x \leftarrow \alpha\, n(x) + f(n(x))$ with $\alpha = \sqrt{56}$ (chapter 5).
# Matrices drawn with the usual small deviation (`GLM.initialise`) would make $f$ almost nothing beside that.
# `initialised` draws them by their inputs, and those that write to the stream larger still:

# %%
small = initialised(model.spec, seed=1)
usual = glm.GLM(model.spec, dtype=torch.float32, seed=1)
x = torch.randn(1, 64, model.spec.width)
norm = LayerNorm(1e-5).build(model.spec.width)
with torch.no_grad():
    for name, each in (("usual", usual), ("initialised", small)):
        added = each.blocks[0].feed_forward(norm(x))
        part = (added.square().mean() / (model.spec.blocks[0].wiring.alpha * norm(x)).square().mean()).sqrt()
        print(f"{name:12} a feed-forward adds {100 * part:6.2f} % of what is carried on")
out = small.blocks[0].mixer.out.weight
assert abs(out.std() / (LOUD * out.shape[1] ** -0.5) - 1) < 0.02

# %% [markdown]
# ## A step
#
# AdamW keeps two averages of each gradient $g$, of itself and of its square, and moves each number by their quotient:
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, $$
# $$ x \leftarrow (1 - \eta \lambda)\, x - \eta\, \frac{m / (1 - \beta_1^n)}{\sqrt{v / (1 - \beta_2^n)} + \epsilon} . $$

# %%
x = torch.randn(5, dtype=torch.float64)
mine, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
theirs = x.clone().requires_grad_()
optimiser = torch.optim.AdamW([theirs], lr=0.1, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay)
for n in range(1, 6):
    g = torch.randn_like(x)
    theirs.grad = g
    optimiser.step()
    m = recipe.beta1 * m + (1 - recipe.beta1) * g
    v = recipe.beta2 * v + (1 - recipe.beta2) * g**2
    step = (m / (1 - recipe.beta1**n)) / ((v / (1 - recipe.beta2**n)).sqrt() + 1e-8)
    mine = (1 - 0.1 * recipe.weight_decay) * mine - 0.1 * step
assert (mine - theirs).abs().max() < 64 * torch.finfo(x.dtype).eps * x.abs().max()

# %% [markdown]
# $\lambda$ only pulls on matrices, not on norms and biases. The rate $\eta$ goes up in a line and down along half a
# cosine:
#
# $$ \eta_s = \eta \min\!\left(1, \tfrac{s + 1}{u}\right) \tfrac{1}{2} \left(1 + \cos \tfrac{\pi s}{S}\right) . $$

# %%
top, up, steps = recipe.learning_rate, recipe.warm_up, recipe.steps
curve = [top * min(1, (s + 1) / up) * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps)]
assert max(abs(rate(recipe, s) - curve[s]) for s in range(steps)) < 1e-15
picture, axes = drawing.figure(5, 2)
axes.plot(curve)
axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
picture

# %% [markdown]
# ## A run
#
# Now all of it, with a smaller model and a few questions. A recipe is one TOML file. `glm train recipe.toml` does what
# the next cell does.

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
known = [pair for pair in pairs((FOLDER / "glossary.md").read_text(encoding="utf-8")) if pair[0].isascii()][:16]
(folder / "questions.md").write_text("\n\n".join(f"Q: {q}\nA: {a}" for q, a in known), encoding="utf-8")
RECIPE = """
name = "tinier-glm"
out = "result"
seed = 1
[tokenizer]
vocabulary = 500
[model]
layers = 2
width = 64
inner = 128
heads = 2
context = 256
[training]
steps = 220
tokens = 512
learning_rate = 6e-3
warm_up = 10
beta1 = 0.9
beta2 = 0.98
weight_decay = 0.01
clip = 1.0
threads = 1
checkpoint_every = 1000
[[objective]]
kind = "chat"
text = "questions.md"
share = 1
"""
(folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")

run = Run(Recipe.read(folder / "recipe.toml"), folder / "result" / "unfinished")
while run.step < run.recipe.steps:
    run.advance()
run.finish(folder / "result")
result = json.loads((folder / "result" / "training.json").read_text())
print(f"{result['parameters']:,} parameters, {result['tokens']:,} tokens, loss {result['loss']:.3f}")
[exam] = result["exam"]
print(f"{exam['right']} of {exam['asked']} questions are answered to the letter")
assert exam["right"] >= exam["asked"] / 2

# %%
picture, axes = drawing.figure(5, 2.6)
axes.semilogy(range(1, len(run.losses) + 1), run.losses)
axes.axhline(math.log(run.spec.vocabulary), color=drawing.INK, linewidth=0.6)
axes.set(xlabel="step; the line is knowing nothing", ylabel="loss, nats a written token")
picture

# %% [markdown]
# What was written is a checkpoint like any other, in float16 and in ChatGLM-6B's layout, with its tokenizer. It is read
# back and asked:

# %%
learnt = glm.GLM.from_pretrained(folder / "result", dtype=torch.float32)
its_tokenizer = glm.Tokenizer.from_pretrained(folder / "result")
for question in (known[0][0], known[5][0], "What is the capital of France?"):
    ids = its_tokenizer.chat([{"role": "user", "content": question}])
    [answer] = glm.generate(learnt, [ids], max_new_tokens=60)
    print("Q:", question)
    print("A:", its_tokenizer.decode(answer))

# %% [markdown]
# The last question is not in its text. It answers all the same, with nonsense: it has learnt by heart, and nothing
# else.
#
# A run that is stopped and goes on gives the same model, bit for bit:

# %%
(folder / "short.toml").write_text(RECIPE.replace("steps = 220", "steps = 8"), encoding="utf-8")
whole = train(folder / "short.toml", out=folder / "whole", quiet=True)
train(folder / "short.toml", out=folder / "pieces", pause=5, quiet=True)
pieces = train(folder / "short.toml", out=folder / "pieces", quiet=True)
hashes = {hashlib.sha256((each / "model.safetensors").read_bytes()).hexdigest() for each in (whole, pieces)}
assert len(hashes) == 1
scratch.cleanup()

# %% [markdown]
# ## The committed run
#
# `glm train weights/tiny-glm/recipe.toml` made the model that comes with the package. What the run was is committed
# beside it, and so is its loss curve. The weights are those it wrote:

# %%
committed = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
for field in (
    "parameters",
    "vocabulary",
    "steps",
    "tokens",
    "loss",
    "minutes",
    "precision",
    "threads",
    "device",
    "torch",
):
    print(f"{field:10} {committed[field]}")
assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == committed["weights"]
assert recipe.fingerprint() == committed["recipe"]  # of this recipe and these texts
assert sum(x.numel() for x in model.parameters()) == committed["parameters"]

# %%
Image(filename=str(FOLDER / "loss.png"))

# %% [markdown]
# How well it does was measured by the run itself: the greedy answer to every question of the glossary, and fresh cuts
# of the passages, right only if right to the letter. Some of that again:

# %%
for exam in committed["exam"]:
    print(f"{exam['kind']}: {exam['right']} of {exam['asked']}")

objective = recipe.objectives[0]
chat = lessons(recipe.text(objective), objective, tokenizer, marks)
again = recalled(model, [chat.rounds([pair]) for pair in chat.pairs[::12]])
print(f"asked here: {sum(again)} of {len(again)}")
assert sum(again) >= 0.9 * len(again)

# %%
filled = fill(
    model, tokenizer, "Sampling is a game of chance with house rules. [MASK], top-k limits the number of players."
)
print(filled.text)
print(filled.blanks)

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e16_training.py`. `python -m docs.check 16` says whether you are right.
#
# - **Exercise 16.1** `training_row`: ids and targets of a text with blanks.
# - **Exercise 16.2** `infilling_loss`: the loss of a batch.
# - **Exercise 16.3** `learning_rate`: the schedule.
# - **Exercise 16.4** `adamw`: several steps of the optimiser.
#
# ## Read the code
#
# - `glm/infilling.py`: the objective, from spans to rows.
# - `glm/curriculum.py`: which rows, in which order.
# - `glm/training.py`: the loop, `Run.advance`, is short.
# - `weights/tiny-glm/recipe.toml`: all that decides how it went.
