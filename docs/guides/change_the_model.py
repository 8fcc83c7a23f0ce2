# %% [markdown]
# # Change the model
#
# A spec is a tree of parts that build modules. So a new idea is a new part, put in the place of an old one; nothing
# registers it, and nothing else has to know. This page makes five changes, each in at most 20 lines (a test counts
# them), runs each, trains it for a moment, and holds it to what every part must keep: a cache changes nothing,
# gradients reach every parameter.

# %%
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import glm
from docs import drawing
from glm.attention import Attention, AttentionModule
from glm.cache import Memory
from glm.feed_forward import FeedForward
from glm.layout import Causal, Layout, Mask
from glm.linear import Weights
from glm.norms import RMSNorm
from glm.positions import Rotary, Rotation, Unturned
from glm.residual import Pre
from glm.spec import Block

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Something to change
#
# A small model in the manner of ChatGLM2, built from its parts. `print(spec)` shows the whole of it.

# %%
attention = Attention(heads=4, groups=2, head_width=16, qkv_bias=True, out_bias=False)
block = Block(Pre(), RMSNorm(1e-5, weight_first=True), attention, FeedForward(96, ("silu", "identity"), bias=False))
base = replace(
    glm.release("chatglm2-6b").spec, vocabulary=32, width=64, context=128, blocks=(block,) * 2, stop=(0,), pad=0,
    rotary=Rotary((8,), "interleaved", 10000.0, glm.release("chatglm2-6b").spec.rotary.scaling, None),
)  # fmt: skip
print(base)

# %% [markdown]
# ## What every change must keep
#
# *A cache changes nothing*: tokens read one by one behind a cache have the logits they have all at once. *The past
# does not see the future*: changing the last token changes no logits before it. *Gradients reach every parameter.*
# And it must be able to learn: the task is to say a random text of eight tokens once more, which needs attention to
# what was said eight places ago.


# %%
def kept(spec: glm.Spec) -> None:
    """Assert all of it, in float64."""
    model = glm.GLM(spec, dtype=torch.float64, seed=0)
    for weight in model.parameters():  # random numbers large enough that every part has a say
        weight.data.uniform_(-0.4, 0.4) if weight.dim() > 1 else weight.data.uniform_(0.5, 1.5)
    ids = torch.randint(1, spec.vocabulary, (2, 24))
    logits = model(ids)
    size = logits.detach().square().mean().sqrt()

    cache = model.new_cache(2, 24)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split([5, 1, 1, 6, 1, 10], dim=1)]
    assert (torch.cat(parts, 1) - logits).abs().max() < 1e-10 * size, "a cache changes something"

    other = ids.clone()
    other[:, -1] = ids[:, -1] % (spec.vocabulary - 1) + 1
    with torch.no_grad():
        assert (model(other) - logits)[:, :-1].abs().max() < 1e-10 * size, "the past sees the future"

    logits.square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, f"no gradient reaches {name}"
        assert weight.grad.abs().max() > 0, f"the gradient of {name} is zero"
    [new] = glm.generate(model, [ids[0, :7].tolist()], max_new_tokens=12, stop=())
    whole = model(torch.tensor([ids[0, :7].tolist() + new[:-1]]))
    assert whole[0, 6:].argmax(-1).tolist() == new, "what is generated is not what the model says"


def batches(count: int) -> Iterator[Tensor]:
    """[32, 16] ids: eight at random, and the same again."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        text = torch.randint(1, 32, (32, 8), generator=draw)
        yield torch.cat((text, text), 1)


def learnt(spec: glm.Spec, steps: int = 120) -> list[float]:
    """Losses on the second half of the texts, in nats."""
    model = glm.GLM(spec, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for ids in batches(steps):
        loss = nn.functional.cross_entropy(model(ids[:, :-1])[:, 7:].flatten(0, 1), ids[:, 8:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


curves = {}


def tried(name: str, spec: glm.Spec) -> None:
    """Hold a change to all of the above, and keep its losses."""
    kept(spec)
    curves[name] = learnt(spec)
    assert curves[name][-1] < 0.9 * curves[name][0], f"{name} learns nothing"
    print(f"{name}: loss {curves[name][0]:.2f} at first, {curves[name][-1]:.2f} at the end")


tried("as it is", base)

# %% [markdown]
# ## A new position scheme
#
# A scheme is anything with `rotation(positions, dtype)` that returns what turns queries and keys. None at all
# ("NoPE") is a part that exists, since GLM-10B has it:

# %% tags=["change"]
without_positions = replace(base, rotary=Unturned())

# %%
tried("no positions", without_positions)

# %% [markdown]
# A scheme in which distance is a ratio: the angle grows with the logarithm of the position, so that what is twice as
# far is one step further. Everything else of `Rotary`, pairing and frequencies, stays.


# %% tags=["change"]
@dataclass(frozen=True)
class Logarithmic(Rotary):
    """Rotates by unit · log₂(1 + p) in the place of p."""

    unit: float = 16.0

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The turns for position ids [B, T, A]."""
        return super().rotation(self.unit * (1 + positions.double()).log2(), dtype)


