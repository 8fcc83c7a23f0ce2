"""Hundreds of malformed checkpoints: small golden folders, each with one thing wrong with it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NATIVE, PER_HEAD, INTEGER, SPLIT = "chatglm3-base", "chatglm1-base", "chatglm1-int4", "hf_glm-base"

Json = Any


@dataclass(frozen=True)
class Case:
    """A golden folder to be spoilt, and a part of what the error must say."""

    name: str
    base: str
    spoil: Callable[[Path], object]
    says: str = ""

    def make(self, folder: Path) -> None:
        """Writes the new folder `folder`, and spoils it."""
        folder.mkdir()
        for name in ("config.json", WEIGHTS):
            shutil.copyfile(GOLDENS / self.base / name, folder / name)
        self.spoil(folder)


CASES: list[Case] = []


def case(name: str, spoil: Callable[[Path], object], says: str = "", base: str = NATIVE) -> None:
    CASES.append(Case(f"{base}: {name}", base, spoil, says))


# --- taking a file apart -------------------------------------------------------------------------------------------


def parts(path: Path) -> tuple[dict[str, Json], bytes]:
    """Header and numbers of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def assemble(path: Path, header: dict[str, Json] | bytes, data: bytes, length: int | None = None) -> None:
    """A file of this header and these numbers, whether they fit together or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length % 2**64) + text + data)


def with_entry(tensor: str, change: Callable[[dict[str, Json]], object]) -> Callable[[Path], None]:
    """Spoils one line of the header."""

    def spoil(folder: Path) -> None:
        header, data = parts(folder / WEIGHTS)
        change(header[tensor])
        assemble(folder / WEIGHTS, header, data)

    return spoil


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Spoils the tensors, in a file that is otherwise as the official library writes it."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return spoil


def with_raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Spoils the bytes of the weight file."""
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def with_config(change: Callable[[dict[str, Json]], object]) -> Callable[[Path], None]:
    """Spoils config.json."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def sharded(change: Callable[[Path, dict[str, Json]], object]) -> Callable[[Path], None]:
    """Two shards with their index, then one thing wrong with it."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, half in halves.items():
            save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
        changed = change(folder, index)
        (folder / INDEX).write_bytes(changed if isinstance(changed, bytes) else json.dumps(index).encode())

    return spoil


def write_json(name: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text)


def names_of(base: str) -> dict[str, tuple[str, list[int]]]:
    """The tensors that a base folder holds and the model uses: name -> (dtype, shape)."""
    header, _ = parts(GOLDENS / base / WEIGHTS)
    return {
        name: (entry["dtype"], entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and not name.endswith("inv_freq")
    }


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "a string": b'"glm"',
    "half": b'{"a": [1, 2',
    "a comma too many": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "a comment": b'{"a": 1} # one',
    "two objects": b"{}{}",
    "not UTF-8": b'{"a": "\xfe\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "zeros": bytes(1000),
    "a key twice": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "an overflow": b'{"a": 1e400}',
    "an endless integer": b'{"a": ' + b"1" * 10_000 + b"}",
    "deep lists": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a": ' * 200_000 + b"1" + b"}" * 200_000,
    "100 MB of a string": b'{"a": "' + b"x" * 100_000_000 + b'"}',
    "15 MB of lists": b'{"a": [' + b"[]," * 5_000_000 + b"[]]}",
    "15 MB of objects": b'{"a": [' + b"{}," * 5_000_000 + b"{}]}",
}
for fault, text in NOT_JSON.items():
    case(f"config.json is {fault}", write_json("config.json", text), "config.json")
    case(f"the index is {fault}", sharded(lambda folder, index, text=text: text), INDEX)
    case(
        f"the header is {fault}",
        lambda folder, text=text: assemble(folder / WEIGHTS, text, parts(folder / WEIGHTS)[1]),
        WEIGHTS,
    )

# --- the file's bytes ----------------------------------------------------------------------------------------------

for left in (0, 1, 4, 7, 8, 9, 100, 2000, 2159, 2160, 2161, 5000, 100_000, 366_000, 366_846, 366_847):
    case(f"truncated to {left} bytes", with_raw(lambda raw, left=left: raw[:left]), "model.safetensors: truncated")
