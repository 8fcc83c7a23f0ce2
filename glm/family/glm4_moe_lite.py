"""GLM-4.7-Flash (2026): model_type "glm4_moe_lite".

The experts of `glm4_moe.py` with latent attention. The norms inside of the attention have an eps of their own, which
no config.json mentions: 10⁻⁶. Channels that carry the position are rotated in interleaved pairs.
"""

from typing import Any

from glm.errors import ConfigError
from glm.experts import Experts, Router
from glm.family import rope
from glm.family.generation import Config, Generation, Name, Release
from glm.family.glm4_moe import (
    BRAIN,
    FEED_FORWARD,
    FOLLOWING,
    FRAME,
    NEXT,
    build,
    common,
    common_config,
    dense_layers,
    rms,
    swiglu,
)
from glm.fields import Fields
from glm.latent_attention import LatentAttention
from glm.norms import RMSNorm
from glm.positions import Plain, Rotary
from glm.spec import Spec

INNER = RMSNorm(1e-6, weight_first=False)


def spec(config: Config, name: str) -> Spec:
    """A config.json of model_type "glm4_moe_lite" as a spec. Raises ConfigError."""
    f = Fields(config, "config.json")
    mixer = latent(f)
    layers = f.integer("num_hidden_layers", 1, 1000)
    return build(
        layers=layers,
        dense=dense_layers(f, layers),
        mixers=(mixer,) * layers,
        rotary=rotary(config, f, mixer),
        **common(f, rms(f)),
    )


def latent(f: Fields) -> LatentAttention:
    """The attention that a config describes."""
    return LatentAttention(
        heads=f.integer("num_attention_heads", 1, 1024),
        query_rank=f.integer("q_lora_rank", 1, 1 << 17) if "q_lora_rank" in f else None,
        rank=f.integer("kv_lora_rank", 1, 1 << 17),
        plain=f.integer("qk_nope_head_dim", 1, 1 << 14),
        rotary=f.integer("qk_rope_head_dim", 2, 1 << 14),
        value=f.integer("v_head_dim", 1, 1 << 14),
        norm=INNER,
        bias=f.flag("attention_bias", default=False),
    )


def rotary(config: Config, f: Fields, mixer: LatentAttention) -> Rotary:
    """The rotation of the channels that carry the position: of all of them, unless the config says otherwise."""
    pairing = "interleaved" if f.flag("rope_interleave", default=True) else "halves"
    context = f.integer("max_position_embeddings", 1, 1 << 30)
    turned = {**config, "partial_rotary_factor": config.get("partial_rotary_factor") or 1.0}
    found = rope.rotary(turned, mixer.rotary, context, pairing)
    if found.widths != (mixer.rotary,):
        raise ConfigError(f"config.json: partial_rotary_factor: all {mixer.rotary} channels must be turned")
    for field in ("rope_scaling", "rope_parameters"):
        if isinstance(f.values.get(field), dict) and f.values[field].get("mscale_all_dim"):
            raise ConfigError(f"config.json: {field}: mscale_all_dim, which scales scores, is not supported")
    return found


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names."""
    assert isinstance(spec.rotary, Rotary)
    return {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "rope_interleave": spec.rotary.pairing == "interleaved",
        "topk_method": "noaux_tc",
        "mlp_layer_types": layer_types(spec),
        **latent_config(spec.blocks[0].mixer),
        **common_config(spec),
        **rope.fields(spec.rotary, spec.blocks[0].mixer.rotary),
    }


def layer_types(spec: Spec) -> list[str]:
    """What each layer has: newer readers of this format ask for a list and no number."""
    return ["sparse" if isinstance(block.feed_forward, Experts) else "dense" for block in spec.blocks]


def latent_config(mixer: LatentAttention) -> dict[str, Any]:
    """The way back from `latent`. Raises ConfigError for inner norms that no config can speak of."""
    if mixer.norm != INNER:
        raise ConfigError(f"this format has no field for the norms inside of the attention: they are {INNER}")
    return {
        "attention_bias": mixer.bias,
        "kv_lora_rank": mixer.rank,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "q_lora_rank": mixer.query_rank,
        "qk_nope_head_dim": mixer.plain,
        "qk_rope_head_dim": mixer.rotary,
        "v_head_dim": mixer.value,
    }


def latent_names(mixer: str) -> tuple[Name, ...]:
    """The tensors of the attention, which is `mixer` in our blocks."""
    return tuple(
        Name(f"model.layers.{{i}}.self_attn.{file}", f"blocks.{{i}}.{mixer}.{ours}")
        for file, ours in {
            "q_proj": "query",
            "q_a_proj": "query_down",
            "q_a_layernorm": "query_norm",
            "q_b_proj": "query_up",
            "kv_a_proj_with_mqa": "down",
            "kv_a_layernorm": "norm",
            "kv_b_proj": "up",
            "o_proj": "out",
        }.items()
    )


NAMES = (*FRAME, *latent_names("mixer"), *FEED_FORWARD)

FLASH = build(
    layers=47,
    dense=1,
    width=2048,
    inner=10240,
    experts=Experts(swiglu(1536), count=64, top=4, shared=1, router=Router(1, 1, normalised=True, scale=1.8)),
    mixers=(
        LatentAttention(heads=20, query_rank=768, rank=512, plain=192, rotary=64, value=256, norm=INNER, bias=False),
    )
    * 47,
    vocabulary=154880,
    context=202752,
    norm=RMSNorm(1e-5, weight_first=False),
    rotary=Rotary(widths=(64,), pairing="interleaved", base=1e6, scaling=Plain(), rounding=None),
    pad=154820,
    stop=(154820, 154827, 154829),
)
RELEASES = (Release("glm-4.7-flash", "zai-org/GLM-4.7-Flash", 2026, FLASH, BRAIN, 48),)

GENERATION = Generation(
    name="glm4_moe_lite",
    recognises=lambda config: config.get("model_type") == "glm4_moe_lite",
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=NEXT,
    releases=RELEASES,
    following=FOLLOWING,
)
