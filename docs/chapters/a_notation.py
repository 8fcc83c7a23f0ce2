# %% [markdown]
# # Notation
#
# ## Shapes
#
# A shape is a list of letters in brackets, and a letter means the same everywhere: in the code, in its comments, in
# the reference and in this book. What each is in two models:

# %%
import re

import torch

import glm
from docs.writing import table

meant = dict(re.findall(r"\b([A-Z])  (\S.*?)(?=   |$)", glm.__doc__, flags=re.MULTILINE))
model = glm.GLM.from_pretrained(glm.embedded())
tok = glm.Tokenizer.from_pretrained(glm.embedded())
ids = torch.tensor([tok.chat([{"role": "user", "content": "What is a blank?"}])])


def numbers(spec: glm.Spec, B: int, T: int, S: int) -> dict[str, object]:
    """What each letter is in a model, when it is given T new tokens of S in each of B rows."""
    block = spec.blocks[0]
    given = {"B": B, "T": T, "S": S, "D": spec.width, "V": spec.vocabulary, "L": len(spec.blocks)}
    of_attention = {"H": block.mixer.heads, "G": block.mixer.groups, "K": block.mixer.head_width}
    axes = spec.reading.axes if hasattr(spec.reading, "axes") else 1
    return given | of_attention | {"F": block.feed_forward.inner, "A": axes}


tiny = numbers(model.spec, *ids.shape, ids.shape[1])
large = numbers(glm.release("glm-4-9b-chat").spec, 1, 1, 8192)
assert tiny.keys() == large.keys() == meant.keys()
table(
    ["letter", "what it counts", "tiny-glm, reading a prompt", "GLM-4-9B, writing one token behind a long text"],
    [[f"$ {letter} $", what, tiny[letter], large[letter]] for letter, what in meant.items()],
)

# %% [markdown]
# They can be checked against the tensors themselves. The stream has the same shape $[B, T, D]$ before, between and
# behind all blocks; logits are $[B, T, V]$; positions are $[B, T, A]$ and visibility is $[B, T, S]$.

# %%
logits, states = model(ids, hidden=True)
layout = model.layout(ids)
B, T, S, D, V, L, A = (tiny[letter] for letter in "BTSDVLA")
assert logits.shape == (B, T, V)
assert len(states) == L + 2
assert all(state.shape == (B, T, D) for state in states)
assert layout.positions.shape == (B, T, A)
assert layout.visible.shape == (B, T, S)

# %% [markdown]
# ## Symbols
#
# | symbol | meaning |
# | --- | --- |
# | $x$, $h$ | the stream: one vector of $D$ channels a token, changed by every sublayer |
# | $f$, $n$ | a sublayer and its norm |
# | $q$, $k$, $v$ | query, key and value of a head |
# | $p$ | a position id; with two axes, $p_0$ is the place in the text and $p_1$ the place inside a blank |
# | $\omega_i$ | the angle by which a pair of channels turns from one position to the next |
# | $a \odot b$ | product of channels, one by one |
# | $\alpha$ | the weight of the stream beside what a sublayer adds, where that is not 1 |
# | $\lfloor x \rceil$ | $x$ rounded to the nearest integer, ties to the even one |
#
# ## Words
#
# **Read, write.** A model reads what it is given and writes what follows. In a blank-filling model all that is read
# sees all that is read; what is written sees that, and what was written before.
#
# **Layout.** Position ids and visibility of some tokens: where each stands, and whom it sees.
#
# **Span, blank.** Tokens cut out of a text, and the mask token that stands in their place.
#
# **Block, sublayer, mixer.** A block is two sublayers: a mixer of tokens (attention, mostly), then a feed-forward.
#
# **Wiring.** How a sublayer, its norm and the stream are joined.
#
# **Group.** Query heads that share a key head; of matrices of integers, columns that share a scale.
#
# **Spec, release, generation.** What a model is made of; a published checkpoint; releases whose files are read alike.
#
# **Golden.** A small model together with what the release's own code computed with it.
#
# ## Numbers
#
# Errors are given relative to the rms of what is right, $\max|y - y^*| / \mathrm{rms}(y^*)$, in float64 unless
# another dtype is named. Parameters are counted in $10^9$. GB is $10^9$ bytes; KiB and GiB are powers of 1024.
