"""The rotary fields of a Hugging Face config.json, in their older and newer spelling.

Older: `rope_theta`, `partial_rotary_factor` and `rope_scaling` at the top; newer: all of it in `rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any

from glm.errors import ConfigError
from glm.family.generation import Config
from glm.fields import Fields
from glm.positions import Interpolation, Plain, Rotary, Scaling, Yarn


def rotary(config: Config, head_width: int, context: int, pairing: str) -> Rotary:
    """The rotation a config describes. Raises ConfigError for one we do not know."""
    merged: dict[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    merged |= {key: config[key] for key in merged if config.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key)
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise ConfigError(f"config.json: {key} must be an object, not {type(part).__name__}")
        merged |= {name: value for name, value in part.items() if value is not None}
    f = Fields(merged, "config.json (rope_parameters)")
    width = int(head_width * f.number("partial_rotary_factor", 0, 1))
    if width % 2 or width == 0:
        raise ConfigError(f"config.json: partial_rotary_factor turns {width} of {head_width} channels: not pairs")
    return Rotary(
        widths=(width,),
        pairing=pairing,
        base=f.number("rope_theta", 1, 1e15),
        scaling=scaling(merged, f, context),
        rounding=None,
    )


def scaling(merged: Mapping[str, Any], f: Fields, context: int) -> Scaling:
    """How positions are stretched: `rope_type` (or, older, `type`) default, linear or yarn."""
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind == "default":
        return Plain()
    factor = f.number("factor", 1e-6, 1e6)
    if kind == "linear":
        return Interpolation(factor)
    if kind == "yarn":
        return Yarn(
            factor=factor,
            original=f.integer("original_max_position_embeddings", 1, 1 << 30, default=context),
            beta_fast=f.number("beta_fast", 1e-6, 1e6, default=32.0),
            beta_slow=f.number("beta_slow", 1e-6, 1e6, default=1.0),
            gain=yarn_gain(f, factor),
            truncate=f.flag("truncate", default=True),
        )
    raise ConfigError(f"config.json: rope_type {kind!r} is not one of default, linear, yarn")


def yarn_gain(f: Fields, factor: float) -> float:
    """`attention_factor`, or 0.1 ln(factor) + 1 (YaRN, eq. 22), or the ratio of two such with mscale weights."""

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in f:
        return f.number("attention_factor", 0, 1e6)
    mscale, all_dim = f.number("mscale", 0, 1e6, default=0.0), f.number("mscale_all_dim", 0, 1e6, default=0.0)
    return gain(mscale) / gain(all_dim) if mscale and all_dim else gain(1.0)


def fields(rotary: Rotary, head_width: int) -> dict[str, Any]:
    """The config.json fields of a rotation: the older spelling, which both old and new readers take."""
    out: dict[str, Any] = {
        "rope_theta": rotary.base,
        "partial_rotary_factor": rotary.widths[0] / head_width,
    }
    if isinstance(rotary.scaling, Interpolation):
        out["rope_scaling"] = {"rope_type": "linear", "factor": rotary.scaling.factor}
    if isinstance(rotary.scaling, Yarn):
        out["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": rotary.scaling.factor,
            "original_max_position_embeddings": rotary.scaling.original,
            "beta_fast": rotary.scaling.beta_fast,
            "beta_slow": rotary.scaling.beta_slow,
            "attention_factor": rotary.scaling.gain,
            "truncate": rotary.scaling.truncate,
        }
    return out
