"""Integers laid out beforehand: the same bits as when they are laid out at start, and no file that does not fit."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from glm_kernels import packing
from integer_layouts import awq, gptq
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm import CheckpointError, Engine, GLMError
from glm.checkpoint import Checkpoint
from glm.compress import compress
from glm.grouped import Grouped
from glm.hub import PREPACKED
from glm.model import GLM
from glm.pretrained import Opened
from glm.runtime import matrices as matrices_of_the_engine
from glm.runtime import prepacked
from glm.runtime.laid_out import AT_ONCE, Integers, LaidOut
from glm.runtime.prepacked import matrices, prepack, with_prepacked
from glm.verify import verify

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
QUANTISED = {
    "int8 rows": ("hf_glm-base", Grouped(8, None, True), False),
    "int4 groups, zero points": ("hf_glm4-base", Grouped(4, 16, False), False),
    "int4 groups, integer head": ("hf_glm4-base", Grouped(4, 16, True), True),
    "int8 experts, zero points": ("hf_glm4_moe-air", Grouped(8, 8, False), False),
    "int8 latents and experts": ("hf_glm4_moe_lite-sensitive", Grouped(8, None, True), False),
    "int8 sparse": ("hf_glm_moe_dsa-base", Grouped(8, None, False), False),
}
OFFICIAL = ("chatglm1-int4", "chatglm1-int8", "chatglm2-int4")
FORMS = (*OFFICIAL, *QUANTISED)


def integer(form: str, folder: Path) -> Path:
    """A checkpoint of integers in a new folder."""
    if form in OFFICIAL:
        shutil.copytree(GOLDENS / form, folder)
    else:
        golden, grouped, head = QUANTISED[form]
        compress(GOLDENS / golden, folder, grouped, head=head, method="nearest", quiet=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """int4 of a tiny ChatGLM2, laid out."""
    folder = integer("chatglm2-int4", tmp_path / "model")
    prepack(folder, quiet=True)
    return folder


def operands(module: LaidOut | Integers) -> list[Tensor | None]:
    return list(module.operands if isinstance(module, LaidOut) else module.lay_out())


def equal(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and x.is_contiguous() and torch.equal(x, y)


# --- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_bits_as_laid_out_at_start(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = integer(form, tmp_path / "model")
    assert prepack(folder, quiet=True) == folder / PREPACKED
    stored = dict(matrices(Opened.of(folder, dtype=dtype).filled("cpu")))
    read = Opened.of(folder, dtype=dtype)
    model = with_prepacked(read).filled("cpu")
    assert not matrices(model), "a stored layout was read"
    laid_out = {name: module for name, module in model.named_modules() if isinstance(module, LaidOut)}
    assert len(laid_out) > 6
    assert laid_out.keys() == stored.keys()
    for name, module in laid_out.items():
        for ours, at_start in zip(operands(module), operands(stored[name]), strict=True):
            assert equal(ours, at_start), name
        assert (module.bits, module.inputs, module.group) == (
            stored[name].bits, stored[name].inputs, stored[name].group,
        )  # fmt: skip
        assert (module.bias is None) == (stored[name].bias is None)
        assert module.bias is None or torch.equal(module.bias, stored[name].bias)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_it_computes_the_same_by_itself(form: str, tmp_path: Path) -> None:
    """In float64 too, where the engine has no kernel: what has no fused form runs the modules as they are."""
    folder = integer(form, tmp_path / "model")
    prepack(folder, quiet=True)
    plain = GLM.from_pretrained(folder, dtype=torch.float64, device="cpu")
    model = with_prepacked(Opened.of(folder, dtype=torch.float64)).filled("cpu")
    ids = torch.tensor([[3, 5, 7, 11, 13]])
    if (start := plain.spec.reading.__dict__.get("start")) is not None:
        ids = torch.cat((ids, torch.tensor([[start]])), dim=1)
    with torch.inference_mode():
        assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", "awq"])
def test_the_layouts_of_others(version: str, tmp_path: Path) -> None:
    """GPTQ and AWQ files are laid out as what they are read as."""
    folder = integer("int4 groups, zero points", tmp_path / "model")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for name in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        outputs, inputs = tensors.pop(f"{name}.weight_shape").tolist()
        u = packing.codes_of(tensors.pop(f"{name}.weight_packed"), 4)
        z = packing.codes_of(tensors.pop(f"{name}.weight_zero_point").T.contiguous(), 4).T[:outputs]
        s = tensors.pop(f"{name}.weight_scale")
        assert u.shape == (outputs, inputs)
        made = awq(u, z, s) if version == "awq" else gptq(u, z, s, 4, 1 + (version == "gptq_v2"))
        tensors |= {f"{name}.{part}": x for part, x in made.items()}
    save_file(tensors, folder / "model.safetensors")
    config["quantization_config"] = {
        "quant_method": version.partition("_")[0], "bits": 4, "group_size": 16, "sym": False, "zero_point": True,
        "checkpoint_format": version, "desc_act": False, "version": "gemm",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    prepack(folder, quiet=True)
    theirs = Opened.of(folder, dtype=torch.float16)
    stored = dict(matrices(theirs.filled("cpu")))
    model = with_prepacked(Opened.of(folder, dtype=torch.float16)).filled("cpu")
    for name, matrix in stored.items():
        module = model.get_submodule(name)
        assert isinstance(module, LaidOut)
        assert all(map(equal, operands(module), operands(matrix)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_some_rows_at_a_time_are_all_rows(bits: int, experts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(bits)
    integers = torch.randint(-(1 << bits - 1), 1 << bits - 1, (*experts, 37, 320), dtype=torch.int8)
    scales, zeros = torch.randn(*experts, 37, 10), integers[..., :10].clone()
    stored = Integers(packing.pack(integers, bits), scales, zeros, bits, None)
    assert integers.numel() < AT_ONCE
    whole = packing.prepack(stored.packed, scales, zeros, bits=bits)
    assert all(map(equal, stored.lay_out(), whole))
    for at_once in (1, 320 * 5, 320 * 36, 320 * 37):
        monkeypatch.setattr("glm.runtime.laid_out.AT_ONCE", at_once)
        assert all(map(equal, stored.lay_out(), whole))


ENGINES = """
import sys, warnings
from pathlib import Path
import torch
from glm import Engine
from glm.runtime.laid_out import Integers
from glm.runtime.matrices import Matrix
from glm.runtime.prepacked import prepack
from glm_kernels.dispatch import INTERPRETED
assert INTERPRETED
warnings.simplefilter("error", UserWarning)

