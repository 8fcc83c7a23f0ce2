# %% [markdown]
# # Numerics
#
# Models are published in bfloat16 or float16. Two correct programs then give different logits, since each rounds in its
# own places. How different may they be? Where does rounding do harm, so that float32 has to be used? And how can a
# small mistake be told from a rounding?

# %%
from dataclasses import replace
from pathlib import Path

import torch
from glm_kernels import rms_norm
from torch.nn import functional as F

import glm
from docs import drawing
from glm.attention import attend
from glm.layout import EVERYTHING
from glm.norms import RMSNorm
from glm.positions import Interpolation
from glm.verify import verify

torch.manual_seed(0)
torch.set_grad_enabled(False)
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def rms(x: torch.Tensor) -> float:
    """Root mean square."""
    return x.double().square().mean().sqrt().item()


# %% [markdown]
# ## What a number is
#
# A floating-point number is a sign, an exponent and some digits. bfloat16 has the exponent of float32 and cuts its
# digits; float16 has more digits and a small exponent. `eps` is the gap between 1 and the next number.

# %%
print(f"{'':10} {'eps':>9} {'largest':>9} {'smallest normal':>16}")
for dtype in (BRAIN, HALF, SINGLE, DOUBLE):
    info = torch.finfo(dtype)
    print(f"{str(dtype)[6:]:10} {info.eps:9.1e} {info.max:9.1e} {info.tiny:16.1e}")

# %% [markdown]
# A result that lies between two numbers becomes the nearer one, and of two equally near the one whose last digit is
# even. So one rounding is wrong by at most half of `eps`:
#
# $$ |\operatorname{fl}(x) - x| \le \tfrac{1}{2}\,\text{eps}\,|x| . $$

# %%
x = torch.randn(100_000, dtype=DOUBLE)
for dtype in (BRAIN, HALF):
    normal = x[x.abs() > torch.finfo(dtype).tiny]
    assert ((normal.to(dtype).double() - normal).abs() <= torch.finfo(dtype).eps / 2 * normal.abs()).all()
assert torch.tensor([1 + 1 / 256, 1 + 3 / 256]).bfloat16().tolist() == [1.0, 1 + 1 / 64]  # ties, both to even

# %% [markdown]
# ## Positions
#
# Eight bits of digits count up to 256. Then every second number is missing, then three of four:

# %%
places = torch.arange(254, 266)
print("positions:   ", places.tolist())
print("in bfloat16: ", [int(p) for p in places.to(BRAIN)])

# %% [markdown]
# A rotary table made in bfloat16 puts neighbours at the same place. So angles are computed in float64 here and only
# their cosines and sines are rounded. (ChatGLM2's own first code computed positions in the model's dtype, float16.)

# %%
spec = glm.release("glm-4-9b").spec
omega = spec.rotary.frequencies(spec.rotary.widths[0])
far = torch.arange(spec.context, dtype=DOUBLE)
exact = (far[:, None] * omega).cos()
picture, axes = drawing.figure(5, 2.8)
for dtype in (BRAIN, HALF, SINGLE):
    coarse = (far.to(dtype)[:, None] * omega.to(dtype)).double().cos()
    worst = (coarse - exact).abs().amax(1).unflatten(0, (-1, 64)).amax(1)
    axes.semilogy(far[::64], worst, label=str(dtype)[6:])
axes.set(xlabel="position", ylabel="worst error of a cosine", ylim=(1e-9, 4))
axes.legend()
picture

# %% [markdown]
# ## Sums
#
# A sum of many terms loses what is small beside it. Ones added up in bfloat16 stop at 256, because the next whole
# number does not exist there:

# %%
total = torch.zeros((), dtype=BRAIN)
for _ in range(1000):
    total += 1
print(total.item())
assert total == 256

# %% [markdown]
# Matrix products do not do this: processors add products of bfloat16 numbers in float32 and round once, at the end.
# What a norm or a softmax adds up has to be widened by hand. Here are both with and without; the error is relative to
# that of one rounding of the right result, which nobody can avoid.

# %%
D, T = 4096, 64
stream = (3 * torch.randn(T, D)).to(BRAIN)
scores = (4 * torch.randn(T, D)).to(BRAIN)
EXACT = {
    "mean square": stream.double().square().mean(-1),
    "softmax": scores.double().softmax(-1),
}