logarithmic = replace(base, rotary=Logarithmic(**vars(base.rotary)))

# %%
tried("logarithmic", logarithmic)

# %% [markdown]
# A bias on the scores, as ALiBi has it (Press et al.), is not a rotation: it belongs to the mixer. There it is one
# more argument of the product. The slope falls from head to head; a constant for each query changes no softmax, so the
# place of the key alone will do.


# %% tags=["change"]
class Sloped(Attention):
    """Attention whose scores fall with distance, s_ij - slope_h (i - j); meant for a model with `Unturned`."""

    def build(self, width: int, weights: Weights) -> nn.Module:
        return SlopedModule(self, width, weights)


class SlopedModule(AttentionModule):
    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, memory: Memory) -> Tensor:
        H, G, K = self.spec.heads, self.spec.groups, self.spec.head_width
        q, k, v = self.qkv(x).unflatten(-1, (-1, K)).transpose(1, 2).split((H, G, G), dim=1)  # [B heads T K]
        k, v = memory.extend(k, v)
        T, S = q.shape[2], k.shape[2]
        slopes = 2.0 ** -torch.arange(1, H + 1, device=x.device, dtype=x.dtype)
        bias = slopes[:, None, None] * torch.arange(S, device=x.device)
        seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if mask.causal else mask.allowed
        bias = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(x), H, T, S), enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


# %%
sloped = Block(block.wiring, block.norm, Sloped(**vars(attention)), block.feed_forward)
tried("slopes", replace(base, rotary=Unturned(), blocks=(sloped,) * 2))

# %% [markdown]
# ## A new mixer
#
# A mixer is a spec with `build(width, weights)` and with `remembers`, the shapes that a cache keeps for every token;
# its module is called with the stream, the rotation, the mask and a memory. Linear attention replaces
# $e^{q \cdot k}$ by $\phi(q) \cdot \phi(k)$ with a positive $\phi$ (Katharopoulos et al.):
#
# $$ y_t = \frac{\sum_{j \le t} (\phi(q_t) \cdot \phi(k_j)) \, v_j}{\sum_{j \le t} \phi(q_t) \cdot \phi(k_j)}. $$
#
# By inheriting from `Attention` it keeps the matrices, the cache, the sharing among processes and all that `glm info`
# counts.


# %% tags=["change"]
class LinearAttention(Attention):
    """Attention without a softmax: the weight of a key is φ(q)·φ(k) with φ = elu + 1."""

    def build(self, width: int, weights: Weights) -> nn.Module:
        return LinearAttentionModule(self, width, weights)


