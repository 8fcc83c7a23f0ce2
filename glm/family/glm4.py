"""GLM-4-9B in its Hugging Face file format (`-hf`, 2024) and GLM-Edge (2024): model_type "glm".

The same mathematics as the native format of `chatglm2.py` under other names, with separate q, k and v matrices on
disk, and one difference that only half precision sees: RMSNorm casts before it multiplies by its weight.
"""

from typing import Any

import torch

from glm.attention import Attention
from glm.errors import ConfigError
from glm.family import rope
from glm.family.generation import Config, Generation, Name, Release
from glm.feed_forward import FeedForward
from glm.fields import Fields
from glm.layout import Causal
from glm.linear import Dense
from glm.norms import RMSNorm
from glm.positions import Plain, Rotary
from glm.residual import Pre, Wiring
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
    eps: float,
    rotary: Rotary,
    qkv_bias: bool,
    pad: int | None,
    stop: tuple[int, ...],
    tied: bool = False,
    wiring: Wiring = Pre(),
) -> Spec:
    """The spec of a model in this format."""
    if heads % groups:
        raise ConfigError(f"config.json: {heads} attention heads cannot share {groups} key heads")
    norm = RMSNorm(eps, weight_first=False)
    block = Block(
        wiring=wiring,
        norm=norm,
        mixer=Attention(heads=heads, groups=groups, head_width=head_width, qkv_bias=qkv_bias, out_bias=False),
        feed_forward=FeedForward(inner=inner, branches=("silu", "identity"), bias=False),
    )
    return Spec(
        vocabulary=vocabulary,
        width=width,
        context=context,
        reading=Causal(),
        rotary=rotary,
        blocks=(block,) * layers,
        final_norm=norm,
        tied=tied,
        prefix=None,
        weights=Dense(),
        pad=pad,
        stop=stop,
    )


