# %% [markdown]
# # Checkpoints
#
# A checkpoint is a folder of numbers with names. Nothing in it says what is computed with them. Most mistakes in
# reading one are not found by any check of shapes: a matrix whose rows are in another order is as large as it was. This
# chapter goes through what every converter forgets once, and measures what it costs to forget it.

# %%
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import glm
from docs import drawing
from glm.checkpoint import Checkpoint, PerHead
from glm.family import GENERATIONS, generation_of
from glm.family.glm_130b import CUTS
from glm.info import parameters
from glm.linear import RowScaled, pack_int4, unpack_int4
from glm.packing import pack, unpack
from glm.parts import cut_of
from glm.quantized_files import AWQ_ORDER

torch.manual_seed(0)
torch.set_grad_enabled(False)
GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"
IDS = torch.arange(3, 27)[None]
mistakes: dict[str, float] = {}


def golden(name: str) -> glm.GLM:
    """A small model with random weights, in float64, from a folder in an official layout."""
    return glm.GLM.from_pretrained(GOLDENS / name, dtype=torch.float64)


def costs(what: str, right: glm.GLM, wrong: glm.GLM) -> None:
    """Notes how far the logits of a model that was read wrongly are off, in the rms and relative to the right ones."""
    expected = right(IDS)
    mistakes[what] = ((wrong(IDS) - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert mistakes[what] > 1e-6


def changed(
    model: glm.GLM, change: Callable[[str, torch.Tensor], torch.Tensor], spec: glm.Spec | None = None
) -> glm.GLM:
    """A copy with other numbers, and maybe of another spec; every shape is the same."""
    copy = glm.GLM(spec or model.spec, dtype=model.dtype)
    copy.load_state_dict({name: change(name, x) for name, x in model.state_dict().items()})
    return copy


# %% [markdown]
# ## A folder
#
# `config.json` says what the model is, and one or more files of `safetensors` hold the numbers. The header of such a
# file is JSON: name, dtype, shape and place of each tensor. It is read without reading a weight:

# %%
checkpoint = Checkpoint.open(glm.embedded())
print(len(checkpoint.tensors), "tensors,", checkpoint.nbytes, "bytes")
for name, info in list(checkpoint.tensors.items())[:4]:
    print(name, str(info.dtype), list(info.shape))

# %% [markdown]
# ## Names
#
# The same matrix has had many names. For each generation: where the queries of the first layer lie on disk, and how
# many tensors of a file make up our one.

# %%
for generation in GENERATIONS:
    spec = generation.releases[0].spec
    mixer = "mixer.attention.query_up" if "dsa" in generation.name else "mixer.qkv"
    mixer = "mixer.query_up" if "lite" in generation.name else mixer
    table = generation.table(spec, generation.config(spec), [f"blocks.0.{mixer}.weight"])
    print(f"{generation.name:14} {table[0].name}" + (f"  (+ {len(table) - 1})" if len(table) > 1 else ""))

# %% [markdown]
# A table of names is used in both directions, and it is strict. A tensor that nobody has asked for is as much an error
# as one that is missing, because both mean that something was not understood:

# %%
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    (folder / "config.json").write_text((GOLDENS / "hf_glm-base" / "config.json").read_text())
    tensors = load_file(GOLDENS / "hf_glm-base" / "model.safetensors")
    without = {name: x for name, x in tensors.items() if "layers.1.self_attn.k_proj.bias" not in name}
    for files in (without, tensors | {"model.layers.1.self_attn.q_norm.weight": torch.ones(4)}):
        save_file(files, folder / "model.safetensors")
        try:
            glm.GLM.from_pretrained(folder)
        except glm.CheckpointError as error:
            print(str(error).replace(scratch, "…"))
        else:
            raise AssertionError("a wrong checkpoint was read")

# %% [markdown]
# Some tensors are meant to be left alone: `inv_freq`, the frequencies of the rotation, which the official code stores
# and never reads; and the block behind the last (chapter 10). Their patterns stand in each generation's file.

# %%
for generation in GENERATIONS:
    for pattern in generation.ignorable:
        print(f"{generation.name:14} {pattern[:60]}")

# %% [markdown]
# ## q, k and v in one matrix
#
# There are two orders. Flat: all queries, then all keys, then all values, `[3, n, d]`. Or head by head, `[n, 3, d]`:
# ChatGLM-6B and GLM-130B. Who reads the one as the other takes keys for queries, and no shape objects.

# %%
for generation in GENERATIONS:
    packed = [name for name in generation.names if name.packing is not None]
    for name in packed:
        spec = generation.releases[0].spec
        if (order := name.packing(spec, generation.config(spec))) is not None:
            print(generation.name, name.file, order)

# %%
first = golden("chatglm1-base")
raw = load_file(GOLDENS / "chatglm1-base" / "model.safetensors")
on_disk = raw["transformer.layers.0.attention.query_key_value.weight"].double()  # [3 n d, D]
n, d = first.spec.blocks[0].mixer.heads, first.spec.blocks[0].mixer.head_width
ours = on_disk.view(n, 3, d, -1).transpose(0, 1).flatten(0, 2)
assert torch.equal(ours, first.blocks[0].mixer.qkv.weight)

as_flat = changed(first, lambda name, x: PerHead(n).on_disk(x).flatten(0, 2) if ".qkv." in name else x)
assert torch.equal(as_flat.blocks[0].mixer.qkv.weight, on_disk)  # rows as they lie, read as q | k | v
costs("q k v read flat", first, as_flat)

# %% [markdown]
# ## Which half is the gate
#
# A gated feed-forward is stored as one matrix as well. SwiGLU activates the first half, GLM-130B's GeGLU the second. In
# the format of `glm4_moe` there are two tensors, and the question does not come up.

# %%
for name in ("glm-130b", "chatglm2-6b", "glm-4-9b-0414"):
    print(f"{name:14}", glm.release(name).spec.blocks[0].feed_forward.branches)

later = golden("glm4-9b-chatglm_format")


def halves_swapped(name: str, x: torch.Tensor) -> torch.Tensor:
    """The rows of the two branches the other way round."""
    return torch.cat(x.chunk(2)[::-1]) if "feed_forward.up" in name else x


costs("gate and up swapped", later, changed(later, halves_swapped))

# %% [markdown]
# ## A number that got lost
#
# GLM-4-9B was published twice. The native `config.json` has `rope_ratio`, by which the base of the rotation is
# multiplied (chapter 3). The converted one, `-hf`, should have the product as its `rope_theta`. Compare the specs that
# the two stand for in this package:

# %%
for change in glm.diff("glm-4-9b-chat", "glm-4-9b-chat-hf").changes:
    print(change)
native, converted = (glm.release(name).spec.rotary.base for name in ("glm-4-9b-chat", "glm-4-9b-chat-hf"))
assert native != converted == 10000

# %% [markdown]
# Same weights, another rotation; no shape objects. In the small model with random weights, over the tokens of this
# chapter:

# %%
base = later.spec.rotary.base
plain = replace(later.spec, rotary=replace(later.spec.rotary, base=10000.0))
assert base > 10000
costs(f"rotary base {base / 10000:.0f} times too small", later, changed(later, lambda _, x: x, plain))

# %% [markdown]
# A norm's $\epsilon$ is as easily lost. The default of most code is not what GLM-4-9B has:

# %%
block = later.spec.blocks[0]
eps = replace(block.norm, eps=1e-5)
usual = replace(later.spec, blocks=(replace(block, norm=eps),) * len(later.spec.blocks), final_norm=eps)
print(block.norm.eps, "is not", eps.eps)
costs("usual eps in the norms", later, changed(later, lambda _, x: x, usual))

# %% [markdown]
# ## Heads that are tied, and heads that are not
#
# Where the head is the embedding, files may leave it out, or hold it all the same. ChatGLM-6B has a tensor of its own.
# GLM-130B has none. The file of the small GLM-Edge has one, which is not used.

# %%
for name in ("glm-10b", "glm-130b", "chatglm-6b", "glm-edge-1.5b-chat", "glm-edge-4b-chat"):
    release = glm.release(name)
    spare = generation_of(name).spare_head(release.spec)
    print(f"{name:19} tied: {release.spec.tied!s:5} ignored in a file: {spare or 'nothing'}")
untied = replace(glm.release("glm-130b").spec, tied=False)
more = parameters(untied) - parameters(glm.release("glm-130b").spec)
assert more == untied.vocabulary * untied.width
print(f"an untied head would be {more:,} numbers more in GLM-130B")

# %% [markdown]
# ## Parts of a training run
#
# GLM-130B was published as it lay on eight devices, `mp_rank_00_model_states.pt` and so on. The first matrix of a pair
# was cut by rows, the second by columns; norms and the biases of second matrices are whole in every part. And a gated
# matrix was cut **half by half**: part 1 holds the first rows of *both* branches. Who just puts the parts on top of
# each other mixes gates and values.

# %%
big = golden("glm130b-base")
up = big.blocks[0].feed_forward.up.weight
cut = cut_of("transformer.layers.0.mlp.dense_h_to_4h.weight", CUTS)
print(cut)
parts = cut.split(up, 2)
assert torch.equal(cut.merge(parts), up)
stacked = torch.cat(parts)
assert stacked.shape == up.shape
assert not torch.equal(stacked, up)


def parts_stacked(name: str, x: torch.Tensor) -> torch.Tensor:
    """The gated matrices of two parts, simply one on top of the other."""
    return torch.cat(cut.split(x, 2)) if "feed_forward.up" in name else x


costs("gated parts stacked", big, changed(big, parts_stacked))

# %% [markdown]
# ## Two numbers in a byte
#
# The int4 files of the first generations hold two columns of a row in each byte: the **even** column in the high
# nibble, both in two's complement. (Half of the world puts the first number into the low bits.) One scale belongs to a
# whole row:
#
# $$ \text{byte}_j = (q_{2j} \bmod 16) \cdot 16 + (q_{2j+1} \bmod 16), \qquad W_{oi} = s_o\, q_{oi} . $$

# %%
values = torch.tensor([[-8, 7, 3, -1]], dtype=torch.int8)
packed = pack_int4(values)
by_equation = (values[:, 0::2] % 16) * 16 + (values[:, 1::2] % 16)
assert torch.equal(packed, by_equation.to(torch.int8))
assert torch.equal(unpack_int4(packed), values)
print(values.tolist(), "->", [f"{byte % 256:08b}" for byte in packed[0].tolist()])

small = golden("chatglm2-int4")
assert small.spec.weights == RowScaled(4)


def nibbles_swapped(name: str, x: torch.Tensor) -> torch.Tensor:
    """Every byte with its halves the other way round."""
    return pack_int4(unpack_int4(x).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)) if x.dtype == torch.int8 else x


costs("nibbles swapped", small, changed(small, nibbles_swapped))

# %% [markdown]
# ## Zero points less one
#
# Layouts with groups along a row come from others (`glm/quantized_files.py` lists four). An integer $u \ge 0$ stands
# for $s\,(u - z)$. Files of GPTQ's first version hold $z - 1$ instead of $z$, modulo 16, and add the one when they are
# read. The second version does not, and both are called `gptq`, if `checkpoint_format` does not tell. Who forgets the
# one shifts a whole matrix by a step:

# %%
u, z, scale = torch.randint(0, 16, (6, 32)), torch.full((6, 1), 8), torch.rand(6, 1)
right, without_the_one = scale * (u - z), scale * (u - (z - 1))
assert torch.allclose(without_the_one - right, scale.expand_as(right))

# %% [markdown]
# AWQ holds the columns of a 32-bit word in the order 0, 2, 4, 6, 1, 3, 5, 7. Unpacked as if they were in order, they
# have to be put back:

# %%
in_order = torch.arange(8, dtype=torch.int8)[None] - 8
word = pack(in_order[:, [0, 2, 4, 6, 1, 3, 5, 7]], 4)
assert torch.equal(unpack(word, 4, 8)[:, AWQ_ORDER], in_order)

# %% [markdown]
# ## What forgetting costs
#
# How far off the logits of a small random model are, for every mistake of this chapter. At 1 the errors are as large as
# the logits.

# %%
order = sorted(mistakes, key=mistakes.get, reverse=True)
drawing.bars(
    order, {"relative change of the logits (rms)": [mistakes[name] for name in order]}, log=True, number="{:.1g}"
)

# %% [markdown]
# The large ones are found by whoever reads a single answer. One like the last is dangerous, because half precision
# hides it. This is why models are compared in float64 here (chapter 12).
#
# One mistake was made by those who published. GLM-10B-Chinese was trained with the same id for the end of a blank and
# for `[gMASK]`. Later files have a copy of its row of the embedding under another id, and so has what `glm convert`
# makes of the original (`mended` in `glm/family/glm_10b.py`).

# %%
mended = generation_of("glm-10b-chinese").mended
embedding = torch.randn(50048, 2)
config = {"num_layers": 48, "vocab_size": 50048}
copied = (mended(config, "word_embeddings.weight", embedding) != embedding).any(-1).nonzero().flatten().tolist()
print("rows that are changed:", copied)
assert len(copied) == 1

# %% [markdown]
# ## Exercises
#
# The stubs are in `docs/exercises/e11_checkpoints.py`. `python -m docs.check 11` says whether you are right.
#
# - **Exercise 11.1** `flat`: rows of ChatGLM-6B's q, k and v in our order.
# - **Exercise 11.2** `merged`: a gated matrix of several parts.
# - **Exercise 11.3** `dequantised`: a matrix from an official int4 file.
# - **Exercise 11.4** `from_gptq`: a matrix from a GPTQ file of either version.
# - **Exercise 11.5** `which_mistake`: a checkpoint that was converted with one mistake. Which?
#
# ## Read the code
#
# - `glm/checkpoint.py`: `Stored`, `match` and `fill`.
# - `glm/family/generation.py`: `Name`, a line of the tables; then `NAMES` in any file of `glm/family/`.
# - `glm/parts.py`, `glm/packing.py` and `glm/quantized_files.py`.
