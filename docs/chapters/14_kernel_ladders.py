# %% [markdown]
# # Kernel ladders
#
# A fast kernel is hard to read, because many ideas are in it at once. So in `kernels/ladders/` stands the road to
# three of them, one idea a file: each step is called as the others of its ladder are, computes the same, and has at
# most 80 lines. This chapter walks up the ladders, runs every step, and takes out the identities they rest on.

# %%
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import glm_kernels
import torch
from glm_kernels.attention import Bounds, forward_reference, visible
from glm_kernels.bench import ladders as measured
from glm_kernels.bench.results import read_all
from glm_kernels.packing import codes_of, dequantised, pack, words_of
from IPython.display import Markdown, display
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from docs import drawing

torch.manual_seed(0)
EPS = torch.finfo(torch.float64).eps
KERNELS = Path(glm_kernels.__file__).parents[1]
ladder = measured.loaded()  # kernels/ladders/ladder.py
devices = read_all(KERNELS / "results")
figures = measured.figures(devices)


def randn(*shape: int) -> torch.Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def show(name: str) -> None:
    """The steps of a ladder with their ideas, and what a GPU took for each, where one has measured."""
    rows = [
        f"| `{s.name}` | {s.idea} | {figures.get(name, {}).get(s.name, ladder.UNMEASURED)} |"
        for s in ladder.steps(name)
    ]
    display(Markdown("\n".join(["| step | idea | measured |", "| --- | --- | --- |", *rows])))
    for device in devices:
        for row in device.rows:
            if row["subject"] == "ladders" and row["fields"]["ladder"] == name:
                run = device.run_of(row)
                print(f"{device.device['device']}: {row['label']}; commit {run['commit']}, {run['date']}")


# %% [markdown]
# ## Every step computes the same
#
# There need not be a GPU: with `TRITON_INTERPRET=1` in the environment Triton runs its programs in Python, one after
# the other. The variable must be set before Triton is imported, so a child process does it. It runs every step of
# every ladder on a small case, and sends back what came out.

# %%
CHILD = """
import sys, torch
from glm_kernels.bench import ladders
cases = torch.load(sys.argv[1])
found = {name: {s.name: s.call(*cases[name]) for s in ladders.loaded().steps(name)} for name in cases}
torch.save(found, sys.argv[2])
"""
cases = {
    "attention": tuple(torch.randn(1, heads, 80, 16) for heads in (2, 1, 1)),  # q, k, v
    "decode": (
        *(torch.randn(1, heads, count, 16) for heads, count in ((2, 1), (1, 80), (1, 80))),
        torch.tensor([70], dtype=torch.int32),  # of 80 places
    ),
    "int4": (torch.randn(2, 160), torch.randint(0, 256, (8, 80), dtype=torch.uint8), torch.rand(8, 5)),
}
here = Path(os.environ.get("TMPDIR", "/tmp"))
given, got = here / f"ladders-{os.getpid()}.pt", here / f"ladders-{os.getpid()}-out.pt"
try:
    torch.save(cases, given)
    place = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(KERNELS), *sys.path])}
    subprocess.run([sys.executable, "-c", CHILD, str(given), str(got)], env=place, check=True)
    found = torch.load(got)
finally:
    given.unlink(missing_ok=True)
    got.unlink(missing_ok=True)

# %% [markdown]
# What they should have given is computed by plain torch in float64. The house rule for a kernel (chapter 12) is at
# most twice the error of plain torch in the same precision.

# %%
q, k, v = cases["attention"]
q1, k1, v1, length = cases["decode"]
x, packed, scales = cases["int4"]
group = x.shape[1] // scales.shape[1]