for more in (1, 2, 4, 8, 4096, 1 << 20):
    case(f"{more} bytes too long", with_raw(lambda raw, more=more: raw + bytes(more)), WEIGHTS)
for length in (
    0,
    1,
    2,
    2143,
    2144 - 8,
    2153,
    2160,
    10_000,
    366_840,
    366_841,
    1 << 25,
    1 << 31,
    1 << 40,
    1 << 63,
    -1,
    -8,
):
    case(
        f"a header said to have {length} bytes",
        lambda folder, length=length: assemble(folder / WEIGHTS, *parts(folder / WEIGHTS), length),
        WEIGHTS,
    )
case("all zeros", with_raw(lambda raw: bytes(len(raw))), WEIGHTS)
case("its bytes reversed", with_raw(lambda raw: raw[::-1]), WEIGHTS)
case("a zip archive", with_raw(lambda raw: b"PK\3\4" + raw), WEIGHTS)
case("a large-file pointer", with_raw(lambda raw: b"version https://git-lfs.github.com/spec/v1\nsize 3\n"), WEIGHTS)
case("a web page", with_raw(lambda raw: b"<!DOCTYPE html><html><body>404</body></html>"), WEIGHTS)
case("100 MB of nothing", lambda folder: os.truncate(folder / WEIGHTS, 100_000_000), WEIGHTS)
case(
    "a header of 100 MB",
    lambda folder: assemble(folder / WEIGHTS, b"{" + b" " * 100_000_000 + b"}", b""),
    "a header of 100000002 bytes",
)
case(
    "a space before the header",
    lambda folder: assemble(
        folder / WEIGHTS, b" " + json.dumps(parts(folder / WEIGHTS)[0]).encode(), parts(folder / WEIGHTS)[1]
    ),
    WEIGHTS,
)
for fault, value in {"a list": [], "a string": "pt", "a number in it": {"format": 1}, "nested": {"a": {}}}.items():
    case(
        f"metadata is {fault}",
        lambda folder, value=value: assemble(
            folder / WEIGHTS, parts(folder / WEIGHTS)[0] | {"__metadata__": value}, parts(folder / WEIGHTS)[1]
        ),
        "__metadata__",
    )

# --- lies in the header --------------------------------------------------------------------------------------------

