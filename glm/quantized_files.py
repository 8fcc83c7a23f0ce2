"""How integer matrices lie on disk in the layouts of others: compressed-tensors, GPTQ and AWQ.

For a matrix [O, I] in groups along I, with the integers u = q + 2^(bits-1) ≥ 0 and zero points alike:

    compressed-tensors    weight_packed      [O, I·bits/32]    u side by side, the first in the lowest bits
    (pack-quantized)      weight_scale       [O, groups]
                          weight_zero_point  [O·bits/32, groups], packed along O; only where not symmetric
                          weight_shape       [2]: O, I
    GPTQ                  qweight            [I·bits/32, O]    the same words, turned on their side
                          qzeros             [groups, O·bits/32]; the first version stores the zero point less one
                          scales             [groups, O]
                          g_idx              [I]: the group of each column
    AWQ (gemm)            qweight            [I, O/8]          packed along O; a word holds columns 0 2 4 6 1 3 5 7
                          qzeros             [groups, O/8], in the same order
                          scales             [groups, O]

The first is what this package writes, and nearly how it computes (`grouped.py`). The others become that when they are
read: the words are only moved, so not one integer changes. (Frantar et al. 2022, arXiv:2210.17323, and the AutoGPTQ and
GPTQModel packages; Lin et al. 2023, arXiv:2306.00978, and AutoAWQ; the compressed-tensors package of the vLLM project.)

GPTQ can also give every column a group of its own (`desc_act`). Such files are refused: with columns in disorder no
kernel reads a group at a stroke, and GPTQ with static groups, as `glm quantize` has it, is as good.
"""

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glm.checkpoint import Checkpoint
from glm.errors import CheckpointError, ConfigError
from glm.fields import Fields, shown
from glm.grouped import Grouped
from glm.packing import pack, unpack
from glm.tensor_file import CODES, Derived, Outgoing, TensorInfo, read_tensor

CONFIG = "quantization_config"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # in which of a word's eight places column 0, 1, … lies
Tensors = MutableMapping[str, TensorInfo]


@dataclass(frozen=True)
class Scheme:
    """What a config.json says of its checkpoint's integers."""

    form: Grouped
    layout: str  # a key of LAYOUTS
    ignore: tuple[str, ...]  # which modules stay dense: their names, or behind "re:" how these begin

    def ignores(self, module: str) -> bool:
        """Whether the matrix of a module is stored dense. Raises ConfigError for what is no regular expression."""
        return module in self.ignore or any(begins(word[3:], module) for word in self.ignore if word.startswith("re:"))


# ----------------------------------------------------------------------------- config.json


def read_scheme(config: Mapping[str, Any], head: str) -> Scheme | None:
    """What `quantization_config` says; None where there is none. `head` is the head's name on disk.

    Raises ConfigError for a method or setting that cannot be read, naming it.
    """
    f = Fields(config, "config.json").section(CONFIG)
    if f is None:
        return None
    readers = {"compressed-tensors": read_compressed_tensors, "gptq": read_gptq, "awq": read_awq}
    return readers[f.choice("quant_method", readers)](f, head)


def read_compressed_tensors(f: Fields, head: str) -> Scheme:
    """The scheme of a compressed-tensors config."""
    f.choice("format", ("pack-quantized",))
    f.choice("quantization_status", ("compressed",), default="compressed")
    nothing(f, "kv_cache_scheme", "sparsity_config", "transform_config")
    groups = f.section("config_groups")
    forms = {read_weights(groups, name) for name in groups.values} if groups is not None else set()
    if len(forms) != 1:
        raise ConfigError(f"{f.source}: config_groups should give all matrices one form, not {len(forms)}")
    ignore = listed(f, "ignore")
    return Scheme(forms.pop(), "pack-quantized", tuple(ignore))