def matrices(engine):
    parts = [part for block in engine.composed.blocks for part in (block.mixer, block.feed_forward)]
    parts += [part.shared for part in parts if getattr(part, "shared", None) is not None]
    found = [x for part in parts for x in vars(part).values() if isinstance(x, Matrix)]
    return [x for x in found if x.operands[0].dtype == torch.int16]

for folder in sys.argv[1:]:
    def engine():
        return Engine.from_pretrained(folder, dtype=torch.float16, device="cpu", max_length=32)
    plain = engine()
    prepack(folder, quiet=True)
    Integers.lay_out = Integers.words = None  # nothing is laid out any more
    laid_out = engine()
    pairs = list(zip(matrices(plain), matrices(laid_out), strict=True))
    assert len(pairs) > 6
    for x, y in pairs:
        assert x.product is y.product and x.named.keys() == y.named.keys() and x.named["group"] == y.named["group"]
        assert len(x.operands) == len(y.operands) == 3
        for p, q in zip(x.operands, y.operands):
            assert (p is None) == (q is None)
            assert p is None or (p.dtype == q.dtype and p.is_contiguous() == q.is_contiguous() and torch.equal(p, q))
    ids = [3, 5, 7, 11, *([] if (start := getattr(plain.spec.reading, "start", None)) is None else [start])]
    assert torch.equal(plain.read(ids), laid_out.read(ids))
    print("equal", len(pairs))
"""


@pytest.mark.skipif(matrices_of_the_engine.INTERPRETED, reason="starts the interpreter itself")
@pytest.mark.parametrize("form", ["chatglm1-int4", "chatglm1-int8", "int8 experts, zero points"])
def test_the_engine_is_the_same(form: str, tmp_path: Path) -> None:
    """Kernels in Triton's interpreter, float16: every matrix bit by bit, and the logits."""
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-c", ENGINES, str(integer(form, tmp_path / "model"))],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("equal ")