LIED_ABOUT = (
    "transformer.embedding.word_embeddings.weight",
    "transformer.encoder.layers.0.self_attention.query_key_value.weight",
    "transformer.encoder.layers.1.input_layernorm.weight",
)
ENTRY_LIES: dict[str, Callable[[dict[str, Json]], object]] = {
    **{
        f"dtype {dtype!r}": lambda e, dtype=dtype: e.update(dtype=dtype)
        for dtype in (
            "F64",
            "F16",
            "BF16",
            "I64",
            "I32",
            "I8",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F128",
            "f32",
            "",
            None,
            5,
            [],
            {},
        )
    },
    **{
        f"shape {shape!r}": lambda e, shape=shape: e.update(shape=shape)
        for shape in (
            [],
            [0],
            [-1],
            [2**62, 4],
            [2**63],
            [10**12],
            [10**30],
            [1.5],
            [64.0],
            [True],
            ["64"],
            [[64]],
            None,
        )
    },
    "shape as a string": lambda e: e.update(shape="64"),
    "shape as an object": lambda e: e.update(shape={"0": 64}),
    "shape of thousands of ones": lambda e: e.update(shape=e["shape"] + [1] * 5000),
    "negative dimensions": lambda e: e.update(shape=[-x for x in e["shape"]] + [-1] * (len(e["shape"]) % 2)),
    "one row fewer": lambda e: e.update(shape=[e["shape"][0] - 1, *e["shape"][1:]]),
    "one row more": lambda e: e.update(shape=[e["shape"][0] + 1, *e["shape"][1:]]),
    "another shape of as many": lambda e: e.update(shape=[*e["shape"][:-1], 2, e["shape"][-1] // 2]),
    "a dimension of one more": lambda e: e.update(shape=[*e["shape"], 1]),
    **{
        f"offsets {offsets!r}": lambda e, offsets=offsets: e.update(data_offsets=offsets)
        for offsets in (
            [],
            [0],
            [0, 0],
            [-4, 0],
            [-256, 0],
            [256, 0],
            [0, 1, 2],
            [0, 2**63],
            [2**63, 2**64],
            [0.0, 256.0],
            ["0", "256"],
            [False, True],
            None,
            "0-256",
            {},
            [0, 10**30],
            [10**12, 10**12 + 256],
        )
    },
    "offsets the wrong way round": lambda e: e.update(data_offsets=e["data_offsets"][::-1]),
    "offsets one byte on": lambda e: e.update(data_offsets=[x + 1 for x in e["data_offsets"]]),
    "offsets four bytes on": lambda e: e.update(data_offsets=[x + 4 for x in e["data_offsets"]]),
    "offsets four bytes back": lambda e: e.update(data_offsets=[x - 4 for x in e["data_offsets"]]),
    "offsets of the first bytes": lambda e: e.update(
        data_offsets=[x - e["data_offsets"][0] + 4 for x in e["data_offsets"]]
    ),
    "a shorter end": lambda e: e["data_offsets"].__setitem__(1, e["data_offsets"][1] - 4),
    "a longer end": lambda e: e["data_offsets"].__setitem__(1, e["data_offsets"][1] + 4),
    "no dtype": lambda e: e.pop("dtype"),
    "no shape": lambda e: e.pop("shape"),
    "no offsets": lambda e: e.pop("data_offsets"),
    "something else": lambda e: e.update(file="/etc/passwd"),
}
for (lie, change), tensor in product(ENTRY_LIES.items(), LIED_ABOUT[1:]):
    case(f"{tensor}: {lie}", with_entry(tensor, change), WEIGHTS)
for value in (None, [], "F32", 3):
    case(
        f"a line of the header is {value!r}",
        lambda folder, value=value: assemble(
            folder / WEIGHTS, parts(folder / WEIGHTS)[0] | {LIED_ABOUT[0]: value}, parts(folder / WEIGHTS)[1]
        ),
        LIED_ABOUT[0],
    )


def swap(folder: Path) -> None:
    """Two tensors of different sizes claim each other's bytes."""
    header, data = parts(folder / WEIGHTS)
    a, b = header[LIED_ABOUT[0]], header[LIED_ABOUT[1]]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    assemble(folder / WEIGHTS, header, data)


def share(folder: Path) -> None:
    """Two tensors of one size claim the same bytes."""
    header, data = parts(folder / WEIGHTS)
    a, b = (header[f"transformer.encoder.layers.{i}.input_layernorm.weight"] for i in (0, 1))
    a["data_offsets"] = b["data_offsets"]
    assemble(folder / WEIGHTS, header, data)


def doubled(folder: Path) -> None:
    """One name stands in the header twice."""
    header, data = parts(folder / WEIGHTS)
    text = json.dumps(header).encode()
    line = json.dumps({LIED_ABOUT[2]: header[LIED_ABOUT[2]]}).encode()
    assemble(folder / WEIGHTS, text[:-1] + b", " + line[1:], data)


def gap(folder: Path) -> None:
    """Bytes between the tensors that belong to none."""
    header, data = parts(folder / WEIGHTS)
    last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][0])
    begin = last["data_offsets"][0]
    last["data_offsets"] = [x + 64 for x in last["data_offsets"]]
    assemble(folder / WEIGHTS, header, data[:begin] + bytes(64) + data[begin:])


