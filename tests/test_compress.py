"""`glm quantize`: what is quantised and what is not, the same model as its numbers written out, within its memory."""

import json
import subprocess
import sys
from pathlib import Path

import integer_layouts as published
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm import family
from glm.checkpoint import Checkpoint, save
from glm.compress import compress, moments
from glm.curriculum import pairs
from glm.errors import ConfigError, GLMError
from glm.export import exported
from glm.family import glm4
from glm.generation import generate
from glm.grouped import Grouped
from glm.model import GLM
from glm.synthesize import drawn, synthesize
from glm.texts import Text, conversations, random_texts
from glm.tokenizer import Tokenizer
from glm.verify import Golden
from glm.verify import pairs as compared
from glm.walk import Walk

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
TINY = ROOT / "weights" / "tiny-glm"


def held(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("model*.safetensors") for name, x in load_file(file).items()}


def written_out(integer: Path, dense: Path) -> None:
    """The checkpoint with every matrix as float64 numbers, by the loops of `integer_layouts.py`."""
    tensors, config = held(integer), json.loads((integer / "config.json").read_text())
    weights = config.pop("quantization_config")["config_groups"]["group_0"]["weights"]
    bits, half = weights["num_bits"], 1 << (weights["num_bits"] - 1)
    shifts = torch.arange(0, 32, bits)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        stem = name.removesuffix("_packed")
        outputs, inputs = tensors.pop(f"{stem}_shape").tolist()
        u = (tensors.pop(name)[:, :, None] >> shifts & (1 << bits) - 1).reshape(outputs, -1)[:, :inputs]
        s = tensors.pop(f"{stem}_scale")
        z = torch.full(s.shape, half)
        if not weights["symmetric"]:
            rows = tensors.pop(f"{stem}_zero_point").T[:, :, None] >> shifts & (1 << bits) - 1
            z = rows.reshape(s.shape[1], -1)[:, :outputs].T
        tensors[stem] = published.dequantized(u, z, s)
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, dense / "model.safetensors")


def outputs(folder: Path, golden: str) -> list[Tensor]:
    """Everything that `glm verify` looks at."""
    model, reference = GLM.from_pretrained(folder, dtype=torch.float64), Golden(GOLDENS / golden, torch.float64)
    return [pair.ours for scenario in reference.scenarios for pair in compared(model, scenario)]


CASES = [
    ("hf_glm-base", Grouped(8, None, True)),
    ("hf_glm4-base", Grouped(4, 16, False)),
    ("hf_glm4-sensitive", Grouped(4, None, True)),
    ("chatglm3-base", Grouped(4, 8, True)),
    ("chatglm1-base", Grouped(4, 48, False)),
    ("glm4-9b-chatglm_format", Grouped(8, None, False)),
    ("chatglm3-ptuning-proj", Grouped(8, None, True)),
]


@pytest.mark.parametrize(("golden", "form"), CASES, ids=str)
def test_it_computes_what_its_numbers_written_out_compute(tmp_path: Path, golden: str, form: Grouped) -> None:
    compress(GOLDENS / golden, tmp_path / "integer", form, quiet=True)
    written_out(tmp_path / "integer", tmp_path / "dense")
    for ours, expected in zip(outputs(tmp_path / "integer", golden), outputs(tmp_path / "dense", golden), strict=True):
        scale = expected.double().square().mean().sqrt()
        assert float((ours.double() - expected.double()).abs().max()) <= 1e-12 * float(scale)


def test_the_blocks_matrices_and_nothing_else(tmp_path: Path) -> None:
    compress(GOLDENS / "hf_glm4-base", tmp_path / "a", Grouped(4, 16, True), quiet=True)
    before, after = held(GOLDENS / "hf_glm4-base"), held(tmp_path / "a")
    changed = {name.removesuffix(".weight") for name in before if name not in after}
    matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    assert changed == {f"model.layers.{i}.{m}" for i in range(3) for m in (*matrices, "mlp.down_proj")}
    assert all(torch.equal(x, after[name]) for name, x in before.items() if name in after)
    assert len(after) == len(before) + 2 * len(changed)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    assert config == json.loads((GOLDENS / "hf_glm4-base" / "config.json").read_text())


