"""Tensor-parallel parts of GLM-130B and GLM: merged they are the whole, in little memory, and nothing else runs."""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glm.convert import convert
from glm.convert_child import convert_parts
from glm.errors import CheckpointError, GLMError
from glm.export import save_pretrained
from glm.family import glm_10b, glm_130b
from glm.linear import RowScaled, pack_int4
from glm.model import GLM
from glm.parts import Cut, cut_of
from glm.verify import verify

SRC = str(Path(__file__).parents[1])
GOLDENS = Path(__file__).parent / "goldens"
CUTS = {"glm130b-base": glm_130b.CUTS, "glm10b-base": glm_10b.CUTS}
LAYER = "transformer.layers.1."


def beside() -> dict[str, Any]:
    """What training runs keep beside the model."""
    return {
        "optimizer": None,
        "iteration": 49300,
        "csr_tensor_module_names": set(),
        "args": argparse.Namespace(lr=1e-4),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "random_rng_state": random.Random(0).getstate(),
        "scalar": np.float64(3.0),
    }


def split(tensors: dict[str, Tensor], cuts: tuple[Cut, ...], parts: int) -> list[dict[str, Tensor]]:
    """What each of several devices would have held."""
    held: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, x in tensors.items():
        cut = cut_of(name, cuts)
        for part, piece in zip(held, [x] * parts if cut is None else cut.split(x, parts), strict=True):
            part[name] = piece.clone()
    return held