def spec(config: Config, name: str, wiring: Wiring = Pre()) -> Spec:
    """A config.json of model_type "glm" as a spec (of "glm4" with its wiring). Raises ConfigError."""
    f = Fields(config, "config.json")
    f.choice("hidden_act", ("silu",), default="silu")
    heads = f.integer("num_attention_heads", 1, 1024)
    head_width = f.integer("head_dim", 1, 1 << 14)
    context = f.integer("max_position_embeddings", 1, 1 << 30)
    return build(
        layers=f.integer("num_hidden_layers", 1, 1000),
        width=f.integer("hidden_size", 1, 1 << 17),
        inner=f.integer("intermediate_size", 1, 1 << 20),
        heads=heads,
        groups=f.integer("num_key_value_heads", 1, 1024),
        head_width=head_width,
        vocabulary=f.integer("vocab_size", 1, 1 << 22),
        context=context,
        eps=f.number("rms_norm_eps", 0, 1),
        rotary=rope.rotary(config, head_width, context, "interleaved"),
        qkv_bias=f.flag("attention_bias", default=True),
        pad=f.integer("pad_token_id", 0, 1 << 22) if "pad_token_id" in f else None,
        stop=f.ids("eos_token_id"),
        tied=f.flag("tie_word_embeddings", default=False),
        wiring=wiring,
    )


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names."""
    assert isinstance(spec.rotary, Rotary)
    block = spec.blocks[0]
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "attention_bias": block.mixer.qkv_bias,
        "attention_dropout": 0.0,
        "eos_token_id": list(spec.stop) if spec.stop else None,
        "head_dim": block.mixer.head_width,
        "hidden_act": "silu",
        "hidden_size": spec.width,
        "intermediate_size": block.feed_forward.inner,
        "max_position_embeddings": spec.context,
        "num_attention_heads": block.mixer.heads,
        "num_hidden_layers": len(spec.blocks),
        "num_key_value_heads": block.mixer.groups,
        "pad_token_id": spec.pad,
        "rms_norm_eps": block.norm.eps,
        "tie_word_embeddings": spec.tied,
        "use_cache": True,
        "vocab_size": spec.vocabulary,
        **rope.fields(spec.rotary, block.mixer.head_width),
    }


def q_rows(spec: Spec) -> slice:
    """The query rows of our one matrix."""
    mixer = spec.blocks[0].mixer
    return slice(0, mixer.heads * mixer.head_width)


def k_rows(spec: Spec) -> slice:
    """The key rows."""
    mixer = spec.blocks[0].mixer
    return slice(q_rows(spec).stop, (mixer.heads + mixer.groups) * mixer.head_width)


def v_rows(spec: Spec) -> slice:
    """The value rows."""
    mixer = spec.blocks[0].mixer
    return slice(k_rows(spec).stop, (mixer.heads + 2 * mixer.groups) * mixer.head_width)


NAMES = (
    Name("model.embed_tokens", "embedding"),
    Name("model.layers.{i}.input_layernorm", "blocks.{i}.wire_mixer.before"),
    Name("model.layers.{i}.self_attn.q_proj", "blocks.{i}.mixer.qkv", rows=q_rows),
    Name("model.layers.{i}.self_attn.k_proj", "blocks.{i}.mixer.qkv", rows=k_rows),
    Name("model.layers.{i}.self_attn.v_proj", "blocks.{i}.mixer.qkv", rows=v_rows),
    Name("model.layers.{i}.self_attn.o_proj", "blocks.{i}.mixer.out"),
    Name("model.layers.{i}.post_attention_layernorm", "blocks.{i}.wire_feed_forward.before"),
    Name("model.layers.{i}.mlp.gate_up_proj", "blocks.{i}.feed_forward.up"),
    Name("model.layers.{i}.mlp.down_proj", "blocks.{i}.feed_forward.down"),
    Name("model.norm", "final_norm"),
    Name("lm_head", "head"),
)


def half_rotary(base: float) -> Rotary:
    """Half of each head of 128 channels, in interleaved pairs."""
    return Rotary(widths=(64,), pairing="interleaved", base=base, scaling=Plain(), rounding=None)


def published_9b(context: int, groups: int = 2) -> Spec:
    """GLM-4-9B as converted for this format: its configs say 10⁴ where the native ones multiply the rotary base."""
    return build(
        layers=40,
        width=4096,
        inner=13696,
        heads=32,
        groups=groups,
        head_width=128,
        vocabulary=151552,
        context=context,
        eps=1.5625e-07,
        rotary=half_rotary(1e4),
        qkv_bias=True,
        pad=151329,
        stop=(151329, 151336, 151338),
    )


def published_edge(layers: int, width: int, inner: int, heads: int, groups: int, tied: bool) -> Spec:
    """GLM-Edge: whole heads rotate, no biases at all."""
    return build(
        layers=layers,
        width=width,
        inner=inner,
        heads=heads,
        groups=groups,
        head_width=128,
        vocabulary=59264,
        context=8192,
        eps=1e-5,
        rotary=Rotary(widths=(128,), pairing="interleaved", base=1e4, scaling=Plain(), rounding=None),
        qkv_bias=False,
        pad=59246,
        stop=(59246, 59253, 59255),
        tied=tied,
    )


BRAIN = torch.bfloat16
EDGE_SMALL = published_edge(28, 2048, 6144, 16, 4, tied=True)
EDGE_LARGE = published_edge(40, 3072, 8192, 24, 6, tied=False)
RELEASES = (
    Release("glm-4-9b-hf", "zai-org/glm-4-9b-hf", 2024, published_9b(8192), BRAIN, 4),
    Release("glm-4-9b-chat-hf", "zai-org/glm-4-9b-chat-hf", 2024, published_9b(131072), BRAIN, 4),
    Release("glm-4-9b-chat-1m-hf", "zai-org/glm-4-9b-chat-1m-hf", 2024, published_9b(1048576, groups=4), BRAIN, 4),
    Release("glm-edge-1.5b-chat", "zai-org/glm-edge-1.5b-chat", 2024, EDGE_SMALL, BRAIN, 1),
    Release("glm-edge-4b-chat", "zai-org/glm-edge-4b-chat", 2024, EDGE_LARGE, BRAIN, 2),
)

GENERATION = Generation(
    name="glm4",
    recognises=lambda config: config.get("model_type") == "glm" and "num_hidden_layers" in config,  # GLM-10B has not
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    releases=RELEASES,
)