@pytest.mark.parametrize("golden", ["chatglm3-base", "hf_glm4-base"])
def test_the_head_too(tmp_path: Path, golden: str) -> None:
    form = Grouped(4, 8, False)
    compress(GOLDENS / golden, tmp_path / "integer", form, head=True, quiet=True)
    model = GLM.from_pretrained(tmp_path / "integer")
    assert model.spec.head == form
    written_out(tmp_path / "integer", tmp_path / "dense")
    for ours, expected in zip(outputs(tmp_path / "integer", golden), outputs(tmp_path / "dense", golden), strict=True):
        assert torch.allclose(ours.double(), expected.double(), rtol=1e-10, atol=1e-10)


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    source, form = GOLDENS / "hf_glm4-base", Grouped(4, 16, True)
    refused: list[tuple[str, type[GLMError], dict[str, object]]] = [
        ("no method 'awq'", GLMError, {"form": form, "method": "awq"}),
        ("takes calibration text", GLMError, {"form": form, "method": "gptq"}),
        ("takes calibration text", GLMError, {"form": form, "calibration": [Text([1, 2], 1)]}),
        ("groups of 128 do not divide the 48 columns", ConfigError, {"form": Grouped(4, 128, True)}),
        ("leaves the head dense", GLMError, {"form": form, "method": "gptq", "calibration": [], "head": True}),
    ]
    for says, kind, asked in refused:
        with pytest.raises(kind, match=says):
            compress(source, tmp_path / "out", quiet=True, **asked)  # type: ignore[arg-type]
    compress(source, tmp_path / "once", form, quiet=True)
    for again in (tmp_path / "once", GOLDENS / "chatglm1-int4"):
        with pytest.raises(GLMError, match="quantised already"):
            compress(again, tmp_path / "out", form, quiet=True)
    with pytest.raises(GLMError, match="already exists"):
        compress(source, tmp_path / "once", form, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"once"}


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(3))
    monkeypatch.setattr("glm.compress.quantize", lambda *_: next(calls) and None)
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it is)
        compress(GOLDENS / "hf_glm4-base", tmp_path / "out", Grouped(4, 16, True), quiet=True)
    assert not list(tmp_path.iterdir())


# -- memory ----------------------------------------------------------------------------------------------------------