class LinearAttentionModule(AttentionModule):
    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, memory: Memory) -> Tensor:
        H, G, K = self.spec.heads, self.spec.groups, self.spec.head_width
        qk, v = self.qkv(x).unflatten(-1, (-1, K)).split((H + G, G), dim=2)
        q, k = (nn.functional.elu(rotation(qk)) + 1).split((H, G), dim=2)
        k, v = memory.extend(k.transpose(1, 2), v.transpose(1, 2))  # [B G S K]
        p = q.transpose(1, 2) @ k.repeat_interleave(H // G, 1).mT  # [B H T S]
        seen = p.new_ones(p.shape[2:], dtype=torch.bool).tril() if mask.causal else mask.allowed
        p = p if seen is None else p * seen
        y = p @ v.repeat_interleave(H // G, 1) / p.sum(-1, keepdim=True)
        return self.out(y.transpose(1, 2).flatten(2))


linear = LinearAttention(**vars(attention))

# %%
mixed = (block, replace(block, mixer=linear))  # the first layer as it was
tried("one layer linear", replace(base, blocks=mixed))

# %% [markdown]
# The equation can be read another way: the sums over $j$ are a state of fixed size that each token adds to. It is the
# same, up to rounding:

# %%
model = glm.GLM(replace(base, blocks=(mixed[1],), rotary=Unturned()), dtype=torch.float64, seed=3)
mixer, x = model.blocks[0].mixer, torch.randn(1, 9, 64, dtype=torch.float64)
layout = Layout.causal(1, 9)
with torch.no_grad():
    y = mixer(x, Unturned().rotation(layout.positions, x.dtype), layout.mask(), model.start()[0])
    qk, v = mixer.qkv(x).unflatten(-1, (-1, 16)).split((6, 2), dim=2)
    q, k = (nn.functional.elu(qk) + 1)[0].split((4, 2), dim=1)
    k, v = k.repeat_interleave(2, 1), v[0].repeat_interleave(2, 1)  # [T H K]
    state, mass, found = torch.zeros(4, 16, 16).double(), torch.zeros(4, 16).double(), []
    for t in range(9):
        state, mass = state + k[t, :, :, None] * v[t, :, None], mass + k[t]
        found.append((q[t, :, None] @ state)[:, 0] / (q[t] * mass).sum(-1, keepdim=True))
    recurrent = mixer.out(torch.stack(found).flatten(1))
assert (recurrent - y[0]).abs().max() < 9 * 16 * 64 * torch.finfo(torch.float64).eps * y.abs().max()

# %% [markdown]
# ## A new mask
#
# Who sees whom is a `Layout`, and a reading rule makes it of ids. A sliding window is the causal rule with the far past
# cut off, for what is read and for what follows. No mixer has to know.


# %% tags=["change"]
@dataclass(frozen=True)
class Window(Causal):
    """A token sees itself and the `width` - 1 before it."""

    width: int

    def read(self, ids: Tensor, real: Tensor | None = None) -> Layout:
        return self.cut(super().read(ids, real))

    def following(self, layout: Layout, count: int) -> Layout:
        return self.cut(super().following(layout, count))

    def cut(self, layout: Layout) -> Layout:
        j = torch.arange(layout.keys, device=layout.positions.device)
        t = j[layout.keys - layout.positions.shape[1] :, None]
        return Layout(layout.positions, layout.visible & (j > t - self.width))


window = replace(base, reading=Window(12))

# %%
tried("window of 12", window)
drawing.mask(Window(4).read(torch.zeros(1, 9, dtype=torch.long)), list("abcdefghi"), title="a window of 4")

# %% [markdown]
# What lies behind the window is not lost altogether: in the second layer a token sees tokens that saw further. Two
# layers of a window of $w$ reach $2(w - 1)$ places back. The token to be repeated lies seven places behind the one that
# has to say it. So a window of 5 can learn the task, and one of 4 cannot do better than to guess among 31 ids.

# %%
guessing = float(torch.tensor(31.0).log())
for width in (5, 4):
    losses = learnt(replace(base, reading=Window(width)))
    at_the_end = sum(losses[-20:]) / 20
    print(f"window of {width}: {at_the_end:.2f} nats at the end; guessing: {guessing:.2f}")
    assert (at_the_end < 0.8 * guessing) == (2 * (width - 1) >= 7)
    assert width == 5 or at_the_end > 0.98 * guessing

# %%
picture, axes = drawing.figure(5, 3.2)
for (name, losses), colour in zip(curves.items(), drawing.PALETTE, strict=False):
    axes.plot(losses, color=colour, label=name, lw=1.2)
axes.set_xlabel("step")
axes.set_ylabel("loss, nats")
picture.legend(loc="outside lower center", ncols=3, columnspacing=1)
picture

# %% [markdown]
# ## In the engine
#
# The engine (chapter 15) has kernels for the parts of the releases. A mixer that it does not know runs as it is, on
# the engine's cache, and gives the same tokens; so does a new position scheme. A layout of one's own is refused, since
# its kernels know the rule of `glm/layout.py` only.

# %%
for spec in (logarithmic, replace(base, blocks=mixed), replace(base, rotary=Unturned(), blocks=(sloped,) * 2)):
    model = glm.GLM(spec, dtype=torch.float64, seed=5)
    engine = glm.Engine(model, max_batch=2, max_length=64)
    prompts = [[3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    assert engine.generate(prompts, max_new_tokens=20, stop=()) == glm.generate(
        model, prompts, max_new_tokens=20, stop=()
    )
try:
    glm.Engine(glm.GLM(window, seed=5), max_length=64).generate([[3, 4, 5]], max_new_tokens=4)
    raise AssertionError("the engine has no window")
except glm.LayoutError as error:
    print(error)

# %% [markdown]
# ## Read the code
#
# - `glm/spec.py`: what a part must have.
# - `glm/positions.py`, `glm/attention.py`, `glm/layout.py`: the parts that were changed here.
# - `glm/infilling.py` and `glm/training.py`: training in earnest; chapter 16 does it.
