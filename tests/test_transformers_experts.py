"""transformers as a second oracle for expert models, both ways: what it saves is computed alike, what we save it loads.

As in test_transformers_oracle.py it computes in float64. Its expert models have other names in memory than on disk, so
a model is first loaded as transformers loads it, and its numbers then go into one of float64.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_transformers_oracle import close, doubled, random_ids
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

from glm.attention import Attention
from glm.errors import ConfigError
from glm.experts import Experts
from glm.export import save_pretrained
from glm.family import glm4_moe, glm4_moe_lite, glm_moe_dsa, release
from glm.generation import generate
from glm.latent_attention import LatentAttention
from glm.model import GLM
from glm.spec import Block, Spec

CLASSES = {
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
}
COMMON: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 7,
}
LATENT = COMMON | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SIZES = {
    "glm4_moe": COMMON | {"head_dim": 16},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"index_topk": 5, "index_head_dim": 12, "index_n_heads": 10, "first_k_dense_replace": 1},
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "glm4_moe plain": {},
    "glm4_moe qk_norm": {"use_qk_norm": True, "attention_bias": True},
    "glm4_moe groups": GROUPS,
    "glm4_moe unnormalised": {"norm_topk_prob": False, "tie_word_embeddings": True},
    "glm4_moe two_shared": {"n_shared_experts": 2, "first_k_dense_replace": 2},
    "glm4_moe no_dense": {"first_k_dense_replace": 0},
    "glm4_moe yarn": {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    "glm4_moe_lite plain": {},
    "glm4_moe_lite no_bottleneck": {"q_lora_rank": None} | GROUPS,
    "glm4_moe_lite halves": {"rope_interleave": False, "attention_bias": True},
    "glm4_moe_lite yarn": {"rope_parameters": YARN},
    "glm4_moe_lite types": {"mlp_layer_types": ["dense", "dense", "sparse"]},
    "glm_moe_dsa plain": {},
    "glm_moe_dsa shared": {"indexer_types": ["full", "shared", "full"], "attention_bias": True},
    "glm_moe_dsa pattern": {"index_topk_pattern": "FSS"},
    "glm_moe_dsa every_other": {"num_hidden_layers": 4, "index_topk_freq": 2},
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers saves it, with a routing bias that matters."""
    kind, name = request.param.split()
    config_class, cls = CLASSES[kind]
    torch.manual_seed(len(name))
    model = cls(config_class(**SIZES[kind] | VARIANTS[request.param]))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(float(parameter.dim() == 1), scale)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    path = tmp_path_factory.mktemp(kind) / "checkpoint"
    model.save_pretrained(path)
    return path


def oracle(folder: Path) -> Any:
    """The model in a folder as transformers computes it, in float64; every tensor accounted for."""
    _, cls = CLASSES[json.loads((folder / "config.json").read_text())["model_type"]]
    single, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with doubled():
        config = cls.config_class.from_pretrained(folder, attn_implementation="eager")
        config._experts_implementation = "eager"
        model = cls(config)
        model.load_state_dict({name: x.double() for name, x in single.state_dict().items()}, strict=True)
    return model.eval()


def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """What transformers makes of ids."""
    model = oracle(folder)
    with doubled():
        logits: Tensor = model(ids).logits
    return logits


@torch.inference_mode()
def test_logits_and_hidden_states(folder: Path) -> None:
    model, reference, ids = GLM.from_pretrained(folder, dtype=torch.float64), oracle(folder), random_ids(2, 30)
    with doubled():
        theirs = reference(ids, output_hidden_states=True)
    logits, states = model(ids, hidden=True)
    assert close(logits, theirs.logits)
    for ours, hidden in zip([*states[:-2], states[-1]], theirs.hidden_states, strict=True):
        assert close(ours, hidden)


