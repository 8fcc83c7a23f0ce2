# %% [markdown]
# # Predicting ahead
#
# To write one token, all weights of a model are read from memory and hardly anything is computed with them. To read
# several tokens at once takes the same weights, once. If only one knew the next tokens beforehand, one pass could check
# them all. Somebody may guess them. What comes out must be what the model alone would have said, token by token.

# %%
from pathlib import Path

import torch
from torch.nn import functional as F

import glm
from docs import drawing
from glm.cache import Cache
from glm.drafting import NextToken, PromptLookup, Tally
from glm.family import GENERATIONS
from glm.layout import Layout

torch.manual_seed(0)
torch.set_grad_enabled(False)
EPS = torch.finfo(torch.float64).eps
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"

# %% [markdown]
# ## Checking a guess
#
# A small GLM-4.5 with random weights continues a prompt. Decoded plainly, the likeliest token each time:

# %%
model = glm.GLM.from_pretrained(GOLDENS / "hf_glm4_moe-sensitive", dtype=torch.float64)
prompt = [118, 193, 119, 64]
[plain] = glm.generate(model, [prompt], max_new_tokens=24, stop=())
print(plain)

# %% [markdown]
# Now the model has read the prompt and chosen its first token, and somebody guesses three more, of which the third is
# wrong. One pass reads the certain token and all guesses. Behind each of them stands the model's own choice:

# %%
cache = model.new_cache(1, 40)
certain = model(torch.tensor([prompt]), cache=cache)[:, -1:].argmax(-1)  # [1 1]
assert certain.item() == plain[0]
guesses = torch.tensor([[plain[1], plain[2], plain[3] + 1]])
choices = model(torch.cat((certain, guesses), dim=1), cache=cache).argmax(-1)[0]  # [1 + 3]
print("guesses:        ", guesses[0].tolist())
print("model's choices:", choices.tolist())

# %% [markdown]
# Choice $i$ was made by a model that had read the guesses before it. So the first choice is always right. If the first
# guess agrees with it the second choice is right as well, and so on up to the first disagreement. $r$ right guesses
# give $r + 1$ tokens: those, and the model's own choice behind them.

# %%
right = int((choices[:-1] == guesses[0]).long().cumprod(0).sum())
assert right == 2
assert choices[: right + 1].tolist() == plain[1 : right + 2]

# %% [markdown]
# The cache has read a wrong token. It is made to forget it: the buffers stay as they are, only the end moves back, and
# the next token is written over what was there.

# %%
layout = cache.layout.without_last(guesses.shape[1] - right)
cache.rewind(layout)
assert len(cache) == len(prompt) + 1 + right
following = model(choices[right][None, None], cache=cache).argmax(-1).item()
assert following == plain[right + 2]

# %% [markdown]
# This is speculative decoding (arXiv:2211.17192) in its simplest form. Nothing in it trusts the guesses. They may be
# nonsense, and only time is lost. It also works where tokens are drawn at random, if the dice of each place are thrown
# beforehand: the model's own draw is compared with the guess.
#
# `glm.generate(…, draft=…)` does this with anybody who guesses.
#
# ## How much is gained
#
# If each guess is right with probability $p$, whatever came before, and $n$ are made, a pass gives
#
# $$ 1 + p + p^2 + \dots + p^n = \frac{1 - p^{n+1}}{1 - p} $$
#
# tokens on average: the choice behind $i$ right guesses is reached with probability $p^i$.

# %%
n, p, trials = 4, 0.7, 200_000
lucky = torch.rand(trials, n) < p
tokens = 1 + lucky.long().cumprod(1).sum(1).double()
assert abs(tokens.mean() - (1 - p ** (n + 1)) / (1 - p)) < 5 * tokens.std() / trials**0.5  # five standard errors

picture, axes = drawing.figure(5, 2.8)
chances = torch.linspace(0, 0.99, 100)
for n in (1, 2, 4, 8):
    axes.plot(chances, (1 - chances ** (n + 1)) / (1 - chances), label=f"{n} guess{'es' * (n > 1)}")
axes.set(xlabel="probability that a guess is right", ylabel="tokens a pass", ylim=(1, None))
axes.legend()
picture

