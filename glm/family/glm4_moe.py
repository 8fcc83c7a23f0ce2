"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7 (2025): model_type "glm4_moe".

Pre-norm blocks, of which the first few have an ordinary feed-forward and all others experts behind a sigmoid router.
Half of each head rotates, as two halves and not in the interleaved pairs of GLM-4; the large ones normalise queries
and keys. On disk every expert has its own three matrices. A layer behind the last predicts one token further
(`glm/drafting.py`); the model alone does not use it.
"""

from dataclasses import replace
from typing import Any

import torch

from glm.attention import Attention
from glm.errors import ConfigError
from glm.experts import Experts, Router
from glm.family import rope
from glm.family.generation import Config, Generation, Name, Release
from glm.feed_forward import FeedForward
from glm.fields import Fields
from glm.layout import Causal
from glm.linear import Dense
from glm.norms import RMSNorm
from glm.positions import Plain, Rotary
from glm.residual import Pre
from glm.spec import Block, Mixer, Spec


def swiglu(inner: int) -> FeedForward:
    """The feed-forward of dense layers and of experts."""
    return FeedForward(inner=inner, branches=("silu", "identity"), bias=False)


def build(
    *,
    layers: int,
    dense: int,
    width: int,
    inner: int,
    experts: Experts,
    mixers: tuple[Mixer, ...],
    vocabulary: int,
    context: int,
    norm: RMSNorm,
    rotary: Rotary,
    pad: int | None,
    stop: tuple[int, ...],
    tied: bool = False,
) -> Spec:
    """The spec of a model whose first `dense` layers have no experts; `mixers` is one for each layer."""
    block = Block(wiring=Pre(), norm=norm, mixer=mixers[0], feed_forward=swiglu(inner))
    return Spec(
        vocabulary=vocabulary,
        width=width,
        context=context,
        reading=Causal(),
        rotary=rotary,
        blocks=tuple(
            replace(block, mixer=mixer, feed_forward=block.feed_forward if i < dense else experts)
            for i, mixer in zip(range(layers), mixers, strict=True)
        ),
        final_norm=norm,
        tied=tied,
        prefix=None,
        weights=Dense(),
        pad=pad,
        stop=stop,
    )


def spec(config: Config, name: str) -> Spec:
    """A config.json of model_type "glm4_moe" as a spec. Raises ConfigError."""
    f = Fields(config, "config.json")
    heads, groups = f.integer("num_attention_heads", 1, 1024), f.integer("num_key_value_heads", 1, 1024)
    if heads % groups:
        raise ConfigError(f"config.json: {heads} attention heads cannot share {groups} key heads")
    norm = rms(f)
    mixer = Attention(
        heads=heads,
        groups=groups,
        head_width=f.integer("head_dim", 1, 1 << 14, default=f.integer("hidden_size", 1, 1 << 17) // heads),
        qkv_bias=f.flag("attention_bias", default=False),
        out_bias=False,
        qk_norm=norm if f.flag("use_qk_norm", default=False) else None,
    )
    layers = f.integer("num_hidden_layers", 1, 1000)
    context = f.integer("max_position_embeddings", 1, 1 << 30)
    return build(
        layers=layers,
        dense=dense_layers(f, layers),
        mixers=(mixer,) * layers,
        rotary=rope.rotary(config, mixer.head_width, context, "halves"),
        **common(f, norm),
    )


def rms(f: Fields) -> RMSNorm:
    """The norm of the stream."""
    return RMSNorm(f.number("rms_norm_eps", 0, 1), weight_first=False)


def dense_layers(f: Fields, layers: int) -> int:
    """How many of the first layers have no experts: `first_k_dense_replace`, or a list of what each layer has."""
    count = f.integer("first_k_dense_replace", 0, 1000, default=1)
    kinds = f.values.get("mlp_layer_types")
    if kinds is None:
        return min(count, layers)
    f.read.add("mlp_layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers or set(map(str, kinds)) - {"dense", "sparse"}:
        f.refuse("mlp_layer_types", f'a list of {layers} times "dense" or "sparse"', kinds)
    first = kinds.index("sparse") if "sparse" in kinds else layers
    if "dense" in kinds[first:]:
        f.refuse("mlp_layer_types", "dense only in the first layers", kinds)
    return first


def common(f: Fields, norm: RMSNorm) -> dict[str, Any]:
    """The fields that all generations with these experts spell alike, as arguments of `build`."""
    f.choice("hidden_act", ("silu",), default="silu")
    f.choice("scoring_func", ("sigmoid",), default="sigmoid")
    f.choice("topk_method", ("noaux_tc",), default="noaux_tc")
    count = f.integer("n_routed_experts", 1, 1 << 16)
    experts = Experts(
        expert=swiglu(f.integer("moe_intermediate_size", 1, 1 << 20)),
        count=count,
        top=f.integer("num_experts_per_tok", 1, count),
        shared=f.integer("n_shared_experts", 0, 64, default=1),
        router=Router(
            groups=f.integer("n_group", 1, count, default=1),
            kept=f.integer("topk_group", 1, count, default=1),
            normalised=f.flag("norm_topk_prob", default=True),
            scale=f.number("routed_scaling_factor", 1e-9, 1e9, default=1.0),
        ),
    )
    return {
        "width": f.integer("hidden_size", 1, 1 << 17),
        "inner": f.integer("intermediate_size", 1, 1 << 20),
        "experts": experts,
        "vocabulary": f.integer("vocab_size", 1, 1 << 22),
        "context": f.integer("max_position_embeddings", 1, 1 << 30),
        "norm": norm,
        "pad": f.integer("pad_token_id", 0, 1 << 22) if "pad_token_id" in f else None,
        "stop": f.ids("eos_token_id"),
        "tied": f.flag("tie_word_embeddings", default=False),
    }


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names."""
    assert isinstance(spec.rotary, Rotary)
    mixer = spec.blocks[0].mixer
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": mixer.qkv_bias,
        "head_dim": mixer.head_width,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.groups,
        "use_qk_norm": mixer.qk_norm is not None,
        **common_config(spec),
        **rope.fields(spec.rotary, mixer.head_width),
    }


