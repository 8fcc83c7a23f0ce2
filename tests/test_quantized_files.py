"""Integer checkpoints in the layouts of others: what is read, what is written, and what is refused.

The oracles are `integer_layouts.py` and, in both directions, the compressed-tensors package.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import integer_layouts as published
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm import gptq, grouped, packing, quantization, quantized_files
from glm.checkpoint import Checkpoint
from glm.compress import compress
from glm.convert import convert
from glm.errors import CheckpointError, ConfigError, GLMError
from glm.export import save_pretrained
from glm.family import recognise
from glm.grouped import Grouped
from glm.info import describe
from glm.layout import Blank
from glm.model import GLM
from glm.verify import FLOAT32_ABSOLUTE

GOLDENS = Path(__file__).parent / "goldens"
WHOLE = {  # goldens whose every width can be cut so, and the last two with q, k and v together, or head by head
    "hf_glm4-base": (16, 48),
    "chatglm3-base": (8, None),
    "chatglm1-base": (16, None),
}


def numbers(rows: int, columns: int, groups: int, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes u, zero points z and scales s; the extremes are among them."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    z = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    z[0], z[-1] = 0, (1 << bits) - 1
    s = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).half()
    return u, z, s


def settings(layout: str, form: Grouped) -> dict[str, Any]:
    """A quantization_config as the packages of each layout write it."""
    group = form.group or -1
    if layout == "awq":
        more = {"zero_point": not form.symmetric, "version": "gemm", "modules_to_not_convert": None}
        return {"quant_method": "awq", "bits": 4, "group_size": group, **more}
    if layout.startswith("gptq"):
        more = {"desc_act": False, "damp_percent": 0.01, "true_sequential": True, "checkpoint_format": layout}
        return {"quant_method": "gptq", "bits": form.bits, "group_size": group, "sym": form.symmetric, **more}
    strategy = "group" if form.group else "channel"
    weights = {"num_bits": form.bits, "symmetric": form.symmetric, "strategy": strategy, "group_size": form.group}
    weights |= {"type": "int", "dynamic": False, "observer": "minmax", "actorder": None}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    more = {"ignore": ["lm_head", "re:.*output_layer"], "kv_cache_scheme": None, "version": "0.9"}
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**method, "config_groups": {"group_0": scheme}, **more}


def in_layout(layout: str, u: Tensor, z: Tensor, s: Tensor, form: Grouped) -> dict[str, Tensor]:
    if layout == "awq":
        tensors = published.awq(u, z, s)
        return {name: x for name, x in tensors.items() if name != "qzeros" or not form.symmetric}
    if layout.startswith("gptq"):
        return published.gptq(u, z, s, form.bits, 2 if layout == "gptq_v2" else 1)
    return published.pack_quantized(u, None if form.symmetric else z, s, form.bits)


def is_matrix(name: str) -> bool:
    """Whether a golden's tensor is a matrix of a block."""
    return "layers." in name and name.endswith(".weight") and "norm" not in name


def checkpoints(path: Path, golden: str, layout: str, form: Grouped, seed: int = 0) -> tuple[Path, Path]:
    """A golden with random integers, in a layout; and the same numbers written out in float64."""
    tensors = load_file(GOLDENS / golden / "model.safetensors")
    config = json.loads((GOLDENS / golden / "config.json").read_text())
    integer, dense = dict(tensors), {name: x.double() for name, x in tensors.items()}
    for n, name in enumerate(sorted(filter(is_matrix, tensors))):
        rows, columns = tensors[name].shape
        u, z, s = numbers(rows, columns, form.groups(columns), form.bits, seed + n)
        if form.symmetric:
            z = torch.full_like(z, 1 << (form.bits - 1))
        del integer[name]
        stem = name.removesuffix(".weight")
        integer |= {f"{stem}.{part}": x.contiguous() for part, x in in_layout(layout, u, z, s, form).items()}
        dense[name] = published.dequantized(u, z, s)
    for folder, held, more in (
        ("integer", integer, {"quantization_config": settings(layout, form)}),
        ("dense", dense, {}),
    ):
        (path / folder).mkdir()
        (path / folder / "config.json").write_text(json.dumps(config | more))
        save_file(held, path / folder / "model.safetensors", {"format": "pt"})
    return path / "integer", path / "dense"


