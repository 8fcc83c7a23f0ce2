"""Converting: the same numbers under the same or other names, and never a call that a file asks for."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glm.checkpoint import Checkpoint
from glm.convert import convert
from glm.convert_child import convert_bins
from glm.errors import CheckpointError, GLMError
from glm.model import GLM

SRC = str(Path(__file__).parents[1])
GOLDENS = Path(__file__).parent / "goldens"
INDEX = "pytorch_model.bin.index.json"


def bins(golden: str, folder: Path, shards: int, zipped: bool = True) -> dict[str, Tensor]:
    """A golden's tensors in the files that ChatGLM was first published in."""
    tensors = load_file(GOLDENS / golden / "model.safetensors")
    folder.mkdir()
    shutil.copyfile(GOLDENS / golden / "config.json", folder / "config.json")
    names = sorted(tensors)
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}-of-{shards}.bin" for i in range(shards)]
    where = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name] for name in names if where[name] == file}
        torch.save(held, folder / file, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        index = {"metadata": {"total_size": 13744473856}, "weight_map": where}  # stale, as ChatGLM-6B's own
        (folder / INDEX).write_text(json.dumps(index))
    return tensors


def written(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# --- .bin files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "shards", "zipped"),
    [
        ("chatglm1-base", 8, True),
        ("chatglm1-int4", 1, True),
        ("chatglm3-ptuning-proj", 2, True),
        ("chatglm3-base", 3, False),
    ],
)
def test_bin_files_become_safetensors_of_the_same_names(tmp_path: Path, golden: str, shards: int, zipped: bool) -> None:
    tensors = bins(golden, tmp_path / "old", shards, zipped)
    for name in ("tokenizer.model", "tokenizer_config.json", "MODEL_LICENSE"):
        (tmp_path / "old" / name).write_text(name)
    (tmp_path / "old" / "modeling_chatglm.py").write_text("code")
    convert(tmp_path / "old", tmp_path / "new")
    assert same(written(tmp_path / "new"), tensors)
    others = {path.name for path in (tmp_path / "new").iterdir() if not path.name.startswith("model")}
    assert others == {"config.json", "tokenizer.model", "tokenizer_config.json", "MODEL_LICENSE"}
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == json.loads(
        (tmp_path / "old" / "config.json").read_text()
    )
    assert len([*(tmp_path / "new").glob("*.safetensors")]) == shards
    theirs = GLM.from_pretrained(GOLDENS / golden, device="cpu").state_dict()
    assert same(GLM.from_pretrained(tmp_path / "new", device="cpu").state_dict(), theirs)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


@pytest.mark.parametrize("dtype", ["float32", "fp16", "bf16"])
@pytest.mark.parametrize("from_bin", [True, False])
def test_another_dtype(tmp_path: Path, dtype: str, from_bin: bool) -> None:
    final = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    tensors = bins("chatglm1-int4", tmp_path / "old", 1)
    if from_bin:
        convert_bins(tmp_path / "old", tmp_path / "new", final, quiet=True)
    else:
        convert(GOLDENS / "chatglm1-int4", tmp_path / "new", dtype=dtype)
    fixed = ("inv_freq", "weight_scale")
    wanted = {n: x if x.dtype == torch.int8 or n.endswith(fixed) else x.to(final) for n, x in tensors.items()}
    assert same(written(tmp_path / "new"), wanted)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["torch_dtype"] == str(final).removeprefix("torch.")


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, exec, subprocess.check_call, torch.load, os.unlink, open, getattr, print]
)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_calls_something_is_refused(tmp_path: Path, function: Callable[..., Any], zipped: bool) -> None:
    bins("chatglm3-base", tmp_path / "old", 1)
    canary = tmp_path / "canary"
    canary.write_text("alive")
    argument = str(canary) if function in (os.unlink, torch.load) else f"touch {tmp_path / 'harmed'}"
    tensors: dict[str, Any] = load_file(GOLDENS / "chatglm3-base" / "model.safetensors")
    tensors["transformer.output_layer.weight"] = Call(function, argument)
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused = r"pytorch_model\.bin: refused, since it is damaged or holds more than"
    with pytest.raises(CheckpointError, match=refused):
        convert_bins(tmp_path / "old", tmp_path / "new", None, quiet=True)
    if function is os.system:  # and the whole way, through the process of its own
        with pytest.raises(CheckpointError, match=refused):
            convert(tmp_path / "old", tmp_path / "new")
    assert canary.read_text() == "alive"
    assert {path.name for path in tmp_path.iterdir()} == {"old", "canary"}


