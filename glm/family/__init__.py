"""The generations: one file each, everything particular to it and nothing else. This file is their register."""

from collections.abc import Mapping
from typing import Any

from glm.errors import ConfigError, GLMError
from glm.family import (
    chatglm,
    chatglm2,
    glm4,
    glm4_0414,
    glm4_moe,
    glm4_moe_lite,
    glm_10b,
    glm_130b,
    glm_moe_dsa,
)
from glm.family.generation import Generation, Release

GENERATIONS: tuple[Generation, ...] = (
    glm_10b.GENERATION,
    glm_130b.GENERATION,
    chatglm.GENERATION,
    chatglm2.GENERATION,
    glm4.GENERATION,
    glm4_0414.GENERATION,
    glm4_moe.GENERATION,
    glm4_moe_lite.GENERATION,
    glm_moe_dsa.GENERATION,
)


def recognise(config: Mapping[str, Any]) -> Generation:
    """The generation a config.json belongs to. Raises ConfigError when it is none of ours."""
    for generation in GENERATIONS:
        if generation.recognises(config):
            return generation
    raise ConfigError(
        f"config.json: model_type {config.get('model_type')!r} with these fields is no GLM this package knows "
        f"({', '.join(generation.name for generation in GENERATIONS)})"
    )


def generation_of(name: str) -> Generation:
    """The generation that published the release `name` (in any case). Raises GLMError with the names there are."""
    for generation in GENERATIONS:
        if any(release.name == name.lower() for release in generation.releases):
            return generation
    raise GLMError(f"no release is called {name!r}; the names are {', '.join(releases())}")


def releases() -> dict[str, Release]:
    """Every published checkpoint with a literal spec, by name."""
    return {release.name: release for generation in GENERATIONS for release in generation.releases}


def release(name: str) -> Release:
    """The release called `name`. Raises GLMError with the names there are."""
    generation_of(name)
    return releases()[name.lower()]
