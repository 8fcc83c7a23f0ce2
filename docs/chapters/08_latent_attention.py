# %% [markdown]
# # Latent attention
#
# Few key heads make a cache small (chapter 4). GLM-4.7-Flash and GLM-5 make it smaller in another way: they keep no
# keys and values at all, but one short vector a token from which the keys and values of all heads *could* be made. What
# is gained if they then have to be made? Mostly they have not.

# %%
from dataclasses import replace
from pathlib import Path

import torch

import glm
from docs import drawing
from glm.cache import Passing
from glm.info import cache_bytes_per_token
from glm.latent_attention import LatentAttention
from glm.layout import Mask
from glm.linear import Dense
from glm.norms import RMSNorm
from glm.positions import Plain, Rotary

torch.manual_seed(0)
torch.set_grad_enabled(False)
EPS = torch.finfo(torch.float64).eps
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"
SPECS = {name: release.spec for name, release in glm.releases().items()}

# %% [markdown]
# ## What is remembered
#
# A token's stream $x$ goes through one matrix into $R + P$ numbers. The first $R$ are normalised and are the **latent**
# $c$. The other $P$ are rotated by the token's position and are a key $r$ that all heads share.
#
# $$ c = \operatorname{norm}(W_c x), \qquad r = \operatorname{rotate}(W_r x). $$
#
# That is all a cache holds, whatever the number of heads:

# %%
flash = SPECS["glm-4.7-flash"].blocks[0].mixer
print(flash)
assert flash.remembers == ((1, flash.rank + flash.rotary),)

SHOWN = ("chatglm-6b", "chatglm2-6b", "glm-4-9b-0414", "glm-4.5-air", "glm-4.7-flash")
each = [cache_bytes_per_token(SPECS[name], torch.bfloat16) / len(SPECS[name].blocks) for name in SHOWN]
assert each[-1] == 2 * (flash.rank + flash.rotary)
drawing.bars(SHOWN, {"bytes a token and layer, in bfloat16": each}, number="{:,.0f}")

# %% [markdown]
# The two key heads of GLM-4-9B take about as much. But there sixteen queries have to make do with one key; here every
# head has its own.
#
# ## The naive form
#
# Each head $h$ has a matrix $U_h$ that makes its key from the latent and a matrix $V_h$ that makes its value. The
# shared key $r$ is put behind every head's own. A query has the same two parts, $N$ channels that meet the latent's and
# $P$ that carry the position:
#
# $$ k_h = [U_h c,\; r], \qquad v_h = V_h c, \qquad q_h = [a_h,\; \operatorname{rotate}(b_h)], $$
# $$ y = W_o \operatorname{concat}_h \operatorname{softmax}\!\left( \frac{q_h k_h^\top}{\sqrt{N + P}} \right) v_h . $$
#
# From here on it is ordinary attention. A small layer with random weights, and the equation one head at a time:

# %%
H, N, P, V, R, D, T = 3, 6, 4, 5, 8, 20, 7
spec = LatentAttention(
    heads=H, query_rank=12, rank=R, plain=N, rotary=P, value=V, norm=RMSNorm(1e-6, weight_first=False), bias=False
)
layer = spec.build(D, Dense()).double()
for weight in layer.parameters():
    torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
rotary = Rotary(widths=(P,), pairing="interleaved", base=1e4, scaling=Plain(), rounding=None)
rotation = rotary.rotation(torch.arange(T)[None, :, None], torch.float64)
causal, x = Mask(None, causal=True), torch.randn(1, T, D, dtype=torch.float64)


def turn(v: torch.Tensor) -> torch.Tensor:
    """Vectors [T, P], each rotated by its position."""
    return rotation(v[None, :, None])[0, :, 0]


raw, shared = layer.down(x[0]).split((R, P), dim=-1)
c, r = layer.norm(raw), turn(shared)  # [T R], [T P]
into, from_ = layer.up.weight.view(H, N + V, R).split((N, V), dim=1)  # U_h: [H N R], V_h: [H V R]
q = layer.query_up(layer.query_norm(layer.query_down(x[0]))).view(T, H, N + P)
past = torch.ones(T, T, dtype=torch.bool).tril()

