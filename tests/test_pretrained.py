"""Loading whole models: a P-Tuning prefix from a folder of its own, a spare head, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from golden_folders import GOLDENS, HERE
from safetensors.torch import load_file, save_file

import glm
from glm.family import chatglm, generation_of, glm4
from glm.synthesize import synthesize

TUNED = [folder for folder in HERE if "ptuning" in folder.name]


def split(golden: Path, place: Path) -> tuple[Path, Path]:
    """The golden as it is published: the model in one folder, the prefix alone in another."""
    tensors = load_file(golden / "model.safetensors")
    config = json.loads((golden / "config.json").read_text())
    base, prefix = place / "base", place / "prefix"
    for folder, wanted in ((base, False), (prefix, True)):
        folder.mkdir()
        part = {name: x for name, x in tensors.items() if (".prefix_encoder." in name) == wanted}
        save_file(part, folder / "model.safetensors")
        own = config if wanted else {key: value for key, value in config.items() if "pre" not in key[:4]}
        (folder / "config.json").write_text(json.dumps(own))
    return base, prefix


@pytest.mark.parametrize("golden", TUNED, ids=lambda folder: folder.name)
def test_a_prefix_comes_from_its_own_folder(golden: Path, tmp_path: Path) -> None:
    base, prefix = split(golden, tmp_path)
    whole = glm.GLM.from_pretrained(golden, dtype=torch.float64)
    joined = glm.GLM.from_pretrained(base, dtype=torch.float64, prefix=prefix)
    ids = torch.randint(4, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    assert joined.spec == whole.spec
    assert torch.equal(joined(ids), whole(ids))
    assert not torch.equal(glm.GLM.from_pretrained(base, dtype=torch.float64)(ids), whole(ids))


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (lambda base, prefix, golden: base, lambda base, prefix, golden: golden, "should hold only"),
        (lambda base, prefix, golden: golden, lambda base, prefix, golden: prefix, "already has"),
        (lambda base, prefix, golden: prefix, lambda base, prefix, golden: prefix, "already has"),
    ],
)
def test_folders_that_do_not_belong_together(
    first: Callable[..., Path], second: Callable[..., Path], why: str, tmp_path: Path
) -> None:
    folders = (*split(TUNED[0], tmp_path), TUNED[0])
    with pytest.raises(glm.CheckpointError, match=why):
        glm.GLM.from_pretrained(first(*folders), prefix=second(*folders))


def test_a_tied_model_may_carry_its_head(tmp_path: Path) -> None:
    synthesize("glm-edge-1.5b-chat", tmp_path / "edge", layers=1, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "edge" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    before = glm.GLM.from_pretrained(tmp_path / "edge")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "edge" / "model.safetensors")
    after = glm.GLM.from_pretrained(tmp_path / "edge")
    ids = torch.tensor([[1, 2, 3]])
    assert after.head.weight is after.embedding.weight
    assert torch.equal(before(ids), after(ids))


@pytest.mark.parametrize("rows", [0, 1])
def test_a_head_that_the_config_denies_is_refused(tmp_path: Path, rows: int) -> None:
    folder = GOLDENS / "chatglm3-base"
    copytree(folder, tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["transformer.output_layer.weight"]
    tensors["transformer.output_layer.weight"] = torch.cat((head, head[:rows])).contiguous()
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(glm.CheckpointError, match=r"output_layer\.weight is another: set tie_word_embeddings to false"):
        glm.GLM.from_pretrained(tmp_path / "tied")


@pytest.mark.parametrize("name", sorted(glm.releases()))
def test_every_release_is_its_own_config_and_builds_without_a_file(name: str) -> None:
    release, generation = glm.release(name), generation_of(name)
    assert generation.spec(generation.config(release.spec), "") == release.spec
    assert glm.GLM.from_release(name.upper(), device="meta").spec == release.spec


def test_an_unknown_release_names_those_there_are() -> None:
    with pytest.raises(glm.GLMError, match="chatglm3-6b"):
        glm.GLM.from_release("chatglm9")


def test_a_synthetic_release_has_the_shards_of_the_original_and_loads(tmp_path: Path) -> None:
    synthesize("chatglm-6b-int4", tmp_path / "int4", layers=1)
    model = glm.GLM.from_pretrained(tmp_path / "int4")
    assert model.dtype == torch.float16
    assert model.spec.weights == chatglm.RELEASES[-1].spec.weights
    synthesize("glm-edge-4b-chat", tmp_path / "edge", layers=1)
    assert len(list((tmp_path / "edge").glob("*.safetensors"))) == glm4.RELEASES[-1].shards == 2
    assert glm.GLM.from_pretrained(tmp_path / "edge")(torch.tensor([[5, 6]])).isfinite().all()
