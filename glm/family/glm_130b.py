"""GLM-130B (2022): DeepNorm, GeGLU, full rotary positions, and the head is the embedding.

Zeng et al. 2022, arXiv:2210.02414. What ChatGLM-6B later kept is here already: the norm's output, not its input,
carries on (`Scaled` in residual.py says how this is DeepNorm; the reference's hidden states decide for this form),
q, k and v lie head by head, rotary frequencies are kept in float16. α grows with the number of layers, √(2L).
A `[MASK]` or `[sMASK]` fixes the place of all that is written for it; for a `[gMASK]` places go on counting.

It was published as parts for 8 devices and without a config.json; the fields of the one here are the arguments of
its official scripts. int4 and int8 are the row-scaled integers of the ChatGLM releases.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from glm.attention import Attention
from glm.checkpoint import PerHead
from glm.errors import ConfigError
from glm.family.generation import Config, Generation, Name, Release, divided
from glm.feed_forward import FeedForward
from glm.fields import Fields
from glm.layout import Blank
from glm.linear import Dense, RowScaled, Weights
from glm.norms import LayerNorm
from glm.parts import Cut
from glm.positions import Plain, Rotary
from glm.residual import Scaled
from glm.spec import Block, Spec


def build(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    vocabulary: int,
    context: int,
    eps: float,
    sop: int,
    fixed: tuple[int, ...],
    gmask: int,
    stop: tuple[int, ...],
    alpha: float | None = None,
    weights: Weights = Dense(),
) -> Spec:
    """The spec of a GLM-130B-shaped model; `fixed` are [MASK] and, if there is one, [sMASK]."""
    head_width = divided(width, heads, "hidden_size / num_attention_heads")
    divided(head_width, 2, "channels of a head")
    block = Block(
        wiring=Scaled(math.sqrt(2 * layers) if alpha is None else alpha),
        norm=LayerNorm(eps),
        mixer=Attention(heads=heads, groups=heads, head_width=head_width, qkv_bias=True, out_bias=True),
        feed_forward=FeedForward(inner=inner, branches=("identity", "gelu"), bias=True),
    )
    return Spec(
        vocabulary=vocabulary,
        width=width,
        context=context,
        reading=Blank(sop=sop, masks=(*fixed, gmask), axes=1, fixed=fixed),
        rotary=Rotary(widths=(head_width,), pairing="halves", base=10000.0, scaling=Plain(), rounding="float16"),
        blocks=(block,) * layers,
        final_norm=LayerNorm(eps),
        tied=True,
        prefix=None,
        weights=weights,
        pad=None,
        stop=stop,
    )


def spec(config: Config, name: str) -> Spec:
    """A GLM-130B config.json as a spec. Raises ConfigError."""
    f = Fields(config, "config.json")
    f.choice("layernorm_order", ("post",), default="post")
    bits = f.choice("quantization_bit", (0, 4, 8), default=0)
    masks = [f.integer("mask_token_id", 0, 1 << 22)]
    if "smask_token_id" in f:
        masks.append(f.integer("smask_token_id", 0, 1 << 22))
    ends = f.ids("eop_token_id") + f.ids("eos_token_id")
    return build(
        layers=f.integer("num_layers", 1, 1000),
        width=f.integer("hidden_size", 1, 1 << 17),
        inner=f.integer("inner_hidden_size", 1, 1 << 20),
        heads=f.integer("num_attention_heads", 1, 1024),
        vocabulary=f.integer("vocab_size", 1, 1 << 22),
        context=f.integer("max_sequence_length", 1, 1 << 30),
        eps=f.number("layernorm_epsilon", 0, 1, default=1e-5),
        sop=f.integer("sop_token_id", 0, 1 << 22),
        fixed=tuple(masks),
        gmask=f.integer("gmask_token_id", 0, 1 << 22),
        stop=tuple(dict.fromkeys(ends)),
        alpha=f.number("deepnorm_alpha", 0, 1e6) if "deepnorm_alpha" in f else None,
        weights=RowScaled(bits) if bits else Dense(),
    )


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the names of the official scripts' arguments."""
    block, reading = spec.blocks[0], spec.reading
    assert isinstance(reading, Blank)
    assert isinstance(block.wiring, Scaled)
    *fixed, gmask = reading.masks
    mask, smask = fixed if len(fixed) == 2 else (*fixed, None)
    fields: dict[str, Any] = {
        "model_type": "glm-130b",
        "layernorm_order": "post",
        "layernorm_epsilon": block.norm.eps,
        "tokenizer_type": "icetk-glm-130B",
        "num_layers": len(spec.blocks),
        "hidden_size": spec.width,
        "inner_hidden_size": block.feed_forward.inner,
        "vocab_size": spec.vocabulary,
        "num_attention_heads": block.mixer.heads,
        "max_sequence_length": spec.context,
        "mask_token_id": mask,
        "smask_token_id": smask,
        "gmask_token_id": gmask,
        "sop_token_id": reading.sop,
        "eop_token_id": spec.stop[0] if len(spec.stop) > 1 else None,
        "eos_token_id": spec.stop[-1] if spec.stop else None,
    }
    if block.wiring.alpha != math.sqrt(2 * len(spec.blocks)):  # a model of which only some layers were kept
        fields["deepnorm_alpha"] = block.wiring.alpha
    if isinstance(spec.weights, RowScaled):
        fields["quantization_bit"] = spec.weights.bits
    return {name: value for name, value in fields.items() if value is not None}