def unaligned(folder: Path) -> None:
    """A byte of its own before everything else, so that no float lies where floats lie."""
    header, data = parts(folder / WEIGHTS)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [x + 1 for x in entry["data_offsets"]]
    header["one"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    assemble(folder / WEIGHTS, header, b"\0" + data)


case("two tensors swapped", swap, WEIGHTS)
case("two tensors in one place", share, WEIGHTS)
case("a tensor twice in the header", doubled, LIED_ABOUT[2])
case("a gap between tensors", gap, "gap")
case("floats at odd bytes", unaligned, "odd byte")
case("no tensors at all", lambda folder: assemble(folder / WEIGHTS, {}, b""), WEIGHTS)

# --- the tensors themselves ----------------------------------------------------------------------------------------


def spoilt(name: str, bad: float, where: int) -> Callable[[Path], None]:
    return with_tensors(lambda t: t[name].view(-1).__setitem__(where, bad))


for base in (NATIVE, INTEGER, SPLIT):
    for i, (name, (dtype, shape)) in enumerate(names_of(base).items()):
        case(f"{name} missing", with_tensors(lambda t, name=name: t.pop(name)), repr(name), base)
        if base == INTEGER and i % 3:
            continue
        if dtype != "I8":
            bad = (float("nan"), float("inf"), -float("inf"))[i % 3]
            where = (0, -1, shape[0] // 2)[i % 3]
            case(f"{name} with {bad} at {where}", spoilt(name, bad, where), repr(name), base)
            case(
                f"{name} as integers",
                with_tensors(lambda t, n=name: t.update({n: t[n].to(torch.int32)})),
                repr(name),
                base,
            )
        else:
            case(f"{name} as floats", with_tensors(lambda t, n=name: t.update({n: t[n].half()})), repr(name), base)
            case(
                f"{name} unsigned",
                with_tensors(lambda t, n=name: t.update({n: t[n].to(torch.uint8)})),
                repr(name),
                base,
            )
        case(
            f"{name} of another width",
            with_tensors(lambda t, n=name: t.update({n: torch.cat([t[n], t[n]], dim=-1)})),
            repr(name),
            base,
        )
for name in LIED_ABOUT:
    case(f"{name} renamed", with_tensors(lambda t, n=name: t.update({n + "_": t.pop(n)})), repr(name))
    case(f"{name} in capitals", with_tensors(lambda t, n=name: t.update({n.upper(): t.pop(n)})), repr(name))
    case(
        f"{name} in quarter precision",
        with_tensors(lambda t, n=name: t.update({n: t[n].to(torch.float8_e5m2)})),
        repr(name),
    )
    case(f"{name} as booleans", with_tensors(lambda t, n=name: t.update({n: t[n] > 0})), repr(name))
    case(f"{name} transposed", with_tensors(lambda t, n=name: t.update({n: t[n][None].mT.contiguous()})), repr(name))
    case(f"{name} empty", with_tensors(lambda t, n=name: t.update({n: t[n][:0].clone()})), repr(name))
for extra in (
    "transformer.encoder.layers.2.input_layernorm.weight",
    "transformer.encoder.layers.0.input_layernorm.bias",
    "transformer.encoder.layers.0.mlp.dense_h_to_4h.bias",
    "transformer.output_layer.bias",
    "lm_head.weight",
    "inv_freq",
    "transformer.rotary_pos_emb.inv_freq.weight",
    "optimizer",
    "",
    "\0",
    "a\nb\x1b[31m",
    "\u202e" * 300,
    "../../x",
    "__class__",
):
    case(f"an extra tensor {extra[:50]!a}", with_tensors(lambda t, n=extra: t.update({n: torch.ones(2)})), WEIGHTS)
case("NaN in a tensor nobody needs", spoilt("transformer.rotary_pos_emb.inv_freq", float("nan"), 1), "inv_freq")
case(
    "a scale of Inf",
    spoilt("transformer.layers.0.attention.dense.weight_scale", float("inf"), 3),
    "weight_scale",
    INTEGER,
)
case(
    "a NaN among heads",
    spoilt("transformer.layers.0.attention.query_key_value.weight", float("nan"), 7),
    "query_key_value",
    PER_HEAD,
)

# --- shards and their index ----------------------------------------------------------------------------------------

SOMEWHERE = "transformer.output_layer.weight"
HOSTILE = (
    "../model.safetensors", "..", ".", "", "/etc/passwd", "/dev/zero", "a/../../x.safetensors", "sub/model.safetensors",
    "..\\model.safetensors", "C:\\model.safetensors", "model\0.safetensors", "~/model.safetensors", "file:///etc/passwd",
    "http://localhost/x.safetensors", "model-00001-of-00002.safetensors/", "./model-00001-of-00002.safetensors",
    "\n", "\ud800", "..%2fmodel.safetensors", "x" * 5000, " model-00001-of-00002.safetensors",
    "missing.safetensors", "config.json", "model.safetensors.index.json", None, 5, True, [], ["model.safetensors"], {},
)  # fmt: skip
for file in HOSTILE:
    case(
        f"the index points to {str(file)[:40]!a} ({type(file).__name__})",
        sharded(lambda folder, index, file=file: index["weight_map"].update({SOMEWHERE: file})),
    )
    case(
        f"every line of the index points to {str(file)[:40]!a} ({type(file).__name__})",
        sharded(lambda folder, index, file=file: index.update(weight_map=dict.fromkeys(index["weight_map"], file))),
    )
for value in (None, [], {}, "model.safetensors", 3, [["a", "b"]]):
    case(f"weight_map is {value!r}", sharded(lambda folder, index, value=value: index.update(weight_map=value)), INDEX)
case("no weight_map", sharded(lambda folder, index: index.pop("weight_map")), INDEX)
case("a tensor the index leaves out", sharded(lambda folder, index: index["weight_map"].pop(SOMEWHERE)), SOMEWHERE)
case(
    "a tensor that is in no shard",
    sharded(lambda f, index: index["weight_map"].update(x=index["weight_map"][SOMEWHERE])),
    "'x'",
)


def other(folder: Path, index: dict[str, Json]) -> None:
    """The index has a tensor in the other shard."""
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][SOMEWHERE] = next(file for file in files if file != index["weight_map"][SOMEWHERE])


def twice(folder: Path, index: dict[str, Json]) -> None:
    """Both shards hold a tensor."""
    one, two = sorted(folder.glob("*.safetensors"))
    a, b = load_file(one), load_file(two)
    name = next(iter(a))
    save_file(b | {name: a[name]}, two)


def remove(number: int) -> Callable[[Path, dict[str, Json]], None]:
    return lambda folder, index: sorted(folder.glob("*.safetensors"))[number].unlink()


def linked(target: str) -> Callable[[Path, dict[str, Json]], None]:
    """A shard that is a link."""

    def change(folder: Path, index: dict[str, Json]) -> None:
        shard = sorted(folder.glob("*.safetensors"))[0]
        shard.rename(folder.parent / "outside.safetensors")
        shard.symlink_to(target.format(here=shard.name))

    return change


def folder_for_a_shard(folder: Path, index: dict[str, Json]) -> None:
    """A folder under the name of a shard."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()


def pipe_for_a_shard(folder: Path, index: dict[str, Json]) -> None:
    """A pipe that nobody writes to: whoever opens it waits for ever."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)


case("a shard that is a pipe", sharded(pipe_for_a_shard), "not a regular file")
case("a tensor in the other shard", sharded(other), SOMEWHERE)
case("a tensor in both shards", sharded(twice), WEIGHTS[:5])
case("the first shard missing", sharded(remove(0)), "model-00001-of-00002")
case("the last shard missing", sharded(remove(1)), "model-00002-of-00002")
for target in ("../outside.safetensors", "{here}", "/dev/zero", "nowhere", ".", "/proc/self/mem", "/etc/passwd"):
    case(f"a shard linked to {target}", sharded(linked(target)), "model-00001-of-00002")
case(
    "a shard cut short",
    sharded(lambda folder, index: os.truncate(sorted(folder.glob("*.safetensors"))[1], 10_000)),
    "model-00002-of-00002",
)
case(
    "an index beside a single file",
    sharded(lambda folder, index: shutil.copy(next(folder.glob("*.safetensors")), folder / WEIGHTS)),
    WEIGHTS,
)
case("a shard that is a folder", sharded(folder_for_a_shard), "model-00001-of-00002")

# --- the config ----------------------------------------------------------------------------------------------------

SIZES = {
    NATIVE: "num_layers hidden_size ffn_hidden_size kv_channels num_attention_heads multi_query_group_num "
    "padded_vocab_size",
    PER_HEAD: "num_layers hidden_size inner_hidden_size num_attention_heads vocab_size",
    SPLIT: "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
    "vocab_size",
}
NO_SIZES = (0, -1, 1, 7, 200, 1000, 10**9, 10**12, 2**63, 10**39, 2.5, "64", True, None, [64], {})
for base, names in SIZES.items():
    for name, value in product(names.split(), NO_SIZES):
        if value is True or (name, value) not in (("multi_query_group_num", 1), ("num_attention_heads", 1)):  # possible
            case(f"{name} = {value!r}", with_config(lambda c, n=name, v=value: c.update({n: v})), "", base)
    for name in names.split():
        case(f"no {name}", with_config(lambda c, n=name: c.pop(n)), "config.json", base)
for base, eps in ((NATIVE, "layernorm_epsilon"), (PER_HEAD, "layernorm_epsilon"), (SPLIT, "rms_norm_eps")):
    for value in (-1e-5, 2, 1e30, "1e-5", True, [1e-5], None):
        case(f"{eps} = {value!r}", with_config(lambda c, n=eps, v=value: c.update({n: v})), eps, base)
for name, value in (
    ("model_type", "llama"), ("model_type", None), ("model_type", 3), ("model_type", ["chatglm"]), ("model_type", {}),
    ("quantization_bit", 4), ("quantization_bit", 8), ("quantization_bit", 3), ("quantization_bit", "4"),
    ("pre_seq_len", 5), ("pre_seq_len", -5), ("pre_seq_len", 10**9), ("multi_query_attention", False),
    ("multi_query_attention", "yes"), ("add_qkv_bias", False), ("add_bias_linear", True), ("add_bias_linear", 1),
    ("post_layer_norm", False), ("rmsnorm", False), ("tie_word_embeddings", "no"), ("rope_ratio", 0),
    ("rope_ratio", -5), ("rope_ratio", "10"), ("rope_ratio", 1e300), ("seq_length", 0), ("seq_length", 10**18),
    ("seq_length", "8192"), ("eos_token_id", -1), ("eos_token_id", "2"), ("eos_token_id", [2, None]),
    ("eos_token_id", 2.0), ("eos_token_id", 10**18), ("pad_token_id", -1), ("pad_token_id", "0"),
):  # fmt: skip
    case(f"{name} = {value!r}", with_config(lambda c, n=name, v=value: c.update({n: v})))
case("quantization_bit = 8 with int4 weights", with_config(lambda c: c.update(quantization_bit=8)), WEIGHTS, INTEGER)
case("no quantization_bit with int4 weights", with_config(lambda c: c.pop("quantization_bit")), WEIGHTS, INTEGER)
case("no fields at all", lambda folder: (folder / "config.json").write_text("{}"), "config.json")

# --- the folder ----------------------------------------------------------------------------------------------------


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else under a file's name."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


for name in ("config.json", WEIGHTS):
    case(f"no {name}", lambda folder, n=name: (folder / n).unlink(), name)
    case(f"{name} is a folder", replaced(name, Path.mkdir), name)
    case(f"{name} is a pipe", replaced(name, lambda p: os.mkfifo(p)), name)
    case(f"{name} is a link to itself", replaced(name, lambda p: p.symlink_to(p)), name)
    case(f"{name} is a broken link", replaced(name, lambda p: p.symlink_to("nowhere")), name)
    case(f"{name} is a device", replaced(name, lambda p: p.symlink_to("/dev/zero")), name)
    case(f"{name} is a link outside", replaced(name, lambda p: p.symlink_to("/etc/passwd")), name)
case("an empty folder", lambda folder: [path.unlink() for path in folder.iterdir()])
case("only .bin files", lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "glm convert")
case("a folder that is a link to itself", lambda folder: [shutil.rmtree(folder), folder.symlink_to(folder)])
case("no folder", shutil.rmtree, "no such folder")
case("a file in its place", lambda folder: [shutil.rmtree(folder), folder.touch()])