# --- where it is used ----------------------------------------------------------------------------------------------


def test_the_engine_reads_it_where_kernels_compute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(prepacked, "with_prepacked", lambda opened: asked.append(opened.base.folder) or opened)
    Engine.from_pretrained(folder, dtype=torch.float16, device="cpu", max_length=16)
    assert not asked, "the reference computes on the CPU"
    monkeypatch.setattr(matrices_of_the_engine, "INTERPRETED", True)
    Engine.from_pretrained(folder, dtype=torch.float32, device="cpu", max_length=16)
    assert not asked, "no kernel multiplies integers in float32"
    Engine.from_pretrained(folder, dtype=torch.float16, device="cpu", max_length=16)
    assert asked == [folder]


def test_nobody_else_minds_it(folder: Path) -> None:
    """Not the model, not verification, not conversion; and its numbers do not count as weights."""
    (folder / PREPACKED).write_bytes(b"no safetensors at all")
    assert GLM.from_pretrained(folder, device="cpu").spec.weights
    assert verify(folder).ok
    assert PREPACKED not in {info.file.name for info in Checkpoint.open(folder).tensors.values()}
    from glm.convert import convert

    convert(folder, folder.parent / "new", quiet=True)
    assert not (folder.parent / "new" / PREPACKED).exists()


def test_a_checkpoint_without_the_file_is_as_it_was(tmp_path: Path) -> None:
    opened = Opened.of(integer("chatglm2-int4", tmp_path / "model"))
    assert with_prepacked(opened) is opened


def test_dense_weights_are_not_laid_out() -> None:
    with pytest.raises(GLMError, match="has no integers to lay out; `glm quantize"):
        prepack(GOLDENS / "chatglm3-base", quiet=True)
    assert not (GOLDENS / "chatglm3-base" / PREPACKED).exists()


def test_a_learned_prefix_does_not_matter(tmp_path: Path) -> None:
    """It belongs to another folder, and to no matrix."""
    folder = integer("chatglm1-int4", tmp_path / "model")
    plain = prepacked.fingerprint(Opened.of(folder).base)
    prefix = tmp_path / "prefix"
    shutil.copytree(GOLDENS / "chatglm1-ptuning-noproj", prefix)
    width = Opened.of(folder).model.spec.width * len(Opened.of(folder).model.spec.blocks) * 2
    save_file(
        {"transformer.prefix_encoder.embedding.weight": torch.randn(5, width)},
        prefix / "model.safetensors",
    )
    prepack(folder, quiet=True)
    opened = Opened.of(folder, prefix=prefix, dtype=torch.float16)
    assert prepacked.fingerprint(opened.base) == plain
    model = with_prepacked(opened).filled("cpu")
    assert model.prefix is not None
    assert any(isinstance(module, LaidOut) for module in model.modules())


# --- what does not fit ---------------------------------------------------------------------------------------------


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_numbers(folder: Path) -> None:
    """The same header, byte by byte; other integers in one matrix."""
    before = (folder / "model.safetensors").read_bytes()[:4096]

    def edit(tensors: dict[str, Tensor]) -> None:
        name = next(name for name, x in tensors.items() if x.dtype == torch.int8)
        tensors[name] = ~tensors[name]

    edited(folder, edit)
    length = int.from_bytes(before[:8], "little")
    assert (folder / "model.safetensors").read_bytes()[: 8 + min(length, 4088)] == before[: 8 + length]


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layernorm_epsilon": 2e-5}))


def another_models(folder: Path) -> None:
    other = integer("chatglm1-int4", folder.parent / "other")
    shutil.copy(prepack(other, quiet=True), folder / PREPACKED)


def unmarked(folder: Path) -> None:
    save_file(load_file(folder / PREPACKED), folder / PREPACKED, {"format": "pt"})


