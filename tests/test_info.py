"""What a model asks of memory, held to published sizes, to files and to the caches that are really made."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_folders import HERE, PROJECT
from safetensors import safe_open

from glm import info, memory
from glm.checkpoint import Checkpoint
from glm.compress import compress
from glm.errors import CheckpointError, GLMError, MemoryFitError
from glm.family import release, releases
from glm.grouped import Grouped
from glm.linear import RowScaled
from glm.memory import Found, size
from glm.model import GLM
from glm.pretrained import described
from glm.synthesize import synthesize
from glm.tensor_file import PIECE as FILE_PIECE

GIB = 1 << 30


def spec_of(folder: Path):
    return described(Checkpoint.open(folder), folder.name)[1]


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "glm-base": 109_338_624,
        "glm-large": 334_688_256,
        "glm-10b": 9_880_682_496,
        "glm-130b": 128_697_794_560,
        "chatglm-6b": 6_707_929_088,
        "chatglm-6b-int4": 6_707_929_088,
        "chatglm2-6b": 6_243_584_000,
        "chatglm3-6b": 6_243_584_000,
        "glm-4-9b-chat": 9_399_951_360,
        "glm-4-9b-chat-1m": 9_483_857_920,
        "glm-edge-1.5b-chat": 1_593_427_968 - 59_264 * 2048,  # published untied, though its config ties the head
        "glm-4-9b-0414": 9_400_279_040,
        "glm-4-32b-0414": 32_566_081_536,
        "glm-z1-rumination-32b-0414": 33_141_749_760,
    }.items(),
)
def test_parameters_are_the_published_ones(name: str, count: int) -> None:
    assert info.parameters(release(name).spec) == count


@pytest.mark.parametrize(
    ("name", "billions", "active"),  # as the releases are called, which is without the embedding or with it
    [("glm-4.5", 355, 32), ("glm-4.5-air", 106, 12), ("glm-4.7-flash", 30, 3), ("glm-5", 744, 40)],
)
def test_active_parameters_are_about_the_published_ones(name: str, billions: int, active: int) -> None:
    spec = release(name).spec
    embedding = spec.vocabulary * spec.width
    assert info.parameters(spec) == pytest.approx(billions * 1e9, rel=0.01)
    assert info.active_parameters(spec) - 2 * embedding <= (active + 1) * 1e9
    assert info.active_parameters(spec) >= active * 1e9
    assert info.active_parameters(release("chatglm3-6b").spec) == 6_243_584_000


def test_bytes_are_those_of_published_indices() -> None:
    assert info.weight_bytes(release("chatglm3-6b").spec, torch.float16) == 12_487_168_064 - 64  # less inv_freq
    assert info.weight_bytes(release("glm-4-9b-chat-hf").spec, torch.bfloat16) == 18_799_902_720


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_weights_take_their_bits_and_one_scale_a_row(bits: int) -> None:
    dense = release("chatglm3-6b").spec
    D, F, QKV = 4096, 13696, (32 + 2 * 2) * 128
    rows = QKV + D + 2 * F + D
    matrices = QKV * D + D * D + 2 * F * D + D * F
    saved = 28 * (2 * matrices - matrices * bits // 8 - 2 * rows)
    integer = info.weight_bytes(replace(dense, weights=RowScaled(bits)), torch.float16)
    assert integer == info.weight_bytes(dense, torch.float16) - saved


@pytest.mark.parametrize(("group", "groups"), [(128, 32), (None, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_take_a_scale_each_and_possibly_a_zero_point(group: int | None, groups: int, symmetric: bool) -> None:
    dense = replace(release("glm-4-9b-0414").spec, blocks=release("glm-4-9b-0414").spec.blocks[:1])
    D, F, QKV = 4096, 13696, (32 + 2 * 2) * 128
    matrices = QKV * D + D * D + 2 * F * D + D * F
    scales = (QKV + D + 2 * F) * groups + D * (groups * F // D if group else 1)
    saved = 2 * matrices - matrices // 2 - scales * (2 if symmetric else 3)
    integer = replace(dense, weights=Grouped(4, group, symmetric))
    assert info.weight_bytes(integer, torch.bfloat16) == info.weight_bytes(dense, torch.bfloat16) - saved
    one = info.working_bytes(integer, torch.bfloat16, 1) - info.working_bytes(dense, torch.bfloat16, 1)
    assert one == (2 + 2 * 2) * 2 * F * D - FILE_PIECE  # the largest matrix, written out


@pytest.mark.parametrize("way", ["int4", "int8"])
def test_integers_asked_for_are_those_that_quantize_writes(tmp_path: Path, way: str) -> None:
    """Counted in the file: `glm info` of the dense checkpoint said it before."""
    dense, small = tmp_path / "dense", tmp_path / "small"
    synthesize("glm-base", dense, layers=1)
    compress(dense, small, Grouped(int(way[3:]), 128, symmetric=True), method="nearest", quiet=True)
    with safe_open(small / "model.safetensors", "pt") as file:
        found = [file.get_tensor(name) for name in file.keys() if "shape" not in name]  # noqa: SIM118 (not a dict)
    assert info.describe(dense).needs[way].weights == sum(x.nbytes for x in found)
    assert info.describe(small).need.weights == info.describe(dense).needs[way].weights


@pytest.mark.parametrize(
    ("columns", "form"), [(256, Grouped(4, 128, True)), (96, Grouped(4, 32, True)), (40, Grouped(4, None, True))]
)
def test_rows_that_128_does_not_divide_take_smaller_groups(columns: int, form: Grouped) -> None:
    made, expected = (way.stack(3, columns, 5, True) for way in (info.STORAGES["int4"][1], form))
    assert {name: x.shape for name, x in made.state_dict().items()} == {
        name: x.shape for name, x in expected.state_dict().items()
    }


@pytest.mark.parametrize("folder", HERE, ids=lambda folder: folder.name)
def test_every_shape_has_a_size_in_every_storage(folder: Path) -> None:
    """Matrices whose rows fill no words stay dense."""
    sizes = {way: need.weights for way, need in info.describe(folder).needs.items()}
    assert sizes["int4"] <= sizes["int8"] <= sizes["bf16"] < sizes["fp32"]
    assert info.STORAGES["int4"][1].linear(20, 5, False).weight.dtype.is_floating_point  # type: ignore[union-attr]


@pytest.mark.parametrize("folder", HERE, ids=lambda folder: folder.name)
def test_bytes_of_a_checkpoint_are_those_in_its_files(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    generation, spec = described(checkpoint, folder.name)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    unused = generation.unused(spec)
    ours = [x for name, x in tensors.items() if not any(re.fullmatch(pattern, name) for pattern in unused)]
    in_float32 = sum(x.numel() * (4 if x.is_floating_point() else x.element_size()) for x in ours)
    assert info.weight_bytes(spec, torch.float32) == in_float32


@pytest.mark.parametrize("folder", HERE, ids=lambda folder: folder.name)
def test_cache_bytes_are_those_of_the_cache_that_is_made(folder: Path) -> None:
    model = GLM(spec_of(folder), dtype=torch.float32, seed=0)
    need = info.need(model.spec, torch.float32, 7)
    assert need.cache == model.new_cache(1, 7).bytes
    assert need.per_token == model.new_cache(1, 8).bytes - model.new_cache(1, 7).bytes
    assert need.bytes == need.weights + need.cache + need.working


def test_longer_and_wider_takes_more() -> None:
    spec = release("chatglm-6b").spec
    small, long, wide = (info.need(spec, *x) for x in [(torch.float16, 64), (torch.float16, 65), (torch.float32, 64)])
    assert small.weights == long.weights == wide.weights // 2
    assert small.cache < long.cache < wide.cache
    assert small.working < long.working < wide.working


MEASURED = """
import re, sys
import torch
import glm
from glm import info
folder, length = sys.argv[1], int(sys.argv[2])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = glm.GLM.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
mask = getattr(model.spec.reading, "masks", (1,))[0], getattr(model.spec.reading, "sop", 2)
glm.generate(model, [[*[5] * (length - 2), *mask]], max_new_tokens=2, stop=())
print(peak() - before, info.need(model.spec, torch.bfloat16, length + 2).bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux does")
@pytest.mark.parametrize(
    ("name", "length"), [("glm-edge-1.5b-chat", 2046), ("chatglm2-6b-int4", 512), ("chatglm-6b", 1024)]
)
def test_what_is_needed_is_enough_and_not_far_more(tmp_path: Path, name: str, length: int) -> None:
    synthesize(name, tmp_path / name, layers=2)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / name), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)
    taken, needed = map(int, done.stdout.split())
    assert taken <= needed + (100 << 20), "code and threads take memory, too"
    assert needed <= 2 * taken


