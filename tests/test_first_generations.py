"""The GLMs of 2021 and GLM-130B as checkpoints: recognised, strict, written back to the published names, ragged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import GOLDENS
from safetensors.torch import load_file, save_file

import glm
from glm.convert import convert
from glm.errors import CheckpointError, ConfigError
from glm.export import save_pretrained
from glm.family import glm_10b, glm_130b, recognise
from glm.generation import generate
from glm.layout import Blank, InTurn
from glm.model import GLM
from glm.residual import Scaled
from glm.synthesize import synthesize
from glm.verify import verify

CASES = {"glm10b-base": "glm_10b", "glm10b-sensitive": "glm_10b", "glm130b-base": "glm_130b"}
TEN = json.loads((GOLDENS / "glm10b-base" / "config.json").read_text())
LARGE = json.loads((GOLDENS / "glm130b-base" / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_written_back_to_the_published_names(tmp_path: Path, case: str) -> None:
    model = GLM.from_pretrained(GOLDENS / case)
    save_pretrained(model, tmp_path / "back")
    original = load_file(GOLDENS / case / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert original.keys() - back.keys() <= {"mixins.rotary-embedding.rotary_emb.inv_freq"}
    assert all(torch.equal(original[name], x) for name, x in back.items())
    assert GLM.from_pretrained(tmp_path / "back").spec == model.spec
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    given = json.loads((GOLDENS / case / "config.json").read_text())
    assert recognise(written).name == CASES[case]
    assert {key: written[key] for key in given if key != "auto_map"} == {
        key: value for key, value in given.items() if key != "auto_map"
    } | ({"torch_dtype": "float32"} if "torch_dtype" in given else {})
    for name in ("meta.json", "reference.safetensors", "reference64.safetensors"):
        shutil.copyfile(GOLDENS / case / name, tmp_path / "back" / name)
    assert verify(tmp_path / "back").ok


@pytest.mark.parametrize("case", CASES)
def test_published_bin_files(tmp_path: Path, case: str) -> None:
    tensors = load_file(GOLDENS / case / "model.safetensors")
    (tmp_path / "old").mkdir()
    shutil.copyfile(GOLDENS / case / "config.json", tmp_path / "old" / "config.json")
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    convert(tmp_path / "old", tmp_path / "new", quiet=True)
    new = load_file(tmp_path / "new" / "model.safetensors")
    assert new.keys() == tensors.keys()
    assert all(torch.equal(new[name], x) for name, x in tensors.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("change", ["less", "more", "shape"])
def test_loading_is_strict(tmp_path: Path, case: str, change: str) -> None:
    folder = tmp_path / case
    shutil.copytree(GOLDENS / case, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.layers.1.mlp.dense_h_to_4h.bias"
    if change == "less":
        del tensors[name]
    elif change == "more":
        tensors["transformer.layers.1.mlp.gate.bias"] = torch.ones(2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer\.layers\.1\.mlp"):
        GLM.from_pretrained(folder)


def test_two_generations_of_one_model_type_are_told_apart() -> None:
    later = json.loads((GOLDENS / "hf_glm-base" / "config.json").read_text())
    assert later["model_type"] == TEN["model_type"] == "glm"
    assert (recognise(later).name, recognise(TEN).name) == ("glm4", "glm_10b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TEN | {"relative_encoding": True}, "relative_encoding = True was never published"),
        (TEN | {"output_predict": False}, "output_predict = False"),
        (TEN | {"spell_length": 5}, "spell_length"),
        (TEN | {"hidden_act": "silu"}, "hidden_act"),
        (TEN | {"num_attention_heads": 5}, "48 is not a multiple of 5"),
        (TEN | {"vocab_size": 100, "mask_token_id": 100}, "too small for the special tokens"),
        (LARGE | {"layernorm_order": "pre"}, "layernorm_order"),
        (LARGE | {"num_attention_heads": 16}, "channels of a head"),
        ({key: value for key, value in LARGE.items() if key != "sop_token_id"}, "sop_token_id.* is missing"),
    ],
)
def test_a_config_that_was_never_published(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recognise(config).spec(config, "")


def test_fields_that_have_two_values() -> None:
    spec = glm_10b.spec(TEN | {"hidden_act": "gelu_new", "block_position_encoding": False}, "")
    assert spec.blocks[0].feed_forward.branches == ("gelu_tanh",)
    assert spec.learned is not None
    assert (spec.learned.length, spec.learned.axes) == (64, 1)  # with the second table the first has one row more
    assert isinstance(spec.reading, InTurn)
    assert spec.reading.axes == 1
    assert glm_10b.spec(glm_10b.config(spec), "") == spec
    own = glm_10b.spec(TEN | {"mask_token_id": 7, "eop_token_id": 9}, "")
    assert own.reading.masks[0] == 7  # type: ignore[union-attr]
    assert glm_10b.spec(glm_10b.config(own), "") == own


def test_alpha_is_that_of_all_layers() -> None:
    spec = glm.release("glm-130b").spec
    cut = replace(spec, blocks=spec.blocks[:3])
    assert spec.blocks[0].wiring == Scaled(140**0.5)
    assert glm_130b.spec(glm_130b.config(cut), "") == cut
    assert "deepnorm_alpha" not in glm_130b.config(spec)
    assert isinstance(spec.reading, Blank)
    assert glm_130b.config(spec)["smask_token_id"] == 150002


@pytest.mark.parametrize("release", ["glm-base", "glm-large-chinese"])
def test_a_synthetic_release(tmp_path: Path, release: str) -> None:
    synthesize(release, tmp_path / "new", layers=1)
    model = GLM.from_pretrained(tmp_path / "new")
    spec = glm.release(release).spec
    assert model.spec == replace(spec, blocks=spec.blocks[:1])
    assert model.dtype == torch.float16


@pytest.mark.parametrize("case", CASES)
def test_rows_of_different_length_and_kind(case: str) -> None:
    model = GLM.from_pretrained(GOLDENS / case, dtype=torch.float64)
    reading = model.spec.reading
    assert isinstance(reading, Blank)
    first, last = reading.masks[0], reading.masks[-1]
    prompts = [
        [5, first, 7, 8, reading.sop],
        [9, last, reading.sop],
        [first, reading.sop],
        [3, 4, 5, last, reading.sop],
    ]
    together = generate(model, prompts, max_new_tokens=6, stop=())
    assert together == [generate(model, [prompt], max_new_tokens=6, stop=())[0] for prompt in prompts]
    for prompt, written in zip(prompts, together, strict=True):  # and what a pass without a cache says
        logits = model(torch.tensor([prompt + written[:-1]]))
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == written
