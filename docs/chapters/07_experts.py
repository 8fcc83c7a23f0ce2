# %% [markdown]
# # Experts
#
# A larger feed-forward knows more, and every token pays for all of it. GLM-4.5 and everything after it have many small
# feed-forwards, **experts**, in nearly every block, and a **router** that sends each token through a few of them. How
# does it choose, and what is saved?

# %%
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

import glm
from docs import drawing
from glm.experts import Experts, Router, RouterModule
from glm.feed_forward import FeedForward
from glm.info import active_parameters, parameters
from glm.linear import Dense

torch.manual_seed(0)
torch.set_grad_enabled(False)
EPS = torch.finfo(torch.float64).eps
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"
SPECS = {name: release.spec for name, release in glm.releases().items()}


def experts_of(spec: glm.Spec) -> Experts | None:
    """The experts of a model's last block."""
    last = spec.blocks[-1].feed_forward
    return last if isinstance(last, Experts) else None


# %% [markdown]
# ## What is saved
#
# A token uses the experts it is sent to, and all that is shared. The rest has to lie in memory and does nothing for it.

# %%
SHOWN = ("glm-4-32b-0414", "glm-4.5-air", "glm-4.5", "glm-4.7-flash", "glm-5")
billions = {
    "10⁹ parameters": [parameters(SPECS[name]) / 1e9 for name in SHOWN],
    "10⁹ that a token uses": [active_parameters(SPECS[name]) / 1e9 for name in SHOWN],
}
drawing.bars(SHOWN, billions, log=True)

# %%
print(f"{'':14} {'experts':>7} {'chosen':>6} {'shared':>6} {'channels':>8} {'scale':>5} {'blocks without':>14}")
for name in SHOWN:
    if (experts := experts_of(SPECS[name])) is not None:
        dense = sum(isinstance(block.feed_forward, FeedForward) for block in SPECS[name].blocks)
        numbers = experts.count, experts.top, experts.shared, experts.expert.inner, experts.router.scale
        print("{:14} {:7} {:6} {:6} {:8} {:5} {:14}".format(name, *numbers, dense))

# %% [markdown]
# The first blocks have an ordinary feed-forward. So has a spec: `blocks` is a tuple, and its first entries are others.
#
# ## The router
#
# How well expert $e$ suits a token $x$ is a number between 0 and 1, from one row of a matrix:
#
# $$ s_e = \sigma(w_e \cdot x) . $$
#
# The $k$ experts with the largest $s_e + b_e$ are chosen. Each weighs by its $s_e$, relative to the others' and times a
# constant $c$:
#
# $$ y = c \sum_{e \in \text{chosen}} \frac{s_e}{\sum_{j \in \text{chosen}} s_j} \operatorname{expert}_e(x)
#        + \operatorname{shared}(x) . $$
#
# Here is a block of a small GLM-4.5 with random weights, from the golden files. First its router, then the sum as it is
# written, token by token:

# %%
model = glm.GLM.from_pretrained(GOLDENS / "hf_glm4_moe-sensitive", dtype=torch.float64)
block = model.spec.blocks[-1].feed_forward
module = model.blocks[-1].feed_forward
print(block)
x = torch.randn(2, 5, model.spec.width, dtype=torch.float64)  # [B T D]

router = module.router
b = router.bias.double()
s = (x @ router.weight.T).sigmoid()  # [B T E]
chosen = (s + b).topk(block.top, dim=-1).indices  # [B T k]
weights = s.gather(-1, chosen)
weights = block.router.scale * weights / weights.sum(-1, keepdim=True)

y = torch.zeros_like(x)
for place in torch.cartesian_prod(torch.arange(2), torch.arange(5)).unbind():
    row, t = place.tolist()
    for e, w in zip(chosen[row, t].tolist(), weights[row, t], strict=True):
        y[row, t] += w * module.experts(x[row, t], e)
    y[row, t] += module.shared(x[row, t])
assert (module(x) - y).abs().max() < 64 * EPS * y.abs().max()
print("experts of the first row's tokens:", chosen[0].tolist())

# %% [markdown]
# The package does not go token by token. It sorts all visits by expert and asks each expert that has any once, for all
# of its tokens together (`glm.experts.mix`). One thing is kept: a token's sum goes through its experts in the order of
# their numbers, so that it does not depend on who else is in the batch.

