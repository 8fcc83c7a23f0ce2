# %% [markdown]
# # Sparse attention
#
# A query that meets a long past gives nearly all of its attention to a few tokens. Whoever knew which could leave out
# the rest. GLM-5 has a small **indexer** in its layers that reads all the past, cheaply, and says which tokens are
# worth attending to. Attention then reads only those.

# %%
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap

import glm
from docs import drawing
from glm.cache import Passing
from glm.info import cache_bytes_per_token
from glm.layout import Mask
from glm.sparse_attention import SparseAttention, only

torch.manual_seed(0)
torch.set_grad_enabled(False)
EPS = torch.finfo(torch.float64).eps
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"
five = glm.release("glm-5").spec

# %% [markdown]
# ## A few tokens get most of it
#
# Is that so? tiny-glm is a trained model, small as it is. Here are some of its passages, read in full. For each head
# and query, keys are sorted by the attention they get. How much do the first $k$ of them have?

# %%
tiny = glm.GLM.from_pretrained(glm.embedded(), dtype=torch.float32)
tokenizer = glm.Tokenizer.from_pretrained(glm.embedded())
text = " ".join((glm.embedded() / "passages.md").read_text(encoding="utf-8").split("\n\n")[1:6])
ids = torch.tensor([tokenizer.encode(text)])
shares = []


def spy(module: torch.nn.Module, given: tuple) -> None:
    """Before an attention runs: the softmax of its scores, [H, T, S]. All is read, and everybody sees everybody."""
    x, rotation, _, _ = given
    H, G, K = module.spec.heads, module.spec.groups, module.spec.head_width
    q, k, _ = module.qkv(x).unflatten(-1, (-1, K)).split((H, G, G), dim=2)
    q, k = (rotation(v)[0].transpose(0, 1) for v in (q, k))
    shares.append((q @ k.transpose(1, 2) / K**0.5).softmax(-1))


hooks = [block.mixer.register_forward_pre_hook(spy) for block in tiny.blocks]
tiny(ids)
for hook in hooks:
    hook.remove()

T = ids.shape[1]
largest = torch.stack(shares).sort(dim=-1, descending=True).values.cumsum(-1)  # [L H T S]
assert (largest[..., -1] - 1).abs().max() < 1e-4
picture, axes = drawing.figure(5, 2.8)
for number, layer in enumerate(largest):
    axes.semilogx(range(1, T + 1), layer.mean((0, 1)), label=f"layer {number}")
axes.axvline(T / 10, color=drawing.INK, linewidth=0.6)
axes.set(xlabel=f"keys, of {T}; the line is a tenth of them", ylabel="part of the attention", ylim=(0, 1.02))
axes.legend()
picture