def logits(folder: Path) -> Tensor:
    model = GLM.from_pretrained(folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.spec.vocabulary - 20, (2, 9), generator=generator)
    if isinstance(reading := model.spec.reading, Blank):  # ChatGLM-6B wants its [gMASK] and <sop>
        ids[:, 4], ids[:, 5] = reading.masks[0], reading.sop
    with torch.inference_mode():
        return model(ids)


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-12 * b.square().mean().sqrt())


LAYOUTS = [
    *(("awq", 4, False), ("awq", 4, True), ("gptq", 4, False), ("gptq", 8, False), ("gptq", 4, True)),
    *(("gptq_v2", 4, False), ("gptq_v2", 8, True), ("pack-quantized", 4, True), ("pack-quantized", 4, False)),
    *(("pack-quantized", 8, False), ("pack-quantized", 8, True)),
]


@pytest.mark.parametrize(("layout", "bits", "symmetric"), LAYOUTS)
@pytest.mark.parametrize("golden", WHOLE)
def test_every_layout_is_read(tmp_path: Path, golden: str, layout: str, bits: int, symmetric: bool) -> None:
    for i, group in enumerate(WHOLE[golden]):
        (tmp_path / str(i)).mkdir()
        integer, dense = checkpoints(tmp_path / str(i), golden, layout, Grouped(bits, group, symmetric))
        assert same(logits(integer), logits(dense))


def test_integers_stay_integers_and_are_counted(tmp_path: Path) -> None:
    form = Grouped(4, 16, False)
    integer, dense = checkpoints(tmp_path, "hf_glm4-base", "gptq", form)
    model = GLM.from_pretrained(integer)
    assert model.spec.weights == form
    matrices = sum(x.numel() for name, x in load_file(dense / "model.safetensors").items() if is_matrix(name))
    words = sum(x.nbytes for name, x in model.state_dict().items() if name.endswith("weight_packed"))
    assert words == matrices // 2
    about = describe(integer)
    assert about.spec.weights == form
    assert about.need.weights == sum(x.nbytes for x in model.state_dict().values())


@pytest.mark.parametrize("layout", ["awq", "gptq", "pack-quantized"])
def test_converted_and_saved_again_it_is_the_same_model(tmp_path: Path, layout: str) -> None:
    integer, dense = checkpoints(tmp_path, "hf_glm4-base", layout, Grouped(4, 16, False))
    convert(integer, tmp_path / "bf16", dtype="bf16", quiet=True)  # the scales stay as they are
    convert(tmp_path / "bf16", tmp_path / "back", dtype="float32", quiet=True)
    model = GLM.from_pretrained(integer, dtype=torch.float64)
    save_pretrained(model, tmp_path / "saved")
    assert same(logits(tmp_path / "saved"), logits(dense))
    for name, x in GLM.from_pretrained(tmp_path / "back").state_dict().items():
        if "weight_" in name:
            assert torch.equal(x.double(), model.state_dict()[name].double())


def test_names_of_the_other_format(tmp_path: Path) -> None:
    compress(GOLDENS / "glm4-9b-chatglm_format", tmp_path / "native", Grouped(8, None, False), quiet=True)
    convert(tmp_path / "native", tmp_path / "hf", names="hf", quiet=True)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in Checkpoint.open(tmp_path / "hf").tensors
    assert same(logits(tmp_path / "hf"), logits(tmp_path / "native"))


# -- the compressed-tensors package ----------------------------------------------------------------------------------


def theirs() -> Any:
    return pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("form", [Grouped(b, g, s) for b in (4, 8) for g in (16, None) for s in (True, False)], ids=str)
