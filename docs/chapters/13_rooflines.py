# %% [markdown]
# # Rooflines, measured
#
# How many tokens a second can a machine write at most? The answer needs no kernel and no profiler. It needs two
# numbers of the machine and two of the model, and all four can be had by code: this chapter counts the model's from
# the specs, and measures the machine's while it runs.

# %%
import math
import time
from dataclasses import replace
from pathlib import Path

import glm_kernels
import torch
from glm_kernels.bench.results import read_all
from glm_kernels.bench.subject import Work

import glm
from docs import drawing
from glm.attention import Attention
from glm.experts import Experts
from glm.grouped import Grouped
from glm.info import active_parameters, cache_bytes_per_token, parameters, tensors, weight_bytes
from glm.linear import Dense

torch.manual_seed(0)
torch.set_num_threads(1)
BF16 = torch.bfloat16
SPECS = {name: release.spec for name, release in glm.releases().items()}
SHOWN = ("chatglm-6b", "chatglm2-6b", "glm-4-9b-chat", "glm-4-32b-0414", "glm-4.5-air", "glm-4.7-flash")

# %% [markdown]
# ## Two roofs
#
# A machine reads at most $R$ bytes a second and does at most $C$ flops a second. Whatever has to read $b$ bytes and do
# $f$ flops takes at least
#
# $$ t \ge \max\left(\frac bR, \frac fC\right), $$
#
# with equality only if reading and computing overlap perfectly. Which of the two is larger depends on the **arithmetic
# intensity** $f/b$ of the work and on nothing else: below $C/R$ flops a byte it waits for memory, above it for
# arithmetic. Drawn as speed $f/t$ over intensity, the bound is a slope that ends in a flat roof: the roofline model of
# Williams, Waterman and Patterson. The benchmark of the kernels grades every case by the same two lines of code:

# %%
R, C = 4.0, 100.0  # of a machine that is easy to compute with
for bytes_read, flops in ((8.0, 8.0), (8.0, 199.0), (8.0, 201.0), (8.0, 8000.0)):
    seconds, bound = Work(bytes_read, flops).floor(R, C)
    assert seconds == max(bytes_read / R, flops / C)
    assert bound == ("R" if flops / bytes_read < C / R else "C")

# %% [markdown]
# ## What a decoding step reads
#
# To write one token, every matrix is read once, and the keys and values of all tokens so far. Of the embedding one row
# is looked up; of the experts only the chosen ones are read. So, for one row with $S$ tokens,
#
# $$ b = b_{\text{weights}} - b_{\text{embedding}} - b_{\text{experts not chosen}} + S \cdot b_{\text{cache}}. $$


# %%
def weights_read(spec: glm.Spec, dtype: torch.dtype = BF16) -> float:
    """Bytes of the weights that a step of one row reads."""
    looked_up = 0 if spec.tied else spec.vocabulary * spec.width * dtype.itemsize
    spared = sum(
        sum(x.nbytes for x in expert(spec, block.feed_forward, dtype))
        * (block.feed_forward.count - block.feed_forward.top)
        for block in spec.blocks
        if isinstance(block.feed_forward, Experts)
    )
    return weight_bytes(spec, dtype) - looked_up - spared