heads = []
for h in range(H):
    k = torch.cat((c @ into[h].T, r), dim=-1)  # [T N+P]
    v = c @ from_[h].T  # [T V]
    asked = torch.cat((q[:, h, :N], turn(q[:, h, N:])), dim=-1)
    scores = (asked @ k.T / (N + P) ** 0.5).masked_fill(~past, -torch.inf)
    heads.append(scores.softmax(-1) @ v)
by_hand = layer.out(torch.cat(heads, dim=-1))

layer.absorbed = False
naive = layer(x, rotation, causal, Passing(None, {}))[0]
assert (naive - by_hand).abs().max() < 64 * EPS * by_hand.abs().max()

# %% [markdown]
# Queries come through a narrow place of their own, `query_rank` channels and a norm. That saves weights, not cache;
# where it is `None` there is one matrix.
#
# ## The absorbed form
#
# Look at one score. A matrix between two vectors can be moved from one to the other:
#
# $$ a_h \cdot U_h c = (U_h^\top a_h) \cdot c . $$
#
# And the sum over values can be taken before $V_h$ is applied, since that is linear too:
#
# $$ \sum_s p_s V_h c_s = V_h \sum_s p_s c_s . $$
#
# So make the *query* as long as the latent, let all heads attend to the remembered vectors $[c, r]$ as they lie in the
# cache, and apply $V_h$ to what was found. Keys and values are then never written out:

# %%
remembered = torch.cat((c, r), dim=-1)  # [T R+P], one row a token: the cache
heads = []
for h in range(H):
    moved = torch.cat((q[:, h, :N] @ into[h], turn(q[:, h, N:])), dim=-1)  # [T R+P]
    scores = (moved @ remembered.T / (N + P) ** 0.5).masked_fill(~past, -torch.inf)
    found = scores.softmax(-1) @ c  # [T R]
    heads.append(found @ from_[h].T)
moved_by_hand = layer.out(torch.cat(heads, dim=-1))

layer.absorbed = True
absorbed = layer(x, rotation, causal, Passing(None, {}))[0]
assert (absorbed - moved_by_hand).abs().max() < 64 * EPS * by_hand.abs().max()
assert (absorbed - naive).abs().max() < 64 * EPS * by_hand.abs().max()
print(f"the two forms differ by {(absorbed - naive).abs().max():.1e} in float64")

# %% [markdown]
# Note what it looks like from outside: one key head, which is also the value, for all $H$ query heads. It is
# multi-query attention with wide heads. Only the scale is that of the naive form, $1/\sqrt{N + P}$; a kernel that takes
# it from the width of the heads it is given computes something else.

# %%
wrong = (moved @ remembered.T / (R + P) ** 0.5).masked_fill(~past, -torch.inf).softmax(-1) @ c
assert (wrong - found).abs().max() > 1e-3

# %% [markdown]
# ## Why the position has a part of its own
#
# Could the latent's key be rotated, as in all earlier generations? Then $U_h$ could not be moved. With rotations $M_t$,
# which depend on the position, a score is $a^\top M_t^\top M_s U c$: between the query and $U$ stands a matrix that is
# another one for every pair of tokens. If $U$ is to be absorbed, what turns must not pass through it.

# %%
wide = replace(rotary, widths=(N,))
at = lambda p, v: wide.rotation(torch.tensor([[[p]]]), v.dtype)(v[None, None, None])[0, 0, 0]  # noqa: E731
a, u = torch.randn(N, dtype=torch.float64), into[0]
turned_key = at(5, a) @ at(2, u @ c[2])  # rotate what U makes
turned_later = (u.T @ at(5, a)) @ c[2]  # move U first: the key's own rotation is lost
assert abs(turned_key - turned_later) > 1e-3

# %% [markdown]
# ## Which form when
#
# Count products of a head for $T$ queries and $S$ keys. The naive form writes out keys and values, $S R (N + V)$, and
# then does $N + P + V$ for each pair. The absorbed form moves queries and results, $T R (N + V)$, and does $2R + P$ for
# each pair (the package counts $2(R + P)$, as its value carries $r$ along).
#
# A prompt has as many queries as keys and many pairs: naive. A decoding step has one query and a long cache: absorbed.


# %%
def products(mixer: LatentAttention, T: int, S: int, absorbed: bool) -> int:
    """Multiplications of one head for T queries, each of which meets S keys."""
    N, P, R, V = mixer.plain, mixer.rotary, mixer.rank, mixer.value
    return T * S * 2 * (R + P) + T * R * (N + V) if absorbed else T * S * (N + P + V) + S * R * (N + V)


