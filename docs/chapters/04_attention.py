# %% [markdown]
# # Attention
#
# A token's vector knows its token and little else. Attention is where tokens hear of each other, and it is the only
# part of a model that has to remember them. This chapter says what is computed, and then what it costs to remember:
# GLM's history of attention is the history of that cost.

# %%
import math
from dataclasses import replace

import torch

import glm
from docs import drawing
from glm.attention import Attention, attend
from glm.cache import Passing
from glm.checkpoint import PerHead
from glm.family import GENERATIONS
from glm.info import cache_bytes_per_token, parameters
from glm.layout import Layout
from glm.linear import Dense
from glm.positions import Unturned

torch.manual_seed(0)
EPS = torch.finfo(torch.float64).eps
SPECS = {name: release.spec for name, release in glm.releases().items()}


def randn(*shape: int) -> torch.Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


# %% [markdown]
# ## A lookup that is a weighted mean
#
# Each token makes a query $q$, a key $k$ and a value $v$ from its vector. What a token gets is the mean of the values
# of all tokens it may see, weighted by how well their keys answer its query:
#
# $$ y_t = \sum_j \frac{e^{s_{tj}}}{\sum_{j'} e^{s_{tj'}}} v_j, \qquad s_{tj} = \frac{q_t \cdot k_j}{\sqrt K}, $$
#
# both sums over the $j$ that $t$ may see. `attend` computes it for all heads at once; here is one head, by the
# equation.

# %%
T, K = 6, 8
q, k, v = randn(1, 1, T, K), randn(1, 1, T, K), randn(1, 1, T, K)  # [B, heads, T, K]
layout = Layout.blanks(read=3, spans=[(1, 3)])
y = attend(q, k, v, layout.mask())

for t in range(T):
    seen = [j for j in range(T) if layout.visible[0, t, j]]
    weights = [math.exp(float(q[0, 0, t] @ k[0, 0, j]) / math.sqrt(K)) for j in seen]
    mean = sum(weight / sum(weights) * v[0, 0, j] for weight, j in zip(weights, seen, strict=True))
    assert (y[0, 0, t] - mean).abs().max() < 8 * K * EPS * v.abs().max()

# %% [markdown]
# The division by $\sqrt K$ keeps scores at one size: a sum of $K$ products of independent numbers of variance 1 has
# the variance $K$. Without it, wide heads would begin their training with a softmax that picks one token.

# %%
for width in (16, 64, 256):
    products = (randn(4000, width) * randn(4000, width)).sum(-1)
    # the variance of n numbers is known to sqrt(2 / n) of itself; eight times that is certain
    assert abs(products.var() / width - 1) < 8 * math.sqrt(2 / 4000)

# %% [markdown]
# ## What is not seen
#
# The official codes hide a key in three ways: they add $-\infty$ to its score (ChatGLM2 and later), set it to
# `-10000` (ChatGLM-6B, GLM-130B), or to `-65504`, the lowest number of float16 (GLM-10B). For a token that sees at
# least one other these are one and the same, in any precision, since $e^{-10000}$ is 0 beside the weight of a key
# that is seen:

# %%
assert torch.exp(torch.tensor(-10000.0, dtype=torch.float64)) == 0
scores = randn(T, T)
hidden = ~layout.visible[0]
with_infinity = scores.masked_fill(hidden, -math.inf).softmax(-1)
with_a_large_number = scores.masked_fill(hidden, -10000.0).softmax(-1)
assert torch.equal(with_infinity, with_a_large_number)

# %% [markdown]
# They differ for a token that sees *nothing*, which is padding. With $-\infty$ it gets 0/0; with a large number it
# gets the mean of all values, hidden ones too. Nobody reads what comes out there, but NaN would spread: a NaN value
# with the weight 0 is NaN. So in a `Layout` a token that sees nothing sees itself.

# %%
nothing = Layout(torch.zeros(1, 2, 1, dtype=torch.long), torch.tensor([[[False, False], [False, True]]]))
assert torch.full((3,), -math.inf).softmax(-1).isnan().all()
assert (0 * torch.tensor(math.nan)).isnan()
assert nothing.mask().allowed[0, 0].tolist() == [[True, False], [False, True]]

# %% [markdown]
# ### A factor that is not there
#
# ChatGLM-6B and GLM-130B divide the query of layer $l$ by $(l+1)\sqrt K$, and multiply the scores by $l+1$ after they
# were converted to float32. In exact arithmetic this is nothing. In float16 it keeps the scores of deep layers from
# passing `65504`, where they would be infinite. `glm` leaves it out: its softmax is computed in float32 at least.

# %%
layer, big_q, big_k = 27, 60 * torch.ones(128, dtype=torch.float16), 60 * torch.ones(128, dtype=torch.float16)
assert (big_q * big_k).sum().isinf()  # summed in float16: 128 · 3600 = 460800
scaled = (big_q / ((layer + 1) * math.sqrt(128)) * big_k).sum()
exact = float(big_q.double() @ big_k.double()) / math.sqrt(128)
assert abs(float(scaled) * (layer + 1) - exact) < 0.01 * exact