def plain(name: str, dtype: torch.dtype) -> torch.Tensor:
    """The case of a ladder in plain torch."""
    if name == "attention":
        return forward_reference(q.to(dtype), k.to(dtype), v.to(dtype), Bounds(), 0.25)[0]
    if name == "decode":
        seen = [y[:, :, : int(length)].to(dtype) for y in (k1, v1)]
        return torch.nn.functional.scaled_dot_product_attention(q1.to(dtype), *seen, enable_gqa=True)
    return x.to(dtype) @ dequantised(packed, scales, None, 4, dtype).T


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference, by that of the truth."""
    return float((y.double() - truth).norm() / truth.norm())


for name, steps in found.items():
    truth = plain(name, torch.float64)
    torchs = max(error(plain(name, torch.float32), truth), torch.finfo(torch.float32).eps / 2)
    print(f"{name}: error of plain torch {torchs:.1e}")
    for step, y in steps.items():
        assert error(y, truth) <= 2 * torchs, step
        print(f"    {step:28} {error(y, truth) / torchs:5.2f} times that")

# %% [markdown]
# ## Attention
#
# A softmax needs its denominator before its first weight is known, and the denominator needs all scores. Written as
# three steps that is a matrix of scores in memory, $T^2$ of them a head. What makes the matrix unnecessary is that a
# softmax can be carried along. For the keys so far, keep the greatest score $m$, the sum of weights $w$ and the
# weighted sum of values $a$; a new block of scores $s_j$ gives
#
# $$ m' = \max(m, \max_j s_j), \qquad p_j = e^{s_j - m'}, $$
#
# $$ w' = e^{m - m'} w + \sum_j p_j, \qquad a' = e^{m - m'} a + \sum_j p_j v_j, $$
#
# and at the end $y = a / w$. The factor $e^{m - m'}$ turns what was divided by $e^m$ into what is divided by
# $e^{m'}$.

# %%
T, K = 100, 8
s, values = 5 * randn(T), randn(T, K)
truth = s.softmax(0) @ values


def carried(block: int) -> tuple[torch.Tensor, list[float]]:
    """y by the recurrence above, and the maxima on the way."""
    m, w, a, maxima = torch.tensor(-torch.inf, dtype=torch.float64), 0.0, torch.zeros(K, dtype=torch.float64), []
    for s_block, v_block in zip(s.split(block), values.split(block), strict=True):
        top = torch.maximum(m, s_block.max())
        keep, p = torch.exp(m - top), torch.exp(s_block - top)
        w, a = keep * w + p.sum(), keep * a + p @ v_block
        m = top
        maxima.append(float(m))
    return a / w, maxima


for block in (1, 7, 64, 100):
    y, maxima = carried(block)
    assert (y - truth).abs().max() < 8 * T * EPS * values.abs().max()
    assert maxima == sorted(maxima)

# %% [markdown]
# The maximum rarely moves: after $n$ keys in random order the next is a new maximum with probability $1/(n+1)$, so
# that it moves $\sum_n 1/n$ times in all. The correction is nearly always a multiplication by 1.

# %%
rows = randn(4000, T)
moves = (rows == rows.cummax(1).values).double().sum(1)
expected = sum(1 / n for n in range(1, T + 1))
assert abs(moves.mean() - expected) < 8 * math.sqrt(expected / 4000)  # its variance is less than its mean

y, maxima = carried(1)
picture, axes = drawing.figure(5, 2.6)
axes.plot(s.tolist(), ".", color=drawing.SKY, label="score of the next key")
axes.step(range(T), maxima, where="post", color=drawing.RED, label="greatest so far")
axes.set_xlabel("key")
picture.legend(loc="outside lower center", ncols=2)
picture

# %% [markdown]
# A GPU has an instruction for $2^x$ and none for $e^x$. Since $e^s = 2^{s \log_2 e}$ the factor $\log_2 e$ goes into
# the scale of the scores, where there is a multiplication anyway.

# %%
assert torch.allclose(torch.exp2((s - s.max()) * math.log2(math.e)), torch.exp(s - s.max()), rtol=1e-13, atol=0)
show("attention")

# %% [markdown]
# Steps 3 and 4 are about the mask. A block of queries and a block of keys are in one of three relations: nobody sees
# anything (skip the block), everybody sees everything (no mask), or the diagonal passes through. With the library's
# bounds, a number a row or a query, that can be said from a few comparisons, for prefixes too: a query sees at most two
# intervals of keys. Here are a causal mask and one with a prefix, block by block.

# %%
picture = drawing.Picture(5, 2.9)
left, right = picture.subplots(1, 2)
for axes, bounds, title in (
    (left, Bounds(), "causal"),
    (right, Bounds(prefix=torch.tensor([200])), "prefix of 200"),
):
    seen = visible(512, 512, bounds)[0, 0].unflatten(0, (8, 64)).unflatten(2, (8, 64))  # [block, 64, block, 64]
    kind = seen.any(3).any(1).int() + seen.all(3).all(1).int()
    axes.pcolormesh(kind.numpy(), cmap=ListedColormap([drawing.PALE, drawing.ORANGE, drawing.BLUE]), vmin=0, vmax=2,
                    edgecolors="white")  # fmt: skip
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_title(title)
    axes.set_xlabel("block of keys")
    axes.tick_params(length=0)
left.set_ylabel("block of queries")
kinds = {"all see all": drawing.BLUE, "masked": drawing.ORANGE, "skipped": drawing.PALE}
picture.legend(handles=[Patch(color=c, label=n) for n, c in kinds.items()], loc="outside lower center", ncols=3)
blocks = visible(512, 512, Bounds())[0, 0].unflatten(0, (8, 64)).unflatten(2, (8, 64))
assert int(blocks.any(3).any(1).sum()) == 8 * 9 // 2  # step 3: half, and half of the diagonal
assert int((blocks.any(3).any(1) & ~blocks.all(3).all(1)).sum()) == 8  # step 4: the diagonal alone
picture

# %% [markdown]
# ## Decode attention
#
# One query against a long cache has no block of queries to share keys with. It has two other chances. The first:
# the $H/G$ query heads of a group ask the same keys, so they are the rows of one small matrix (chapter 4). The
# second: with one row there is one program a group, a handful on a GPU of more than a hundred multiprocessors. So the
# keys are split, each split sums up its own, and the results are joined. A set $J$ of keys is summed up by
#
# $$ m(J) = \max_J s, \qquad z(J) = \sum_J e^{s - m(J)}, $$
#
# $$ a(J) = \sum_J e^{s - m(J)} v, $$
#
# and two disjoint sets by the same rule as a block in the recurrence above. Joining is associative and commutative,
# and the empty set is neutral: any split, in any order, gives one and the same softmax.

# %%
Sum = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # m, z, a


def summed(keys: slice) -> Sum:
    """What a set of keys comes to."""
    m = s[keys].max()
    p = torch.exp(s[keys] - m)
    return m, p.sum(), p @ values[keys]


def join(one: Sum, other: Sum) -> Sum:
    """Of two disjoint sets, what their union comes to."""
    m = torch.maximum(one[0], other[0])
    mine, its = torch.exp(one[0] - m), torch.exp(other[0] - m)
    return m, mine * one[1] + its * other[1], mine * one[2] + its * other[2]


def same(one: Sum, other: Sum) -> bool:
    """Up to rounding."""
    return all(torch.allclose(x, y, rtol=16 * T * EPS, atol=16 * T * EPS) for x, y in zip(one, other, strict=True))


first, second, third = summed(slice(0, 13)), summed(slice(13, 64)), summed(slice(64, T))
empty = (torch.tensor(-1e300, dtype=torch.float64), torch.zeros((), dtype=torch.float64), torch.zeros(K).double())
assert same(join(first, second), join(second, first))
assert same(join(join(first, second), third), join(first, join(second, third)))
assert same(join(join(first, second), third), summed(slice(None)))
assert same(join(first, empty), first)
m, z, a = join(join(third, first), second)
assert (a / z - truth).abs().max() < 16 * T * EPS * values.abs().max()

# %% [markdown]
# The neutral element has a very low maximum and not $-\infty$, since two empty sets would be joined with
# $e^{-\infty + \infty}$, which is NaN. In the last step the last program of a row to finish joins the splits, always
# in the same order, so that a result does not depend on who was last.

# %%
assert torch.exp(torch.tensor(-math.inf) - torch.tensor(-math.inf)).isnan()
show("decode")

# %% [markdown]
# ## int4 weights
#
# A matrix of 4-bit integers has a quarter of the bytes; if undoing the packing costs no time, decoding is nearly four
# times as fast (chapter 13). Stored, two neighbours share a byte. If a program loads bytes and splits each in
# two, the two numbers belong to neighbouring columns, and have to be shuffled between threads to lie beside each other.
# So the kernels read another layout: a 16-bit word holds four codes that are 32 columns apart. Shifting a *tile* of
# words by $4i$ bits gives 32 columns that stand side by side already:
#
# $$ \text{word}[t, o, j] = \sum_{i=0}^{3} \text{code}[o, 128 t + 32 i + j] \cdot 2^{4 i}. $$

# %%
integers = torch.randint(-8, 8, (3, 256), dtype=torch.int8)  # three rows, two tiles
codes, words = codes_of(pack(integers, 4), 4).int(), words_of(pack(integers, 4), 4).int()
assert torch.equal(codes, integers.int() + 8)
for t in range(2):
    for i in range(4):
        chunk = words[t] >> (4 * i) & 15  # [outputs, 32]: one shift and one mask for a whole tile
        assert torch.equal(chunk, codes[:, 128 * t + 32 * i : 128 * t + 32 * i + 32])

picture, axes = drawing.figure(5, 2.5)
for column in range(128):
    i, j = divmod(column, 32)
    axes.add_patch(Rectangle((column / 4, 2.6), 0.25, 0.8, color=drawing.PALETTE[i], lw=0))
    axes.add_patch(Rectangle((j, 1.2 - 0.3 * i), 0.9, 0.27, color=drawing.PALETTE[i], lw=0))
axes.text(0, 3.5, "128 columns of one row, in order", va="bottom")
axes.text(0, 1.6, "32 words of 16 bits; the lowest bits on top", va="bottom")
axes.set_xlim(0, 32)
axes.set_ylim(-0.1, 4)
axes.axis("off")
picture

# %% [markdown]
# Turning a code into a number is the other cost: converting integers is slow on a GPU. But a number in half precision
# with the exponent of $2^7$ has a mantissa that counts in ones, so writing the code into the lowest bits *is* the
# number $128 + c$. Masking two codes and setting two exponents is one instruction (`lop3`), taking 128 and the offset
# away is one more, and it is exact.

# %%
c = torch.arange(16, dtype=torch.int16)
assert torch.equal((c | 0x4300).view(torch.bfloat16), (128 + c).bfloat16())  # bfloat16: 128 + c
assert torch.equal((c | 0x6400).view(torch.float16), (1024 + c).half())  # float16: 1024 + c
pairs = words[0].to(torch.int16).view(torch.int32)  # two words of a row at a time, [outputs, 16]
for i in range(4):
    two = ((pairs >> (4 * i)) & 0x000F000F) | 0x43004300
    numbers = two.view(torch.bfloat16) - 136  # 128, and 8 that codes are above integers
    assert torch.equal(numbers, integers[:, 32 * i : 32 * i + 32].bfloat16())
show("int4")

# %% [markdown]
# The product is computed as $Y^\top = W X^\top$: the weights are the left operand of the tensor cores, which may lie
# in registers, and the few rows of a decoding step are the narrow right one. A scale belongs to a group of columns, so
# the sum over a group is scaled once, not each weight:
#
# $$ y_o = \sum_g s_{og} \sum_{i \in g} q_{oi} x_i. $$

# %%
y_groups = (dequantised(packed, torch.ones_like(scales), None, 4, torch.float64) * x[0].double()).unflatten(
    1, (5, group)
)
by_groups = (y_groups.sum(2) * scales.double()).sum(1)
assert (by_groups - plain("int4", torch.float64)[0]).abs().max() < 160 * EPS * by_groups.abs().max() * 16

# %% [markdown]
# ## Norms, dense products, and what is fused
#
# A norm is bound by memory: it reads a row and writes a row. In a decoding step the row is short and the launch of a
# kernel takes longer than the norm. So the product behind it takes it in. The factor of a row commutes with a product:
#
# $$ \left(\frac{x \odot n}{r}\right) W^\top = \frac1r \, (x \odot n) W^\top, \qquad
#    r = \sqrt{\frac1D \sum_i x_i^2 + \varepsilon}. $$
#
# The squares are summed up beside the product, while the same $x$ is in registers, and the division waits until the
# end. A LayerNorm subtracts a mean first and is not taken in.

# %%
D, F = 64, 24
rows, norm, W = randn(5, D), randn(D), randn(F, D)
r = (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()
before, behind = (rows * norm / r) @ W.T, (rows * norm) @ W.T / r
assert (before - behind).abs().max() < 4 * D * EPS * behind.abs().max()
fused = glm_kernels.dense_matmul(rows, W, norm=norm, eps=1e-5)
assert (fused - before).abs().max() < 4 * D * EPS * behind.abs().max()

# %% [markdown]
# The same call takes a bias, SwiGLU over the two halves of its outputs, and a residual. What stands between two
# products of a feed-forward is then no kernel at all:

# %%
up, down = randn(2 * F, D) / 8, randn(D, F) / 8
gate, linear = ((rows * norm / r) @ up.T).chunk(2, -1)
by_hand = rows + (torch.nn.functional.silu(gate) * linear) @ down.T
hidden = glm_kernels.dense_matmul(rows, up, norm=norm, eps=1e-5, swiglu=True)
y = glm_kernels.dense_matmul(hidden, down, residual=rows)
assert (y - by_hand).abs().max() < 16 * D * EPS * by_hand.abs().max()

# %% [markdown]
# ## What the compiler says
#
# Compiling needs no GPU, and shows much of what decides speed. A thread has only so many registers; what does not fit
# is *spilled* to memory. A program's shared memory says how many loads are on their way, and how many programs fit on
# a multiprocessor. The repository holds both for every form of every kernel on five devices, and its tests compile
# them again. For bfloat16 on sm_90:

# %%
resources = json.loads((KERNELS / "results" / "resources.json").read_text(encoding="utf-8"))
kinds = {
    "attention": "attention_kernel", "its gradients": "gradient_kernel", "decode": "decode_kernel",
    "dense": "dense_kernel", "int4, int8": "packed_kernel", "norms": "norm_", "others": "",
}  # fmt: skip
points: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in kinds}
for name, targets in resources["variants"].items():
    if "90" in targets and "bf16" in name:
        kind = next(kind for kind, start in kinds.items() if name.startswith(start))
        points[kind].append(tuple(targets["90"]))
versions = ", ".join(f"{what} {number}" for what, number in resources["versions"].items())
print(f"{sum(map(len, points.values()))} forms; {versions}, commit {resources['commit']}")

picture, axes = drawing.figure(5, 3.4)
for (kind, dots), colour, marker in zip(points.items(), drawing.PALETTE, "osD^vPX", strict=True):
    axes.plot([shared / 1024 for _, _, shared in dots], [registers for registers, _, _ in dots], marker, ms=4.5,
              color=colour, label=kind, ls="", alpha=0.85)  # fmt: skip
axes.axhline(255, color=drawing.INK, lw=0.8)
axes.axvline(227, color=drawing.INK, lw=0.8)
axes.set_xlabel("shared memory of a program, KiB")
axes.set_ylabel("registers of a thread")
picture.legend(loc="outside lower center", ncols=4, columnspacing=1, handletextpad=0.2)
assert all(registers <= 255 and shared <= 227 * 1024 for dots in points.values() for registers, _, shared in dots)
picture

# %% [markdown]
# The lines are the limits of the device. And the forms that do spill there, in any precision:

# %%
spilling = [(name, t["90"]) for name, t in resources["variants"].items() if "90" in t and t["90"][1]]
for name, (registers, spilled, _) in spilling:
    print(f"{name}: {registers} registers, {spilled} bytes of a thread spilled")
print(f"{len(spilling)} of {sum('90' in t for t in resources['variants'].values())} forms for sm_90")

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e14_kernel_ladders.py`. `python -m docs.check 14.1` says whether you are right.
#
# - Exercise 14.1, `carried_softmax`: the recurrence for many queries, block by block.
# - Exercise 14.2, `joined`: what splits of the keys found, made one.
# - Exercise 14.3, `words`: from codes in order to the kernels' words.
# - Exercise 14.4, `blocks_of_keys`: what steps 3 and 4 of the attention ladder visit.
#
# ## Read the code
#
# - `kernels/ladders/`: the steps; each is a page.
# - `kernels/glm_kernels/attention.py` and `decode.py`: the equations at the top, the kernels below name them.
# - `kernels/glm_kernels/packing.py`: both layouts and the way between them.
# - `kernels/glm_kernels/variants.py`: how a kernel is compiled and looked at without a GPU.