# %%
alone = torch.cat([module(x[row : row + 1, t : t + 1]) for row in range(2) for t in range(5)]).view_as(x)
assert (alone - module(x)).abs().max() < 64 * EPS * y.abs().max()

# %% [markdown]
# ## The bias selects and does not weigh
#
# Why is there a $b$, if it is left out of the weights? A router that prefers a few experts starves the others, which
# then learn nothing and are preferred even less. $b$ is moved by hand while the model is trained: up a little for an
# expert that had less than its share of the last batch, down for one that had more (arXiv:2408.15664). As it does not
# enter the sum it has no gradient, and does not disturb what the model learns.
#
# With a router that starts out unfair, and no other change than that rule:

# %%
E, k, D, tokens, step = 16, 2, 24, 4096, 0.01
unfair = RouterModule(Router(groups=1, kept=1, normalised=True, scale=1.0), D, E, k)
torch.nn.init.normal_(unfair.weight, std=0.2)
direction = torch.randn(D)
unfair.weight += direction / direction.norm() * torch.linspace(-0.4, 0.4, E)[:, None]


def loads() -> torch.Tensor:
    """Which part of a fair share each expert gets of a batch of tokens that have something in common."""
    visits, _ = unfair(torch.randn(tokens, D) + direction)
    return visits.flatten().bincount(minlength=E) * E / (tokens * k)


before = loads()
for _ in range(300):
    unfair.bias += step * (1 - loads()).sign()
after = loads()
assert before.max() > 2
assert (after - 1).abs().max() < 0.3

picture, axes = drawing.figure(5, 2.6)
for label, values, colour in (("without b", before, drawing.ORANGE), ("with b", after, drawing.BLUE)):
    axes.plot(range(E), values, "o-", label=label, color=colour)
axes.axhline(1, color=drawing.INK, linewidth=0.6)
axes.set(xlabel="expert", ylabel="tokens, in fair shares", ylim=(0, None))
axes.legend()
picture

# %% [markdown]
# A converter that adds $b$ to the weights as well computes another model, and one that looks healthy: the same experts,
# a little differently mixed.

# %%
mixed = (s + b).gather(-1, chosen)
mixed = block.router.scale * mixed / mixed.sum(-1, keepdim=True)
print(f"weights off by up to {100 * ((mixed - weights) / weights).abs().max():.0f} %")
assert (mixed - weights).abs().max() > 1e-3

# %% [markdown]
# ## The shared expert
#
# What every token needs, every expert would have to learn. One expert is therefore asked always. Several such experts
# would be one feed-forward, several times as wide: a sum over experts is a sum over their channels. This is why a
# checkpoint has a single `shared_experts` whatever their number.
#
# $$ \sum_i W^{\text{down}}_i\, h(W^{\text{up}}_i x) =
#    \begin{pmatrix} W^{\text{down}}_1 & W^{\text{down}}_2 & \cdots \end{pmatrix}
#    h\!\left( \begin{pmatrix} W^{\text{up}}_1 \\ W^{\text{up}}_2 \\ \vdots \end{pmatrix} x \right) $$

# %%
two = Experts(FeedForward(inner=6, branches=("silu", "identity"), bias=False), 8, 2, 2, Router(1, 1, True, 1.0))
together = two.together.build(D, Dense()).double()
torch.nn.init.normal_(together.up.weight)
torch.nn.init.normal_(together.down.weight)
parts = []
for i in range(two.shared):
    rows = torch.arange(6 * i, 6 * i + 6)
    part = two.expert.build(D, Dense()).double()
    part.up.weight.copy_(together.up.weight[torch.cat((rows, rows + 6 * two.shared))])  # of both branches
    part.down.weight.copy_(together.down.weight[:, rows])
    parts.append(part)
z = torch.randn(3, D, dtype=torch.float64)
assert (together(z) - sum(part(z) for part in parts)).abs().max() < 64 * EPS * together(z).abs().max()

# %% [markdown]
# ## Groups
#
# Experts may lie in groups of neighbours, of which only the best can be chosen from; a group is worth its two best
# $s + b$. Where a group is a machine, a token then travels to few of them. Every release has one group, so that nothing
# is left out. The rule is there because a `config.json` may ask for it.