def written(folder: Path, held: list[dict[str, Tensor]], zipped: bool = True, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate(held):
        state = {"module": tensors, **more}
        torch.save(state, folder / f"mp_rank_{number:02d}_model_states.pt", _use_new_zipfile_serialization=zipped)


def merged(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# --- merging -------------------------------------------------------------------------------------------------------


def test_a_matrix_of_two_is_cut_half_by_half() -> None:
    whole = torch.arange(16).view(8, 2)
    parts = Cut(".*", 0, blocks=2).split(whole, 2)
    assert parts[0].tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert torch.equal(Cut(".*", 0, blocks=2).merge(parts), whole)
    assert not torch.equal(Cut(".*", 0).merge(parts), whole)
    assert Cut(".*", 1).whole((8, 2), 4) == (8, 8)


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize(("parts", "zipped"), [(1, True), (4, True), (4, False)])
def test_parts_become_the_whole(tmp_path: Path, case: str, parts: int, zipped: bool) -> None:
    """The vocabulary of 260 rows divides by 4; GLM-10B's parts have the same form but a flat qkv."""
    tensors = load_file(GOLDENS / case / "model.safetensors")
    old = tmp_path / "old"
    written(old / "49300", split(tensors, CUTS[case], parts), zipped, **beside())
    (old / "latest").write_text("49300")
    for name in ("config.json", "ice_text.model"):
        (old / name).write_bytes((GOLDENS / case / "config.json").read_bytes())
    convert(old, tmp_path / "new", quiet=True)
    assert same(merged(tmp_path / "new"), tensors)
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".json", ".model", ".safetensors"}
    for name in ("meta.json", "reference.safetensors", "reference64.safetensors"):
        shutil.copyfile(GOLDENS / case / name, tmp_path / "new" / name)
    assert verify(tmp_path / "new").ok


def test_eight_parts_without_a_config(tmp_path: Path) -> None:
    """GLM-130B as it was published, smaller: what it is follows from its shapes."""
    spec = glm_130b.build(
        layers=2, width=1024, inner=64, heads=8, vocabulary=150528, context=2048, eps=1e-5,
        sop=150004, fixed=(150000, 150002), gmask=150001, stop=(150005, 20002),
    )  # fmt: skip
    model = GLM(spec, dtype=torch.float16, seed=1)
    save_pretrained(model, tmp_path / "whole")
    tensors = merged(tmp_path / "whole")
    inv_freq = {"mixins.rotary-embedding.rotary_emb.inv_freq": torch.ones(64)}
    written(tmp_path / "old", split(tensors | inv_freq, glm_130b.CUTS, 8))
    convert(tmp_path / "old", tmp_path / "new", quiet=True)
    assert same(merged(tmp_path / "new"), tensors | inv_freq)
    again = GLM.from_pretrained(tmp_path / "new")
    assert again.spec == spec
    assert again.dtype == torch.float16
    assert same(again.state_dict(), model.state_dict())


def test_an_original_glm_without_a_config(tmp_path: Path) -> None:
    spec = glm_10b.build(layers=2, width=128, heads=2, vocabulary=30592, context=32, activation="gelu_tanh")
    model = GLM(spec, dtype=torch.float16, seed=1)
    save_pretrained(model, tmp_path / "whole")
    written(tmp_path / "old", [merged(tmp_path / "whole")], **beside())
    convert(tmp_path / "old", tmp_path / "new", dtype="float32", quiet=True)
    again = GLM.from_pretrained(tmp_path / "new")
    assert again.spec == spec  # with the GELU of the training code
    assert same(again.state_dict(), model.float().state_dict())


def test_the_blank_that_shared_an_id_gets_its_own() -> None:
    table = torch.randn(50048, 2)
    chinese = {"num_layers": 48, "vocab_size": 50048}
    assert torch.equal(glm_10b.mended(chinese, "word_embeddings.weight", table)[50009], table[50007])
    for config, name in ((chinese, "other"), (chinese | {"num_layers": 24}, "word_embeddings.weight")):
        assert glm_10b.mended(config, name, table) is table


# --- integers ------------------------------------------------------------------------------------------------------


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and the scale of each row, as the official code makes them."""
    scale = (weight.abs().amax(1) / (2 ** (bits - 1) - 1)).half()
    integers = (weight.half() / scale[:, None]).round().to(torch.int8)
    return (pack_int4(integers) if bits == 4 else integers), scale


def with_integers(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The same tensors with the matrices of the blocks as integers."""
    out = {}
    for name, x in tensors.items():
        if name.startswith("transformer.layers") and x.dim() == 2:
            out[name], out[name.removesuffix("weight") + "weight_scale"] = quantised(x, bits)
        else:
            out[name] = x.half()
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("alike", [True, False])
def test_integers(tmp_path: Path, bits: int, alike: bool) -> None:
    """Cut after they were made, all parts have the same scales; made of a part, each has its own."""
    plain = load_file(GOLDENS / "glm130b-base" / "model.safetensors")
    if alike:
        whole = with_integers(plain, bits)
        held = split(whole, glm_130b.CUTS, 2)
    else:
        held = [with_integers(part, bits) for part in split(plain, glm_130b.CUTS, 2)]
    written(tmp_path / "old", held)
    config = json.loads((GOLDENS / "glm130b-base" / "config.json").read_text()) | {"quantization_bit": bits}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "old", tmp_path / "new", quiet=True)
    model = GLM.from_pretrained(tmp_path / "new")
    if alike:
        assert same(merged(tmp_path / "new"), whole)
        assert model.spec.weights == RowScaled(bits)
        return
    name = "transformer.layers.2.mlp.dense_4h_to_h.weight"
    integers = [part[name] for part in held]
    if bits == 4:
        integers = [torch.stack((x >> 4, (x << 4) >> 4), -1).flatten(1) for x in integers]
    scales = [part[name.removesuffix("weight") + "weight_scale"] for part in held]
    expected = torch.cat([x * scale[:, None] for x, scale in zip(integers, scales, strict=True)], dim=1)
    found = merged(tmp_path / "new")
    assert torch.equal(found[name], expected)
    assert not any(key.endswith("weight_scale") for key in found)
    assert "quantization_bit" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert (found[name] - plain[name]).abs().max() <= plain[name].abs().max() / (2 ** (bits - 1) - 1)