def added_up(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis, in the dtype of x after every term."""
    total = torch.zeros(x.shape[:-1], dtype=x.dtype)
    for column in x.unbind(-1):
        total = total + column
    return total


exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
ways = {
    "mean square": {"float32": stream.float().square().mean(-1), "bfloat16": added_up(stream.square()) / D},
    "softmax": {"float32": scores.float().softmax(-1), "bfloat16": exponentials / added_up(exponentials)[:, None]},
}
for what, results in ways.items():
    one = rms(EXACT[what].to(BRAIN).double() - EXACT[what])
    for how, result in results.items():
        error = rms(result.to(BRAIN).double() - EXACT[what]) / one
        print(f"{what:12} in {how:8} is {error:8.1f} roundings off")
        assert (error < 2) == (how == "float32")

# %% [markdown]
# This is `wide` in `glm/norms.py`: statistics, softmax, rotations and the router (chapter 7) are computed in float32 at
# least, and in a float64 model in float64.
#
# ## What is too large
#
# float16 ends early. The square of a number that is not even large is infinite:

# %%
loud = torch.full((8,), 300.0, dtype=HALF)
print("mean square in float16:", loud.square().mean().item(), " in float32:", loud.float().square().mean().item())
assert loud.square().mean().isinf()

# %% [markdown]
# ChatGLM-6B is a float16 model. Its official code divides queries by the number of the layer before the product and
# multiplies scores by it afterwards, in float32, which changes nothing but the range:
#
# $$ (\ell + 1) \left( \frac{q}{\sqrt{d}\,(\ell + 1)} \cdot k \right) = \frac{q \cdot k}{\sqrt d} . $$

# %%
d, layer = 128, 27
q, k = (120 * torch.ones(d, dtype=HALF), 60 * torch.ones(d, dtype=HALF))
direct = (q @ k) / d**0.5  # the product first
careful = ((q / (d**0.5 * (layer + 1))) @ k).float() * (layer + 1)
exact = (q.double() @ k.double()) / d**0.5
print(f"product first: {direct.item()}, divided first: {careful.item():.0f}, exact: {exact.item():.0f}")
assert direct.isinf()
assert (careful - exact).abs() < 4 * torch.finfo(HALF).eps * exact

# %% [markdown]
# `glm` leaves it out. In exact arithmetic it is nothing, and torch's attention does not round scores to float16:

# %%
everywhere = attend(*(x.expand(1, 1, 4, d) for x in (q, k, k)), EVERYTHING)
assert everywhere.isfinite().all()

# %% [markdown]
# ## Rounding in the same places
#
# RMSNorm can multiply by its weight before it rounds, or after. In float64 it is the same. In half precision many
# numbers differ in their last bit, and a release was trained with one of the two. So the spec says which:

# %%
states, weight = torch.randn(64, 256).to(BRAIN), (1 + 0.3 * torch.randn(256)).to(BRAIN)
results = []
for weight_first in (True, False):
    norm = RMSNorm(1e-5, weight_first).build(256).to(BRAIN)
    norm.weight.copy_(weight)
    results.append(norm(states))
differ = (results[0] != results[1]).double().mean()
print(f"{100 * differ:.0f} % of the numbers differ, by up to {(results[0] - results[1]).abs().max():.3f}")
assert differ > 0.05

# %% [markdown]
# ## A whole model in bfloat16
#
# How the error grows through the layers of tiny-glm, relative to the size of the stream. The weights are the same in
# all three models; only what is computed is rounded.

# %%
models = {dtype: glm.GLM.from_pretrained(glm.embedded(), dtype=dtype) for dtype in (BRAIN, SINGLE, DOUBLE)}
models[SINGLE].load_state_dict(models[BRAIN].state_dict())
models[DOUBLE].load_state_dict(models[BRAIN].state_dict())
tokenizer = glm.Tokenizer.from_pretrained(glm.embedded())
ids = torch.tensor([tokenizer.chat([{"role": "user", "content": "What is a general language model?"}])])
streams = {dtype: model(ids, hidden=True)[1] for dtype, model in models.items()}
picture, axes = drawing.figure(5, 2.6)
for dtype in (BRAIN, SINGLE):
    errors = [rms(ours - exact) / rms(exact) for ours, exact in zip(streams[dtype], streams[DOUBLE], strict=True)]
    axes.semilogy(range(1, len(errors)), errors[1:], "o-", label=str(dtype)[6:])
    assert errors[-1] < 16 * torch.finfo(dtype).eps
    assert errors[0] == 0  # a row of the embedding is looked up
axes.set_xticks(range(1, len(errors)))
axes.set(xlabel="blocks gone through; the last is the final norm", ylabel="relative error (rms)")
axes.legend(loc="center right")
picture

# %% [markdown]
# The golden files hold what the official code computed in bfloat16, and in float64. So one can ask how wrong *it* is,
# and hold our model to that: not to its numbers, which are as arbitrary as ours, but to its error. `glm verify` does
# it.

# %%
for name in ("chatglm1-base", "chatglm3-base", "hf_glm-base", "hf_glm4-base"):
    report = verify(GOLDENS / name, dtype=BRAIN)
    total = report.rows[-1]
    print(f"{name:14} error of the logits: {total.relative:.2f} times that of the official code")
    assert report.ok

# %% [markdown]
# ## Why models are compared in float64
#
# Here are three small mistakes in a spec, how much each changes the logits of a small model, and beside them the noise
# of each precision. What lies below the noise cannot be seen.

# %%
small = glm.GLM.from_pretrained(GOLDENS / "chatglm3-base", dtype=DOUBLE)
ids = torch.arange(3, 40)[None]
expected = small(ids)


def change(spec: glm.Spec) -> float:
    """How far the logits of these weights under another spec are from the right ones."""
    other = glm.GLM(spec, dtype=DOUBLE)
    other.load_state_dict(small.state_dict())
    return rms(other(ids) - expected) / rms(expected)


def noise(dtype: torch.dtype) -> float:
    """How far the logits of the same model are off in another precision."""
    other = glm.GLM.from_pretrained(GOLDENS / "chatglm3-base", dtype=dtype)
    return rms(other(ids).double() - expected) / rms(expected)


spec = small.spec
block, rotary = spec.blocks[0], spec.rotary
eps = replace(block.norm, eps=block.norm.eps / 10)
found = {
    "noise of bfloat16": noise(BRAIN),
    "noise of float32": noise(SINGLE),
    "rotary base 8 % larger": change(replace(spec, rotary=replace(rotary, base=1.08 * rotary.base))),
    "a tenth of the norms' eps": change(replace(spec, blocks=(replace(block, norm=eps),) * len(spec.blocks))),
    "positions divided by 1.001": change(replace(spec, rotary=replace(rotary, scaling=Interpolation(1.001)))),
}
assert found["noise of float32"] < found["a tenth of the norms' eps"] < found["noise of bfloat16"]
order = sorted(found, key=found.get, reverse=True)
drawing.bars(order, {"relative change of the logits (rms)": [found[name] for name in order]}, log=True, number="{:.1e}")

# %% [markdown]
# In float64 the noise is far below all of them, and every field of every spec can be tested by changing it.

# %%
report = verify(GOLDENS / "chatglm3-base", dtype=DOUBLE)
worst = max(row.relative for row in report.rows if "logits" in row.quantity)
print(f"against the official code in float64: {worst:.0e}")
assert worst < 1e-9

# %% [markdown]
# ## Twice torch's error
#
# A kernel cannot be held to float64's accuracy. And a tolerance typed by hand is either too strict for one size or too
# loose for another. This project's rule uses plain torch as the measure:
#
# $$ \lVert \text{kernel} - \text{exact} \rVert \le 2 \max\left( \lVert \text{torch} - \text{exact} \rVert,\;
#    \tfrac{1}{2}\,\text{eps}\, \lVert \text{exact} \rVert \right) $$
#
# in the largest element and in the mean, with torch in the kernel's dtype and *exact* in float64. The second term is
# there for cases where torch happens to hit the exact result.


# %%
def allowed(kernel: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    """The rule."""
    for norm in (2, torch.inf):
        size = lambda x, norm=norm: torch.linalg.vector_norm(x.double().flatten(), norm)  # noqa: E731
        floor = torch.finfo(kernel.dtype).eps / 2 * size(exact)
        if size(kernel - exact) > 2 * max(size(plain - exact), floor):
            return False
    return True


x, w = torch.randn(32, 2048).to(HALF), (torch.randn(64, 2048) / 2048**0.5).to(HALF)
exact, plain = x.double() @ w.double().T, F.linear(x, w)
pieces = [F.linear(a.float(), b.float()) for a, b in zip(x.chunk(8, -1), w.chunk(8, -1), strict=True)]
rounded_late = torch.stack(pieces).sum(0).to(HALF)  # the inputs dealt out to eight, whose sums are added in float32
rounded_early = pieces[0].to(HALF)
for piece in pieces[1:]:
    rounded_early = rounded_early + piece.to(HALF)  # and in float16
assert allowed(rounded_late, plain, exact)
assert not allowed(rounded_early, plain, exact)
assert torch.allclose(rounded_early.double(), exact, atol=1e-2)  # which a usual tolerance lets pass
print(f"added in float16: {rms(rounded_early - exact) / rms(plain - exact):.1f} times torch's error")

# %% [markdown]
# On this machine `glm_kernels` computes with its reference, which is plain torch; where Triton runs, the same call is a
# kernel, and `tests/kernels` holds it to the rule.

# %%
gain = torch.ones(2048, dtype=HALF)
truth = F.rms_norm(x.double(), (2048,), gain.double(), 1e-5)
assert allowed(rms_norm(x, gain, 1e-5, weight_first=True), F.rms_norm(x, (2048,), gain, 1e-5), truth)

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e12_numerics.py`. `python -m docs.check 12` says whether you are right.
#
# - **Exercise 12.1** `rounded`: to bfloat16, by hand.
# - **Exercise 12.2** `counts_to`: up to which position a dtype tells neighbours apart.
# - **Exercise 12.3** `careful_scores`: scores in float16 that do not overflow.
# - **Exercise 12.4** `judged`: the rule.
#
# ## Read the code
#
# - `wide` in `glm/norms.py`, and who calls it.
# - `glm/verify.py`: how a golden file is compared, in each precision.
# - `tests/kernels/harness.py`: the rule, with guard bands and NaN around every tensor.
