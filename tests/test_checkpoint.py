"""Checkpoints in and out: every number in its place, in the dtype asked for, with no memory to spare."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glm.checkpoint import Checkpoint, PerHead, Stored, agree, export, fill, match, save
from glm.errors import CheckpointError, GLMError
from glm.tensor_file import PIECE, Outgoing, finite

SRC = str(Path(__file__).parents[1])


class Fused(nn.Module):
    """Three linear maps in one matrix, an integer matrix, a norm: what a table has to deal with."""

    def __init__(self, heads: int = 3, width: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.qkv = nn.Linear(width, 3 * heads * 2)
        self.split = nn.Linear(width, 6, bias=False)
        self.stack = nn.Parameter(torch.zeros(2, 5, width))
        self.register_buffer("integers", torch.zeros(4, 3, dtype=torch.int8))
        self.register_buffer("made", torch.arange(3.0), persistent=False)
        self.scale = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


TABLE = [
    Stored("wte", "embedding.weight"),
    Stored("attn.w", "qkv.weight", packing=PerHead(3)),
    Stored("attn.b", "qkv.bias", packing=PerHead(3)),
    Stored("low", "split.weight", (slice(0, 2),)),
    Stored("high", "split.weight", (slice(2, 6),)),
    Stored("expert.0", "stack", (0,)),
    Stored("expert.1", "stack", (1,)),
    Stored("int", "integers"),
    Stored("scale", "scale", at_least=torch.float32),
]


def numbers() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "wte": torch.randn(11, 4),
        "attn.w": torch.randn(18, 4),
        "attn.b": torch.randn(18),
        "low": torch.randn(2, 4),
        "high": torch.randn(4, 4),
        "expert.0": torch.randn(5, 4),
        "expert.1": torch.randn(5, 4),
        "int": torch.randint(-128, 128, (4, 3), dtype=torch.int8),
        "scale": torch.tensor(0.3),
    }


def folder_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder as the safetensors library writes it."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def on_meta() -> Fused:
    with torch.device("meta"):
        model = Fused()
    model.made = torch.arange(3.0)
    return model


def test_every_number_arrives_in_its_place(tmp_path: Path) -> None:
    disk = numbers()
    model = on_meta()
    done: list[int] = []
    fill(model, Checkpoint.open(folder_of(tmp_path, disk)), TABLE, device="cpu", progress=done.append)
    assert torch.equal(model.embedding.weight, disk["wte"])
    heads, width = 3, 2
    for head in range(heads):
        for which in range(3):
            for channel in range(width):
                there = (head * 3 + which) * width + channel
                here = (which * heads + head) * width + channel
                assert torch.equal(model.qkv.weight[here], disk["attn.w"][there])
                assert model.qkv.bias[here] == disk["attn.b"][there]
    assert torch.equal(model.split.weight, torch.cat([disk["low"], disk["high"]]))
    assert torch.equal(model.stack, torch.stack([disk["expert.0"], disk["expert.1"]]))
    assert torch.equal(model.integers, disk["int"])
    assert model.integers.dtype == torch.int8
    assert model.scale.item() == disk["scale"].item()
    assert sum(done) == sum(x.nbytes for x in disk.values())


def test_a_filled_model_is_wired_as_it_was(tmp_path: Path) -> None:
    model = on_meta()
    fill(model, Checkpoint.open(folder_of(tmp_path, numbers())), TABLE, dtype=torch.bfloat16, device="cpu")
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.requires_grad
    assert not model.scale.requires_grad
    assert [name for name, _ in model.named_buffers()] == ["integers", "made"]
    assert "made" not in model.state_dict()
    assert model.made.tolist() == [0, 1, 2]
    assert model.qkv.weight.dtype == torch.bfloat16
    assert model.scale.dtype == torch.float32  # the table says: never narrower


def test_a_model_that_has_numbers_gets_new_ones(tmp_path: Path) -> None:
    model = Fused()
    fill(model, Checkpoint.open(folder_of(tmp_path, numbers())), TABLE, dtype=torch.float64)
    assert torch.equal(model.embedding.weight, numbers()["wte"].double())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_becomes_the_dtype_asked_for(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    disk = {name: x if x.dtype == torch.int8 else x.to(stored) for name, x in numbers().items()}
    model = on_meta()
    fill(model, Checkpoint.open(folder_of(tmp_path, disk)), TABLE, dtype=wanted, device="cpu")
    assert model.split.weight.dtype == wanted
    assert torch.equal(model.split.weight, torch.cat([disk["low"], disk["high"]]).to(wanted))


EVERY = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    assert finite(torch.zeros(0, dtype=dtype))
    for where in (0, 500, 999):
        x = torch.randn(1000).to(dtype)
        assert finite(x)
        x[where] = bad if dtype != torch.float8_e4m3fn else torch.nan  # which has no Inf
        assert finite(x) is False


def test_the_largest_numbers_are_numbers() -> None:
    assert all(finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)) for dtype in EVERY)
    assert finite(torch.tensor([127], dtype=torch.int8))


def exported(model: nn.Module, table: list[Stored], dtype: torch.dtype | None = None) -> list[Outgoing]:
    tensors = model.state_dict()
    return export(table, tensors, lambda stored: stored.on_disk(tensors[stored.parameter]), lambda _: dtype)


@pytest.mark.parametrize("rows", [1, 3, PIECE // 3 - 1, PIECE // 3, PIECE // 3 + 1, 5_000_000])
def test_tensors_of_any_number_of_pieces(tmp_path: Path, rows: int) -> None:
    disk = {"w": torch.randint(-128, 128, (3 * rows, 1), dtype=torch.int8)}
    for packing in (None, PerHead(rows)):
        model = nn.Module()
        model.register_buffer("weight", torch.empty(3 * rows, 1, dtype=torch.int8, device="meta"))
        table = [Stored("w", "weight", packing=packing)]
        fill(model, Checkpoint.open(folder_of(tmp_path, disk)), table, device="cpu")
        [back] = exported(model, table)
        assert torch.equal(back.make(), disk["w"])


def test_export_and_save_are_the_way_back(tmp_path: Path) -> None:
    model = on_meta()
    fill(model, Checkpoint.open(folder_of(tmp_path / "one", numbers())), TABLE, device="cpu")
    save(tmp_path / "two", {"a": [1, "字"]}, exported(model, TABLE))
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == {"a": [1, "字"]}
    back = load_file(tmp_path / "two" / "model.safetensors")
    assert back.keys() == numbers().keys()
    assert all(torch.equal(back[name], x) for name, x in numbers().items())
    narrow = {out.name: out.dtype for out in exported(model, TABLE, torch.float16)}
    assert narrow["wte"] == torch.float16
    assert narrow["scale"] == torch.float32
    assert narrow["int"] == torch.int8


def outgoing(tensors: dict[str, Tensor]) -> list[Outgoing]:
    return [Outgoing(name, x.dtype, tuple(x.shape), lambda x=x: x) for name, x in tensors.items()]


@pytest.mark.parametrize("shard_bytes", [1, 300, 500, 10**9])
def test_shards_are_what_the_official_library_reads(tmp_path: Path, shard_bytes: int) -> None:
    tensors = numbers() | {
        "odd": torch.ones(3, dtype=torch.int8),
        "wide": torch.ones(2).double(),
        "none": torch.ones(0),
    }
    done: list[int] = []
    save(tmp_path / "new", {}, outgoing(tensors), shard_bytes=shard_bytes, progress=done.append)
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    total = sum(x.nbytes for x in tensors.values())
    assert sum(done) == total
    if shard_bytes > total:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        count = len(files)
        assert count <= -(-total // shard_bytes)
        assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    back = {name: x for file in files for name, x in load_file(file).items()}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], x) and back[name].dtype == x.dtype for name, x in tensors.items())
    for file in files:
        with safe_open(file, "pt") as official:
            assert official.metadata() == {"format": "pt"}
        assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0
    ours = Checkpoint.open(tmp_path / "new")
    assert ours.nbytes == total
    for name, info in ours.tensors.items():
        assert torch.equal(ours.read(name), tensors[name])
        assert info.begin % info.dtype.itemsize == 0


def test_equal_shards_of_a_released_size(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.zeros(10, 10) for i in range(40)}
    total = sum(x.nbytes for x in tensors.values())
    save(tmp_path / "new", {}, outgoing(tensors), shard_bytes=-(-total // 7))
    sizes = [sum(x.nbytes for x in load_file(f).values()) for f in (tmp_path / "new").glob("*.safetensors")]
    assert len(sizes) == 7
    assert max(sizes) - min(sizes) <= 400


def test_save_refuses_a_folder_that_is_taken_and_leaves_nothing_on_errors(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    with pytest.raises(GLMError, match="already exists"):
        save(tmp_path / "taken", {}, outgoing(numbers()))
    with pytest.raises(ValueError, match="not what was to be written"):
        save(tmp_path / "new", {}, [Outgoing("x", torch.float32, (2,), lambda: torch.zeros(3))])
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "new", {"eps": float("nan")}, outgoing(numbers()))
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_copies_go_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1")
    save(tmp_path / "new", {}, outgoing(numbers()), copies=[tmp_path / "tokenizer.model"])
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == b"\0\1"


# --- nothing is left half loaded -----------------------------------------------------------------------------------


def broken(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    tensors = numbers()
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (broken(lambda t: t.pop("low")), "model.safetensors: lacks the tensor 'low'"),
        (broken(lambda t: t.update(more=torch.ones(1))), "model.safetensors: holds the tensor 'more'"),
        (broken(lambda t: t.update(low=torch.ones(2, 5))), r"model.safetensors: the tensor 'low' is \[2, 5\]"),
        (broken(lambda t: t.update(low=torch.ones(2, 4).int())), "model.safetensors: the tensor 'low' holds I32"),
        (broken(lambda t: t.update(int=torch.ones(4, 3))), "model.safetensors: the tensor 'int' holds F32"),
        (broken(lambda t: t.update(int=torch.ones(4, 3).byte())), "model.safetensors: the tensor 'int' holds U8"),
        (broken(lambda t: t["wte"][10].fill_(float("nan"))), "model.safetensors: the tensor 'wte' has NaN or Inf"),
        (
            broken(lambda t: t["attn.b"][17].fill_(float("inf"))),
            "model.safetensors: the tensor 'attn.b' has NaN or Inf",
        ),
        (broken(lambda t: t["scale"].fill_(-float("inf"))), "model.safetensors: the tensor 'scale' has NaN or Inf"),
        (broken(lambda t: t["high"].fill_(1e6)), "'high' has numbers too large for float16; take bfloat16"),
    ],
    ids=lambda value: value.split(": ")[-1] if isinstance(value, str) else "",
)
def test_an_error_names_file_and_tensor_and_leaves_the_model_alone(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    model = on_meta()
    checkpoint = Checkpoint.open(folder_of(tmp_path, tensors))
    before = dict(model.state_dict(keep_vars=True))
    with pytest.raises(CheckpointError, match=message):
        fill(model, checkpoint, TABLE, dtype=torch.float16, device="cpu")
    assert all(x is before[name] for name, x in model.state_dict(keep_vars=True).items())


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    """Through a memory map this would be a bus error, and the end of the process."""
    checkpoint = Checkpoint.open(folder_of(tmp_path, numbers()))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(checkpoint.tensors["wte"].end - 1)
    model = on_meta()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the tensor 'wte' cannot be read"):
        fill(model, checkpoint, TABLE, device="cpu")
    assert model.embedding.weight.is_meta
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the tensor '.*' cannot be read"):
        fill(model, checkpoint, TABLE, device="cpu")


def test_ignorable_names_are_patterns_for_the_whole_name(tmp_path: Path) -> None:
    unused = torch.ones(2)
    checkpoint = Checkpoint.open(folder_of(tmp_path / "a", numbers() | {"layers.7.inv_freq": unused}))
    names = list(numbers())
    with pytest.raises(CheckpointError, match=r"holds the tensor 'layers\.7\.inv_freq'"):
        agree(checkpoint, names)
    with pytest.raises(CheckpointError, match="holds the tensor"):
        agree(checkpoint, names, [r"layers\.\d+", "inv_freq"])
    fill(on_meta(), checkpoint, TABLE, [r"layers\.\d+\.inv_freq"], device="cpu")
    unused[1] = torch.nan  # a file that is damaged there may be damaged anywhere
    checkpoint = Checkpoint.open(folder_of(tmp_path / "b", numbers() | {"layers.7.inv_freq": unused}))
    with pytest.raises(CheckpointError, match=r"the tensor 'layers\.7\.inv_freq' has NaN or Inf"):
        fill(on_meta(), checkpoint, TABLE, [r"layers\.\d+\.inv_freq"], device="cpu")


@pytest.mark.parametrize(
    "table",
    [
        TABLE[1:],
        [*TABLE, Stored("more", "scale")],
        [*TABLE, TABLE[0]],
        [*TABLE[:3], Stored("low", "split.weight", (slice(0, 3),)), *TABLE[4:]],
        [*TABLE[:3], Stored("low", "split.weight", (slice(0, 1),)), *TABLE[4:]],
        [*TABLE[:4], Stored("high", "split.weight", (slice(1, 5),)), *TABLE[5:]],
        [*TABLE[:4], Stored("low", "split.weight", (slice(2, 6),)), *TABLE[5:]],
    ],
    ids=["a gap", "a scalar twice", "a line twice", "rows twice", "rows left out", "rows shifted", "a name twice"],
)
def test_a_table_that_does_not_cover_the_model_once_is_our_mistake(tmp_path: Path, table: list[Stored]) -> None:
    checkpoint = Checkpoint.open(folder_of(tmp_path, numbers() | {"more": torch.tensor(1.0)}))
    with pytest.raises(ValueError, match="table"):
        match(on_meta(), checkpoint, table)


def test_a_buffer_that_nobody_can_fill_is_our_mistake(tmp_path: Path) -> None:
    model = on_meta()
    model.made = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match="buffer made"):
        match(model, Checkpoint.open(folder_of(tmp_path, numbers())), TABLE)


# --- folders -------------------------------------------------------------------------------------------------------


def test_the_layout_of_the_hub_cache_is_accepted(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    folder_of(tmp_path / "made", numbers())
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate(("config.json", "model.safetensors")):
        (tmp_path / "made" / name).rename(blobs / f"{i}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"{i}")
    assert Checkpoint.open(snapshot).tensors.keys() == numbers().keys()
    (tmp_path / "by-name").symlink_to(snapshot)
    assert Checkpoint.open(tmp_path / "by-name").tensors.keys() == numbers().keys()
    (snapshot / "config.json").unlink()
    (tmp_path / "models--a--b" / "outside.json").write_text("{}")
    (snapshot / "config.json").symlink_to("../../outside.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a link to a file outside"):
        Checkpoint.open(snapshot)


def test_a_link_within_the_folder_is_accepted_and_one_out_of_it_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", numbers())
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    assert Checkpoint.open(folder).nbytes
    (folder / "real").rename(tmp_path / "real")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../real")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a link to a file outside"):
        Checkpoint.open(folder)


def test_other_files_of_the_folder_do_not_matter(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, numbers())
    (folder / "reference.safetensors").write_bytes(b"no")
    (folder / "pytorch_model.bin").write_bytes(b"no")
    assert Checkpoint.open(folder).tensors.keys() == numbers().keys()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Checkpoint.open(tmp_path / "none")


def test_a_folder_of_bin_files_says_how_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-00001-of-00008.bin").touch()
    with pytest.raises(CheckpointError, match="glm convert"):
        Checkpoint.open(tmp_path)


# --- memory and kills ----------------------------------------------------------------------------------------------

LOADER = """
import sys
from pathlib import Path
import torch
from torch import nn
from glm.checkpoint import Checkpoint, Stored, fill

def status(field):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field)).split()[1])

dtype = getattr(torch, sys.argv[2])
layers = nn.ModuleList(nn.Linear(2048, 4096, bias=False, device="meta") for _ in range(8))
warm = torch.randn(2, 2).to(dtype).aminmax()
before = status("VmRSS")
table = [Stored(f"{i}", f"{i}.weight") for i in range(8)]
fill(layers, Checkpoint.open(sys.argv[1]), table, dtype=dtype, device="cpu")
print(status("VmHWM") - before, sum(x.nbytes for x in layers.state_dict().values()) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see a process's peak memory")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_hardly_more_than_the_weights(tmp_path: Path, dtype: str) -> None:
    """8 × 16 MiB in bf16: the peak, file pages included, exceeds the weights by the largest and 32 MiB at most."""
    weight = torch.randn(4096, 2048).bfloat16()
    save(tmp_path / "new", {}, outgoing({str(i): weight for i in range(8)}), shard_bytes=100 << 20)
    ran = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "new"), dtype],
        env=os.environ | {"PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, weights = map(int, ran.stdout.split())
    largest = 8 * 1024 * getattr(torch, dtype).itemsize
    assert weights == 8 * largest
    assert peak < weights + largest + 32 * 1024, (peak, weights)