# --- what is refused -----------------------------------------------------------------------------------------------


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("where", ["module", "args"])
def test_a_part_that_calls_something_is_refused(tmp_path: Path, where: str) -> None:
    evil = Call(os.system, f"touch {tmp_path / 'harmed'}")
    tensors: dict[str, Any] = load_file(GOLDENS / "glm130b-base" / "model.safetensors")
    if where == "module":
        tensors["transformer.word_embeddings.weight"] = evil
    written(tmp_path / "old", [tensors], **({"args": evil} if where == "args" else {}))
    with pytest.raises(CheckpointError, match=r"refused, .* it wants to call posix\.system"):
        convert(tmp_path / "old", tmp_path / "new", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def broken(change: str, held: list[dict[str, Tensor]], folder: Path) -> None:
    """One thing wrong with the second of two parts."""
    norm, bias = f"{LAYER}input_layernorm.weight", f"{LAYER}attention.dense.bias"
    if change == "a norm that differs":
        held[1][norm][3] += 1e-3
    elif change == "a tensor less":
        del held[1][bias]
    elif change == "another shape":
        held[1][bias] = held[1][bias][:-1].clone()
    elif change == "NaN":
        held[1][f"{LAYER}mlp.dense_4h_to_h.weight"][0, 0] = float("nan")
    written(folder, held)
    if change == "a part less":
        (folder / "mp_rank_00_model_states.pt").unlink()
    elif change == "no module":
        torch.save({"model": held[1]}, folder / "mp_rank_01_model_states.pt")
    elif change == "another latest":
        for path in folder.iterdir():
            path.unlink()
        (folder / "latest").write_text("../elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "a norm that differs": r"layers\.1\.input_layernorm\.weight' should be the same in all parts, .* in part 1",
        "a tensor less": r"mp_rank_01.* 'transformer\.layers\.1\.attention\.dense\.bias' is not in all parts",
        "another shape": r"mp_rank_01.* is not as in mp_rank_00_model_states\.pt: \[47\]",
        "NaN": "has NaN or Inf in it",
        "a part less": r"has 1 parts, but mp_rank_00_model_states\.pt is missing",
        "no module": "holds a NoneType",
        "another latest": r"latest: names '\.\./elsewhere', which is no folder beside it",
    }.items(),
)
def test_parts_that_do_not_fit(tmp_path: Path, change: str, message: str) -> None:
    tensors = load_file(GOLDENS / "glm130b-base" / "model.safetensors")
    folder = tmp_path / "old"
    broken(change, split(tensors, glm_130b.CUTS, 2), folder)
    shutil.copyfile(GOLDENS / "glm130b-base" / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match=message):
        convert_parts(folder, tmp_path / "new", None, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_parts_of_no_known_model(tmp_path: Path) -> None:
    written(tmp_path / "old", [{"wte": torch.ones(2, 2)}])
    with pytest.raises(CheckpointError, match="the names of the tensors are no GLM's"):
        convert(tmp_path / "old", tmp_path / "new", quiet=True)
    with pytest.raises(GLMError, match="only one set of names"):
        convert(tmp_path / "old", tmp_path / "new", names="hf", quiet=True)
    with pytest.raises(CheckpointError, match="glm convert"):
        GLM.from_pretrained(tmp_path / "old")


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from glm.convert import convert
convert(*sys.argv[1:3], quiet=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """Eight parts, together 120 MiB; the largest merged tensor has 8 MiB."""
    spec = glm_130b.build(
        layers=8, width=512, inner=4096, heads=4, vocabulary=8192, context=2048, eps=1e-5,
        sop=8004, fixed=(8000, 8002), gmask=8001, stop=(8005,),
    )  # fmt: skip

    def peak(name: str, layers: int) -> int:
        shapes = GLM(spec, device="meta").state_dict()
        config = glm_130b.config(spec) | {"num_layers": layers or 1}
        held: list[dict[str, Tensor]] = [{} for _ in range(8)]
        for stored in glm_130b.GENERATION.table(spec, config, shapes):
            if layers or ".layers." not in stored.name:
                x = torch.ones(shapes[stored.parameter].shape, dtype=torch.float32)
                x = x if layers else x[..., :8].clone()
                cut = cut_of(stored.name, glm_130b.CUTS)
                for part, piece in zip(held, [x] * 8 if cut is None else cut.split(x, 8), strict=True):
                    part[stored.name] = piece.half()
        written(tmp_path / name, held)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-c", MEASURE, str(tmp_path / name), str(tmp_path / f"{name}-new")]
        env = os.environ | {"PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return int(ran.stdout)

    whole, small = peak("whole", 8), peak("small", 0)
    total = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    largest = 8 << 20  # the embedding, 8192 · 512 in float16
    assert total > 10 * largest
    assert (whole - small) * 1024 < 4 * largest