LONG = """
import re, sys
from dataclasses import replace
import torch
from glm import info
from glm.layout import Layout
from glm.model import GLM
from glm.pretrained import described
from glm.checkpoint import Checkpoint
from pathlib import Path
folder, keys, value = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
spec = described(Checkpoint.open(folder), folder.name)[1]
sizes = dict(heads=8, rank=64, plain=64, rotary=32, value=value)
for block in spec.blocks[:1]:
    mixer, rotary = block.mixer, spec.rotary
    if hasattr(mixer, "attention"):
        mixer = replace(mixer, attention=replace(mixer.attention, **sizes), indexer=replace(mixer.indexer, width=32))
    elif hasattr(mixer, "rank"):
        mixer = replace(mixer, **sizes)
    if mixer is not block.mixer:
        rotary = replace(rotary, widths=(32,))
    spec = replace(spec, blocks=(replace(block, mixer=mixer),), context=keys, rotary=rotary)
model = GLM(spec, dtype=torch.float32, device="cpu", seed=0)
T = info.PIECE
def read(length):
    cache = model.new_cache(1, length)
    cache.filled = max(0, length - T)
    new = torch.arange(cache.filled, length)[None, :, None]
    with torch.inference_mode():
        model(torch.ones(1, new.shape[1], dtype=torch.long), Layout.rule(new, length), cache, last=True)
read(64)
before = peak()
read(keys)
need = info.need(spec, torch.float32, keys)
print(peak() - before, need.cache + need.working - info.FILE_PIECE)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux does")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chatglm3-base", 0),
        ("hf_glm4_moe_lite-sensitive", 96),  # as wide as a key, like those that are published
        ("hf_glm4_moe_lite-sensitive", 64),
        ("hf_glm_moe_dsa-base", 96),
    ],
)
def test_the_last_piece_of_a_long_text_has_what_it_needs(name: str, value: int) -> None:
    """Of attention, latent attention and sparse attention: a mask, the keys of all heads, the scores of all pairs."""
    folder = next(folder for folder in HERE if folder.name == name)
    command = [sys.executable, "-c", LONG, str(folder), str(6 * info.PIECE), str(value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    taken, needed = map(int, done.stdout.split())
    assert taken <= needed + (20 << 20), "code and threads take memory, too"
    assert needed <= 2 * taken


# -- fitting -----------------------------------------------------------------------------------------------------------


def with_memory(monkeypatch: pytest.MonkeyPatch, bytes: int | None) -> None:
    found = None if bytes is None else Found(bytes, "available")
    monkeypatch.setattr(info, "memory_found", lambda device=None: found)


def test_require_fit_is_exact_and_says_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = release("chatglm3-6b").spec
    needed = info.need(spec, torch.bfloat16, 8192).bytes
    with_memory(monkeypatch, needed)
    info.require_fit(spec, torch.bfloat16, "cpu", 8192)
    with_memory(monkeypatch, needed - 1)
    with pytest.raises(MemoryFitError, match=r"needs 12\.2 GiB .*11\.6 GiB of weights.*224\.0 MiB .* 8,192 tokens"):
        info.require_fit(spec, torch.bfloat16, "cpu", 8192)
    info.require_fit(spec, torch.bfloat16, "cpu")  # fewer tokens when nobody says how many
    with_memory(monkeypatch, None)
    info.require_fit(spec, torch.float64, "cpu", 1 << 20)


def test_from_pretrained_refuses_before_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1000)
    monkeypatch.setattr("glm.pretrained.fill", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(MemoryFitError, match="only 1000 B of memory are available"):
        GLM.from_pretrained(HERE[0])


def test_describe_compares_each_storage_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 12 * GIB)
    about = info.describe("chatglm3-6b", 8192, "int4")
    assert (about.fits(), about.need) == (True, about.needs["int4"])
    assert {way: about.fits(way) for way in about.needs} == {
        "stored": False,
        "fp32": False,
        "bf16": False,
        "int8": True,
        "int4": True,
    }
    with_memory(monkeypatch, None)
    assert info.describe("chatglm3-6b").fits() is None


# -- describing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", releases())
def test_every_release_can_be_described_by_name(name: str) -> None:
    about = info.describe(name)
    assert about.release is release(name)
    assert about.need.context == about.spec.context
    assert about.need.weights == info.weight_bytes(about.spec, release(name).dtype)


def test_a_folder_is_described_by_its_config() -> None:
    folder = next(folder for folder in HERE if folder.name == "chatglm1-int4")
    about = info.describe(folder, 64)
    assert (about.generation, about.release, about.spec) == ("chatglm", None, spec_of(folder))
    assert about.needs["int4"].weights < about.needs["int8"].weights < about.needs["bf16"].weights


def test_a_hub_id_is_described_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = HERE[0], []

    def fetch(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
        asked.append((source, revision, weights))
        return folder

    monkeypatch.setattr(info, "fetch", fetch)
    assert info.describe("someone/something", revision="main").spec == spec_of(folder)
    assert asked == [("someone/something", "main", False)]


def test_what_cannot_be_described() -> None:
    with pytest.raises(GLMError, match="cannot be stored as 'int3'"):
        info.describe("chatglm3-6b", weights="int3")
    with pytest.raises(GLMError, match="context of 0 tokens"):
        info.describe("chatglm3-6b", 0)
    with pytest.raises(CheckpointError, match="no such folder"):
        info.describe("chatglm9-6b")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, torch.bfloat16),
        ({}, torch.float32),
        ({"torch_dtype": None}, torch.float32),
    ],
)
def test_dtype_of_the_files(config: dict[str, str], dtype: torch.dtype) -> None:
    assert info.stored_dtype(config) == dtype


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_of_this_machine() -> None:
    found = memory.memory_found("cpu")
    assert found is None or 0 < found.bytes < 1 << 50
    assert memory.memory_found("meta") is None


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free on the device, and what torch holds there without using it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert memory.memory_found("cuda") == Found(1200, "free on a GPU")


def test_memory_that_linux_calls_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemFree:        10 kB\nMemAvailable:   64 kB\n")
    assert memory._system(meminfo) == Found(64 * 1024, "available")
    meminfo.write_text("MemTotal: 100 kB\n")  # before Linux 3.14: whatever sysconf says
    other = memory._system(meminfo)
    assert other is None or other.where in ("free", "installed")


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "sys"
    assert memory._control_group(root, membership) is None
    membership.write_text("0::/box/inner\n")
    assert memory._control_group(root, membership) is None
    group(root / "box" / "inner", {"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1"})
    assert memory._control_group(root, membership) is None
    group(root / "box", {"memory.max": "1000", "memory.current": "300", "memory.stat": "anon 9\ninactive_file 50"})
    assert memory._control_group(root, membership) == Found(750, "left within the container's limit")
    group(root / "box" / "inner", {"memory.max": "100"})
    assert memory._control_group(root, membership) == Found(96, "left within the container's limit")


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "sys"
    membership.write_text("5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n")
    files = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "990", "memory.stat": "total_inactive_file 40"}
    group(root / "memory", files)  # inside a container its own group is the root
    assert memory._control_group(root, membership) == Found(50, "left within the container's limit")
    group(root / "memory" / "box", files | {"memory.usage_in_bytes": "2000"})
    assert memory._control_group(root, membership) == Found(0, "left within the container's limit")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (28_672, "28.0 KiB"),
        (12_487_168_000, "11.6 GiB"),
        (1 << 50, "1048576.0 GiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text