# %% [markdown]
# ## Many heads
#
# One softmax can look at one thing. So the $D$ channels of the stream are turned into $H$ heads of $K$ channels, each
# with a softmax of its own. All queries, keys and values come from **one** matrix, whose rows are the query heads,
# then the key heads, then the value heads. A last matrix $W_o$ mixes what the heads found.


# %%
def by_hand(module: torch.nn.Module, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The attention of a module on [T, D], written out head by head; no rotation."""
    H, G, K = module.spec.heads, module.spec.groups, module.spec.head_width
    rows = x @ module.qkv.weight.T + module.qkv.bias  # [T, (H + 2 G) K]
    q, k, v = rows[:, : H * K], rows[:, H * K : (H + G) * K], rows[:, (H + G) * K :]
    found = []
    for h in range(H):
        g = h * G // H  # the group that head h belongs to
        mine, keys, values = q[:, h * K : (h + 1) * K], k[:, g * K : (g + 1) * K], v[:, g * K : (g + 1) * K]
        scores = (mine @ keys.T / math.sqrt(K)).masked_fill(~visible, -math.inf)
        found.append(scores.softmax(-1) @ values)
    return torch.cat(found, -1) @ module.out.weight.T + module.out.bias


def attention(heads: int, groups: int) -> torch.nn.Module:
    """A small attention with random weights."""
    spec = Attention(heads=heads, groups=groups, head_width=8, qkv_bias=True, out_bias=True)
    module = spec.build(32, Dense()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A module on [T, D] under the layout above, nothing turned and nothing remembered."""
    turn = Unturned().rotation(layout.positions, x.dtype)
    return module(x[None], turn, layout.mask(), Passing(None, {}))[0]


x = randn(T, 32)
for groups in (4, 2, 1):
    module = attention(heads=4, groups=groups)
    y = run(module, x)
    assert (y - by_hand(module, x, layout.visible[0])).abs().max() < 32 * 8 * EPS * y.abs().max()

# %% [markdown]
# In the files of ChatGLM-6B and GLM-130B the rows lie otherwise: q, k and v of the first head, then those of the
# second, and so on. Whoever reads them in the wrong order gets another model, and no error.

# %%
names = [f"{what}{head}" for what in "qkv" for head in range(4)]  # how they lie in `glm`, K = 1
in_memory = torch.arange(12)
on_disk = PerHead(heads=4).on_disk(in_memory).flatten()
print("in memory:", *names)
print("on disk:  ", *(names[i] for i in on_disk))
assert torch.equal(on_disk.view(4, 3).T.flatten(), in_memory)

# %% [markdown]
# ## Few key heads
#
# In the code above stands $g = \lfloor hG/H \rfloor$. With $G = H$ each query head has keys of its own: multi-head
# attention, GLM-10B to ChatGLM-6B. With $G = 1$ all share one. Between them $H/G$ neighbours share: grouped-query
# attention, ChatGLM2 to GLM-4.7. What is computed is the same as that of a model with $H$ key heads in which those of
# a group have **equal** weights:

# %%
for generation in GENERATIONS:
    mixer = generation.releases[0].spec.blocks[0].mixer
    if isinstance(mixer, Attention):
        assert (mixer.groups == mixer.heads) == (generation.name in ("glm_10b", "glm_130b", "chatglm"))

few = attention(heads=4, groups=2)
many = attention(heads=4, groups=4)
for name in ("weight", "bias"):
    q_rows, k_rows, v_rows = getattr(few.qkv, name).split((32, 16, 16))
    repeated = [rows.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for rows in (k_rows, v_rows)]
    getattr(many.qkv, name).data = torch.cat((q_rows, *repeated))
many.out = few.out
assert (run(few, x) - run(many, x)).abs().max() < 32 * 8 * EPS * x.abs().max()

# %% [markdown]
# So it computes *less* than multi-head attention can. It is done for what does not have to be remembered.
#
# ## What a token costs
#
# To write the next token, all keys and values of earlier tokens are needed again. They are kept. A token costs
#
# $$ 2 \cdot L \cdot G \cdot K \quad \text{numbers:} $$
#
# a key and a value, in each layer, of each key head. The following table is computed from the specs, for two bytes a
# number.

# %%
print(f"{'release':18} {'L':>3} {'H':>3} {'G':>3} {'K':>4} {'KiB a token':>12} {'GiB at its context':>19}")
shown = ("glm-10b", "glm-130b", "chatglm-6b", "chatglm2-6b", "glm-4-9b-chat", "glm-4-9b-chat-1m", "glm-4-32b-0414")
cost = {}
for name in (*shown, "glm-4.5-air", "glm-4.5"):
    spec, mixer = SPECS[name], SPECS[name].blocks[0].mixer
    cost[name] = cache_bytes_per_token(spec, torch.bfloat16)
    assert cost[name] == 2 * len(spec.blocks) * mixer.groups * mixer.head_width * 2
    print(
        f"{name:18} {len(spec.blocks):3} {mixer.heads:3} {mixer.groups:3} {mixer.head_width:4} "
        f"{cost[name] / 2**10:12,.0f} {cost[name] * spec.context / 2**30:19.2f}"
    )

# %% [markdown]
# From ChatGLM-6B to ChatGLM2-6B the cache became smaller by the factor $H/G$, and that is all of it:

# %%
print("a cache smaller by", cost["chatglm-6b"] // cost["chatglm2-6b"])
assert cost["chatglm-6b"] == 32 // 2 * cost["chatglm2-6b"]

drawing.bars(
    list(cost), {"KiB of cache a token": [needed / 2**10 for needed in cost.values()]}, log=True, number="{:,.0f}"
)

# %% [markdown]
# The matrices became smaller as well: $W_k$ and $W_v$ have $G K$ rows instead of $H K$. ChatGLM2 spent them on its
# feed-forward (chapter 6).

# %%
spec = SPECS["chatglm2-6b"]
block = spec.blocks[0]
with_all_heads = replace(block, mixer=replace(block.mixer, groups=block.mixer.heads))
saved = parameters(replace(spec, blocks=(with_all_heads,) * len(spec.blocks))) - parameters(spec)
print(f"with {block.mixer.heads} key heads ChatGLM2-6B would have {saved / parameters(spec):.0%} more parameters")

# %% [markdown]
# ## Why bytes are time
#
# A decoding step reads all weights once (but of the embedding one row a token) and the whole cache once, and does two
# flops for each number it reads: it waits for memory. So a cache as large as the weights halves the speed. From how
# many tokens on, all rows of a batch together?

# %%
for name in ("chatglm-6b", "chatglm2-6b", "glm-4-9b-chat"):
    spec = SPECS[name]
    assert not spec.tied  # else the embedding is the head, and is read
    weights = 2 * (parameters(spec) - spec.vocabulary * spec.width)
    print(f"{name:14} {weights / cost[name]:10,.0f} tokens")

# %% [markdown]
# Chapter 13 is about that. In the kernels it has one more consequence. At a decoding step the $H/G$ query heads of a
# group all ask the same keys; they can be laid out as if they were $H/G$ queries at one place, so that a key is read
# once and used $H/G$ times. `attend` does the same when $T = 1$:

# %%
H, G, S = 8, 2, 5
q, k, v = randn(1, H, 1, K), randn(1, G, S, K), randn(1, G, S, K)
as_queries = attend(q.view(1, G, H // G, K), k, v, Layout.rule(torch.zeros(1, 1, 1, dtype=torch.long), S).mask())
at_once = attend(q, k, v, Layout.rule(torch.zeros(1, 1, 1, dtype=torch.long), S).mask())
assert (at_once - as_queries.view(1, H, 1, K)).abs().max() < 8 * K * EPS * v.abs().max()

# %% [markdown]
# ## What else changed
#
# Which biases there are, and, since GLM-4.5, a norm for every query and key. The first release of each kind:

# %%
seen = {}
for name, spec in SPECS.items():
    mixer = spec.blocks[0].mixer
    if isinstance(mixer, Attention):
        seen.setdefault((mixer.qkv_bias, mixer.out_bias, mixer.qk_norm is not None), name)
print(f"{'first release':20} {'bias of q, k, v':>15} {'of the output':>14} {'norm of q, k':>13}")
for flags, name in seen.items():
    q_bias, out_bias, norm = ("yes" if flag else "no" for flag in flags)
    print(f"{name:20} {q_bias:>15} {out_bias:>14} {norm:>13}")

# %% [markdown]
# The norm stands before the rotation and bounds the scores: queries and keys of unit mean square have
# $|q \cdot k| \le K$, so that $|s| \le \sqrt K$ before the norm's weights come in.

# %%
norm = SPECS["glm-4.5"].blocks[0].mixer.qk_norm.build(128).double()
q, k = norm(1000 * randn(500, 128)).detach(), norm(randn(500, 128)).detach()
assert ((q @ k.T).abs() / math.sqrt(128)).max() <= math.sqrt(128)

# %% [markdown]
# Releases whose cache holds something else, GLM-4.7-Flash and GLM-5, come in chapters 8 and 9.
#
# ## Exercises
#
# The stubs are in `docs/exercises/e04_attention.py`. `python -m docs.check 4.1` says whether you are right.
#
# - Exercise 4.1, `grouped_attention`: heads, groups and a mask.
# - Exercise 4.2, `step`: one token behind a cache.
# - Exercise 4.3, `flat_rows`: rows of q, k and v as ChatGLM-6B's files have them, in the order of ChatGLM2's.
# - Exercise 4.4, `equal_length`: from how many tokens on the cache is as large as the weights.
#
# ## Read the code
#
# - `glm/attention.py`: the module above, without loops.
# - `glm/cache.py`: where keys and values are kept.
# - `glm/info.py`: what a release takes, from its spec.
