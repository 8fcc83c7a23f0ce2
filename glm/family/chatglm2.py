"""ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2 (2023) and GLM-4-9B (2024) in their native file format.

Pre-norm blocks with RMSNorm and SwiGLU, two groups of key heads, and only the first half of each head rotated, in
interleaved pairs. The releases differ in numbers: above all in how the rotation was stretched to long contexts,
for which the same field `rope_ratio` means two things. ChatGLM2-6B-32k divides positions by it, all later ones
multiply the base.
"""

from dataclasses import replace
from typing import Any

import torch

from glm.attention import Attention
from glm.checkpoint import PerHead
from glm.errors import ConfigError
from glm.family.generation import Config, Generation, Name, Release
from glm.feed_forward import FeedForward
from glm.fields import Fields
from glm.layout import Causal
from glm.linear import Dense, RowScaled
from glm.norms import LayerNorm, Norm, RMSNorm
from glm.positions import Interpolation, Plain, Rotary, Scaling
from glm.prefix import Prefix
from glm.residual import Pre, Scaled, Wiring
from glm.spec import Block, Spec


def build(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    groups: int,
    head_width: int,
    vocabulary: int,
    context: int,
    norm: Norm,
    base: float,
    scaling: Scaling,
    pad: int | None,
    stop: tuple[int, ...],
    wiring: Wiring = Pre(),
    qkv_bias: bool = True,
    linear_bias: bool = False,
    final_norm: bool = True,
    tied: bool = False,
) -> Spec:
    """The spec of a ChatGLM2-shaped model; the defaults are what every published release has."""
    if heads % groups:
        raise ConfigError(f"config.json: {heads} attention heads cannot share {groups} groups")
    if head_width % 4:
        raise ConfigError(f"config.json: kv_channels: {head_width} is not a multiple of 4")
    block = Block(
        wiring=wiring,
        norm=norm,
        mixer=Attention(heads=heads, groups=groups, head_width=head_width, qkv_bias=qkv_bias, out_bias=linear_bias),
        feed_forward=FeedForward(inner=inner, branches=("silu", "identity"), bias=linear_bias),
    )
    return Spec(
        vocabulary=vocabulary,
        width=width,
        context=context,
        reading=Causal(),
        rotary=Rotary(widths=(head_width // 2,), pairing="interleaved", base=base, scaling=scaling, rounding=None),
        blocks=(block,) * layers,
        final_norm=norm if final_norm else None,
        tied=tied,
        prefix=None,
        weights=Dense(),
        pad=pad,
        stop=stop,
    )


def divides_positions(config: Config, name: str, ratio: float) -> bool:
    """Whether `rope_ratio` divides positions, as only ChatGLM2 does.

    No field tells it from ChatGLM3: the name in the config does, else the folder's `name`, else the ratio itself,
    which was 16 in the one release that divides and 50 or more in all that multiply.
    """
    for known in (str(config.get("_name_or_path", "")).lower(), name.lower()):
        if "chatglm2" in known:
            return True
        if any(other in known for other in ("chatglm3", "glm-4", "glm4", "codegeex")):
            return False
    return ratio == 16


def spec(config: Config, name: str) -> Spec:
    """A native ChatGLM2/3 or GLM-4 config.json as a spec. Raises ConfigError."""
    f = Fields(config, "config.json")
    for flag, value in (("original_rope", True), ("fp32_residual_connection", False)):
        if f.flag(flag, default=value) != value:
            raise ConfigError(f"config.json: {flag} = {not value} was never published and is not supported")
    heads = f.integer("num_attention_heads", 1, 1024)
    shared = f.flag("multi_query_attention", default=True)
    eps = f.number("layernorm_epsilon", 0, 1)
    ratio = f.number("rope_ratio", 1e-6, 1e9, default=1.0)
    divide = ratio != 1 and divides_positions(config, name, ratio)
    linear_bias = f.flag("add_bias_linear", default=False)
    base = build(
        layers=f.integer("num_layers", 1, 1000),
        width=f.integer("hidden_size", 1, 1 << 17),
        inner=f.integer("ffn_hidden_size", 1, 1 << 20),
        heads=heads,
        groups=f.integer("multi_query_group_num", 1, 1024) if shared else heads,
        head_width=f.integer("kv_channels", 1, 1 << 14),
        vocabulary=f.integer("padded_vocab_size", 1, 1 << 22),
        context=f.integer("seq_length", 1, 1 << 30),
        norm=RMSNorm(eps, weight_first=True) if f.flag("rmsnorm", default=True) else LayerNorm(eps),
        base=10000.0 * (1.0 if divide else ratio),
        scaling=Interpolation(ratio) if divide else Plain(),
        pad=f.integer("pad_token_id", 0, 1 << 22) if "pad_token_id" in f else None,
        stop=f.ids("eos_token_id"),
        wiring=Scaled(1.0) if f.flag("apply_residual_connection_post_layernorm", default=False) else Pre(),
        qkv_bias=f.flag("add_qkv_bias", default=True) or linear_bias,
        linear_bias=linear_bias,
        final_norm=f.flag("post_layer_norm", default=True),
        tied=f.flag("tie_word_embeddings", default=False),
    )
    bits = f.choice("quantization_bit", (0, 4, 8), default=0)
    length = f.integer("pre_seq_len", 0, 1 << 16, default=0)
    mixer = base.blocks[0].mixer
    remembered = 2 * len(base.blocks) * mixer.groups * mixer.head_width
    projected = (remembered, base.width) if f.flag("prefix_projection", default=False) else None
    return replace(
        base,
        prefix=Prefix(length, projected) if length else None,
        weights=RowScaled(bits) if bits else Dense(),
    )


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names."""
    assert isinstance(spec.rotary, Rotary)
    block, scaling = spec.blocks[0], spec.rotary.scaling
    fields: dict[str, Any] = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": block.feed_forward.bias,
        "add_qkv_bias": block.mixer.qkv_bias,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": isinstance(block.wiring, Scaled),
        "attention_softmax_in_fp32": True,
        "ffn_hidden_size": block.feed_forward.inner,
        "fp32_residual_connection": False,
        "hidden_size": spec.width,
        "kv_channels": block.mixer.head_width,
        "layernorm_epsilon": block.norm.eps,
        "multi_query_attention": True,
        "multi_query_group_num": block.mixer.groups,
        "num_attention_heads": block.mixer.heads,
        "num_layers": len(spec.blocks),
        "original_rope": True,
        "padded_vocab_size": spec.vocabulary,
        "post_layer_norm": spec.final_norm is not None,
        "rmsnorm": isinstance(block.norm, RMSNorm),
        "seq_length": spec.context,
        "use_cache": True,
        "tie_word_embeddings": spec.tied,
        "eos_token_id": spec.stop[0] if len(spec.stop) == 1 else list(spec.stop),
        "pad_token_id": spec.pad,
    }
    if isinstance(scaling, Interpolation):
        fields |= {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": scaling.factor}
    elif spec.rotary.base != 10000.0:
        fields["rope_ratio"] = spec.rotary.base / 10000.0
    if isinstance(spec.weights, RowScaled):
        fields["quantization_bit"] = spec.weights.bits
    if spec.prefix is not None:
        fields |= {"pre_seq_len": spec.prefix.length, "prefix_projection": spec.prefix.projected is not None}
    return fields


def qkv_packing(spec: Spec, config: Config) -> PerHead | None:
    """Flat q | k | v rows, as in every release; head by head where multi_query_attention is off."""
    return None if config.get("multi_query_attention") in (None, True) else PerHead(spec.blocks[0].mixer.heads)


NAMES = (
    Name("transformer.embedding.word_embeddings", "embedding"),
    Name("transformer.prefix_encoder.embedding", "prefix.embedding"),
    Name("transformer.prefix_encoder.trans.0", "prefix.project.0"),
    Name("transformer.prefix_encoder.trans.2", "prefix.project.2"),
    Name("transformer.encoder.layers.{i}.input_layernorm", "blocks.{i}.wire_mixer.before"),
    Name(
        "transformer.encoder.layers.{i}.self_attention.query_key_value",
        "blocks.{i}.mixer.qkv",
        packing=qkv_packing,
    ),
    Name("transformer.encoder.layers.{i}.self_attention.dense", "blocks.{i}.mixer.out"),
    Name("transformer.encoder.layers.{i}.post_attention_layernorm", "blocks.{i}.wire_feed_forward.before"),
    Name("transformer.encoder.layers.{i}.mlp.dense_h_to_4h", "blocks.{i}.feed_forward.up"),
    Name("transformer.encoder.layers.{i}.mlp.dense_4h_to_h", "blocks.{i}.feed_forward.down"),
    Name("transformer.encoder.final_layernorm", "final_norm"),
    Name("transformer.output_layer", "head"),
)


def published_6b(context: int, base: float = 1e4, scaling: Scaling = Plain(), pad: int | None = 0) -> Spec:
    """The shape shared by ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B."""
    return build(
        layers=28,
        width=4096,
        inner=13696,
        heads=32,
        groups=2,
        head_width=128,
        vocabulary=65024,
        context=context,
        norm=RMSNorm(1e-5, weight_first=True),
        base=base,
        scaling=scaling,
        pad=pad,
        stop=(2,),
    )


def published_9b(context: int, base: float, groups: int = 2) -> Spec:
    """The shape shared by the GLM-4-9B releases."""
    return build(
        layers=40,
        width=4096,
        inner=13696,
        heads=32,
        groups=groups,
        head_width=128,
        vocabulary=151552,
        context=context,
        norm=RMSNorm(1.5625e-07, weight_first=True),
        base=base,
        scaling=Plain(),
        pad=151329,
        stop=(151329, 151336, 151338),
    )


def int4(spec: Spec) -> Spec:
    """The same with its blocks' matrices in four bits."""
    return replace(spec, weights=RowScaled(4))


HALF, BRAIN = torch.float16, torch.bfloat16
CHATGLM2 = published_6b(32768)
CODEGEEX2 = published_6b(8192, pad=None)
RELEASES = (
    Release("chatglm2-6b", "zai-org/chatglm2-6b", 2023, CHATGLM2, HALF, 7),
    Release("chatglm2-6b-int4", "THUDM/chatglm2-6b-int4", 2023, int4(CHATGLM2), HALF, 1),
    Release(
        "chatglm2-6b-32k",
        "THUDM/chatglm2-6b-32k",
        2023,
        published_6b(32768, scaling=Interpolation(16.0)),
        HALF,
        7,
    ),
    Release("codegeex2-6b", "THUDM/codegeex2-6b", 2023, CODEGEEX2, BRAIN, 7),
    Release("codegeex2-6b-int4", "THUDM/codegeex2-6b-int4", 2023, int4(CODEGEEX2), HALF, 1),
    Release("chatglm3-6b", "zai-org/chatglm3-6b", 2023, published_6b(8192), HALF, 7),
    Release("chatglm3-6b-base", "THUDM/chatglm3-6b-base", 2023, published_6b(32768), HALF, 7),
    Release("chatglm3-6b-32k", "zai-org/chatglm3-6b-32k", 2023, published_6b(32768, base=5e5), HALF, 7),
    Release("chatglm3-6b-128k", "THUDM/chatglm3-6b-128k", 2024, published_6b(131072, base=5e6), HALF, 7),
    Release("glm-4-9b", "zai-org/glm-4-9b", 2024, published_9b(8192, 1e4), BRAIN, 10),
    Release("glm-4-9b-chat", "zai-org/glm-4-9b-chat", 2024, published_9b(131072, 5e6), BRAIN, 10),
    Release("glm-4-9b-chat-1m", "zai-org/glm-4-9b-chat-1m", 2024, published_9b(1048576, 1e8, groups=4), BRAIN, 10),
    Release("codegeex4-all-9b", "zai-org/codegeex4-all-9b", 2024, published_9b(131072, 5e6), BRAIN, 4),
)

GENERATION = Generation(
    name="chatglm2",
    recognises=lambda config: config.get("model_type") == "chatglm" and "ffn_hidden_size" in config,
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=(r"transformer\.rotary_pos_emb\.inv_freq",),
    releases=RELEASES,
)