def test_compressed_tensors_reads_what_we_write(tmp_path: Path, form: Grouped) -> None:
    theirs()
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    compress(GOLDENS / "hf_glm4-base", tmp_path / "out", form, quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config.pop("quant_method")
    found = QuantizationConfig.model_validate(config)
    assert found.ignore == ["lm_head"]
    scheme = found.config_groups["group_0"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    dense = dict(tensors)
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = name.removesuffix("weight_packed")
        held = {
            part: dense.pop(f"{stem}{part}") for part in PackedQuantizationCompressor.compression_param_names(scheme)
        }
        held["weight_scale"] = held["weight_scale"].double()
        dense[f"{stem}weight"] = PackedQuantizationCompressor.decompress(held, scheme)["weight"]
    (tmp_path / "dense").mkdir()
    shutil.copyfile(GOLDENS / "hf_glm4-base" / "config.json", tmp_path / "dense" / "config.json")
    save_file({name: x.contiguous() for name, x in dense.items()}, tmp_path / "dense" / "model.safetensors")
    assert same(logits(tmp_path / "out"), logits(tmp_path / "dense"))


@pytest.mark.parametrize("form", [Grouped(b, g, s) for b in (4, 8) for g in (16, None) for s in (True, False)], ids=str)
def test_we_read_what_compressed_tensors_writes(tmp_path: Path, form: Grouped) -> None:
    theirs()
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=form.bits,
        symmetric=form.symmetric,
        strategy="group" if form.group else "channel",
        group_size=form.group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = load_file(GOLDENS / "hf_glm4-base" / "model.safetensors")
    integer, dense = dict(tensors), dict(tensors)
    for name in filter(is_matrix, tensors):
        w = integer.pop(name)
        parts = w.view(len(w), form.groups(w.shape[1]), -1)
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        packed = PackedQuantizationCompressor.compress(
            {"weight": w, "weight_scale": scale, "weight_zero_point": zero}, scheme
        )
        integer |= {f"{name.removesuffix('weight')}{part}": x.contiguous() for part, x in packed.items()}
        held = packed | {"weight_scale": scale.double()}
        dense[name] = PackedQuantizationCompressor.decompress(held, scheme)["weight"]
    config = json.loads((GOLDENS / "hf_glm4-base" / "config.json").read_text())
    theirs_config = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    ).to_dict()
    theirs_config["quant_method"] = "compressed-tensors"
    for folder, held, more in (("a", integer, {"quantization_config": theirs_config}), ("b", dense, {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | more, default=str))
        save_file(held, tmp_path / folder / "model.safetensors")
    assert same(logits(tmp_path / "a"), logits(tmp_path / "b"))


@pytest.mark.parametrize("form", [Grouped(4, 16, True), Grouped(4, 16, False), Grouped(8, None, True)], ids=str)
@pytest.mark.filterwarnings("ignore:You passed")
def test_transformers_computes_the_same(tmp_path: Path, form: Grouped) -> None:
    theirs()
    transformers = pytest.importorskip("transformers")
    compress(GOLDENS / "hf_glm4-base", tmp_path / "out", form, quiet=True)
    dense = transformers.CompressedTensorsConfig(dequantize=True)  # its other way does not know packed zero points
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=dense
    )
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        difference = other(ids).logits - GLM.from_pretrained(tmp_path / "out")(ids)
    assert float(difference.abs().max()) < FLOAT32_ABSOLUTE


# -- mixed checkpoints -----------------------------------------------------------------------------------------------

# golden, layout, what stays dense in its config's words, and in ours: (block, sublayer)
MIXED: dict[str, tuple[str, str, list[str], set[tuple[int, str]]]] = {
    "attention": (
        "hf_glm4-base", "pack-quantized", ["lm_head", "re:.*self_attn.*"], {(0, "mixer"), (1, "mixer"), (2, "mixer")},
    ),
    "the first feed-forward, by name": (
        "hf_glm4-base", "pack-quantized",
        ["lm_head", "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"], {(0, "feed_forward")},
    ),
    "a block, by a part of its name": (
        "hf_glm4-base", "awq", ["layers.1."], {(1, "mixer"), (1, "feed_forward")},
    ),
    "fused attention": (
        "chatglm3-base", "pack-quantized", ["re:.*output_layer", r"re:.*layers\.1\.self_attention"], {(1, "mixer")},
    ),
    "the feed-forward before experts": (
        "hf_glm4_moe-air", "pack-quantized", ["lm_head", r"re:model\.layers\.0\.mlp", "re:.*mlp.gate$"],
        {(0, "feed_forward")},
    ),
}  # fmt: skip


def mixed(path: Path, golden: str, layout: str, ignore: list[str]) -> tuple[Path, Path]:
    """`checkpoints` where what a config ignores is dense in both."""
    integer, dense = checkpoints(path, golden, layout, Grouped(4, 8, False))
    config = json.loads((integer / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert" if layout == "awq" else "ignore"] = ignore
    (integer / "config.json").write_text(json.dumps(config))
    held, whole = load_file(integer / "model.safetensors"), load_file(dense / "model.safetensors")
    for name in filter(is_matrix, whole):
        stem = name.removesuffix(".weight")
        if any(re.match(word[3:], stem) if word.startswith("re:") else word in stem for word in ignore):
            held = {other: x for other, x in held.items() if other in whole or not other.startswith(f"{stem}.")}
            held[name] = whole[name]
    save_file(held, integer / "model.safetensors", {"format": "pt"})
    return integer, dense


@pytest.mark.parametrize("what", MIXED)
def test_whole_sublayers_can_stay_dense(tmp_path: Path, what: str) -> None:
    """They are read, computed with as the same numbers are, and written again by what the spec says."""
    golden, layout, ignore, left = MIXED[what]
    integer, dense = mixed(tmp_path, golden, layout, ignore)
    model = GLM.from_pretrained(integer)
    assert {(i, sublayer) for i, block in enumerate(model.spec.blocks) for sublayer in block.dense} == left
    assert any(isinstance(module, grouped.GroupedLinear | grouped.GroupedStack) for module in model.modules())
    for i, block in enumerate(model.blocks):
        for sublayer in ("mixer", "feed_forward"):
            integers = [x for x in getattr(block, sublayer).buffers() if x.dtype == torch.int32]
            assert bool(integers) is ((i, sublayer) not in left)
    assert same(logits(integer), logits(dense))
    save_pretrained(model, tmp_path / "again")
    again = GLM.from_pretrained(tmp_path / "again")
    assert again.spec == model.spec
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize("ignore", [["model.layers.0.mlp.down_proj"], ["re:.*[qk]_proj"]], ids=str)
def test_a_part_of_a_sublayer_cannot_stay_dense(tmp_path: Path, ignore: list[str]) -> None:
    integer, _ = mixed(tmp_path, "hf_glm4-base", "pack-quantized", ["lm_head", *ignore])
    with pytest.raises(ConfigError, match=r"_proj' is to stay dense and .*_proj' is not") as refusal:
        GLM.from_pretrained(integer)
    assert len(str(refusal.value).splitlines()) == 1


def test_what_stays_dense_needs_no_groups() -> None:
    """Groups of 64 divide no row of 48."""
    checkpoint = Checkpoint.open(GOLDENS / "hf_glm4-base")
    scheme = settings("pack-quantized", Grouped(4, 64, True)) | {"ignore": ["re:.*"]}
    config = checkpoint.config | {"quantization_config": scheme}
    spec = recognise(config).read(config, "")
    assert {block.dense for block in spec.blocks} == {("mixer", "feed_forward")}
    assert not any(isinstance(module, grouped.GroupedLinear) for module in GLM(spec, device="meta").blocks.modules())


# -- what is refused -------------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], object]


def weights(**changes: Any) -> Edit:
    return lambda q: q["config_groups"]["group_0"]["weights"].update(changes)


CONFIGS: dict[str, tuple[str, Edit, str]] = {
    "method": ("awq", lambda q: q.update(quant_method="bitsandbytes"), "'quant_method' should be one of .* 'bitsand"),
    "no method": ("awq", lambda q: q.pop("quant_method"), "'quant_method' is missing"),
    "gemv": ("awq", lambda q: q.update(version="gemv"), "'version' should be one of 'gemm'"),
    "awq of 8 bits": ("awq", lambda q: q.update(bits=8), "'bits' should be one of 4"),
    "marlin": ("gptq", lambda q: q.update(checkpoint_format="marlin"), "'checkpoint_format'"),
    "3 bits": ("gptq", lambda q: q.update(bits=3), "'bits' should be one of 4, 8"),
    "group 0": ("gptq", lambda q: q.update(group_size=0), "'group_size' should be -1 or at least 8"),
    "dynamic": ("gptq", lambda q: q.update(dynamic={"-:.*": {}}), "'dynamic' should be absent"),
    "format": ("pack-quantized", lambda q: q.update(format="float-quantized"), "'format' should be one of 'pack-quant"),
    "kv cache": ("pack-quantized", lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "'kv_cache_scheme'"),
    "floats": ("pack-quantized", weights(type="float"), "'type' should be one of 'int'"),
    "tensor": ("pack-quantized", weights(strategy="tensor"), "'strategy' should be one of 'group', 'channel'"),
    "actorder": ("pack-quantized", weights(actorder="group"), "'actorder' should be"),
    "activations": (
        "pack-quantized",
        lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "'input_activations' should be absent",
    ),
    "targets": ("pack-quantized", lambda q: q["config_groups"]["group_0"].update(targets=["re:.*mlp"]), "'targets'"),
    "targets of a number": ("pack-quantized", lambda q: q["config_groups"]["group_0"].update(targets=5), "'targets'"),
    "groups of a number": (
        "pack-quantized",
        lambda q: q.update(config_groups=5),
        "'config_groups' should be an object",
    ),
    "a group of a number": ("pack-quantized", lambda q: q.update(config_groups={"a": 5}), "'a' should be an object"),
    "no weights": ("pack-quantized", lambda q: q["config_groups"]["group_0"].pop("weights"), "says nothing of weights"),
    "no groups": ("pack-quantized", lambda q: q.update(config_groups={}), "one form, not 0"),
    "ignore": ("pack-quantized", lambda q: q.update(ignore=["re:("]), "no regular expression"),
    "group 7": ("pack-quantized", weights(group_size=7), "'group_size'"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_cannot_be_read_says_what(tmp_path: Path, what: str) -> None:
    layout, edit, says = CONFIGS[what]
    integer, _ = checkpoints(tmp_path, "hf_glm4-base", layout, Grouped(4, 16, False))
    config = json.loads((integer / "config.json").read_text())
    edit(config["quantization_config"])
    (integer / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says) as refusal:
        GLM.from_pretrained(integer)
    assert len(str(refusal.value).splitlines()) == 1


FILES: dict[str, tuple[str, Callable[[dict[str, Tensor], str], object], str]] = {
    "no scales": ("awq", lambda t, m: t.pop(f"{m}.scales"), r"\.scales' is missing"),
    "no zero points": ("gptq", lambda t, m: t.pop(f"{m}.qzeros"), r"\.qzeros' is missing"),
    "no words": ("gptq", lambda t, m: t.pop(f"{m}.qweight"), r"lacks the tensor .*\.weight_packed'"),
    "no shape": ("pack-quantized", lambda t, m: t.pop(f"{m}.weight_shape"), r"\.weight_shape' is missing"),
    "another shape": (
        "pack-quantized",
        lambda t, m: t.update({f"{m}.weight_shape": t[f"{m}.weight_shape"] + 8}),
        "which is not",
    ),
    "disorder": ("gptq", lambda t, m: t[f"{m}.g_idx"].copy_(t[f"{m}.g_idx"].flip(0)), "desc_act"),
    "words of bytes": ("awq", lambda t, m: t.update({f"{m}.qweight": t[f"{m}.qweight"].long()}), "but I32"),
    "scales of integers": ("awq", lambda t, m: t.update({f"{m}.scales": t[f"{m}.scales"].int()}), "floating-point"),
    "other groups": ("awq", lambda t, m: t.update({f"{m}.scales": t[f"{m}.scales"][:1].clone()}), "are wanted"),
    "one matrix dense": (
        "pack-quantized",
        lambda t, m: (
            [t.pop(f"{m}.{x}") for x in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")]
            + [t.update({f"{m}.weight": torch.zeros(48, 96)})]
        ),
        r"lacks the tensor .*\.weight_packed'",
    ),
    "NaN": ("gptq", lambda t, m: t[f"{m}.scales"].fill_(torch.nan), "NaN"),
    "one more": ("awq", lambda t, m: t.update({f"{m}.extra": torch.zeros(1)}), "no place for"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_do_not_hold_what_they_should(tmp_path: Path, what: str) -> None:
    layout, spoil, says = FILES[what]
    integer, _ = checkpoints(tmp_path, "hf_glm4-base", layout, Grouped(4, 16, False))
    tensors = load_file(integer / "model.safetensors")
    spoil(tensors, "model.layers.1.mlp.down_proj")
    save_file(tensors, integer / "model.safetensors")
    with pytest.raises(CheckpointError, match=says) as refusal:
        GLM.from_pretrained(integer)
    assert len(str(refusal.value).splitlines()) == 1


def test_symmetric_gptq_files_have_the_middle_as_their_zero_point(tmp_path: Path) -> None:
    integer, _ = checkpoints(tmp_path, "hf_glm4-base", "gptq", Grouped(4, 16, False))
    config = json.loads((integer / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (integer / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="are not all 8, as sym promises"):
        GLM.from_pretrained(integer)


def test_two_ways_to_say_it_are_one_too_many() -> None:
    checkpoint = Checkpoint.open(GOLDENS / "chatglm1-int4")
    config = checkpoint.config | {"quantization_config": settings("awq", Grouped(4, 16, False))}
    with pytest.raises(GLMError, match="both quantization_config and quantization_bit"):
        recognise(config).read(config, "")


# -- mutants ---------------------------------------------------------------------------------------------------------

# The function's module and name, what stands there, what instead.
MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "nibbles swapped": (packing, "unpack", "(codes & 15, codes >> 4)", "(codes >> 4, codes & 15)"),
    "nibbles swapped in packing": (packing, "pack", "0::2] | codes[..., 1::2]", "1::2] | codes[..., 0::2]"),
    "two's complement": (packing, "unpack", "codes - (1 << (bits - 1))", "codes - 0"),
    "offset in packing": (packing, "pack", "+ (1 << (bits - 1))", "+ 0"),
    "scale of the next group": (grouped, "dequantize", "scales.to(dtype)", "scales.roll(1, -1).to(dtype)"),
    "groups interleaved": (grouped, "dequantize", "(scales.shape[-1], -1))", "(-1, scales.shape[-1])).mT"),
    "sign of the zero point": (grouped, "dequantize", "integers -= ", "integers += "),
    "zero point forgotten": (grouped, "dequantize", "zeros is not None", "False"),
    "zero point of the next group": (grouped, "dequantize", "zeros.to(dtype)", "zeros.roll(1, -1).to(dtype)"),
    "AWQ's order": (quantized_files, "from_awq", "[..., AWQ_ORDER]", "[..., (0, 2, 4, 6, 1, 3, 5, 7)]"),
    "GPTQ of the second version": (quantized_files, "from_gptq", 'int(scheme.layout == "gptq")', "0"),
    "GPTQ of the first version": (quantized_files, "from_gptq", 'int(scheme.layout == "gptq")', "1"),
    "GPTQ's 15 is not 0": (quantized_files, "from_gptq", "codes % (2 * middle)", "codes"),
    "columns in any order": (quantized_files, "from_gptq", "if g_idx is not None and not", "if False and not"),
    "zero points upside down": (quantized_files, "from_compressed_tensors", "info).T", "info).T.flip(0)"),
    "zero points written upside down": (quantized_files, "packed_zeros", "make().T", "make().flip(0).T"),
    "zero point of the quantiser": (quantization, "nearest_integers", ".add_(chosen.zeros)", ".sub_(chosen.zeros)"),
    "columns in their order of rounding": (gptq, "gptq", "q[:, order] =", "q[:] ="),
}


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Tensor]]:
    """A checkpoint in each layout, and the logits that it should give."""
    found = []
    for layout in ("awq", "gptq", "gptq_v2", "pack-quantized"):
        integer, dense = checkpoints(tmp_path_factory.mktemp(layout), "hf_glm4-base", layout, Grouped(4, 16, False))
        found.append((integer, logits(dense)))
    return found


def everything_holds(path: Path, readings: list[tuple[Path, Tensor]]) -> None:
    """What the tests of this file check, on little."""
    w, form = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), Grouped(4, 32, False)
    for made in (quantization.quantize(w, form), gptq.gptq(w, torch.diag(torch.arange(1.0, 65)), form)):
        assert (grouped.dequantize(*made, form) - w).norm() < 0.15 * w.norm()
    for integer, expected in readings:
        assert same(logits(integer), expected)
    model = GLM.from_pretrained(readings[-1][0], dtype=torch.float64)
    save_pretrained(model, path / "saved")
    assert same(logits(path / "saved"), readings[-1][1])
    test_files_that_do_not_hold_what_they_should(new(path / "disorder"), "disorder")


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_unchanged_code_holds(tmp_path: Path, readings: list[tuple[Path, Tensor]]) -> None:
    everything_holds(tmp_path, readings)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[tuple[Path, Tensor]], mutant: str
) -> None:
    module, name, stands, instead = MUTANTS[mutant]
    source = Path(module.__file__).read_text()
    start = source.index(f"\ndef {name}(")
    end = source.find("\n\n\n", start)
    body = source[start:end]
    assert stands in body
    namespace = dict(vars(module))
    exec(compile(body.replace(stands, instead), module.__file__, "exec"), namespace)
    function = getattr(module, name)
    monkeypatch.setattr(function, "__code__", namespace[name].__code__)  # in place: others have imported it by name
    with pytest.raises((AssertionError, GLMError, RuntimeError, IndexError, pytest.fail.Exception)):
        everything_holds(tmp_path, readings)
