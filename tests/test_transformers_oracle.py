"""transformers as a second oracle: models it saves are loaded and computed alike, and it loads what we save.

transformers computes its rotary table, norms and softmax in float32 whatever the model's dtype. Under `doubled` the
names it asks for float32 by mean float64, so that it becomes a float64 reference and the comparison can see 1e-9.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import GOLDENS
from safetensors.torch import load_file
from torch import Tensor
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

from glm.export import save_pretrained
from glm.family import glm4, glm4_0414, release
from glm.generation import generate
from glm.layout import Layout
from glm.model import GLM
from glm.spec import Spec

OLD = {"rope_theta": 100.0, "partial_rotary_factor": 0.5}  # so low that YaRN's ramp lies within four frequencies
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole_head": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "no_bias": {"attention_bias": False},
    "tied": {"tie_word_embeddings": True},
    "one_key_head": {"num_key_value_heads": 1},
    "as_many_key_heads": {"num_key_value_heads": 6},
    "published_eps": {"rms_norm_eps": 1.5625e-7},
    "defaults": {},
    "linear_old": OLD | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "linear_new": {"rope_parameters": OLD | {"rope_type": "linear", "factor": 3.0}},
    "yarn_of_the_context": {"rope_parameters": OLD | {"rope_type": "yarn", "factor": 1.5}},
    "yarn_old": OLD | {"rope_scaling": YARN},
    "yarn_new": {"rope_parameters": OLD | YARN},
    "yarn_betas": {"rope_parameters": OLD | YARN | {"beta_fast": 4.0, "beta_slow": 0.5}},
    "yarn_whole_channels": {"rope_parameters": OLD | YARN | {"beta_fast": 4.0, "truncate": False}},
    "yarn_attention_factor": {"rope_parameters": OLD | YARN | {"attention_factor": 1.3}},
    "yarn_mscale": {"rope_parameters": OLD | YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
}
CLASSES = {"glm": (GlmConfig, GlmForCausalLM), "glm4": (Glm4Config, Glm4ForCausalLM)}
SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 6 · 16 is not 40
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "pad_token_id": 0,
    "eos_token_id": 7,
}


@contextmanager
def doubled() -> Iterator[None]:
    """What transformers writes as float32 is float64 in here."""
    names = {name: getattr(torch, name) for name in ("float32", "float")}
    to_float = Tensor.float
    torch.set_default_dtype(torch.float64)
    try:
        for name in names:
            setattr(torch, name, torch.float64)
        Tensor.float = Tensor.double  # type: ignore[method-assign]
        yield
    finally:
        for name, dtype in names.items():
            setattr(torch, name, dtype)
        Tensor.float = to_float  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


def oracle(folder: Path) -> Any:
    """The model in a folder as transformers computes it, in float64; every tensor accounted for."""
    _, cls = CLASSES[json.loads((folder / "config.json").read_text())["model_type"]]
    _, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    with doubled():
        model = cls(cls.config_class.from_pretrained(folder, attn_implementation="eager"))
        model.load_state_dict({name: x.double() for name, x in tensors.items()}, strict=True)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float64
    return model.eval()


def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """What transformers makes of ids."""
    model = oracle(folder)
    with doubled():
        logits: Tensor = model(ids).logits
    return logits


@pytest.fixture(scope="module", params=[f"{kind}-{name}" for kind in CLASSES for name in VARIANTS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers saves it. Some configs are then spelt otherwise."""
    kind, _, name = request.param.partition("-")
    config_class, cls = CLASSES[kind]
    torch.manual_seed(len(name))
    model = cls(config_class(**SIZES | VARIANTS[name]))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, and all so large that a mistake cannot hide
            scale = 0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(float(parameter.dim() == 1 and "bias" not in name), scale)
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    if "rope_scaling" in VARIANTS[name]:
        del config["rope_parameters"]
        config |= VARIANTS[name]
    if name == "defaults":
        for field in ("rope_parameters", "attention_bias", "hidden_act", "tie_word_embeddings"):
            config.pop(field, None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to 1e-9 of the rms."""
    return bool((ours - theirs).abs().max() <= 1e-9 * theirs.square().mean().sqrt())


def random_ids(*shape: int) -> Tensor:
    return torch.randint(8, 120, shape, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def test_logits_and_hidden_states(folder: Path) -> None:
    model, reference, ids = GLM.from_pretrained(folder, dtype=torch.float64), oracle(folder), random_ids(2, 40)
    with doubled():
        theirs = reference(ids, output_hidden_states=True)
    logits, states = model(ids, hidden=True)
    assert close(logits, theirs.logits)
    for ours, hidden in zip([*states[:-2], states[-1]], theirs.hidden_states, strict=True):
        assert close(ours, hidden)  # transformers keeps the last block's output only after the final norm


@torch.inference_mode()
def test_padding_and_far_positions(folder: Path) -> None:
    model, reference, ids = GLM.from_pretrained(folder, dtype=torch.float64), oracle(folder), random_ids(3, 12)
    real = torch.arange(12) >= torch.tensor([[0], [4], [9]])
    places = (real.long().cumsum(-1) - 1).clamp(min=0)
    with doubled():
        padded = reference(ids, attention_mask=real.long(), position_ids=places).logits
        far = reference(ids, position_ids=torch.arange(12)[None] * 7 + 30).logits
    assert close(model(ids, model.layout(ids, real))[real], padded[real])
    gapped = Layout.rule((torch.arange(12) * 7 + 30).expand(3, -1)[..., None])
    assert close(model(ids, gapped), far)


@torch.inference_mode()
def test_cached_decode_and_greedy_ids(folder: Path) -> None:
    model, reference, ids = GLM.from_pretrained(folder, dtype=torch.float64), oracle(folder), random_ids(2, 9)
    with doubled():
        generated = reference.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        theirs = reference(generated).logits
    assert generate(model, ids.tolist(), max_new_tokens=8, stop=()) == generated[:, 9:].tolist()
    cache = model.new_cache(2, 17)
    steps = [model(ids, cache=cache)] + [model(token, cache=cache) for token in generated[:, 9:].split(1, dim=1)]
    assert close(torch.cat(steps, dim=1), theirs)


@torch.inference_mode()
def test_the_way_back(folder: Path, tmp_path: Path) -> None:
    model, ids = GLM.from_pretrained(folder, dtype=torch.float32), random_ids(1, 20)
    save_pretrained(model, tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert close(logits_of(tmp_path / "again", ids), logits_of(folder, ids))  # the config says the same as well


def small(spec: Spec) -> Spec:
    """A release's spec with small numbers, everything else as it is."""
    block = replace(
        spec.blocks[0],
        mixer=replace(spec.blocks[0].mixer, heads=4, groups=2, head_width=12),
        feed_forward=replace(spec.blocks[0].feed_forward, inner=20),
    )
    width = round(12 * spec.rotary.widths[0] / spec.blocks[0].mixer.head_width)
    return replace(
        spec,
        vocabulary=90,
        width=32,
        blocks=(block,) * 2,
        pad=0,
        stop=(1,),
        rotary=replace(spec.rotary, widths=(width,)),
    )


@pytest.mark.parametrize(
    "name", [known.name for generation in (glm4, glm4_0414) for known in generation.GENERATION.releases]
)
@torch.inference_mode()
def test_every_release_can_be_exported(name: str, tmp_path: Path) -> None:
    spec = small(release(name).spec)
    model = GLM(spec, dtype=torch.float64, seed=1)
    ids = torch.arange(2, 40)[None]
    save_pretrained(model, tmp_path / name, dtype=torch.float32)
    rounded = GLM.from_pretrained(tmp_path / name, dtype=torch.float64)
    assert rounded.spec == spec
    assert close(rounded(ids), logits_of(tmp_path / name, ids))


@pytest.mark.parametrize("case", ["glm4-9b-chatglm_format", "chatglm3-base", "chatglm3-sensitive"])
@torch.inference_mode()
def test_chatglm_names_become_hf_names(case: str, tmp_path: Path) -> None:
    model = GLM.from_pretrained(GOLDENS / case, dtype=torch.float32)
    save_pretrained(model, tmp_path / "hf", generation="glm4")
    inputs = load_file(GOLDENS / case / "reference.safetensors")
    exact = load_file(GOLDENS / case / "reference64.safetensors")
    assert close(logits_of(tmp_path / "hf", inputs["single.input_ids"]), exact["single.logits"])
    save_pretrained(GLM.from_pretrained(tmp_path / "hf"), tmp_path / "back", generation="chatglm2")
    before = load_file(GOLDENS / case / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() - after.keys() <= {"transformer.rotary_pos_emb.inv_freq"}
    assert all(torch.equal(before[name], x) for name, x in after.items())


@pytest.mark.parametrize("folder", ["glm4-yarn_whole_channels", "glm-linear_new"], indirect=True)
@torch.inference_mode()
def test_every_number_of_the_scaling_is_seen(folder: Path) -> None:
    model, ids = GLM.from_pretrained(folder, dtype=torch.float64), random_ids(1, 40)
    theirs, rotary = logits_of(folder, ids), model.spec.rotary
    assert close(model(ids), theirs)
    for field in dataclasses.fields(rotary.scaling):
        value = getattr(rotary.scaling, field.name)
        changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 1.001
        scaling = replace(rotary.scaling, **{field.name: changed})
        model.spec = replace(model.spec, rotary=replace(rotary, scaling=scaling))
        assert not close(model(ids), theirs), field.name