# %% [markdown]
# ## Guessing for nothing: prompt lookup
#
# Answers repeat what they were asked about: a summary its text, a correction nearly everything. `PromptLookup` looks
# for the last few tokens earlier in the text and guesses that what followed them then follows them now. It costs
# nothing and needs no second model.

# %%
lookup = PromptLookup(guesses=3, longest=2)
#              … 1  2  8  7  6 …                     1  2 at the end
assert lookup.found([1, 2, 9, 9, 9, 1, 2, 8, 7, 6, 1, 2]) == [8, 7, 6]
assert lookup.found([5, 2, 7, 3, 2]) == [7, 3, 2]  # 3, 2 was never there before; 2 was
assert lookup.found([4]) == [4, 4, 4]  # nothing to find: something is guessed all the same

# %% [markdown]
# tiny-glm answers some questions of its glossary: once as they are, and once more after it has answered them already,
# when the text to be written stands in the prompt.

# %%
tiny = glm.GLM.from_pretrained(glm.embedded(), dtype=torch.float32)
tokenizer = glm.Tokenizer.from_pretrained(glm.embedded())
lines = (glm.embedded() / "glossary.md").read_text(encoding="utf-8").splitlines()
questions = [line.removeprefix("Q: ") for line in lines if line.startswith("Q: ")][40:52]
once, again = PromptLookup(guesses=4), PromptLookup(guesses=4)
for question in questions:
    messages = [{"role": "user", "content": question}]
    for lookup in (once, again):
        ids = tokenizer.chat(messages)
        [answer] = glm.generate(tiny, [ids], max_new_tokens=60)
        assert glm.generate(tiny, [ids], max_new_tokens=60, draft=lookup) == [answer]
        messages += [{"role": "assistant", "content": tokenizer.decode(answer)}, {"role": "user", "content": question}]
print("asked once: ", once.tally)
print("asked again:", again.tally)
assert again.tally.right > 10 * once.tally.right

# %% [markdown]
# The same tokens, but in the second case in far fewer passes. Where nothing repeats nothing is won. (The two ways may
# in principle differ: a product over several rows may be rounded differently from one over a single row, and a close
# decision tip. In float64, or with such clear decisions, it does not happen.)
#
# ## A block that was trained to guess
#
# The checkpoints of GLM-4.5 and later have one block more than the model: `model.layers.46` of GLM-4.5-Air's 46 layers,
# which count from 0. The model never uses it. It was trained along with the model to predict **one token further**
# (arXiv:2412.19437): from the stream $h_t$ that the head reads and the token $x_{t+1}$ that came after, it makes a
# stream from which the same head tells $x_{t+2}$:
#
# $$ h'_t = \operatorname{block}\!\left( W \left[ n_e(\operatorname{emb}(x_{t+1})),\; n_s(h_t) \right] \right),
#    \qquad \text{logits of } x_{t+2} = \operatorname{head}(n(h'_t)) . $$
#
# Two norms, because embeddings and streams are of different size; one matrix, to make one vector of two; and an
# ordinary block of the model, with experts and all.

# %%
drafter = NextToken(model.spec).to(model.dtype).to_empty(device="cpu")
for name, x in drafter.state_dict().items():
    if x.dim() > 1:
        x.normal_(0, x.shape[-1] ** -0.5)
    else:
        x.fill_(0 if name.endswith("bias") else 1)
drafter.embedding, drafter.head = model.embedding, model.head  # shared with the model


def memory(batch: int, length: int) -> Cache:
    """What the drafter's one block remembers."""
    remembers = [model.spec.blocks[-1].mixer.remembers]
    return Cache(remembers, batch, length, dtype=model.dtype, device=model.device)


ids = torch.tensor([prompt + plain])
T = ids.shape[1] - 1
stream, _ = model.stream(ids)  # [1 T+1 D]
layout = Layout.causal(1, T)
made = drafter(ids[:, 1:], stream[:, :-1], layout, memory(1, T))

pair = torch.cat((drafter.token_norm(model.embedding(ids[:, 1:])), drafter.stream_norm(stream[:, :-1])), dim=-1)
x = pair @ drafter.join.weight.T  # [1 T D]
rotation = model.spec.rotary.rotation(layout.positions, x.dtype)
by_hand = drafter.norm(drafter.block(x, rotation, layout.mask(), memory(1, T).memories()[0]))
assert (made - by_hand).abs().max() < 64 * EPS * by_hand.abs().max()