S = 4096
sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
picture, axes = drawing.figure(5, 2.8)
for label, form in (("naive", False), ("absorbed", True)):
    axes.loglog(sizes, [products(flash, T, S, form) / T for T in sizes], "o-", markersize=3, label=label)
axes.set(xlabel=f"queries read together, of a cache of {S} tokens", ylabel="products a query and head")
axes.legend()
picture

# %%
for T in sizes:
    chosen = flash.absorbing_is_cheaper(T, S)
    assert chosen == (products(flash, T, S, True) < products(flash, T, S, False))
crossing = next(T for T in range(1, S) if not flash.absorbing_is_cheaper(T, S))
print(f"with {S} keys the absorbed form is cheaper up to {crossing - 1} queries")

# %% [markdown]
# Products are not the whole story: a decoding step waits for memory, and there the absorbed form is far ahead. It reads
# $R + P$ numbers a token; the naive one first reads those, then writes and reads keys and values of all heads.

# %%
mixer = flash
latent_numbers, written_out = mixer.rank + mixer.rotary, mixer.heads * (mixer.plain + mixer.rotary + mixer.value)
print(f"{written_out / latent_numbers:.0f} times as many numbers a token, in {mixer.heads} heads")

# %% [markdown]
# ## The model uses both
#
# A prompt of a small GLM-4.7-Flash with random weights is read in the naive form; what follows is decoded in the
# absorbed one, from a cache that never held a key. The logits are those of a single pass over all tokens, in either
# form:

# %%
model = glm.GLM.from_pretrained(GOLDENS / "hf_glm4_moe_lite-sensitive", dtype=torch.float64)
ids = torch.randint(3, model.spec.vocabulary, (1, 24))
whole = {}
for form in (False, True):
    for block in model.blocks:
        block.mixer.absorbed = form
    whole[form] = model(ids)
rms = whole[False].square().mean().sqrt()
assert (whole[True] - whole[False]).abs().max() < 1e-12 * rms

for block in model.blocks:
    block.mixer.absorbed = None  # whichever is cheaper
cache = model.new_cache(1, 24)
mixer = model.spec.blocks[0].mixer
print("absorbed for the prompt:", mixer.absorbing_is_cheaper(20, 20))
print("absorbed for a step:    ", mixer.absorbing_is_cheaper(1, 24))
logits = [model(ids[:, :20], cache=cache), *(model(ids[:, t : t + 1], cache=cache) for t in range(20, 24))]
assert (torch.cat(logits, dim=1) - whole[False]).abs().max() < 1e-12 * rms
assert all(buffer.shape == (1, 1, 24, mixer.rank + mixer.rotary) for layer in cache.buffers for buffer in layer)

# %% [markdown]
# ## Two small print items
#
# - The norms of the latent and of the queries' narrow place have an $\epsilon$ that no `config.json` mentions and that
#   is not the one of the other norms. With the wrong one the model still speaks; only numbers tell.
# - The part that turns is stored in interleaved pairs. Implementations that write it back in halves get the same
#   scores, as long as queries and keys agree.

# %%
assert flash.norm != SPECS["glm-4.7-flash"].blocks[0].norm
print("inside:", flash.norm, " outside:", SPECS["glm-4.7-flash"].blocks[0].norm)

order = torch.cat((torch.arange(0, P, 2), torch.arange(1, P, 2)))
b = turn(q[:, 0, N:])
assert (b[:, order] @ r[:, order].T - b @ r.T).abs().max() < 16 * EPS * (b @ r.T).abs().max()

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e08_latent_attention.py`. `python -m docs.check 8` says whether you are right.
#
# - **Exercise 8.1** `remembered`: what the cache gets of a token.
# - **Exercise 8.2** `naive`: attention with keys and values written out.
# - **Exercise 8.3** `absorbed`: the same without them.
# - **Exercise 8.4** `break_even`: up to how many queries the absorbed form is cheaper.
#
# ## Read the code
#
# - `glm/latent_attention.py`: `attend_naive` and `attend_absorbed` are the two forms, six lines each.
# - `glm/family/glm4_moe_lite.py`: the release.