@torch.inference_mode()
def test_padding_decoding_and_greedy_ids(folder: Path) -> None:
    model, reference, ids = GLM.from_pretrained(folder, dtype=torch.float64), oracle(folder), random_ids(3, 12)
    real = torch.arange(12) >= torch.tensor([[0], [4], [9]])
    places = (real.long().cumsum(-1) - 1).clamp(min=0)
    with doubled():
        padded = reference(ids, attention_mask=real.long(), position_ids=places).logits
        generated = reference.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        theirs = reference(generated).logits
    assert close(model(ids, model.layout(ids, real))[real], padded[real])
    assert generate(model, ids.tolist(), max_new_tokens=6, stop=()) == generated[:, 12:].tolist()
    cache = model.new_cache(3, 18)
    steps = [model(ids, cache=cache)] + [model(part, cache=cache) for part in generated[:, 12:].split([1, 3, 2], dim=1)]
    assert close(torch.cat(steps, dim=1), theirs)


@torch.inference_mode()
def test_the_way_back(folder: Path, tmp_path: Path) -> None:
    model, ids = GLM.from_pretrained(folder, dtype=torch.float32), random_ids(1, 20)
    save_pretrained(model, tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert GLM.from_pretrained(tmp_path / "again").spec == model.spec
    assert close(logits_of(tmp_path / "again", ids), logits_of(folder, ids))  # the config says the same as well


def small(spec: Spec) -> Spec:
    """A release's spec with small numbers and three layers, everything else as it is."""

    def mixer(whole: Any) -> Any:
        if isinstance(whole, Attention):
            return replace(whole, heads=4, groups=2, head_width=16)
        if isinstance(whole, LatentAttention):
            return replace(whole, heads=4, query_rank=24, rank=20, plain=12, rotary=8, value=16)
        indexer = replace(whole.indexer, heads=10, width=12, top=9)
        return replace(whole, attention=mixer(whole.attention), indexer=indexer)

    def feed_forward(whole: Any) -> Any:
        if isinstance(whole, Experts):
            return replace(whole, expert=feed_forward(whole.expert), count=10)
        return replace(whole, inner=20)

    def block(whole: Block) -> Block:
        return replace(whole, mixer=mixer(whole.mixer), feed_forward=feed_forward(whole.feed_forward))

    blocks = (spec.blocks[0], *spec.blocks[-2:])
    rotary = replace(spec.rotary, widths=(8,))
    return replace(spec, vocabulary=90, width=32, blocks=tuple(map(block, blocks)), pad=0, stop=(1,), rotary=rotary)


RELEASES = [one.name for family in (glm4_moe, glm4_moe_lite, glm_moe_dsa) for one in family.RELEASES]


@pytest.mark.parametrize("name", RELEASES)
@torch.inference_mode()
def test_every_release_can_be_exported(name: str, tmp_path: Path) -> None:
    spec = small(release(name).spec)
    model = GLM(spec, dtype=torch.float64, seed=1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter *= 10  # else every expert is worth one half
    save_pretrained(model, tmp_path / name, dtype=torch.float32)
    rounded, ids = GLM.from_pretrained(tmp_path / name, dtype=torch.float64), torch.arange(2, 40)[None]
    assert rounded.spec == spec
    assert close(rounded(ids), logits_of(tmp_path / name, ids))


@pytest.mark.parametrize(
    ("family", "changed", "field"),
    [
        (glm4_moe, {"scoring_func": "softmax"}, "scoring_func"),
        (glm4_moe, {"mlp_layer_types": ["dense", "sparse", "dense"]}, "mlp_layer_types"),
        (glm4_moe, {"num_key_value_heads": 3}, "key heads"),
        (glm4_moe_lite, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (glm4_moe_lite, {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "mscale_all_dim"),
        (glm_moe_dsa, {"indexer_types": ["shared", "full", "full"]}, "indexer_types"),
        (glm_moe_dsa, {"index_topk_pattern": "FSX"}, "indexer_types"),
        (glm_moe_dsa, {"indexer_rope_interleave": False}, "indexer_rope_interleave"),
    ],
)
def test_what_cannot_be_computed_is_refused(family: Any, changed: dict[str, Any], field: str) -> None:
    config = {"rms_norm_eps": 1e-5, **SIZES[family.GENERATION.name], **changed}
    family.spec({**config, **dict.fromkeys(changed)} | {"num_key_value_heads": 4}, "")
    with pytest.raises(ConfigError, match=field):
        family.spec(config, "")