def whole(value: Any) -> Callable[[Path], object]:
    """Something else in the file."""
    return lambda folder: torch.save(value, folder / "pytorch_model.bin")


def with_tensor(value: Any) -> Callable[[Path], object]:
    """One tensor more."""
    held = load_file(GOLDENS / "chatglm3-base" / "model.safetensors")
    return whole({**held, "more": value})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a list": (whole([torch.ones(2)]), "holds a list"),
    "a tensor": (whole(torch.ones(2)), "holds a Tensor"),
    "nested": (whole({"module": {"a": torch.ones(2)}}), "'module' is a dict"),
    "a number": (with_tensor(3.0), "'more' is a float"),
    "numbered": (whole({0: torch.ones(2)}), "0 is a Tensor"),
    "sparse": (with_tensor(torch.eye(3).to_sparse()), "'more' is a tensor of a kind"),
    "complex": (with_tensor(torch.ones(2, dtype=torch.complex64)), "'more' is a tensor of a kind"),
    "expanded": (with_tensor(torch.ones(1).expand(10**6, 10**6)), "'more' claims more numbers"),
    "overlapping": (with_tensor(torch.ones(2000).as_strided((1000, 1000), (1, 1))), "'more' claims more numbers"),
    "many views of one": (whole({str(i): x for x in [torch.ones(10**4)] for i in range(1000)}), "claims more numbers"),
    "NaN": (with_tensor(torch.tensor([0.0, torch.nan])), "'more' has NaN"),
    "Inf": (with_tensor(torch.tensor([torch.inf])), "'more' has NaN or Inf"),
    "empty": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "refused"),
    "half": (lambda folder: os.truncate(folder / "pytorch_model.bin", 100_000), "refused"),
    "text": (lambda folder: (folder / "pytorch_model.bin").write_text("<html>"), "refused"),
    "a link outside": (
        lambda folder: [
            (folder / "pytorch_model.bin").rename(folder.parent / "x.bin"),
            (folder / "pytorch_model.bin").symlink_to("../x.bin"),
        ],
        "link to a file outside",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "an index out of the folder": (
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../pytorch_model.bin"}})),
        "not the name of a file in this folder",
    ),
    "an index of other tensors": (
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}})),
        "which the index has nowhere",
    ),
}