# %% [markdown]
# What stands first in the pair, the token or the stream, is not told by any shape: both are as wide.
#
# Where is this block in a text? $h_t$ is made at position $t$ and $x_{t+1}$ stands at $t + 1$. It does not matter which
# of the two is taken, if it is always the same one: rotary attention only sees differences.

# %%
later = Layout.rule(layout.positions + 1)
assert (drafter(ids[:, 1:], stream[:, :-1], later, memory(1, T)) - made).abs().max() < 1e-12 * made.abs().max()

# %% [markdown]
# ## Training one
#
# Random weights guess badly, and the tokens are right all the same:

# %%
new = [torch.randint(3, model.spec.vocabulary, (4,)).tolist() for _ in range(10)]
expected = [glm.generate(model, [each], max_new_tokens=28, stop=())[0] for each in new]


def tally(drafter: NextToken | PromptLookup) -> Tally:
    """How it does on the new prompts. What comes out is always what the model says alone."""
    drafter.tally = Tally()
    for each, want in zip(new, expected, strict=True):
        assert glm.generate(model, [each], max_new_tokens=28, stop=(), draft=drafter) == [want]
    return drafter.tally


tallies = {"untrained": tally(drafter), "prompt lookup": tally(PromptLookup(guesses=1))}
for name, each in tallies.items():
    print(f"{name}: {each}")

# %% [markdown]
# So it learns. What it has to predict is what the model itself goes on with; its lessons are texts that the model
# wrote. Embedding, head and the model stay as they are.

# %%
starts = [torch.randint(3, model.spec.vocabulary, (4,)).tolist() for _ in range(512)]
written = glm.generate(model, starts, max_new_tokens=28, stop=())
texts = torch.tensor([start + text for start, text in zip(starts, written, strict=True)])
streams, _ = model.stream(texts)

model.requires_grad_(False)
learning = [x for x in drafter.parameters() if x.requires_grad]
optimiser = torch.optim.AdamW(learning, lr=3e-3)
losses = []
with torch.enable_grad():
    for _ in range(180):
        rows = torch.randint(len(texts), (24,))
        tokens, states = texts[rows], streams[rows]
        length = tokens.shape[1] - 2
        guessed = drafter(tokens[:, 1:-1], states[:, :-2], Layout.causal(len(rows), length), memory(len(rows), length))
        loss = F.cross_entropy(drafter.head(guessed).flatten(0, 1), tokens[:, 2:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
print(f"loss from {losses[0]:.2f} to {sum(losses[-20:]) / 20:.2f} nats a token")
tallies["trained"] = tally(drafter)
print(tallies["trained"])
assert tallies["trained"].right > 3 * tallies["untrained"].right
drawing.bars(list(tallies), {"passes after the prompts": [each.passes for each in tallies.values()]}, number="{:.0f}")

# %% [markdown]
# A model with random weights is hard to guess: its texts have no sense to go by. But the block reads the model's
# stream, where much of the next choice stands already.
#
# For further guesses the block is fed what it made itself, in place of $h$. It was trained for the first. What it
# remembers of its own guesses is forgotten after each pass.

# %%
drafter.guesses = 3
print("three guesses each time:", tally(drafter))

# %% [markdown]
# ## What the releases have
#
# The published block is read by `glm.NextToken.from_pretrained(folder, model)`. It has names of its own in the
# checkpoint, and copies of the embedding and the head, which are recognised as copies. Converters that know nothing of
# it take it for one layer too many.

# %%
for generation in GENERATIONS:
    if generation.following:
        names = ", ".join(name.file.rpartition("{i}.")[2] for name in generation.following)
        print(f"{generation.name}: {names}")

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e10_predicting_ahead.py`. `python -m docs.check 10` says whether you are right.
#
# - **Exercise 10.1** `found`: what prompt lookup guesses.
# - **Exercise 10.2** `kept`: what a pass over guesses has told.
# - **Exercise 10.3** `tokens_a_pass`: the mean, where later guesses are worse.
# - **Exercise 10.4** `joined`: what the block behind the last reads.
#
# ## Read the code
#
# - `glm/drafting.py`: both drafters; `continuations` in `glm/generation.py` is the loop that checks them.
# - `Cache.rewind` in `glm/cache.py`.