# %%
assert all(e.router.groups == 1 for e in map(experts_of, SPECS.values()) if e is not None)
grouped = RouterModule(Router(groups=4, kept=2, normalised=True, scale=1.0), D, E, top=6)
torch.nn.init.normal_(grouped.weight)
visits, _ = grouped(torch.randn(100, D))
assert all(len(set((row // (E // 4)).tolist())) <= 2 for row in visits)
free = RouterModule(replace(grouped.spec, kept=4), D, E, top=6)
free.weight.copy_(grouped.weight)
assert any(len(set((row // (E // 4)).tolist())) > 2 for row in free(torch.randn(100, D))[0])

# %% [markdown]
# ## Why the router computes in float32
#
# Choosing is not continuous: the smallest change of a score can swap one expert for another, and then the result jumps.
# In bfloat16 the sigmoid of two different products is often the same number, and a tie is decided by whoever comes
# first. So the scores are computed in float32 whatever the model's dtype, and the bias is stored in it.

# %%
experts = experts_of(SPECS["glm-4.5-air"])
large = RouterModule(experts.router, 1024, experts.count, experts.top)
torch.nn.init.normal_(large.weight, std=1024**-0.5)
states = torch.randn(2000, 1024).bfloat16()
weight = large.weight.bfloat16()
large.weight.copy_(weight)  # the same numbers, once computed with in float32, once in bfloat16
wide, _ = large(states)
narrow = F.linear(states, weight).sigmoid().topk(experts.top, dim=-1).indices
other = (wide.sort().values != narrow.sort().values).any(-1).double().mean()
print(f"{100 * other:.0f} % of the tokens go to another set of experts if the scores are bfloat16")
assert large.to(torch.bfloat16).bias.dtype == torch.float32
assert other > 0.05

# %% [markdown]
# ## What a batch reads
#
# Decoding waits for weights to come from memory. One token reads $k$ experts. Two tokens read up to twice as many. If
# tokens chose independently and evenly, $n$ tokens would read, on average,
#
# $$ E \left( 1 - \left( 1 - \tfrac{k}{E} \right)^n \right) $$
#
# experts: an expert is left alone by one token with probability $1 - k/E$, and by all with the $n$-th power of that.

# %%


def expected(experts: Experts, n: int) -> float:
    """Experts that n tokens visit, on average."""
    return experts.count * (1 - (1 - experts.top / experts.count) ** n)


flash = experts_of(SPECS["glm-4.7-flash"])
trials, n = 2000, 12
picks = torch.rand(trials, n, flash.count).topk(flash.top).indices  # any k experts are equally likely
visited = torch.zeros(trials, flash.count).scatter(1, picks.flatten(1), 1.0).sum(-1)
assert abs(visited.mean() - expected(flash, n)) < 5 * visited.std() / trials**0.5  # five standard errors

picture, axes = drawing.figure(5, 2.8)
sizes = range(1, 129)
for name in ("glm-4.7-flash", "glm-4.5-air", "glm-4.5", "glm-5"):
    experts = experts_of(SPECS[name])
    axes.plot(sizes, [expected(experts, size) / experts.count for size in sizes], label=name)
axes.set(xlabel="tokens that are decoded together", ylabel="part of the experts that is read", ylim=(0, 1.02))
axes.legend()
picture

# %% [markdown]
# What a dense model gains by batching, that weights are read once for all, a model of experts gains only when nearly
# all of its experts are busy anyway.
#
# ## Exercises
#
# The stubs are in `docs/exercises/e07_experts.py`. `python -m docs.check 7.1` says whether you are right.
#
# - **Exercise 7.1** `route`: which experts, with which weights.
# - **Exercise 7.2** `mixture`: the whole sublayer.
# - **Exercise 7.3** `experts_read`: the bytes of experts that a batch reads.
# - **Exercise 7.4** `rebalanced`: one step of the rule that moves the bias.
# - **Exercise 7.5** `which_field`: a block whose router is wrong in one field. Which one?
#
# ## Read the code
#
# - `glm/experts.py`: all of it; `mix` and `RouterModule.forward` are the equation.
# - `glm/family/glm4_moe.py`: how `n_routed_experts`, `first_k_dense_replace` and the others become a spec.