@pytest.mark.parametrize(("spoil", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_malformed_bin_file_is_one_error_and_leaves_nothing(
    tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    bins("chatglm3-base", tmp_path / "old", 1)
    spoil(tmp_path / "old")
    with pytest.raises(CheckpointError) as refusal:
        convert_bins(tmp_path / "old", tmp_path / "new", None, quiet=True)
    assert says in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} - {"x.bin"} == {"old"}


def test_numbers_too_large_for_half_precision(tmp_path: Path) -> None:
    bins("chatglm3-base", tmp_path / "old", 1)
    with_tensor(torch.tensor([1e6]))(tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"'more'.*too large for"):
        convert_bins(tmp_path / "old", tmp_path / "new", torch.float16, quiet=True)
    convert_bins(tmp_path / "old", tmp_path / "new", torch.bfloat16, quiet=True)


def test_a_destination_that_is_taken(tmp_path: Path) -> None:
    bins("chatglm3-base", tmp_path / "old", 1)
    for source in (tmp_path / "old", GOLDENS / "chatglm3-base"):
        with pytest.raises(GLMError, match="already exists"):
            convert(source, tmp_path / "old")
    assert (tmp_path / "old" / "pytorch_model.bin").exists()


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    for wrong in ({"dtype": "int3"}, {"names": "llama"}):
        with pytest.raises(GLMError, match="choose one of"):
            convert(GOLDENS / "chatglm3-base", tmp_path / "new", **wrong)
    bins("chatglm3-base", tmp_path / "old", 1)
    with pytest.raises(GLMError, match=r"glm convert .*/old STEP"):
        convert(tmp_path / "old", tmp_path / "new", names="hf")


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", ["chatglm3-base", "chatglm2-32k-rope_interp", "glm4-9b-chatglm_format"])
def test_native_names_to_hf_and_back(tmp_path: Path, golden: str) -> None:
    source = GOLDENS / golden
    convert(source, tmp_path / "hf", names="hf")
    convert(tmp_path / "hf", tmp_path / "back", names="chatglm")
    ids = torch.arange(12)[None]
    one, two, three = (
        GLM.from_pretrained(folder, dtype=torch.float64, device="cpu")
        for folder in (source, tmp_path / "hf", tmp_path / "back")
    )
    assert torch.equal(one(ids), two(ids))
    assert torch.equal(one(ids), three(ids))
    assert "model.layers.0.self_attn.q_proj.weight" in written(tmp_path / "hf")
    used = {name: x for name, x in load_file(source / "model.safetensors").items() if not name.endswith("inv_freq")}
    assert same(written(tmp_path / "back"), used)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"


def test_hf_names_to_native_and_back(tmp_path: Path) -> None:
    source = GOLDENS / "hf_glm-base"
    convert(source, tmp_path / "native", names="chatglm", dtype="bf16")
    convert(tmp_path / "native", tmp_path / "back", names="hf")
    original = {name: x.bfloat16() for name, x in load_file(source / "model.safetensors").items()}
    assert same(written(tmp_path / "back"), original)
    assert GLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


@pytest.mark.parametrize("golden", ["chatglm1-base", "chatglm2-int4", "chatglm3-ptuning-noproj", "hf_glm4-base"])
def test_a_model_that_other_names_cannot_hold(tmp_path: Path, golden: str) -> None:
    for names in ("hf", "chatglm"):
        if (golden, names) in (("chatglm2-int4", "chatglm"), ("chatglm3-ptuning-noproj", "chatglm")):
            continue
        with pytest.raises(GLMError):
            convert(GOLDENS / golden, tmp_path / "new", names=names)
    assert list(tmp_path.iterdir()) == []


# --- kills and memory ----------------------------------------------------------------------------------------------

CONVERT = "import sys; from glm.convert import convert; convert(*sys.argv[1:3], quiet=True)"
ENV = os.environ | {"PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}


def test_a_kill_at_any_moment_leaves_nothing_or_the_whole(tmp_path: Path) -> None:
    tensors = bins("chatglm1-base", tmp_path / "old", 4)
    moments = random.Random(0)
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", CONVERT, str(tmp_path / "old"), str(tmp_path / "new")], env=ENV)
        while not ((tmp_path / ".new.partial").exists() or (tmp_path / "new").exists()):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        settle(tmp_path)
        if (tmp_path / "new").exists():
            assert same(written(tmp_path / "new"), tensors)
            shutil.rmtree(tmp_path / "new")
    convert(tmp_path / "old", tmp_path / "new", quiet=True)
    assert same(written(tmp_path / "new"), tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


def settle(place: Path) -> None:
    """Waits for the end of the process that writes into `place`, if there is one: it ends with its parent."""
    deadline = time.monotonic() + 20
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            while str(place).encode() in (folder / "cmdline").read_bytes():
                assert time.monotonic() < deadline, "the child outlived its parent"
                time.sleep(0.02)
        except OSError:
            continue


MEASURE = """
import resource, sys
from glm.convert import convert
from glm.convert_child import convert_bins
convert(*sys.argv[1:3], quiet=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_is_about_one_file(tmp_path: Path) -> None:
    """Eight files of 16 MiB, mapped or read whole: all of them would be 128 MiB more than two small ones."""

    def peak(name: str, shards: int, size: int, zipped: bool) -> int:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        for i in range(shards):
            held = {f"{i}": torch.ones(size), f"{i}.": torch.ones(1)}
            torch.save(held, folder / f"{i}.bin", _use_new_zipfile_serialization=zipped)
        names = {f"{i}{dot}": f"{i}.bin" for i in range(shards) for dot in ("", ".")}
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))
        command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / f"{name}-new")]
        ran = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True)
        return int(ran.stdout)

    file = 16 * 1024
    small = peak("small", 2, 1, zipped=True)
    for name, zipped in (("mapped", True), ("read", False)):
        assert peak(name, 8, file * 256, zipped) - small < 4 * file
        assert Checkpoint.open(tmp_path / f"{name}-new").nbytes == 8 * (file * 1024 + 4)
