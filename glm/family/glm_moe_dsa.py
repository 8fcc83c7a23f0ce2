"""GLM-5 and GLM-5.1 (2026): model_type "glm_moe_dsa".

`glm4_moe_lite.py` with an indexer beside each latent attention. A config may let some layers go without and attend to
what the layer below has chosen, as a list `indexer_types`, a pattern such as "FSSF", or a count and an offset.
"""

from dataclasses import replace
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
from glm.family.glm4_moe_lite import INNER, latent, latent_config, latent_names, layer_types, rotary
from glm.fields import Fields
from glm.latent_attention import LatentAttention
from glm.norms import LayerNorm, RMSNorm
from glm.positions import Plain, Rotary
from glm.sparse_attention import Indexer, SparseAttention
from glm.spec import Spec

KEY_NORM = LayerNorm(1e-6)
KINDS = {"F": "full", "S": "shared"}


def spec(config: Config, name: str) -> Spec:
    """A config.json of model_type "glm_moe_dsa" as a spec. Raises ConfigError."""
    f = Fields(config, "config.json")
    attention = latent(f)
    f.choice("indexer_rope_interleave", (f.flag("rope_interleave", default=True),), default=True)
    indexer = Indexer(
        heads=f.integer("index_n_heads", 1, 1024),
        width=f.integer("index_head_dim", 1, 1 << 14),
        top=f.integer("index_topk", 1, 1 << 30),
        norm=KEY_NORM,
    )
    full = SparseAttention(attention, indexer)
    layers = f.integer("num_hidden_layers", 1, 1000)
    kinds = {"full": full, "shared": replace(full, indexer=None)}
    return build(
        layers=layers,
        dense=dense_layers(f, layers),
        mixers=tuple(kinds[kind] for kind in indexer_types(f, layers)),
        rotary=rotary(config, f, attention),
        **common(f, rms(f)),
    )


def indexer_types(f: Fields, layers: int) -> list[str]:
    """Which layers have an indexer of their own: "full" or "shared" for each."""
    found = f.values.get("indexer_types", f.values.get("index_topk_pattern"))
    f.read |= {"indexer_types", "index_topk_pattern"}
    if found is None:
        every = f.integer("index_topk_freq", 1, 1000, default=1)
        offset = f.integer("index_skip_topk_offset", 0, 1000, default=2)
        found = ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(layers)]
    if isinstance(found, str):
        found = [KINDS.get(letter) for letter in found]
    if not isinstance(found, list) or len(found) != layers or any(kind not in KINDS.values() for kind in found):
        f.refuse("indexer_types", f'a list of {layers} times "full" or "shared"', found)
    if found[0] != "full":
        f.refuse("indexer_types", '"full" in the first layer', found)
    return [str(kind) for kind in found]


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names."""
    mixer = spec.blocks[0].mixer
    if mixer.indexer.norm != KEY_NORM:
        raise ConfigError(f"this format has no field for the norm of index keys: it is {KEY_NORM}")
    types = ["shared" if block.mixer.indexer is None else "full" for block in spec.blocks]
    assert isinstance(spec.rotary, Rotary)
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "index_head_dim": mixer.indexer.width,
        "index_n_heads": mixer.indexer.heads,
        "index_topk": mixer.indexer.top,
        **({"indexer_types": types} if "shared" in types else {}),
        "indexer_rope_interleave": spec.rotary.pairing == "interleaved",
        "rope_interleave": spec.rotary.pairing == "interleaved",
        "topk_method": "noaux_tc",
        "mlp_layer_types": layer_types(spec),
        **latent_config(mixer.attention),
        **common_config(spec),
        **rope.fields(spec.rotary, mixer.attention.rotary),
    }


INDEXER = tuple(
    Name(f"model.layers.{{i}}.self_attn.indexer.{file}", f"blocks.{{i}}.mixer.indexer.{ours}")
    for file, ours in {"wq_b": "query", "wk": "down", "k_norm": "norm", "weights_proj": "weigh"}.items()
)
NAMES = (*FRAME, *latent_names("mixer.attention"), *INDEXER, *FEED_FORWARD)

FIVE = build(
    layers=78,
    dense=3,
    width=6144,
    inner=12288,
    experts=Experts(swiglu(2048), count=256, top=8, shared=1, router=Router(1, 1, normalised=True, scale=2.5)),
    mixers=(
        SparseAttention(
            LatentAttention(
                heads=64, query_rank=2048, rank=512, plain=192, rotary=64, value=256, norm=INNER, bias=False
            ),
            Indexer(heads=32, width=128, top=2048, norm=KEY_NORM),
        ),
    )
    * 78,
    vocabulary=154880,
    context=202752,
    norm=RMSNorm(1e-5, weight_first=False),
    rotary=Rotary(widths=(64,), pairing="interleaved", base=1e6, scaling=Plain(), rounding=None),
    pad=154820,
    stop=(154820, 154827, 154829),
)
RELEASES = (
    Release("glm-5", "zai-org/GLM-5", 2026, FIVE, BRAIN, 282),
    Release("glm-5.1", "zai-org/GLM-5.1", 2026, FIVE, BRAIN, 282),
)

GENERATION = Generation(
    name="glm_moe_dsa",
    recognises=lambda config: config.get("model_type") == "glm_moe_dsa",
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=NEXT,
    releases=RELEASES,
    following=FOLLOWING,
)
