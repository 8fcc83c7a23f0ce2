# %% [markdown]
# # Norms and wiring
#
# A block has two sublayers, attention and feed-forward. Each reads the stream, computes something, and gives it back.
# GLM has tried several ways of giving it back. The smallest difference between two of them is where a norm stands, and
# whoever overlooks it has all weights of ChatGLM-6B and another model.

# %%
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import glm
from docs import drawing
from glm.family import GENERATIONS
from glm.norms import LayerNorm, RMSNorm
from glm.residual import Deep, Pre, Sandwich, Scaled

torch.manual_seed(0)
EPS = torch.finfo(torch.float64).eps


def randn(*shape: int) -> torch.Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


# %% [markdown]
# ## What a norm does
#
# A norm brings a vector to one size, whatever came in, and then weights its channels:
#
# $$ \text{LayerNorm:}\quad y = w \odot \frac{x - \bar x}{\sqrt{\operatorname{var} x + \epsilon}} + b,
#    \qquad \text{RMSNorm:}\quad y = w \odot \frac{x}{\sqrt{\overline{x^2} + \epsilon}} . $$
#
# The generations up to ChatGLM-6B have the first, all later ones the second. RMSNorm leaves out the mean and the
# bias; on vectors without a mean the two are one.

# %%
D, eps = 64, 1e-5
layer, rms = LayerNorm(eps).build(D).double(), RMSNorm(eps, weight_first=True).build(D).double()
for norm in (layer, rms):
    torch.nn.init.normal_(norm.weight, mean=1, std=0.1)
    norm.requires_grad_(False)
torch.nn.init.normal_(layer.bias)

x = 3 + 2 * randn(5, D)
centred = x - x.mean(-1, keepdim=True)
by_layer = layer.weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + layer.bias
by_rms = rms.weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
assert (layer(x) - by_layer).abs().max() < D * EPS * by_layer.abs().max()
assert (rms(x) - by_rms).abs().max() < D * EPS * by_rms.abs().max()

rms.weight.copy_(layer.weight)
assert (layer(centred) - (rms(centred) + layer.bias)).abs().max() < D * EPS * by_layer.abs().max()

# %% [markdown]
# ### The small number under the root
#
# $\epsilon$ is more than a guard against division by zero: what is much smaller than $\sqrt\epsilon$ is left small. At
# a mean square of $\epsilon$ a vector comes out at $1/\sqrt 2$ of its size. GLM-4-9B has an unusual one.

# %%
for name in ("chatglm3-6b", "glm-4-9b-chat", "glm-4-9b-0414"):
    eps = glm.release(name).spec.final_norm.eps
    small = math.sqrt(eps) * torch.ones(1, D, dtype=torch.float64)
    out = RMSNorm(eps, weight_first=True).build(D).double()(small)
    assert (out - 1 / math.sqrt(2)).abs().max() < D * EPS
    print(f"{name:14} ε = {eps:.4g}: an rms of {math.sqrt(eps):.1e} becomes 0.71")

# %% [markdown]
# ### Two roundings
#
# In half precision the statistics are computed in float32. Then either the weight is multiplied and the result
# rounded (ChatGLM2's code), or the result is rounded and the weight multiplied (transformers' code). In float64 it is
# one equation; in bfloat16 the last bit differs here and there, and `weight_first` says which one a release has.

# %%
w = 1 + 0.1 * torch.randn(D)
both = {}
for first in (True, False):
    norm = RMSNorm(1e-5, weight_first=first).build(D)
    norm.weight.data.copy_(w)
    both[first] = norm.bfloat16()(x.bfloat16())
differ = (both[True] != both[False]).double().mean().item()
assert 0 < differ < 1
print(f"{differ:.0%} of the numbers differ in bfloat16")

# %% [markdown]
# ## Four ways to give back
#
# With $x$ the stream, $f$ a sublayer, $n$ and $m$ norms:
#
# | wiring | the new stream |
# | --- | --- |
# | `Pre` | $x + f(n(x))$ |
# | `Sandwich` | $x + m(f(n(x)))$ |
# | `Deep` | $n(\alpha x + f(x))$ |
# | `Scaled` | $\alpha\, n(x) + f(n(x))$ |
#
# In `glm/residual.py` the equation is the class:


# %%
def f(h: torch.Tensor) -> torch.Tensor:
    """Some sublayer."""
    return (h @ matrix).tanh()


matrix = randn(D, D) / math.sqrt(D)
norm, alpha = RMSNorm(1e-5, weight_first=True), 7.5
pre, sandwich, deep, scaled = (
    wiring.build(norm, D).double().requires_grad_(False) for wiring in (Pre(), Sandwich(), Deep(alpha), Scaled(alpha))
)
n = pre.before
assert torch.equal(pre(x, f), x + f(n(x)))
assert torch.equal(sandwich(x, f), x + n(f(n(x))))
assert torch.equal(deep(x, f), n(alpha * x + f(x)))
assert torch.equal(scaled(x, f), alpha * n(x) + f(n(x)))

