# %% [markdown]
# # The engine
#
# The model of the earlier chapters says what is computed. It is not how one would compute it in a hurry: it launches
# dozens of operations a layer, grows its cache by slices, and answers a batch of prompts that begin and end together.
# `glm.Engine` composes the same parameters a second time. Everything it does is held to one condition, which this
# chapter asserts at every step: the tokens are those of `glm.generate`.

# %%
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import glm_kernels
import torch
from glm_kernels.acceptance import REJECTED
from matplotlib.patches import Patch
from torch.utils._python_dispatch import TorchDispatchMode

import glm
from docs import drawing
from glm.bench.goals import fraction, speed
from glm.bench.results import read_all
from glm.info import cache_bytes_per_token
from glm.runtime.decoding import advance, read

torch.set_num_threads(1)
folder = glm.embedded()
model = glm.GLM.from_pretrained(folder, dtype=torch.float64)
tokenizer = glm.Tokenizer.from_pretrained(folder)


def asked(text: str) -> list[int]:
    """A question as ids."""
    return tokenizer.chat([{"role": "user", "content": text}])


def alone(prompt: list[int], count: int, **how: object) -> list[int]:
    """What the pure model says to a single prompt."""
    return glm.generate(model, [prompt], max_new_tokens=count, **how)[0]


# %% [markdown]
# ## The same parameters, a second time
#
# An engine is made of a loaded model. It copies no dense matrix: its products read the memory of the model's own.

# %%
engine = glm.Engine(model, max_batch=2, max_length=96)
block = engine.composed.blocks[0]
assert block.mixer.qkv.operands[0].data_ptr() == model.blocks[0].mixer.qkv.weight.data_ptr()

prompt = asked("What is blank infilling?")
[answer] = engine.generate([prompt], max_new_tokens=40)
assert answer == alone(prompt, 40)
print(tokenizer.decode(answer))

logits = engine.read(prompt)
with torch.inference_mode():
    truth = model(torch.tensor([prompt]))[0]
assert (logits - truth).abs().max() < 1e-10 * truth.square().mean().sqrt()

# %% [markdown]
# ## Few kernels
#
# Each kernel costs time to start, whatever it computes and even in a recorded graph. A decoding step has little to
# compute, so the number of kernels is a floor of its own, beside that of memory. Count them: a mode of
# torch sees every operation that is called. The difference between three layers and two is one layer.


