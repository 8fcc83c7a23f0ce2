"""ChatGLM-6B (2023): a blank-filling model with two position axes, tuned for dialogue.

Its blocks carry α times the normalised input (α = √56 in every release and size, since the block's default of 28
layers was never overridden), rotate each half of a head by one position axis with frequencies kept in float16, and
see everything up to `<sop>` in both directions.
"""

import math
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
from glm.positions import Plain, Rotary
from glm.prefix import Prefix
from glm.residual import Scaled
from glm.spec import Block, Spec

ALPHA = math.sqrt(2 * 28)


def build(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    vocabulary: int,
    context: int,
    eps: float,
    two_axes: bool,
    sop: int,
    mask: int,
    gmask: int,
    pad: int | None,
    stop: tuple[int, ...],
) -> Spec:
    """The spec of a ChatGLM-6B-shaped model."""
    head_width = divided(width, heads, "hidden_size / num_attention_heads")
    divided(head_width, 4 if two_axes else 2, "channels of a head")
    block = Block(
        wiring=Scaled(ALPHA),
        norm=LayerNorm(eps),
        mixer=Attention(heads=heads, groups=heads, head_width=head_width, qkv_bias=True, out_bias=True),
        feed_forward=FeedForward(inner=inner, branches=("gelu_tanh",), bias=True),
    )
    return Spec(
        vocabulary=vocabulary,
        width=width,
        context=context,
        reading=Blank(
            sop=sop,
            masks=(gmask, mask),
            axes=2 if two_axes else 1,
            fixed=(gmask, mask) if two_axes else (mask,),
        ),
        rotary=Rotary(
            widths=(head_width // 2, head_width // 2) if two_axes else (head_width,),
            pairing="halves",
            base=10000.0,
            scaling=Plain(),
            rounding="float16",
        ),
        blocks=(block,) * layers,
        final_norm=LayerNorm(eps),
        tied=False,
        prefix=None,
        weights=Dense(),
        pad=pad,
        stop=stop,
    )


def spec(config: Config, name: str) -> Spec:
    """A ChatGLM-6B config.json as a spec. Raises ConfigError."""
    f = Fields(config, "config.json")
    bits = f.choice("quantization_bit", (0, 4, 8), default=0)
    if f.flag("quantization_embeddings", default=False):
        raise ConfigError("config.json: quantization_embeddings: integer embeddings are not supported")
    sop = f.integer("bos_token_id", 4, 1 << 22)
    base = build(
        layers=f.integer("num_layers", 1, 1000),
        width=f.integer("hidden_size", 1, 1 << 17),
        inner=f.integer("inner_hidden_size", 1, 1 << 20),
        heads=f.integer("num_attention_heads", 1, 1024),
        vocabulary=f.integer("vocab_size", 1, 1 << 22),
        context=f.integer("max_sequence_length", 1, 1 << 30),
        eps=f.number("layernorm_epsilon", 0, 1),
        two_axes=f.flag("position_encoding_2d", default=True),
        sop=sop,  # the first release's config leaves out the masks, which stood at the same distance from it
        mask=f.integer("mask_token_id", 0, 1 << 22, default=sop - 4),
        gmask=f.integer("gmask_token_id", 0, 1 << 22, default=sop - 3),
        pad=f.integer("pad_token_id", 0, 1 << 22) if "pad_token_id" in f else None,
        stop=f.ids("eos_token_id"),
    )
    length = f.integer("pre_seq_len", 0, 1 << 16, default=0)
    projected = (base.width, base.width) if f.flag("prefix_projection", default=False) else None
    return replace(
        base,
        prefix=Prefix(length, projected) if length else None,
        weights=RowScaled(bits) if bits else Dense(),
    )


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names."""
    block, reading = spec.blocks[0], spec.reading
    assert isinstance(reading, Blank)
    gmask, mask = reading.masks
    fields: dict[str, Any] = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "hidden_size": spec.width,
        "inner_hidden_size": block.feed_forward.inner,
        "num_layers": len(spec.blocks),
        "num_attention_heads": block.mixer.heads,
        "vocab_size": spec.vocabulary,
        "max_sequence_length": spec.context,
        "layernorm_epsilon": block.norm.eps,
        "position_encoding_2d": reading.axes == 2,
        "bos_token_id": reading.sop,
        "eos_token_id": spec.stop[0] if len(spec.stop) == 1 else list(spec.stop),
        "mask_token_id": mask,
        "gmask_token_id": gmask,
        "pad_token_id": spec.pad,
        "use_cache": True,
    }
    if isinstance(spec.weights, RowScaled):
        fields["quantization_bit"] = spec.weights.bits
    if spec.prefix is not None:
        fields |= {"pre_seq_len": spec.prefix.length, "prefix_projection": spec.prefix.projected is not None}
    return fields


def per_head(spec: Spec, config: Config) -> PerHead:
    """The rows of query_key_value lie head by head, each with its q, k and v."""
    return PerHead(spec.blocks[0].mixer.heads)


NAMES = (
    Name("transformer.word_embeddings", "embedding"),
    Name("transformer.prefix_encoder.embedding", "prefix.embedding"),
    Name("transformer.prefix_encoder.trans.0", "prefix.project.0"),
    Name("transformer.prefix_encoder.trans.2", "prefix.project.2"),
    Name("transformer.layers.{i}.input_layernorm", "blocks.{i}.wire_mixer.before"),
    Name("transformer.layers.{i}.attention.query_key_value", "blocks.{i}.mixer.qkv", packing=per_head),
    Name("transformer.layers.{i}.attention.dense", "blocks.{i}.mixer.out"),
    Name("transformer.layers.{i}.post_attention_layernorm", "blocks.{i}.wire_feed_forward.before"),
    Name("transformer.layers.{i}.mlp.dense_h_to_4h", "blocks.{i}.feed_forward.up"),
    Name("transformer.layers.{i}.mlp.dense_4h_to_h", "blocks.{i}.feed_forward.down"),
    Name("transformer.final_layernorm", "final_norm"),
    Name("lm_head", "head"),
)


def published(vocabulary: int, sop: int, pad: int, weights: Weights = Dense()) -> Spec:
    """ChatGLM-6B with the vocabulary and special ids of one release."""
    base = build(
        layers=28,
        width=4096,
        inner=16384,
        heads=32,
        vocabulary=vocabulary,
        context=2048,
        eps=1e-5,
        two_axes=True,
        sop=sop,
        mask=sop - 4,
        gmask=sop - 3,
        pad=pad,
        stop=(sop + 1,),
    )
    return replace(base, weights=weights)


HALF = torch.float16
RELEASES = (
    Release("chatglm-6b-v1.0", "THUDM/chatglm-6b", 2023, published(150528, 150004, 20003), HALF, 8),
    Release("chatglm-6b", "zai-org/chatglm-6b", 2023, published(130528, 130004, 3), HALF, 8),
    Release(
        "chatglm-6b-int8",
        "zai-org/chatglm-6b-int8",
        2023,
        published(130528, 130004, 3, RowScaled(8)),
        HALF,
        1,
    ),
    Release(
        "chatglm-6b-int4",
        "zai-org/chatglm-6b-int4",
        2023,
        published(130528, 130004, 3, RowScaled(4)),
        HALF,
        1,
    ),
)

GENERATION = Generation(
    name="chatglm",
    recognises=lambda config: config.get("model_type") == "chatglm" and "inner_hidden_size" in config,
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=(r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq",),
    releases=RELEASES,
)