# %% [markdown]
# And which release has which, from the specs:

# %%
for generation in GENERATIONS:
    found = {(block.wiring, type(block.norm).__name__) for r in generation.releases for block in r.spec.blocks}
    for wiring, kind in sorted(found, key=str):
        loud = f", α = {wiring.alpha:.2f}" if hasattr(wiring, "alpha") else ""
        print(f"{generation.name:14} {kind:10} {type(wiring).__name__}{loud}")

# %% [markdown]
# ## How loud the stream becomes
#
# In `Pre` nothing bounds the stream: every sublayer adds to it. Suppose what they add is independent and of the size
# $s$; then after $k$ sublayers the mean square is $1 + k s^2$. Each sublayer reads the *normalised* stream, so one
# that comes late adds the same to something larger, and changes less. `Sandwich` makes $s$ a weight of its own,
# whatever $f$ does. `Deep` is normalised after every sublayer.

# %%
LAYERS, WIDTH, LOUD = 80, 256, 3.0
wirings = {"Pre": Pre(), "Sandwich": Sandwich(), "Deep": Deep(math.sqrt(LAYERS)), "Scaled": Scaled(math.sqrt(LAYERS))}
sizes = {}
for name, wiring in wirings.items():
    stream, sizes[name] = randn(32, WIDTH), []
    for _ in range(LAYERS):
        weights = LOUD * randn(WIDTH, WIDTH) / math.sqrt(WIDTH)
        module = wiring.build(norm, WIDTH).double().requires_grad_(False)
        stream = module(stream, lambda h, weights=weights: h @ weights)
        sizes[name].append(stream.square().mean().sqrt().item())

# the mean of 32 · 256 squares is known to about 2 %; the sum of 80 such, which are not quite independent, to 10 %
k = torch.arange(1, LAYERS + 1)
assert (torch.tensor(sizes["Pre"]) / (1 + k * LOUD**2).sqrt() - 1).abs().max() < 0.1
assert (torch.tensor(sizes["Sandwich"]) / (1 + k).sqrt() - 1).abs().max() < 0.1
assert (torch.tensor(sizes["Deep"]) - 1).abs().max() < 1e-3

picture, ax = drawing.figure(5, 3)
for name, values in sizes.items():
    ax.plot(k, values, label=name)
ax.set_xlabel("sublayers so far")
ax.set_ylabel("size of the stream (rms)")
ax.legend()
picture

# %% [markdown]
# `Scaled` is at $\sqrt{\alpha^2 + s^2}$ from the first sublayer on: it is a normalised vector, $\alpha$ times as
# large, and one addition.
#
# ## DeepNorm
#
# DeepNorm (`Deep`) is the old post-norm transformer, $n(x + f(x))$, with the residual made louder by $\alpha > 1$.
# One sublayer then turns the direction of the stream by little: if $f(x)$ is as long as $x$ and at a right angle to
# it, by $\arctan(1/\alpha)$. GLM-130B and ChatGLM-6B have $\alpha = \sqrt{2L}$.

# %%
for name in ("glm-130b", "chatglm-6b"):
    spec = glm.release(name).spec
    alpha = spec.blocks[0].wiring.alpha
    assert alpha == math.sqrt(2 * len(spec.blocks))
    angle = math.degrees(math.atan(1 / alpha))
    print(f"{name:10} L = {len(spec.blocks)}, α = {alpha:.2f}: a sublayer turns by {angle:.1f}°")

# %% [markdown]
# ChatGLM-6B's code never tells a block how many layers there are, and a block's default is 28. So a *smaller* ChatGLM
# has $\alpha = \sqrt{56}$ as well. The golden file is from a model of three layers, made by the official code:

# %%
folder = Path(glm.__file__).parents[1] / "tests" / "goldens" / "chatglm1-base"
golden = load_file(folder / "reference.safetensors")
reference = load_file(folder / "reference64.safetensors")["gmask.logits"]
model = glm.GLM.from_pretrained(folder, dtype=torch.float64)
ids = golden["gmask.input_ids"].long()