@pytest.mark.parametrize("change", [other_numbers, other_config, another_models, unmarked])
def test_a_file_of_something_else_is_not_used(change: Callable[[Path], None], folder: Path) -> None:
    change(folder)
    opened = Opened.of(folder)
    with pytest.warns(UserWarning, match=f"{PREPACKED}: is not used: it .*; remove it, or .* `glm prepack {folder}`"):
        assert with_prepacked(opened) is opened
    assert matrices(opened.filled("cpu"))
    prepack(folder, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not matrices(with_prepacked(Opened.of(folder)).model)


def test_another_layout_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the layout is seen without anybody's having to remember a number."""
    words_of = packing.words_of
    monkeypatch.setattr(packing, "words_of", lambda packed, bits: words_of(packed, bits).flip(-1))
    prepacked.layout.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not laid out as these kernels read integers"):
            with_prepacked(Opened.of(folder))
    finally:
        prepacked.layout.cache_clear()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewritten(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Other tensors under the same marks."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        marks = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, marks)


def first(tensors: dict[str, Tensor], leaf: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(leaf))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "truncated: .*glm prepack"),
    "no safetensors": (lambda path: path.write_bytes(b"{}" * 50), "glm prepack"),
    "lacking": (
        lambda path: rewritten(path, lambda t: t.pop(first(t, "weight_scale"))),
        r"lacks, or has no use for, '.*weight_scale'; remove it, or write it anew with `glm prepack",
    ),
    "too much": (
        lambda path: rewritten(path, lambda t: t.update(more=torch.zeros(1))),
        "lacks, or has no use for, 'more'; .*glm prepack",
    ),
    "another shape": (
        lambda path: rewritten(path, lambda t: t.update({first(t, "packed"): t[first(t, "packed")][:, :-1].clone()})),
        r"weight_packed' is \[.*\], but \[.*\] is wanted",
    ),
    "another dtype": (
        lambda path: rewritten(path, lambda t: t.update({first(t, "packed"): t[first(t, "packed")].int()})),
        "holds I32, but I16 are wanted",
    ),
    "no number": (
        lambda path: rewritten(path, lambda t: t[first(t, "weight_scale")].fill_(torch.nan)),
        "weight_scale' has NaN or Inf",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error(damage: str, folder: Path) -> None:
    change, message = DAMAGE[damage]
    change(folder / PREPACKED)
    with pytest.raises(CheckpointError, match=f"{PREPACKED}.*{message}"):
        with_prepacked(Opened.of(folder)).filled("cpu")


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    shutil.move(folder / PREPACKED, folder.parent / "elsewhere")
    (folder / PREPACKED).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="outside"):
        with_prepacked(Opened.of(folder))


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, names = (folder / PREPACKED).read_bytes(), {path.name for path in folder.iterdir()}

    def fails(self: Integers) -> Tensor:
        raise OSError("the disk is full")

    monkeypatch.setattr(Integers, "words", fails)
    with pytest.raises(GLMError, match=f"{PREPACKED}: cannot be written .*the disk is full"):
        prepack(folder, quiet=True)
    assert (folder / PREPACKED).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == names


PREPACK = """
import sys
from pathlib import Path
import torch
from glm.runtime.prepacked import prepack

def status(field):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field)).split()[1])

prepack(sys.argv[1], quiet=True)  # whatever is imported at the first call
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak
prepack(sys.argv[2], quiet=True)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to see a process's peak memory")
def test_memory_is_the_largest_matrix_twice(folder: Path, tmp_path: Path) -> None:
    """2 layers of 97 MiB of int4 in matrices of 54 MiB and less, laid out within two of these and 44 MiB."""
    from dataclasses import replace

    from glm.export import save_pretrained
    from glm.family import release

    spec = release("chatglm2-6b-int4").spec
    block = spec.blocks[0]
    spec = replace(spec, vocabulary=64, blocks=(block,) * 2)
    model = GLM(spec, device="cpu", dtype=torch.float16)
    largest = max(stored.packed.nbytes for _, stored in matrices(model))
    total = sum(stored.packed.nbytes for _, stored in matrices(model))
    assert largest > 40 << 20
    assert total > 3 * largest
    save_pretrained(model, tmp_path / "large")
    del model
    ran = subprocess.run(
        [sys.executable, "-c", PREPACK, str(folder), str(tmp_path / "large")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert int(ran.stdout) < (2 * largest >> 10) + 44 * 1024, (ran.stdout, largest, total)
