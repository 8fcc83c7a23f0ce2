"""GLM-4-0414 and GLM-Z1 (2025): model_type "glm4".

`glm4.py` with a second norm on what each sublayer adds (the sandwich), and YaRN for contexts beyond 32768 tokens
where `rope_scaling` asks for it. On disk the norm before the feed-forward is called post_attention_layernorm.
"""

from typing import Any

import torch

from glm.family import glm4
from glm.family.generation import Config, Generation, Name, Release
from glm.residual import Sandwich
from glm.spec import Spec


def spec(config: Config, name: str) -> Spec:
    """A config.json of model_type "glm4" as a spec. Raises ConfigError."""
    return glm4.spec(config, name, Sandwich())


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names."""
    return glm4.config(spec) | {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}


NAMES = (
    *glm4.NAMES,
    Name("model.layers.{i}.post_self_attn_layernorm", "blocks.{i}.wire_mixer.after"),
    Name("model.layers.{i}.post_mlp_layernorm", "blocks.{i}.wire_feed_forward.after"),
)


def published(layers: int, width: int, inner: int, heads: int, groups: int, context: int, qkv_bias: bool) -> Spec:
    """The numbers in which the releases differ."""
    return glm4.build(
        layers=layers,
        width=width,
        inner=inner,
        heads=heads,
        groups=groups,
        head_width=128,
        vocabulary=151552,
        context=context,
        eps=1e-5,
        rotary=glm4.half_rotary(1e4),
        qkv_bias=qkv_bias,
        pad=151329,
        stop=(151329, 151336, 151338),
        wiring=Sandwich(),
    )


BRAIN = torch.bfloat16
SPEC_9B = published(40, 4096, 13696, 32, 2, 32768, qkv_bias=True)
SPEC_32B = published(61, 6144, 23040, 48, 2, 32768, qkv_bias=False)
RUMINATION = published(61, 6144, 23040, 48, 8, 131072, qkv_bias=False)
RELEASES = (
    Release("glm-4-9b-0414", "zai-org/GLM-4-9B-0414", 2025, SPEC_9B, BRAIN, 4),
    Release("glm-4-32b-0414", "zai-org/GLM-4-32B-0414", 2025, SPEC_32B, BRAIN, 14),
    Release("glm-4-32b-base-0414", "zai-org/GLM-4-32B-Base-0414", 2025, SPEC_32B, BRAIN, 14),
    Release("glm-z1-9b-0414", "zai-org/GLM-Z1-9B-0414", 2025, SPEC_9B, BRAIN, 4),
    Release("glm-z1-32b-0414", "zai-org/GLM-Z1-32B-0414", 2025, SPEC_32B, BRAIN, 14),
    Release("glm-z1-rumination-32b-0414", "zai-org/GLM-Z1-Rumination-32B-0414", 2025, RUMINATION, BRAIN, 14),
)

GENERATION = Generation(
    name="glm4_0414",
    recognises=lambda config: config.get("model_type") == "glm4",
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=glm4.GENERATION.ignorable,
    releases=RELEASES,
)