def expert(spec: glm.Spec, part: Experts, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors of one expert, without their numbers."""
    with torch.device("meta"):
        module = part.expert.build(spec.width, spec.weights).to(dtype)
    return [*module.parameters(), *module.buffers()]


for name in SHOWN:  # the same follows from counting parameters; routers have a few numbers that stay in float32
    by_count = 2 * (active_parameters(SPECS[name]) - SPECS[name].vocabulary * SPECS[name].width)
    routers = sum(block.feed_forward.count for block in SPECS[name].blocks if isinstance(block.feed_forward, Experts))
    assert weights_read(SPECS[name]) == by_count + 2 * routers, name

# %% [markdown]
# Integer weights are data of the spec as well. int4 in groups of 128 takes half a byte and a shared scale for each
# weight; head, norms and cache stay as they are. Here are the bytes of a token, and the floor it sets for each TB/s
# that a machine can read: multiply by its $R$.


# %%
def stored(spec: glm.Spec, bits: int) -> glm.Spec:
    """The same with integers of so many bits in groups of 128, or of 64 where rows are no multiple of that."""
    whole = all(block.feed_forward.inner % 128 == 0 for block in spec.blocks if hasattr(block.feed_forward, "inner"))
    return replace(spec, weights=Grouped(bits, 128 if whole else 64, symmetric=True))


floors = {}
print(f"{'':16}{'GB of weights read a token':>30}{'tokens/s for each TB/s':>32}")
print(f"{'release':16}" + 2 * "".join(f"{form:>10}" for form in ("bf16", "int8", "int4")))
for name in SHOWN:
    spec = SPECS[name]
    kinds = {"bf16": spec, "int8": stored(spec, 8), "int4": stored(spec, 4)}
    floors[name] = {form: weights_read(kind) for form, kind in kinds.items()}
    sizes = floors[name].values()
    print(f"{name:16}" + "".join(f"{size / 1e9:10.2f}" for size in sizes) + "".join(f"{1e12 / s:10.1f}" for s in sizes))

forms = ("bf16", "int8", "int4")
picture = drawing.bars(
    list(floors), {form: [sizes[form] / 1e9 for sizes in floors.values()] for form in forms}, number="{:.2f}"
)
picture.axes[0].set_title("GB of weights read a token")
picture

# %% [markdown]
# The two releases with experts stand out: they hold many times what they read.

# %%
for name in SHOWN:
    spec = SPECS[name]
    held, read = parameters(spec), active_parameters(spec)
    print(f"{name:16} holds {held / 1e9:6.1f} billion numbers, a token meets {read / held:4.0%} of them")
    assert (held == read) == (not any(isinstance(block.feed_forward, Experts) for block in spec.blocks))

# %% [markdown]
# The cache adds to that with every token of context. From how many on does a token read as much cache as weights, in
# bf16 and in int4? (Exercise 4.4 counts the same for a whole model in memory.)

# %%
print(f"{'':16}{'bytes of cache':>15}{'tokens of cache like weights in':>33}{'':>10}")
print(f"{'release':16}{'a token':>15}{'bf16':>18}{'int4':>15}{'context':>12}")
for name in SHOWN:
    each = cache_bytes_per_token(SPECS[name], BF16)
    as_bf16, as_int4 = (floors[name][form] / each for form in ("bf16", "int4"))
    print(f"{name:16}{each:15,}{as_bf16:18,.0f}{as_int4:15,.0f}{SPECS[name].context:12,}")

# %% [markdown]
# ## Rows, and where int4 stops being bound by memory
#
# A matrix $[O, I]$ times $N$ rows is $2 N O I$ flops, however its weights are stored. With $w$ bytes a weight it reads
# $w O I$ bytes, and beside them $2 N (I + O)$ of activations, which are few. Its intensity is
#
# $$ \frac fb = \frac{2N}{w + 2N\left(\frac1O + \frac1I\right)} \approx \frac{2N}{w}, $$
#
# so that it waits for memory up to about $N^* = \frac w2 \cdot \frac CR$ rows. Half the bytes are half the rows: int4
# reaches the flat roof four times as early as bf16. Behind $N^*$ rows small weights gain nothing but room.


# %%
def product(rows: int, outputs: int, inputs: int, weight: float) -> Work:
    """A matrix of `weight` bytes a number, times so many rows in half precision."""
    return Work(weight * outputs * inputs + 2 * rows * (inputs + outputs), 2.0 * rows * outputs * inputs)


G128 = 0.5 + 2 / 128  # int4 with a scale of two bytes for each 128
outputs, inputs = 27392, 4096  # gate and up of GLM-4-9B
spec = SPECS["glm-4-9b-chat"]
assert (2 * spec.blocks[0].feed_forward.inner, spec.width) == (outputs, inputs)
for rows in (1, 16, 256):
    for weight in (2.0, G128):
        work = product(rows, outputs, inputs, weight)
        assert abs(work.flops / work.bytes - 2 * rows / (weight + 2 * rows * (1 / outputs + 1 / inputs))) < 1e-12 * rows

R, C = 1.0, 170.0  # in these units N* is easily said: w / 2 times 170
for weight in (2.0, 1.0, G128):
    limit = weight / 2 * C / R
    bound = [product(rows, outputs, inputs, weight).floor(R, C)[1] for rows in range(1, 512)]
    turns = bound.index("C") + 1  # the first number of rows that waits for arithmetic
    print(f"{weight:.3f} bytes a weight: memory is the bound below {turns} rows; w C / 2 R = {limit:.1f}")
    assert bound == ["R"] * (turns - 1) + ["C"] * (512 - turns)
    assert limit <= turns <= 1.15 * limit + 1  # activations put it off a little

# %% [markdown]
# The ideal speed-up of int4 over bf16 is the ratio of the two floors: the ratio of bytes as long as both wait for
# memory, then less and less, then 1.

# %%
counts = [2 ** (i / 4) for i in range(41)]
picture, axes = drawing.figure(5, 3)
for ridge in (50, 170, 300):
    gain = [
        product(n, outputs, inputs, 2.0).floor(1.0, ridge)[0] / product(n, outputs, inputs, G128).floor(1.0, ridge)[0]
        for n in map(int, counts)
    ]
    assert math.isclose(gain[0], product(1, outputs, inputs, 2.0).bytes / product(1, outputs, inputs, G128).bytes)
    assert gain[-1] == 1
    axes.plot([int(n) for n in counts], gain, label=f"C/R = {ridge}")
axes.set_xscale("log", base=2)
axes.set_xlabel("rows")
axes.set_ylabel("ideal speed-up of int4 over bf16")
axes.set_ylim(0)
axes.legend()
picture

# %% [markdown]
# Attention over a cache is never helped by more rows: every row has a cache of its own. A key or value is used once by
# each of the $H/G$ heads of its group, for 2 flops in 2 bytes, so its intensity is $H/G$ whatever the length.

# %%
for name in ("chatglm-6b", "chatglm2-6b", "glm-4-9b-chat", "glm-4-32b-0414", "glm-4.5-air"):
    mixer = SPECS[name].blocks[0].mixer
    assert isinstance(mixer, Attention)
    S, K = 1000, mixer.head_width
    flops = 2 * 2 * mixer.heads * K * S  # q·k and p·v
    intensity = flops / (S * 2 * mixer.groups * K * 2)
    assert intensity == mixer.heads // mixer.groups
    print(f"{name:16} decode attention: {intensity:4.0f} flops a byte")

# %% [markdown]
# ## A prompt
#
# A prompt of $T$ tokens is $T$ rows at once, plus the scores, whose number grows with $T^2$. It reads the weights once.


# %%
def prompt(spec: glm.Spec, tokens: int, weight: float = 2.0) -> Work:
    """Reading a causal prompt, up to its first new token: weights read once, the head for the last token only."""
    dense = replace(spec, weights=Dense())
    vectors = sum(x.numel() for x in tensors(dense, torch.float32) if x.dim() == 1)  # norms, biases: not multiplied
    ends = spec.vocabulary * spec.width
    matrices = active_parameters(spec) - vectors - (1 if spec.tied else 2) * ends
    pairs = tokens * (tokens + 1) // 2
    scores = sum(4 * block.mixer.heads * block.mixer.head_width * pairs for block in spec.blocks)
    return Work(weight * matrices + 2 * ends, 2.0 * tokens * matrices + 2.0 * ends + scores)


spec = SPECS["glm-4-9b-chat"]
print(f"{'tokens':>8}{'TFLOP':>10}{'flops a byte':>14}{'of them scores':>16}")
for tokens in (1, 16, 128, 1024, 8192, 65536):
    work = prompt(spec, tokens)
    mixer = spec.blocks[0].mixer
    scores = len(spec.blocks) * 4 * mixer.heads * mixer.head_width * tokens * (tokens + 1) // 2
    print(f"{tokens:8}{work.flops / 1e12:10.3f}{work.flops / work.bytes:14.1f}{scores / work.flops:16.1%}")

# %% [markdown]
# So the same model lies at both ends: a decoding step at one flop a byte, a prompt at thousands. They want different
# kernels, and the engine (chapter 15) has one of each.
#
# ## The roofs of this machine
#
# $R$: the sum of a tensor far larger than any cache, and its product with itself, whichever is read faster. $C$: a
# product of two square matrices. Both with one thread, the best of several rounds, since whatever else the machine
# does can only slow a round down. In the same rounds one decoding step of a layer of ChatGLM2-6B, in its true size,
# with a small vocabulary and random weights.

# %%
spec = replace(SPECS["chatglm2-6b"], vocabulary=1024)
spec = replace(spec, blocks=spec.blocks[:1])
model = glm.GLM(spec, dtype=torch.float32, device="meta").to_empty(device="cpu").requires_grad_(False)
for weight in model.parameters():
    weight.uniform_(-0.03, 0.03)

ids = torch.randint(spec.vocabulary, (1, 32))
cache = model.new_cache(1, 48)
large = torch.ones(2**26)  # 256 MiB
side = 768
a, b = torch.randn(side, side), torch.randn(side, side)


def step() -> None:
    """One more token, forgotten again."""
    before = cache.layout
    model(ids[:, :1], cache=cache, last=True)
    cache.rewind(before)


def read_prompt() -> None:
    """A prompt of 32 tokens, without a cache."""
    model(ids, last=True)


calls = {
    "sum": large.sum, "dot": lambda: large.dot(large), "matmul": lambda: a @ b,
    "decode": step, "prompt": read_prompt,
}  # fmt: skip
best = dict.fromkeys(calls, math.inf)
with torch.inference_mode():
    model(ids, cache=cache, last=True)
    for _ in range(4):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)

R = large.nbytes / min(best["sum"], best["dot"])
C = 2 * side**3 / best["matmul"]
print(f"R = {R / 1e9:.1f} GB/s, C = {C / 1e9:.1f} GFLOP/s, C/R = {C / R:.1f} flops a byte")

# %%
weights = weights_read(spec, torch.float32)
one = Work(weights + 33 * cache_bytes_per_token(spec, torch.float32), 2 * weights / 4)
many = prompt(spec, 32)
many = Work(2 * many.bytes, many.flops)  # float32: twice the bytes of bf16
measured = {"a decoding step": (one, best["decode"]), "a prompt of 32 tokens": (many, best["prompt"])}
for what, (work, seconds) in measured.items():
    least, bound = work.floor(R, C)
    print(
        f"{what}: {work.bytes / 1e9:.2f} GB, {work.flops / 1e9:.2f} GFLOP, {1e3 * seconds:.1f} ms; "
        f"{least / seconds:.0%} of the roof {bound}"
    )
assert one.flops / one.bytes < 1 < many.flops / many.bytes

# %%
picture, axes = drawing.figure(5, 3.4)
x = [2 ** (i / 4) for i in range(-12, 49)]
axes.plot(x, [min(R * i, C) / 1e9 for i in x], color=drawing.INK, label="roof, measured")
for (what, (work, seconds)), colour, marker in zip(measured.items(), (drawing.BLUE, drawing.ORANGE), "os", strict=True):
    axes.plot(work.flops / work.bytes, work.flops / seconds / 1e9, marker, color=colour, label=what)
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
axes.set_xlabel("flops a byte")
axes.set_ylabel("GFLOP/s")
axes.legend(loc="lower right")
picture

# %% [markdown]
# A point on the slope is as fast as memory lets it be. A point below tells how much time is spent on something else
# than what has to be done. These are figures of the machine that built this page, one thread, one run.
#
# ## The roofs of GPUs
#
# On a GPU both roofs are measured by the benchmark, in the same run as the kernels (`glm_kernels/bench/roofs.py`), and
# stand in the files of `kernels/results/`. This is what they say of every device measured so far, and what follows
# for decoding.

# %%
results = read_all(Path(glm_kernels.__file__).parents[1] / "results")
if not results:
    print("GPU roofs: not yet measured. `python -m glm_kernels.bench all --out kernels/results/` writes them.")
for device in results:
    run = device.runs[-1]
    R, C = run["roofs"]["read"], run["roofs"]["multiply"]
    print(f"{device.device['device']}, commit {run['commit']}, {run['date']}")
    print(f"  R = {R / 1e12:.2f} TB/s, C = {C / 1e12:.0f} TFLOP/s, C/R = {C / R:.0f} flops a byte")
    for form, weight in (("bf16", 2.0), ("int8", 1 + 2 / 128), ("int4", G128)):
        print(f"  {form}: bound by memory up to about {weight / 2 * C / R:.0f} rows")
    for name, sizes in floors.items():
        print(f"  {name:16}" + "".join(f"{form} {R / size:7.0f} tokens/s  " for form, size in sizes.items()))

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e13_rooflines.py`. `python -m docs.check 13.1` says whether you are right.
#
# - Exercise 13.1, `step_bytes`: what a step of several rows reads.
# - Exercise 13.2, `floor`: the least time, and which roof says so.
# - Exercise 13.3, `rows_bound_by_memory`: up to how many rows a product waits for memory.
# - Exercise 13.4, `ideal_gain`: what int4 can gain over bf16 at so many rows.
#
# ## Read the code
#
# - `kernels/glm_kernels/bench/subject.py`: `Work`, the bound that every measurement is held to.
# - `kernels/glm_kernels/bench/roofs.py`: how $R$ and $C$ are measured on a GPU.
# - `glm/info.py`: what is counted from a spec.