def error(wiring: object) -> float:
    """How far the logits are from the official ones, relative to their rms, with another wiring in every block."""
    blocks = tuple(replace(block, wiring=wiring) for block in model.spec.blocks)
    other = glm.GLM(replace(model.spec, blocks=blocks), dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        return float((other(ids) - reference).abs().max() / reference.square().mean().sqrt())


tried = {
    "α n(x) + f(n(x)), α = √56": Scaled(math.sqrt(56)),
    "the same with α = √6": Scaled(math.sqrt(6)),
    "x + f(n(x))": Pre(),
}
errors = {what: error(wiring) for what, wiring in tried.items()}
for what, far in errors.items():
    print(f"{what:28} {far:.1e}")
right, *wrong = errors.values()
assert right < 1e-9
assert min(wrong) > 0.01

# %% [markdown]
# ## The cut
#
# Why `Scaled` and not `Deep`? Because both are DeepNorm. Number the sublayers $f_0, f_1, \dots, f_{N-1}$ and let
# $n_0, \dots, n_N$ be norms.
#
# **Theorem.** Let the chain `Scaled` begin with $x_0$, and `Deep` with $h_0 = n_0(x_0)$:
#
# $$ x_{k+1} = \alpha\, n_k(x_k) + f_k(n_k(x_k)), \qquad h_{k+1} = n_{k+1}(\alpha h_k + f_k(h_k)) . $$
#
# Then $h_k = n_k(x_k)$ for all $k$. In particular the result of `Deep`, $h_N$, is that of `Scaled` behind a last
# norm, $n_N(x_N)$.
#
# *Proof.* For $k = 0$ it is how they begin. If $h_k = n_k(x_k)$, then $x_{k+1} = \alpha h_k + f_k(h_k)$, and
# $h_{k+1} = n_{k+1}(x_{k+1})$. $\square$
#
# One chain is cut before each norm, the other behind it; the sequence of operations is the same. Executed:

# %%
N, alpha = 6, math.sqrt(56)
matrices = randn(N, D, D) / math.sqrt(D)
sublayers = [lambda h, w=w: (h @ w).tanh() for w in matrices]
norms = []
for _ in range(N + 1):
    norms.append(LayerNorm(1e-5).build(D).double().requires_grad_(False))
    torch.nn.init.normal_(norms[-1].weight, mean=1, std=0.1)
    torch.nn.init.normal_(norms[-1].bias)


def wired(wiring: Scaled | Deep, norm: torch.nn.Module) -> torch.nn.Module:
    """A wiring whose only norm is the one given."""
    module = wiring.build(LayerNorm(1e-5), D).double().requires_grad_(False)
    next(module.children()).load_state_dict(norm.state_dict())
    return module


x = randn(5, D)
h = norms[0](x)
for k, f in enumerate(sublayers):
    x = wired(Scaled(alpha), norms[k])(x, f)
    h = wired(Deep(alpha), norms[k + 1])(h, f)
    assert torch.equal(h, norms[k + 1](x))  # to the bit: the same operations

# %% [markdown]
# The same for a whole model. tiny-glm is written as `Scaled`, like every published GLM with DeepNorm. To write it as
# `Deep`, move each norm one place on: the norm before the first attention goes to the embedding, where it can be
# applied to every row of the table once and for all; the norm behind the last block becomes part of it.

# %%
cut = glm.GLM.from_pretrained(glm.embedded(), dtype=torch.float64)
spec = cut.spec
blocks = tuple(replace(block, wiring=Deep(block.wiring.alpha)) for block in spec.blocks)
whole = glm.GLM(replace(spec, blocks=blocks, final_norm=None), dtype=torch.float64)

wires = [f"blocks.{i}.wire_{part}" for i in range(len(blocks)) for part in ("mixer", "feed_forward")]
state = cut.state_dict()
state["embedding.weight"] = cut.blocks[0].wire_mixer.before(cut.embedding.weight)
before = [f"{wire}.before" for wire in wires] + ["final_norm"]
moved = {}
for wire, source in zip(wires, before[1:], strict=True):
    for what in ("weight", "bias"):
        moved[f"{wire}.after.{what}"] = state[f"{source}.{what}"]
for source in before:
    for what in ("weight", "bias"):
        del state[f"{source}.{what}"]
whole.load_state_dict(state | moved)

ids = torch.tensor([[5, 6, 7, spec.reading.masks[0], spec.reading.sop, 9, 10]])
with torch.inference_mode():
    one, other = whole(ids), cut(ids)
# rounding: as many terms as the longest sums have, in every sublayer
assert (one - other).abs().max() < len(wires) * spec.blocks[0].feed_forward.inner * EPS * other.abs().max()

# %% [markdown]
# So why is it written cut? In the cut form a norm stands *before* each sublayer, as in `Pre`; the files have one
# `input_layernorm` and one `post_attention_layernorm` a block and a final norm behind the last, and the code looks
# almost like pre-norm. Almost: the residual is $\alpha$ times the **normalised** input. The table of errors above
# shows what it costs to miss that.
#
# ## What changed, by release

# %%
for one, other in (("glm-10b", "chatglm-6b"), ("chatglm-6b", "chatglm2-6b"), ("glm-4-9b-hf", "glm-4-9b-0414")):
    print(f"{one} → {other}")
    for change in glm.diff(one, other).changes:
        if ".wiring" in change.field or "norm" in change.field:
            print("   ", change)

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e05_wiring.py`. `python -m docs.check 5.1` says whether you are right.
#
# - Exercise 5.1, `rms_norm`: in both orders of rounding.
# - Exercise 5.2, `wired`: the four equations.
# - Exercise 5.3, `two_chains`: the states of both chains of the theorem.
# - Exercise 5.4, `which_field`: a ChatGLM that is wrong in one field of its norms or wiring. Which one?
#
# ## Read the code
#
# - `glm/norms.py` and `glm/residual.py`: what this chapter said, with types.
# - `BlockModule` in `glm/model.py`: two lines.