def common_config(spec: Spec) -> dict[str, Any]:
    """The way back from `common`. Raises ConfigError for a model without experts."""
    first = next((i for i, block in enumerate(spec.blocks) if isinstance(block.feed_forward, Experts)), None)
    if first is None:
        raise ConfigError("this format is for models with experts, and none of these layers has any: keep more of them")
    experts = spec.blocks[first].feed_forward
    return {
        "attention_dropout": 0.0,
        "eos_token_id": list(spec.stop) if spec.stop else None,
        "first_k_dense_replace": first,
        "hidden_act": "silu",
        "hidden_size": spec.width,
        "intermediate_size": spec.blocks[0].feed_forward.inner if first else experts.expert.inner,
        "max_position_embeddings": spec.context,
        "moe_intermediate_size": experts.expert.inner,
        "n_group": experts.router.groups,
        "n_routed_experts": experts.count,
        "n_shared_experts": experts.shared,
        "norm_topk_prob": experts.router.normalised,
        "num_experts_per_tok": experts.top,
        "num_hidden_layers": len(spec.blocks),
        "num_nextn_predict_layers": 0,  # an exported model comes without the layer that predicts further
        "pad_token_id": spec.pad,
        "rms_norm_eps": spec.blocks[0].norm.eps,
        "routed_scaling_factor": experts.router.scale,
        "tie_word_embeddings": spec.tied,
        "topk_group": experts.router.kept,
        "use_cache": True,
        "vocab_size": spec.vocabulary,
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
    return slice(k_rows(spec).stop, None)


def experts_of(spec: Spec) -> Experts:
    """The experts, which are alike in all layers that have them."""
    return next(block.feed_forward for block in spec.blocks if isinstance(block.feed_forward, Experts))


def dense_of(spec: Spec) -> FeedForward:
    """The feed-forward of the first layers."""
    return next(block.feed_forward for block in spec.blocks if isinstance(block.feed_forward, FeedForward))


def first_half(spec: Spec) -> slice:
    """The branch that is activated, in the first layers."""
    return slice(0, dense_of(spec).inner)


def second_half(spec: Spec) -> slice:
    """The other branch."""
    return slice(dense_of(spec).inner, None)


FEED_FORWARD = (
    Name("model.layers.{i}.mlp.gate_proj", "blocks.{i}.feed_forward.up", rows=first_half),
    Name("model.layers.{i}.mlp.up_proj", "blocks.{i}.feed_forward.up", rows=second_half),
    Name("model.layers.{i}.mlp.down_proj", "blocks.{i}.feed_forward.down"),
    Name("model.layers.{i}.mlp.gate", "blocks.{i}.feed_forward.router"),
    Name(
        "model.layers.{i}.mlp.gate.e_score_correction_bias",
        "blocks.{i}.feed_forward.router.bias",
        whole=True,
        at_least=torch.float32,
    ),
    Name(
        "model.layers.{i}.mlp.experts.{e}.gate_proj",
        "blocks.{i}.feed_forward.experts.up",
        rows=lambda spec: slice(0, experts_of(spec).expert.inner),
        stack=lambda spec: experts_of(spec).count,
    ),
    Name(
        "model.layers.{i}.mlp.experts.{e}.up_proj",
        "blocks.{i}.feed_forward.experts.up",
        rows=lambda spec: slice(experts_of(spec).expert.inner, None),
        stack=lambda spec: experts_of(spec).count,
    ),
    Name(
        "model.layers.{i}.mlp.experts.{e}.down_proj",
        "blocks.{i}.feed_forward.experts.down",
        stack=lambda spec: experts_of(spec).count,
    ),
    Name(
        "model.layers.{i}.mlp.shared_experts.gate_proj",
        "blocks.{i}.feed_forward.shared.up",
        rows=lambda spec: slice(0, experts_of(spec).together.inner),
    ),
    Name(
        "model.layers.{i}.mlp.shared_experts.up_proj",
        "blocks.{i}.feed_forward.shared.up",
        rows=lambda spec: slice(experts_of(spec).together.inner, None),
    ),
    Name("model.layers.{i}.mlp.shared_experts.down_proj", "blocks.{i}.feed_forward.shared.down"),
)
FRAME = (
    Name("model.embed_tokens", "embedding"),
    Name("model.layers.{i}.input_layernorm", "blocks.{i}.wire_mixer.before"),
    Name("model.layers.{i}.post_attention_layernorm", "blocks.{i}.wire_feed_forward.before"),
    Name("model.norm", "final_norm"),
    Name("lm_head", "head"),
)
NAMES = (
    *FRAME,
    Name("model.layers.{i}.self_attn.q_proj", "blocks.{i}.mixer.qkv", rows=q_rows),
    Name("model.layers.{i}.self_attn.k_proj", "blocks.{i}.mixer.qkv", rows=k_rows),
    Name("model.layers.{i}.self_attn.v_proj", "blocks.{i}.mixer.qkv", rows=v_rows),
    Name("model.layers.{i}.self_attn.q_norm", "blocks.{i}.mixer.qk_norm.q"),
    Name("model.layers.{i}.self_attn.k_norm", "blocks.{i}.mixer.qk_norm.k"),
    Name("model.layers.{i}.self_attn.o_proj", "blocks.{i}.mixer.out"),
    *FEED_FORWARD,
)

# The block behind the last, which predicts one token further: what it has besides, and all that files hold of it.
FOLLOWING = (
    Name("model.layers.{i}.embed_tokens", "blocks.{i}.embedding"),
    Name("model.layers.{i}.enorm", "blocks.{i}.token_norm"),
    Name("model.layers.{i}.hnorm", "blocks.{i}.stream_norm"),
    Name("model.layers.{i}.eh_proj", "blocks.{i}.join"),
    Name("model.layers.{i}.shared_head.norm", "blocks.{i}.norm"),
    Name("model.layers.{i}.shared_head.head", "blocks.{i}.head"),
)
NEXT = (
    r"model\.layers\.{L}\.(embed_tokens|enorm|hnorm|eh_proj|shared_head\.(norm|head)"
    r"|input_layernorm|post_attention_layernorm|(self_attn|mlp)\..+)\.\w+",
)


def published(
    layers: int,
    dense: int,
    width: int,
    inner: int,
    experts: tuple[int, int],
    scale: float,
    context: int,
    qk_norm: bool,
) -> Spec:
    """The numbers in which the releases differ; `experts` is how many, and how wide."""
    norm = RMSNorm(1e-5, weight_first=False)
    count, expert = experts
    mixer = Attention(
        heads=96, groups=8, head_width=128, qkv_bias=True, out_bias=False, qk_norm=norm if qk_norm else None
    )
    return build(
        layers=layers,
        dense=dense,
        width=width,
        inner=inner,
        experts=Experts(swiglu(expert), count, top=8, shared=1, router=Router(1, 1, normalised=True, scale=scale)),
        mixers=(mixer,) * layers,
        vocabulary=151552,
        context=context,
        norm=norm,
        rotary=Rotary(widths=(64,), pairing="halves", base=1e6, scaling=Plain(), rounding=None),
        pad=151329,
        stop=(151329, 151336, 151338),
    )


BRAIN = torch.bfloat16
LARGE = published(92, 3, 5120, 12288, (160, 1536), 2.5, 131072, qk_norm=True)
LONGER = replace(LARGE, context=202752)
AIR = published(46, 1, 4096, 10944, (128, 1408), 1.0, 131072, qk_norm=False)
RELEASES = (
    Release("glm-4.5", "zai-org/GLM-4.5", 2025, LARGE, BRAIN, 93),
    Release("glm-4.5-base", "zai-org/GLM-4.5-Base", 2025, LARGE, BRAIN, 93),
    Release("glm-4.5-air", "zai-org/GLM-4.5-Air", 2025, AIR, BRAIN, 47),
    Release("glm-4.5-air-base", "zai-org/GLM-4.5-Air-Base", 2025, AIR, BRAIN, 47),
    Release("glm-4.6", "zai-org/GLM-4.6", 2025, LONGER, BRAIN, 92),
    Release("glm-4.7", "zai-org/GLM-4.7", 2025, LONGER, BRAIN, 92),
)

GENERATION = Generation(
    name="glm4_moe",
    recognises=lambda config: config.get("model_type") == "glm4_moe",
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=NEXT,
    releases=RELEASES,
    following=FOLLOWING,
)