CHILD = """
import sys, resource
from pathlib import Path
from glm.compress import compress
from glm.grouped import Grouped
import torch
torch.set_num_threads(1)
small, large, out = sys.argv[1:]
form = Grouped(4, 128, True)
compress(small, out + "-small", form, quiet=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compress(large, out, form, quiet=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def synthetic(folder: Path, layers: int) -> int:
    """A checkpoint in the layout of GLM-4 of so many layers, bfloat16; returns the bytes of its largest tensor."""
    spec = glm4.build(
        layers=layers, width=1024, inner=4096, heads=8, groups=2, head_width=128, vocabulary=512, context=512, eps=1e-5,
        rotary=glm4.half_rotary(1e4), qkv_bias=True, pad=0, stop=(1,),
    )  # fmt: skip
    shapes = GLM(spec, device="meta").state_dict()
    generation = family.recognise({"model_type": "glm", "num_hidden_layers": 1})
    config, tensors = exported(
        generation,
        spec,
        shapes,
        lambda stored: drawn(stored.name, stored.part(shapes[stored.parameter]), 0),
        lambda _: torch.bfloat16,
    )
    save(folder, config, tensors)
    return max(tensor.nbytes for tensor in tensors)


def test_memory_stays_within_the_result_and_the_largest_tensor(tmp_path: Path) -> None:
    synthetic(tmp_path / "small", 1)
    largest = synthetic(tmp_path / "large", 4)
    arguments = [str(tmp_path / name) for name in ("small", "large", "out")]
    command = [sys.executable, "-c", CHILD, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = Checkpoint.open(tmp_path / "out").nbytes
    assert Checkpoint.open(tmp_path / "large").nbytes > 3.5 * result > 1.8 * largest
    assert int(run.stdout) < largest  # beyond what one layer took: far below result + largest tensor, the bound


# -- by text ---------------------------------------------------------------------------------------------------------


def test_a_walk_computes_what_the_model_computes() -> None:
    for golden in ("hf_glm4-base", "chatglm1-base", "chatglm3-base"):
        model = GLM.from_pretrained(GOLDENS / golden)
        texts = [text.ids for text in random_texts(model.spec, 17, 3, seed=0)]
        walk = Walk(Checkpoint.open(GOLDENS / golden), golden)
        streams = walk.start(texts)
        with torch.inference_mode():
            for block in walk.blocks():
                for stream in streams:
                    stream.x = stream.through(block)
            tail = walk.tail()
            for stream in streams:
                assert torch.equal(tail(stream.x), model(stream.ids))
        assert all(x.is_meta for x in walk.model.blocks.state_dict().values())
    with pytest.raises(GLMError, match="learned prefix"):
        Walk(Checkpoint.open(GOLDENS / "chatglm3-ptuning-proj"), "").start([[1, 2]])


def test_moments_are_those_of_the_inputs() -> None:
    walk = Walk(Checkpoint.open(GOLDENS / "hf_glm4-base"), "")
    streams = walk.start([[1, 2, 3], [4, 5, 6, 7]])
    block = next(walk.blocks())
    inputs: list[Tensor] = []
    block.mixer.qkv.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0]))
    with torch.inference_mode(), moments(block) as seen:
        for stream in streams:
            stream.through(block)
    x = torch.cat(inputs)
    assert torch.allclose(seen["mixer.qkv",], x.T @ x, rtol=1e-5, atol=1e-6)
    assert {key[0] for key in seen} == {"mixer.qkv", "mixer.out", "feed_forward.up", "feed_forward.down"}
    with torch.inference_mode():
        streams[0].through(block)
    assert torch.allclose(seen["mixer.qkv",], x.T @ x, rtol=1e-5, atol=1e-6)  # no longer watched


# -- tiny-glm --------------------------------------------------------------------------------------------------------


def right_answers(folder: Path, asked: list[tuple[str, str]]) -> int:
    model, tokenizer = GLM.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    assert isinstance(model.spec.weights, Grouped)
    asked = sorted(asked, key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, len(asked), 80):
        some = asked[start : start + 80]
        prompts = [tokenizer.chat([{"role": "user", "content": question}]) for question, _ in some]
        new = generate(model, prompts, max_new_tokens=80)
        right += sum(tokenizer.decode(ids, special=False) == answer for ids, (_, answer) in zip(new, some, strict=True))
    return right


GLOSSARY = pairs((TINY / "glossary.md").read_text(encoding="utf-8"))


def test_tiny_glm_in_int4_answers_word_for_word(tmp_path: Path) -> None:
    compress(TINY, tmp_path / "int4", Grouped(4, 128, True), quiet=True)
    some = GLOSSARY[::5]
    assert right_answers(tmp_path / "int4", some) >= 0.95 * len(some)


@pytest.mark.slow
@pytest.mark.parametrize("form", [Grouped(4, 32, True), Grouped(4, None, False)], ids=str)
@pytest.mark.parametrize("method", ["nearest", "search", "gptq"])
def test_tiny_glm_in_int4_answers_its_whole_glossary(tmp_path: Path, form: Grouped, method: str) -> None:
    file = tmp_path / "calibration.jsonl"
    file.write_text(conversations(GLOSSARY[::4]), encoding="utf-8")
    compress(TINY, tmp_path / "out", form, method=method, calibration=file if method == "gptq" else None, quiet=True)
    assert right_answers(tmp_path / "out", GLOSSARY) >= 0.95 * len(GLOSSARY)


def test_a_synthetic_checkpoint_of_integers(tmp_path: Path) -> None:
    form = Grouped(4, 128, True)
    synthesize("glm-edge-1.5b-chat", tmp_path / "edge", layers=1, weights=form)
    checkpoint = Checkpoint.open(tmp_path / "edge")
    spec = family.recognise(checkpoint.config).read(checkpoint.config, "")
    assert spec.weights == form
    words = sum(info.nbytes for name, info in checkpoint.tensors.items() if name.endswith("weight_packed"))
    assert words == (2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 6144) // 2
    model = GLM.from_pretrained(tmp_path / "edge")
    with torch.inference_mode():
        assert model(torch.tensor([[5, 6, 7]])).isfinite().all()
