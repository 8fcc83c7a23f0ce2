# %% [markdown]
# # Feed-forward
#
# After attention, each token is transformed by itself. Most of a model's parameters are there. All feed-forwards of
# the family are one equation, and a release chooses its **branches**.

# %%
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import glm
from docs import drawing
from glm.experts import Experts
from glm.family import GENERATIONS
from glm.feed_forward import ACTIVATIONS, FeedForward
from glm.info import parameters
from glm.linear import Dense

torch.manual_seed(0)
EPS = torch.finfo(torch.float64).eps
SPECS = {name: release.spec for name, release in glm.releases().items()}
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"


def built(spec: FeedForward, width: int = 16) -> torch.nn.Module:
    """A feed-forward with random weights, in float64."""
    module = spec.build(width, Dense()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


x = torch.randn(1, 5, 16, dtype=torch.float64)  # [B T D]

# %% [markdown]
# ## A product of branches
#
# Each branch is a matrix and an activation $a$; the branches are multiplied channel by channel, and one more matrix
# leads back:
#
# $$ y = W_{\text{down}} \big( a_1(W_1 x) \odot a_2(W_2 x) \odot \dots \big) . $$
#
# With one branch this is the feed-forward of the first transformers, with two it is a *gated* one: a branch with an
# activation says how much of the other passes. `identity` is an activation as well.

# %%
one = built(FeedForward(inner=32, branches=("gelu_tanh",), bias=True))
y = ACTIVATIONS["gelu_tanh"](x @ one.up.weight.T + one.up.bias) @ one.down.weight.T + one.down.bias
assert (one(x) - y).abs().max() < 32 * EPS * y.abs().max()

swiglu = FeedForward(inner=32, branches=("silu", "identity"), bias=False)
two = built(swiglu)
w1, w2 = two.up.weight.chunk(2)  # the branches lie in one matrix, one above the other
gate, value = x @ w1.T, x @ w2.T
y = (gate / (1 + (-gate).exp()) * value) @ two.down.weight.T
assert (two(x) - y).abs().max() < 32 * EPS * y.abs().max()

# %% [markdown]
# What each generation chose, from the specs. `gelu` with `identity` is called GeGLU, `silu` with `identity` SwiGLU.

# %%
print(f"{'generation':14} {'D':>6} {'F':>6} {'F/D':>5}  bias  branches")
for generation in GENERATIONS:
    spec = generation.releases[-1].spec
    forward = spec.blocks[0].feed_forward
    bias = "yes" if forward.bias else "no"
    ratio = forward.inner / spec.width
    branches = ", ".join(forward.branches)
    print(f"{generation.name:14} {spec.width:6} {forward.inner:6} {ratio:5.2f}  {bias:4}  {branches}")

# %% [markdown]
# GLM-130B has GeGLU, ChatGLM-6B after it has one branch again, and everything since then SwiGLU. In models of
# experts these are the dense first layers; their experts are feed-forwards of the same kind (chapter 7).

# %%
for name, spec in SPECS.items():
    last = spec.blocks[-1].feed_forward
    if isinstance(last, Experts):
        assert last.expert.branches == spec.blocks[0].feed_forward.branches == ("silu", "identity"), name

# %% [markdown]
# ## Why 13696
#
# A gated feed-forward has three matrices where the plain one has two. To cost the same it has to be narrower:
# $3 D F' = 2 D F$, so $F' = \tfrac23 F$. ChatGLM-6B has $F = 4D$; two thirds of that are $2.67\,D$. ChatGLM2 has
# more than that: it spent on $F$ what it saved on key heads. To see it, count.


# %%
def of_a_block(name: str, part: str) -> int:
    """Parameters of one part of a release's block."""
    spec = SPECS[name]
    module = getattr(spec.blocks[0], part)
    with torch.device("meta"):
        return sum(p.numel() for p in module.build(spec.width, Dense()).parameters())


for name in ("chatglm-6b", "chatglm2-6b"):
    attention, forward = of_a_block(name, "mixer"), of_a_block(name, "feed_forward")
    print(f"{name:12} attention {attention:12,}  feed-forward {forward:12,}  block {attention + forward:12,}")

old, new = (of_a_block(name, "mixer") + of_a_block(name, "feed_forward") for name in ("chatglm-6b", "chatglm2-6b"))
assert abs(new / old - 1) < 0.02  # the blocks of both cost the same to 2 %

dense = SPECS["chatglm2-6b"]
share = of_a_block("chatglm2-6b", "feed_forward") * len(dense.blocks) / parameters(dense)
print(f"{share:.0%} of ChatGLM2-6B is feed-forward")

# %% [markdown]
# ## Which half is activated
#
# The order of branches is an order of rows, and it is not the same everywhere. GLM-130B's first half is the plain one,
# its second half goes through GELU; in ChatGLM2 the first half is activated. A product does not mind the order, but the
# halves of the matrix must follow:
#
# $$ a(W_1 x) \odot W_2 x = W_2 x \odot a(W_1 x) . $$

# %%
print("glm-130b:", SPECS["glm-130b"].blocks[0].feed_forward.branches)
print("chatglm2:", SPECS["chatglm2-6b"].blocks[0].feed_forward.branches)

gate_first = built(FeedForward(inner=32, branches=("gelu", "identity"), bias=False))
gate_last = built(FeedForward(inner=32, branches=("identity", "gelu"), bias=False))
gate_last.load_state_dict(gate_first.state_dict())
assert (gate_last(x) - gate_first(x)).abs().max() > 0.1  # the same weights, read in the other order: another function

gate_last.up.weight.copy_(torch.cat(gate_first.up.weight.chunk(2)[::-1]))
assert (gate_last(x) - gate_first(x)).abs().max() < 32 * EPS * gate_first(x).abs().max()

# %% [markdown]
# ## Activations
#
# $$ \text{silu}(z) = \frac{z}{1 + e^{-z}}, \qquad
#    \text{gelu}(z) = \frac z2 \Big(1 + \operatorname{erf}\frac{z}{\sqrt 2}\Big), \qquad
#    \text{gelu}_{\tanh}(z) = \frac z2 \Big(1 + \tanh\big(\sqrt{2/\pi}\,(z + 0.044715\,z^3)\big)\Big) . $$

# %%
z = torch.linspace(-6, 6, 1201, dtype=torch.float64)
tanh = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
formulas = {
    "silu": z / (1 + (-z).exp()),
    "gelu": z / 2 * (1 + torch.erf(z / 2**0.5)),
    "gelu_tanh": z / 2 * (1 + tanh.tanh()),
}
for name, expected in formulas.items():
    # 1 + erf and 1 + tanh cancel for negative z: what is left is rounded as a number near 1 is
    assert (ACTIVATIONS[name](z) - expected).abs().max() < 4 * 6 * EPS

apart = (formulas["gelu"] - formulas["gelu_tanh"]).abs().max().item()
print(f"the two forms of GELU differ by {apart:.1e} at most")

picture, ax = drawing.figure(5, 3)
for name, expected in formulas.items():
    ax.plot(z, expected, label=name, linestyle="--" if name == "gelu_tanh" else "-")
ax.set_xlim(-4, 3)
ax.set_ylim(-0.5, 3)
ax.set_xlabel("z")
ax.legend()
picture

# %% [markdown]
# The second and the third cannot be told apart in the picture, and a usual tolerance does not tell them apart
# either. They are not the same model. GLM-10B was trained with the tanh form, and the code that its published files
# belong to computes the exact one. The golden file has the official logits with both:

# %%
model = glm.GLM.from_pretrained(GOLDENS / "glm10b-base", dtype=torch.float64)
ids = load_file(GOLDENS / "glm10b-base" / "reference.safetensors")["mask.input_ids"].long()
golden = load_file(GOLDENS / "glm10b-base" / "reference64.safetensors")
exact, tanh_form = golden["mask.logits"], golden["mask.logits_tanh_gelu"]
blocks = tuple(replace(b, feed_forward=replace(b.feed_forward, branches=("gelu_tanh",))) for b in model.spec.blocks)
other = glm.GLM(replace(model.spec, blocks=blocks), dtype=torch.float64)
other.load_state_dict(model.state_dict())
with torch.inference_mode():
    ours = {"gelu": model(ids), "gelu_tanh": other(ids)}
size = exact.square().mean().sqrt()
for name, logits in ours.items():
    far = [float((logits - theirs).abs().max() / size) for theirs in (exact, tanh_form)]
    print(f"{name:9} {far[0]:.1e} from the official logits with erf, {far[1]:.1e} from those with tanh")
    right, wrong = far if name == "gelu" else far[::-1]
    assert right < 1e-9
    assert 1e-6 < wrong < 1e-3

# %% [markdown]
# ## A sum over inner channels
#
# Channel $f$ of the inside reads the stream along its rows of $W_1, W_2$ and writes along its column of
# $W_{\text{down}}$. The channels do not know of each other:
#
# $$ y = \sum_f \text{down}_f \, a_1(w_{1f} \cdot x)\,(w_{2f} \cdot x) . $$
#
# So a feed-forward can be cut into parts whose outputs are added. Tensor parallelism gives each device a part; a model
# of experts computes only some parts for each token.

# %%
whole = two(x)
parts = torch.zeros_like(whole)
for rank in range(4):
    narrower = swiglu.share(rank, 4)
    part = built(narrower)
    rows = torch.arange(32).chunk(4)[rank]
    part.up.weight.copy_(torch.cat([w[rows] for w in two.up.weight.chunk(2)]))  # the same channels of both branches
    part.down.weight.copy_(two.down.weight[:, rows])
    parts += part(x)
assert narrower.inner == 8
assert (parts - whole).abs().max() < 4 * 32 * EPS * whole.abs().max()

# %% [markdown]
# Note which rows a part takes: the same channels of *each* branch, not a quarter of the stacked matrix. Whoever merges
# the parts of GLM-130B's files has to put them together in the same way, half by half.
#
# ## What changed, by release

# %%
for one, other in (("glm-10b", "glm-130b"), ("glm-130b", "chatglm-6b"), ("chatglm-6b", "chatglm2-6b")):
    print(f"{one} → {other}")
    for change in glm.diff(one, other).changes:
        if ".feed_forward" in change.field:
            print("   ", change)

# %% [markdown]
# With this chapter all parts of a dense GLM are on the table. What ChatGLM2-6B changed in ChatGLM-6B, in full:

# %%
for change in glm.diff("chatglm-6b", "chatglm2-6b").changes:
    print(f"{change.field}\n    {change.before}\n  → {change.after}")

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e06_feed_forward.py`. `python -m docs.check 6.1` says whether you are right.
#
# - Exercise 6.1, `feed_forward`: any branches.
# - Exercise 6.2, `gate_first`: GLM-130B's matrix in the order of ChatGLM2's.
# - Exercise 6.3, `merged`: a gated matrix put together from the parts of several devices.
# - Exercise 6.4, `which_branches`: a feed-forward that can only be called. What are its branches?
# - Exercise 6.5, `chatglm2_from_chatglm`: what ChatGLM2 changed, done to a small ChatGLM.
#
# ## Read the code
#
# - `glm/feed_forward.py`: the sublayer, and how it is cut for several devices.
# - `glm/spec.py`: all parts of a model in one tree; `print(glm.release("chatglm2-6b").spec)` shows it.