def read_weights(groups: Fields, name: str) -> Grouped:
    """The form that one of several `config_groups` gives the weights of every linear layer."""
    group = groups.section(name)
    weights = None if group is None else group.section("weights")
    if group is None or weights is None:
        raise ConfigError(f"{groups.source}: {shown(name)} says nothing of weights")
    targets = group.values.get("targets")
    if not (isinstance(targets, list) and "Linear" in targets):
        group.refuse("targets", "['Linear']", targets)
    group.choice("format", ("pack-quantized",), default="pack-quantized")
    nothing(group, "input_activations", "output_activations")
    weights.choice("type", ("int",), default="int")
    weights.choice("dynamic", (False,), default=False)
    weights.choice("actorder", ("weight", "static", False), default=False)  # the others leave columns in disorder
    strategy = weights.choice("strategy", ("group", "channel"))
    return Grouped(
        weights.choice("num_bits", (4, 8)),
        weights.integer("group_size", 8, 1 << 20) if strategy == "group" else None,
        weights.flag("symmetric", default=True),
    )


def read_gptq(f: Fields, head: str) -> Scheme:
    """The scheme of a GPTQ config. Whether columns are in order is not said here but in the files."""
    f.choice("is_marlin_format", (False,), default=False)
    nothing(f, "dynamic")
    form = Grouped(f.choice("bits", (4, 8)), read_group(f, "group_size"), f.flag("sym"))
    layout = f.choice("checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    return Scheme(form, layout, () if f.flag("lm_head", default=False) else (head,))


def read_awq(f: Fields, head: str) -> Scheme:
    """The scheme of an AWQ config, whose fields have two names each. Dense is what has a listed word in its name."""
    f.choice("version", ("gemm", "GEMM"), default="gemm")
    bits, group = ("bits" if "bits" in f else "w_bit"), ("group_size" if "group_size" in f else "q_group_size")
    form = Grouped(f.choice(bits, (4,)), read_group(f, group), not f.flag("zero_point"))
    parts = [f"re:.*{re.escape(part)}" for part in listed(f, "modules_to_not_convert")]
    return Scheme(form, "awq", (head, *parts))


def read_group(f: Fields, name: str) -> int | None:
    """Columns of a group, where -1 is a whole row."""
    group = f.integer(name, -1, 1 << 20)
    return None if group == -1 else group if group >= 8 else f.refuse(name, "-1 or at least 8", group)


def listed(f: Fields, field: str) -> list[str]:
    """A list of names, which may be absent. Raises ConfigError for anything else."""
    found = f.values.get(field) or []
    if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        f.refuse(field, "a list of names", found)
    return found


def nothing(f: Fields, *fields: str) -> None:
    """Raises ConfigError where one of `fields` asks for something."""
    for name in fields:
        if f.values.get(name):
            f.refuse(name, "absent, as this package cannot do that", f.values[name])


def begins(pattern: str, module: str) -> bool:
    """Whether a module's name begins as a regular expression says."""
    try:
        return re.match(pattern, module) is not None
    except (re.error, OverflowError, RecursionError):
        raise ConfigError(f"config.json: {CONFIG}: ignore: {shown(pattern)} is no regular expression") from None


def write_scheme(form: Grouped, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of matrices in `form`, in all linear layers but `ignore`."""
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "channel" if form.group is None else "group",
        "group_size": form.group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(ignore),
    }


# ----------------------------------------------------------------------------- in


def ours(checkpoint: Checkpoint, scheme: Scheme | None) -> Checkpoint:
    """The checkpoint as if its integers lay as `GroupedLinear` has them; no weight is read yet.

    Raises CheckpointError for a matrix that lacks a part, or has one of another shape or kind.
    """
    if scheme is None:
        return checkpoint
    mark, read = LAYOUTS[scheme.layout]
    tensors = dict(checkpoint.tensors)
    for module in [name.removesuffix(mark) for name in tensors if name.endswith(mark)]:
        try:
            tensors |= read(tensors, module, scheme)
        except ConfigError as error:
            raise CheckpointError(f"{checkpoint.listing}: the matrix {shown(module)}: {error}") from None
    return replace(checkpoint, tensors=tensors)


def from_compressed_tensors(tensors: Tensors, module: str, scheme: Scheme) -> Tensors:
    """Words and scales as they are; zero points unpacked."""
    form, packed = scheme.form, tensors[f"{module}.weight_packed"]
    outputs, inputs = read(f"{module}.weight_shape", taken(tensors, f"{module}.weight_shape", torch.int64, 2)).tolist()
    if packed.shape != (outputs, inputs * form.bits // 32):
        raise CheckpointError(
            f"{packed.file}: the tensor {shown(f'{module}.weight_packed')} is {list(packed.shape)}, which is not "
            f"{outputs} rows of {inputs} integers of {form.bits} bits"
        )
    groups, words = form.groups(inputs), -(-outputs * form.bits // 32)
    if form.symmetric:
        return {}
    name = f"{module}.weight_zero_point"
    info = taken(tensors, name, torch.int32, words, groups)
    return {
        name: derived(info, torch.int8, (outputs, groups), lambda: unpack(read(name, info).T, form.bits, outputs).T)
    }


def from_gptq(tensors: Tensors, module: str, scheme: Scheme) -> Tensors:
    """Words turned on their side; zero points one more in the first version (0 was stored as -1, all bits set)."""
    form, (rows, outputs) = scheme.form, taken_shape(tensors, f"{module}.qweight")
    inputs, words = rows * 32 // form.bits, -(-outputs * form.bits // 32)
    groups = form.groups(inputs)
    qweight = taken(tensors, f"{module}.qweight", torch.int32, rows, outputs)
    qzeros = taken(tensors, f"{module}.qzeros", torch.int32, groups, words)
    scales = taken(tensors, f"{module}.scales", None, groups, outputs)
    g_idx = taken(tensors, f"{module}.g_idx", torch.int32, inputs) if f"{module}.g_idx" in tensors else None
    middle, late = 1 << (form.bits - 1), int(scheme.layout == "gptq")

    def packed() -> Tensor:
        if g_idx is not None and not read(f"{module}.g_idx", g_idx).equal(grouping(inputs, groups)):
            raise CheckpointError(
                f"{g_idx.file}: {shown(f'{module}.g_idx')} gives columns groups in disorder (desc_act), which cannot "
                "be read; quantise the original with `glm quantize --method gptq`, whose groups are static"
            )
        return read(f"{module}.qweight", qweight).T

    def zeros() -> Tensor:
        codes = unpack(read(f"{module}.qzeros", qzeros), form.bits, outputs).T.to(torch.int16) + middle + late
        return (codes % (2 * middle) - middle).to(torch.int8)

    def scale() -> Tensor:
        if form.symmetric and bool(zeros().any()):
            raise CheckpointError(f"{qzeros.file}: {shown(f'{module}.qzeros')} are not all {middle}, as sym promises")
        return read(f"{module}.scales", scales).T

    return parts(module, form, derived(qweight, torch.int32, (outputs, rows), packed),
                 derived(scales, scales.dtype, (outputs, groups), scale),
                 derived(qzeros, torch.int8, (outputs, groups), zeros))  # fmt: skip


def from_awq(tensors: Tensors, module: str, scheme: Scheme) -> Tensors:
    """Integers put in order, and packed along the other dimension."""
    form, (inputs, words) = scheme.form, taken_shape(tensors, f"{module}.qweight")
    outputs, groups = words * 8, form.groups(inputs)
    qweight = taken(tensors, f"{module}.qweight", torch.int32, inputs, words)
    scales = taken(tensors, f"{module}.scales", None, groups, outputs)
    qzeros = scales if form.symmetric else taken(tensors, f"{module}.qzeros", torch.int32, groups, words)

    def integers(name: str, info: TensorInfo) -> Tensor:
        eights: Tensor = unpack(read(f"{module}.{name}", info), 4, outputs).unflatten(-1, (-1, 8))
        return eights[..., AWQ_ORDER].flatten(-2).T.contiguous()

    return parts(
        module, form,
        derived(qweight, torch.int32, (outputs, inputs // 8), lambda: pack(integers("qweight", qweight), 4)),
        derived(scales, scales.dtype, (outputs, groups), lambda: read(f"{module}.scales", scales).T),
        derived(qzeros, torch.int8, (outputs, groups), lambda: integers("qzeros", qzeros)),
    )  # fmt: skip


Reader = Callable[[Tensors, str, Scheme], Tensors]
LAYOUTS: dict[str, tuple[str, Reader]] = {
    "pack-quantized": (".weight_packed", from_compressed_tensors),
    "gptq": (".qweight", from_gptq),
    "gptq_v2": (".qweight", from_gptq),
    "awq": (".qweight", from_awq),
}
"""By name: the end of the tensor name by which a layout's matrices are found, and how one is read."""


def parts(module: str, form: Grouped, packed: TensorInfo, scales: TensorInfo, zeros: TensorInfo) -> Tensors:
    """The tensors of one matrix by name."""
    found: Tensors = {f"{module}.weight_packed": packed, f"{module}.weight_scale": scales}
    return found if form.symmetric else {**found, f"{module}.weight_zero_point": zeros}


def grouping(inputs: int, groups: int) -> Tensor:
    """The group of each column, in order."""
    return torch.arange(groups, dtype=torch.int32).repeat_interleave(inputs // groups)


def derived(info: TensorInfo, dtype: torch.dtype, shape: tuple[int, int], make: Callable[[], Tensor]) -> Derived:
    """What is made of the tensor `info`, and laid out row by row."""
    return Derived(info.file, dtype, shape, info.begin, info.end, lambda: make().contiguous())


def read(name: str, info: TensorInfo) -> Tensor:
    """A tensor as it lies on disk."""
    tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
    read_tensor(name, info, tensor)
    return tensor


def taken_shape(tensors: Tensors, name: str) -> tuple[int, int]:
    """The shape of a matrix, which stays."""
    if len(shape := tensors[name].shape) != 2:
        raise CheckpointError(f"{tensors[name].file}: the tensor {shown(name)} should be a matrix, not {list(shape)}")
    return shape[0], shape[1]


def taken(tensors: Tensors, name: str, dtype: torch.dtype | None, *shape: int) -> TensorInfo:
    """Takes a tensor out, which must be there, of that shape and `dtype` (None: floating-point, 16 bits or more)."""
    if name not in tensors:
        raise CheckpointError(f"the tensor {shown(name)} is missing, without which its matrix cannot be read")
    info = tensors.pop(name)
    fits = info.dtype.is_floating_point and info.dtype.itemsize > 1 if dtype is None else info.dtype == dtype
    if info.shape != shape or not fits:
        kind = "floating-point numbers of 16 bits or more" if dtype is None else CODES[dtype]
        raise CheckpointError(
            f"{info.file}: the tensor {shown(name)} is {CODES[info.dtype]} {list(info.shape)}, "
            f"but {kind} {list(shape)} are wanted"
        )
    return info


# ----------------------------------------------------------------------------- out


def as_published(tensors: Sequence[Outgoing], bits: int) -> list[Outgoing]:
    """Tensors of a model with `Grouped` weights in the compressed-tensors layout."""
    published: list[Outgoing] = []
    for tensor in tensors:
        published += [packed_zeros(tensor, bits) if tensor.name.endswith(".weight_zero_point") else tensor]
        if tensor.name.endswith(".weight_packed"):
            outputs, words = tensor.shape
            published.append(shape_of(tensor.name.removesuffix("_packed"), outputs, words * 32 // bits))
    return published


def shape_of(weight: str, outputs: int, inputs: int) -> Outgoing:
    """The tensor that says how large the matrix `weight` is."""
    return Outgoing(f"{weight}_shape", torch.int64, (2,), lambda: torch.tensor([outputs, inputs]))


def packed_zeros(zeros: Outgoing, bits: int) -> Outgoing:
    """Zero points int8 [O, groups] packed along O."""
    outputs, groups = zeros.shape
    shape = (-(-outputs * bits // 32), groups)
    return Outgoing(zeros.name, torch.int32, shape, lambda: pack(zeros.make().T.contiguous(), bits).T)