# %%
class Counting(TorchDispatchMode):
    """How often each operation is called; views, which start nothing on a GPU, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        """Note it and do it."""
        if not any(given.alias_info is not None and not given.alias_info.is_write for given in op._schema.returns):
            self.calls[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def small(name: str, layers: int) -> glm.Spec:
    """A release with its own wiring, norms and positions, and few channels."""
    spec = glm.release(name).spec
    [first, *_], old = spec.blocks, spec.blocks[0].mixer
    mixer = replace(old, heads=4, groups=4 if old.groups == old.heads else 2, head_width=16)
    block = replace(first, mixer=mixer, feed_forward=replace(first.feed_forward, inner=64))
    rotary = replace(spec.rotary, widths=tuple(width * 16 // old.head_width for width in spec.rotary.widths))
    return replace(spec, width=64, rotary=rotary, blocks=(block,) * layers)


def launched(name: str, layers: int) -> tuple[Counter[str], Counter[str]]:
    """Operations of one decoding step, of the pure model and of the engine, in bfloat16."""
    toy = glm.GLM(small(name, layers), dtype=torch.bfloat16, seed=0).requires_grad_(False)
    fast, cache, new = glm.Engine(toy, max_length=8), toy.new_cache(1, 8), torch.ones(1, 1, dtype=torch.long)
    places = torch.zeros(1, 4, len(toy.spec.reading.step), dtype=torch.long)
    counts = Counting(), Counting()
    with torch.inference_mode():
        toy(new.expand(1, 3), glm.Layout.rule(places[:, :3]), cache)
        with counts[0]:
            toy(new, glm.Layout.rule(places[:, 3:], 4), cache)
        fast.rows.at.fill_(3)
        fast.rows.length.fill_(4)
        with counts[1]:
            read(fast.composed, fast.slots, fast.rows, new)
    return counts[0].calls, counts[1].calls


print(f"{'':18}{'operations a layer':>20}")
print(f"{'release':18}{'model':>10}{'engine':>10}   which")
for name in ("chatglm-6b", "chatglm2-6b", "glm-4-9b-chat", "glm-4-32b-0414"):
    pure, fast = (three - two for three, two in zip(launched(name, 3), launched(name, 2), strict=True))
    kinds = ", ".join(f"{n} {op}" for op, n in fast.most_common())
    print(f"{name:18}{pure.total():10}{fast.total():10}   {kinds}")
    assert fast.total() < pure.total() / 2

# %% [markdown]
# A layer of ChatGLM2 and GLM-4 is: norm, queries, keys, values and their bias in one product; attention, which turns
# queries and keys and writes to the cache as well; the product behind it with the residual; norm, gate, up and SwiGLU
# in one product; down with the residual. What the others have more are norms that no product can take in:
# ChatGLM-6B's LayerNorms, whose result is needed by itself as $\alpha n(x)$, and the second norms of GLM-4-0414.
#
# ## Memory that stays where it is
#
# A recorded step reads and writes fixed addresses. So the cache is **static**: a slot for each request that can be
# answered at the same time, each with room for `max_length` tokens, taken once. Bytes of it can be said beforehand,
# and a request that does not fit is refused before it costs anything.

# %%
slots = engine.slots
print(f"{slots.rows} slots, each of {slots.length} tokens, and spare room for {slots.places - slots.length} more")
assert engine.bytes == slots.rows * slots.places * cache_bytes_per_token(model.spec, torch.float64)

before = [buffer.data_ptr() for layer in slots.buffers for buffer in layer]
for text in ("What is attention?", "什么是空白填充？"):
    assert engine.generate([asked(text)], max_new_tokens=30) == [alone(asked(text), 30)]
assert before == [buffer.data_ptr() for layer in slots.buffers for buffer in layer]

try:
    engine.submit(prompt, max_new_tokens=1000)
    raise AssertionError("it does not fit")
except glm.CacheError as error:
    print(textwrap.fill(str(error), 80))

# %% [markdown]
# ## A step without a word from the host
#
# In `glm.generate` the host looks at every token before it asks for the next. In the engine all that a step needs lies
# in tensors: the newest token of each row, its place in the cache, its positions, its rules for sampling and its dice.
# `advance` reads them and writes them. It can be called again and again and nobody has to tell it anything, so on a
# GPU it is recorded once as a graph, and replayed. Here it is called by hand:

# %%
request = engine.submit(prompt, max_new_tokens=40, stop=())
engine.step()  # reads the prompt, chooses the first token, makes one step
ids, slot = list(request.ids), engine.seats.holders.index(request)
with torch.inference_mode():
    for _ in range(8):
        outcome = advance(engine.composed, engine.slots, engine.rows, count=2, choice="greedy")
        ids += outcome.ids[slot].tolist()
        assert outcome.ids[1 - slot].tolist() == [REJECTED]  # the other row is idle
assert ids == alone(prompt, 40, stop=())[: len(ids)]
engine.cancel(request)

# %% [markdown]
# Rows have lengths of their own. The attention kernel reads them from the device, so that one recorded graph serves
# rows of any length. A row without a request is *idle*: its length is 0, and it writes to a place that is nobody's.

# %%
long, short = asked("What is the difference between a prefix and a blank?"), asked("What is attention?")
first, second = (engine.submit(text, max_new_tokens=20, stop=()) for text in (long, short))
while not all(each.state == "writing" for each in (first, second)):
    engine.step()
print("places of the newest tokens:", engine.rows.at.tolist())
slot = engine.seats.holders.index(first)
engine.cancel(first)
assert engine.rows.at.tolist()[slot] == slots.nowhere
while second.active:
    engine.step()
assert second.ids == alone(short, 20, stop=())

# %% [markdown]
# ## Requests come and go
#
# A batch that begins together ends when its longest answer does; until then the rows that are done do nothing. The
# engine admits a request whenever a slot is free: *continuous batching*. A step reads a piece of new prompts, and
# gives a token to everyone who is writing. Six requests for two slots, one of them given up on the way:

# %%
texts = ("What is attention?", "什么是空白填充？", "What is blank infilling?", "What is a token?", "什么是注意力？",
         "What is a key?")  # fmt: skip
prompts = [asked(text) for text in texts]
engine = glm.Engine(model, max_batch=2, max_length=64, chunk=4)
requests = [engine.submit(text, max_new_tokens=24) for text in prompts]
history: list[list[tuple[str, int | None]]] = [[] for _ in requests]
while any(request.active for request in requests):
    engine.step()
    for request, past in zip(requests, history, strict=True):
        holders = engine.seats.holders
        past.append((request.state, holders.index(request) if request in holders else None))
    if len(requests[2].ids) >= 5:
        engine.cancel(requests[2])

for request, text in zip(requests, prompts, strict=True):
    said = alone(text, 24)
    assert request.ids == (said if request.state == "done" else said[: len(request.ids)])
assert requests[2].state == "cancelled"

# %%
colours = {"waiting": drawing.PALE, "reading": drawing.ORANGE, "writing": drawing.BLUE}
picture, axes = drawing.figure(5, 2.6)
for line, past in enumerate(history):
    for state, colour in colours.items():
        steps = [i for i, (there, _) in enumerate(past) if there == state]
        axes.barh([line] * len(steps), [1] * len(steps), left=steps, height=0.7, color=colour)
axes.set_yticks(range(len(requests)), [f"request {i}" for i in range(len(requests))])
axes.tick_params(axis="y", length=0)
axes.invert_yaxis()
axes.set_xlabel("step")
picture.legend(handles=[Patch(color=colour, label=state) for state, colour in colours.items()],
               loc="outside lower center", ncols=3)  # fmt: skip
picture

# %% [markdown]
# A request's tokens do not depend on its neighbours: not on who they are, nor on when they come. (Up to rounding, in
# low precision: a product of four rows may add up in another order than one of a single row.)
#
# ## Dice of one's own
#
# Sampling happens on the device too, each row by its own temperature, top-k, top-p and penalty. What it needs of
# chance is a number a token, which the host throws beforehand, from the seed of the request. So the same request with
# the same seed says the same, alone or in company, in the engine or in `glm.generate`.

# %%
how = {"max_new_tokens": 20, "stop": ()}
choices = [{"temperature": 0.0}, {"temperature": 1.5, "seed": 3}, {"temperature": 2.0, "top_k": 20, "seed": 4},
           {"temperature": 1.6, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}]  # fmt: skip
engine = glm.Engine(model, max_batch=4, max_length=64)
requests = [engine.submit(prompt, **how, **choice) for choice in choices]
while any(request.active for request in requests):
    engine.step()
for request, choice in zip(requests, choices, strict=True):
    assert request.ids == alone(prompt, 20, stop=(), **choice)
    print(tokenizer.decode(request.ids)[:90].replace("\n", " "))
assert len({tuple(request.ids) for request in requests}) >= 3

# %% [markdown]
# ## What need not be read again
#
# The second question of a chat comes with the first question and its answer in front. A slot remembers the ids whose
# keys and values it still holds; a prompt that begins like them is read from where they differ. That is right where a
# token sees only its past: then what was computed for it does not depend on what follows. tiny-glm reads its prompt in
# both directions, as ChatGLM-6B does, so for it nothing may be reused. A causal toy shows it:

# %%
causal = glm.GLM(small("glm-4-9b-chat", 2), dtype=torch.float64, seed=1).requires_grad_(False)
fast = glm.Engine(causal, max_length=64)
talk = list(range(10, 22))
reused = []
for turn in range(3):
    request = fast.submit(talk, max_new_tokens=6, stop=())
    while request.active:
        fast.step()
    assert [request.ids] == glm.generate(causal, [talk], max_new_tokens=6, stop=())
    reused.append(request.reused)
    talk = [*talk, *request.ids, 30 + turn, 40 + turn]  # the answer, and what is asked next
print("tokens that were not read again:", reused)
assert reused == [0, 12 + 6 - 1, 12 + 8 + 6 - 1]  # of an answer all but its last token was read

for _ in range(2):
    request = engine.submit(prompt, max_new_tokens=2)
    while request.active:
        engine.step()
assert request.reused == 0
assert not engine.reusable

# %% [markdown]
# ## Guessing ahead
#
# A step reads all weights, for one token as for five. So somebody guesses the next $n$ tokens, and a step reads the
# newest token and the guesses. The model's own choice behind each says how many were right; $r$ right ones give
# $r + 1$ tokens. Every token is the model's choice, so the answer is the same; guesses only decide how many steps it
# takes (chapter 10 has a model that was trained to guess). The cheapest guess is what stood behind the same words
# earlier in the text.

# %%
text = "Blank infilling removes spans from a text and trains the model to write them back. What is blank infilling?"
repeating = asked(text)
for guesses in (2, 4, 8):
    drafter = glm.PromptLookup(guesses=guesses)
    quick = glm.Engine(model, max_length=128, draft=drafter)
    assert quick.generate([repeating], max_new_tokens=40, stop=()) == [alone(repeating, 40, stop=())]
    tally = drafter.tally
    print(f"{guesses} guesses: {tally}; {39 / tally.passes:.2f} tokens a step")
    assert tally.passes + tally.right >= 39  # a step gives its right guesses and one token more
    assert tally.guessed == guesses * tally.passes

# %% [markdown]
# ## When numbers go wrong
#
# A damaged weight makes NaN, and a sampler that is given NaN says something. The engine checks the logits of each row
# on the device. If they are not finite, it reads the request once more, layer by layer, and names the first that made
# them so. Neighbours go on, and the slot is cleared before anybody else has it.

# %%
broken = glm.GLM.from_pretrained(folder, dtype=torch.float64)
with torch.no_grad():
    broken.blocks[2].feed_forward.up.weight[7, 11] = torch.nan
quick = glm.Engine(broken, max_batch=1, max_length=64)
request = quick.submit(prompt, max_new_tokens=20)
while request.active:
    quick.step()
print(textwrap.fill(f"{request.state}: {request.error}", 80))
assert "the feed-forward of block 2" in str(request.error)
assert all(buffer.isfinite().all() for layer in quick.slots.buffers for buffer in layer)
assert quick.seats.free() == [0]

# %% [markdown]
# ## Integer weights
#
# `weights="int4"` makes integers of the dense matrices of the blocks while composing. What a step reads of a layer then
# is what the products hold: count it.

# %%
single = glm.GLM.from_pretrained(folder, dtype=torch.bfloat16)
sizes = {}
for weights in (None, "int8", "int4"):
    composed = glm.Engine(single, max_length=64, weights=weights).composed
    matrices = [m for b in composed.blocks for m in (b.mixer.qkv, b.mixer.out, b.feed_forward.up, b.feed_forward.down)]
    sizes[weights or "as they are"] = sum(matrix.bytes for matrix in matrices)
    print(f"{weights or 'as they are':12}{sizes[weights or 'as they are'] / 1e6:8.2f} MB of matrices in the blocks")
assert sizes["int4"] < 0.3 * sizes["as they are"]

# %% [markdown]
# ## Tokens a second against the bound
#
# On this CPU, with one thread and tiny-glm in float32. tiny-glm fits the cache of a CPU, so that memory is no bound
# for it. What counts is how many operations the host starts, and there is no graph to record; those of `glm_kernels`
# cost it more than torch's own. So for one row the engine is no gain here, and for several it is.

# %%
single = single.float()
best = dict.fromkeys(("model", 1, 2, 4, 8), float("inf"))
engines = {rows: glm.Engine(single, max_batch=rows, max_length=64) for rows in (1, 2, 4, 8)}
for _ in range(2):
    begin = time.perf_counter()
    glm.generate(single, [prompt], max_new_tokens=20, stop=())
    best["model"] = min(best["model"], time.perf_counter() - begin)
    for rows, fast in engines.items():
        begin = time.perf_counter()
        fast.generate([prompt] * rows, max_new_tokens=20, stop=())
        best[rows] = min(best[rows], time.perf_counter() - begin)
print(f"the model:        {20 / best['model']:8.1f} tokens/s, the prompt among them")
for rows in engines:
    print(f"the engine, ×{rows}:   {20 * rows / best[rows]:8.1f} tokens/s")

# %% [markdown]
# On a GPU `glm bench` measures the engine, beside transformers and a compiled model in the style of gpt-fast, and
# writes `kernels/results/runtime_<device>.json`. What a step reads at least, divided by the speed of a stream that only
# reads, is the bound:

# %%
results = read_all(Path(glm_kernels.__file__).parents[1] / "results")
if not results:
    print("The engine on a GPU: not yet measured.")
for device in results:
    print(device.device["device"])
    for row in device.rows:
        if row["subject"] == "decode" and speed(row) is not None:
            run, (axis, size) = device.run_of(row), row["axis"]
            print(
                f"  {row['label']:30} {axis} {size:6}: {speed(row):7.0f} tokens/s, "
                f"{fraction(row, device):.2f} of the bound; commit {run['commit']}, {run['date']}"
            )

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e15_engine.py`. `python -m docs.check 15.1` says whether you are right.
#
# - Exercise 15.1, `remember`: ragged rows, written to a static cache.
# - Exercise 15.2, `choose`: every row by its own rules, with its own luck.
# - Exercise 15.3, `guess`: what followed the last tokens before.
# - Exercise 15.4, `not_read_again`: how much of a prompt a slot holds already.
#
# ## Read the code
#
# - `glm/runtime/engine.py`: requests in, tokens out; its `step` is a page.
# - `glm/runtime/decoding.py`: `advance`, the step that is recorded.
# - `glm/runtime/wiring.py` and `matrices.py`: how norms and residuals are handed to products.
# - `glm/runtime/rows.py`, `slots.py`, `seats.py`: what is kept on the device, and who sits where.