def per_head(spec: Spec, config: Config) -> PerHead:
    """The rows of query_key_value lie head by head, each with its q, k and v."""
    return PerHead(spec.blocks[0].mixer.heads)


NAMES = (
    Name("transformer.word_embeddings", "embedding"),
    Name("transformer.layers.{i}.input_layernorm", "blocks.{i}.wire_mixer.before"),
    Name("transformer.layers.{i}.attention.query_key_value", "blocks.{i}.mixer.qkv", packing=per_head),
    Name("transformer.layers.{i}.attention.dense", "blocks.{i}.mixer.out"),
    Name("transformer.layers.{i}.post_attention_layernorm", "blocks.{i}.wire_feed_forward.before"),
    Name("transformer.layers.{i}.mlp.dense_h_to_4h", "blocks.{i}.feed_forward.up"),
    Name("transformer.layers.{i}.mlp.dense_4h_to_h", "blocks.{i}.feed_forward.down"),
    Name("transformer.final_layernorm", "final_norm"),
)

CUTS = (
    Cut(r"transformer\.word_embeddings\.weight", 0),
    Cut(r".*\.query_key_value\.(weight|bias|weight_scale)", 0),
    Cut(r".*\.dense_h_to_4h\.(weight|bias|weight_scale)", 0, blocks=2),
    Cut(r".*\.(attention\.dense|dense_4h_to_h)\.weight", 1),
)


def original(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config.json of an original checkpoint, which came without one, from the shapes of its whole tensors.

    Heads have 128 channels, and special ids are those of the one release.
    """
    vocabulary, width = shapes["transformer.word_embeddings.weight"]
    scaled = "transformer.layers.0.attention.dense.weight_scale" in shapes
    bits = 8 * shapes["transformer.layers.0.attention.dense.weight"][1] // width if scaled else 0
    if bits not in (0, 4, 8):
        raise ConfigError(f"attention.dense.weight has {bits} bits a number, not 4 or 8")
    found = build(
        layers=sum(name.endswith(".input_layernorm.weight") for name in shapes),
        width=width,
        inner=shapes["transformer.layers.0.mlp.dense_h_to_4h.weight"][0] // 2,
        heads=divided(width, 128, "hidden_size"),
        vocabulary=vocabulary,
        context=2048,
        eps=1e-5,
        sop=SOP,
        fixed=FIXED,
        gmask=GMASK,
        stop=SPEC.stop,
        weights=RowScaled(bits) if bits else Dense(),
    )
    return config(found)


FIXED, GMASK, SOP, EOP, EOS = (150000, 150002), 150001, 150004, 150005, 20002
SPEC = build(
    layers=70,
    width=12288,
    inner=32768,
    heads=96,
    vocabulary=150528,
    context=2048,
    eps=1e-5,
    sop=SOP,
    fixed=FIXED,
    gmask=GMASK,
    stop=(EOP, EOS),
)
RELEASES = (
    Release("glm-130b", "THUDM/GLM-130B", 2022, SPEC, torch.float16, 8),
    Release("glm-130b-int8", "THUDM/GLM-130B", 2022, replace(SPEC, weights=RowScaled(8)), torch.float16, 8),
    Release("glm-130b-int4", "THUDM/GLM-130B", 2022, replace(SPEC, weights=RowScaled(4)), torch.float16, 8),
)

GENERATION = Generation(
    name="glm_130b",
    recognises=lambda config: config.get("model_type") == "glm-130b",
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=(r".*\.?rotary_emb\.inv_freq",),
    releases=RELEASES,
    cuts=CUTS,
    original=original,
)