# %%
tenth = largest[..., T // 10 - 1].mean()
print(f"{T // 10} of {T} keys have {100 * tenth:.0f} % of the attention, in the mean over layers, heads and queries")
assert tenth > 0.5

# %% [markdown]
# ## The indexer
#
# Which those are is known only after all scores were computed. So they are guessed by something smaller: $J$ index
# heads of $K$ channels, with one key a token for all of them,
#
# $$ \operatorname{score}(t, s) = \frac{1}{\sqrt{K J}} \sum_j w_j(x_t) \operatorname{relu}(q_j(t) \cdot k(s)) . $$
#
# Queries are made from the narrow place of the attention's own queries (chapter 8), the key from the stream, with a
# norm. Their first channels are rotated. How much a head counts, $w_j$, is another row of the stream. Everything is
# there in a small GLM-5 with random weights from the golden files:

# %%
model = glm.GLM.from_pretrained(GOLDENS / "hf_glm_moe_dsa-base", dtype=torch.float64)
spec, layer = model.spec.blocks[0].mixer, model.blocks[0].mixer
print(spec.indexer)
J, K, top = spec.indexer.heads, spec.indexer.width, spec.indexer.top
T = 12
ids = torch.randint(3, model.spec.vocabulary, (1, T))
x = model.blocks[0].wire_mixer.before(model.embedding(ids))  # what the first attention reads, [1 T D]
rotation = model.spec.rotary.rotation(torch.arange(T)[None, :, None], x.dtype)

indexer = layer.indexer
asked = layer.attention.bottleneck(x)
q = rotation(indexer.query(asked).unflatten(-1, (J, K)))[0]  # [T J K]
k = rotation(indexer.norm(indexer.down(x))[:, :, None])[0, :, 0]  # [T K]
w = indexer.weigh(x)[0]  # [T J]
score = torch.zeros(T, T, dtype=torch.float64)
for t in range(T):
    for s in range(T):
        score[t, s] = (w[t] * (q[t] @ k[s]).relu()).sum() / (K * J) ** 0.5

causal = Mask(None, causal=True)
past = torch.ones(T, T, dtype=torch.bool).tril()
by_hand = score.masked_fill(~past, -torch.inf).topk(top, dim=-1).indices
chosen = indexer(x, asked, indexer.key(x, rotation), rotation, causal)[0]
assert all(
    set(mine.tolist()) == set(its.tolist()) for mine, its in zip(by_hand[top - 1 :], chosen[top - 1 :], strict=True)
)

# %% [markdown]
# The first queries have fewer than `top` keys to see. They attend to all of those; what else `topk` returns for them is
# masked as it always was.
#
# ## What attends is what was
#
# Attention itself is that of chapter 8, with another mask: a query sees key $s$ if it was chosen **and** could be seen
# anyway.

# %%
picked = torch.zeros(T, T, dtype=torch.bool).scatter(1, chosen, True) & past
queries, latents = layer.attention.queries(asked, rotation), layer.attention.latent(x, rotation)
expected = layer.attention.answer(queries, latents, Mask(picked[None, None], causal=False))
assert (layer(x, rotation, causal, Passing(None, {})) - expected).abs().max() < 64 * EPS * expected.abs().max()
assert picked.sum(-1).tolist() == [min(t + 1, top) for t in range(T)]

picture, axes = drawing.figure(3.6, 3.2)
colours = ListedColormap([drawing.PALE, drawing.SKY, drawing.BLUE])
axes.pcolormesh((past.int() + picked.int()).numpy(), cmap=colours, edgecolors="white", linewidth=1)
axes.invert_yaxis()
axes.set_aspect("equal")
axes.set(xlabel="key: dark is chosen, light only visible", ylabel="query")
picture

# %% [markdown]
# While a prompt is read, the mask is all there is. In a decoding step the keys that were not chosen need not be read
# from memory: the chosen ones are gathered, and attention runs over so many.

# %%
step = queries[:, :, -1:]
gathered, mask = only(chosen[None, -1:], latents, Mask(None, causal=False))
assert gathered.shape[2] == top
alone = layer.attention.answer(step, gathered, mask)
assert (alone - expected[:, -1:]).abs().max() < 64 * EPS * expected.abs().max()

# %% [markdown]
# A text no longer than `top` loses nothing: everything is chosen, and the indexer is not even asked.

# %%
print(f"GLM-5 attends to {five.blocks[0].mixer.indexer.top} keys; it was published for {five.context:,} tokens")
short = model.spec.rotary.rotation(torch.arange(top)[None, :, None], x.dtype)
sparse, dense = (part(x[:, :top], short, causal, Passing(None, {})) for part in (layer, layer.attention))
assert torch.equal(sparse, dense)

# %% [markdown]
# ## Is it cheaper?
#
# The indexer still meets every token of the past. It is the size of the meeting that shrinks. For one query over $S$
# keys, $H$ heads in the absorbed form do $2 H (R + P)$ products a key; the indexer does $J K$. It also reads less: its
# key instead of the latent.


# %%
def work(mixer: SparseAttention, S: int, sparse: bool) -> int:
    """Products of one query over S keys."""
    attention, indexer = mixer.attention, mixer.indexer
    a_key = 2 * attention.heads * (attention.rank + attention.rotary)
    return S * indexer.heads * indexer.width + min(S, indexer.top) * a_key if sparse else S * a_key


mixer = five.blocks[0].mixer
lengths = [2**n for n in range(9, 18)]
picture, axes = drawing.figure(5, 2.8)
for label, sparse in (("attention to everything", False), ("indexer, and attention to the chosen", True)):
    axes.loglog(lengths, [work(mixer, S, sparse) for S in lengths], "o-", markersize=3, label=label)
axes.set(xlabel="tokens of the past", ylabel="products of a query, one layer")
axes.legend()
picture

# %%
S = 131072
print(f"at {S:,} tokens: {work(mixer, S, False) / work(mixer, S, True):.1f} times fewer products")
assert work(mixer, 512, True) > work(mixer, 512, False)  # and for a short text somewhat more

# %% [markdown]
# The indexer's key has to be remembered too. It adds to the cache what the indexer's width is to the latent's:

# %%
print("a token and layer:", mixer.remembers)
more = mixer.indexer.width / (mixer.attention.rank + mixer.attention.rotary)
print(f"{100 * more:.0f} % more; {cache_bytes_per_token(five, torch.bfloat16) / 1024:.1f} KiB a token in all")

# %% [markdown]
# ## One choice for several layers
#
# Neighbouring layers choose much alike. A layer whose `indexer` is `None` attends to what the nearest one below has
# chosen (arXiv:2603.12201), and neither computes nor remembers an index key. `config.json` can say so for each layer;
# how many layers of the releases have an indexer of their own:

# %%
for name in ("glm-5", "glm-5.1"):
    blocks = glm.release(name).spec.blocks
    print(f"{name}: {sum(block.mixer.indexer is not None for block in blocks)} of {len(blocks)}")

follower = SparseAttention(spec.attention, None)
assert follower.remembers == spec.attention.remembers
module = follower.build(model.spec.width, model.spec.weights).double()
module.load_state_dict({n: v for n, v in layer.state_dict().items() if not n.startswith("indexer")})
notes = {}
first = layer(x, rotation, causal, Passing(None, notes))  # leaves its choice in the notes of this pass
assert torch.equal(module(x, rotation, causal, Passing(None, notes)), first)

# %% [markdown]
# ## Why its numbers are hard to compare
#
# `relu` makes many scores exactly 0. If fewer than `top` keys have a positive score, which of the zeros are taken is up
# to the implementation of `topk`, and two correct programs differ. The golden file has so many index heads that no
# score is 0; a model with few of them would have many:

# %%
assert (score[past] != 0).all()
few = w[:, :1] * (q[:, 0] @ k.T).relu()
print(f"with one index head {100 * (few[past] == 0).double().mean():.0f} % of the scores are 0")
assert (few[past] == 0).any()

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e09_sparse_attention.py`. `python -m docs.check 9` says whether you are right.
#
# - **Exercise 9.1** `chosen`: what the indexer chooses, without loops.
# - **Exercise 9.2** `seen`: who sees whom after the choice.
# - **Exercise 9.3** `a_step`: attention of one query that reads nothing but what was chosen.
# - **Exercise 9.4** `worth_it`: from which length on choosing is cheaper than attending to all.
#
# ## Read the code
#
# - `glm/sparse_attention.py`: `IndexerModule.forward` chooses, `only` leaves out the rest.
# - `glm/family/glm_moe_dsa.py`: the release, and how a `config.json` says which layers share.
