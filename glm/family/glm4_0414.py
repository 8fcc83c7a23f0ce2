"""GLM-4-0414 and GLM-Z1 (2025): model_type "glm4".

`glm4.py` with a second norm on what each sublayer adds (the sandwich), and YaRN for contexts beyond 32768 tokens
where `rope_scaling` asks for it. On disk the norm before the feed-forward is called post_attention_layernorm.
"""

from typing import Any

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

RELEASES: tuple[Release, ...] = ()

GENERATION = Generation(
    name="glm4_0414",
    recognises=lambda config: config.get("model_type") == "glm4",
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=glm4.GENERATION.ignorable,
    releases=RELEASES,
)
