"""The product with a matrix of int4 weights in groups of 128, against the same matrix in bfloat16 and other kernels.

Bytes: the integers, the scales and x read, y written. Flops: 2 N O I. Every side gets the matrix in its own layout,
made before anything is timed. The roof is R until about 45 rows, C from there on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.bench.peers import OURS, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, MissingError, Side, Subject, Work, generator, sample

GROUP = 128
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
SHAPES = (  # model, matrix, outputs, inputs
    ("ChatGLM3-6B", "qkv", 4608, 4096),
    ("ChatGLM3-6B", "attention output", 4096, 4096),
    ("ChatGLM3-6B", "gate and up", 27392, 4096),
    ("ChatGLM3-6B", "down", 4096, 13696),
    ("ChatGLM-6B", "qkv", 12288, 4096),
    ("ChatGLM-6B", "up", 16384, 4096),
    ("GLM-4-32B", "gate and up", 46080, 6144),
    ("ChatGLM3-6B", "head", 65024, 4096),
    ("GLM-4-9B", "head", 151552, 4096),
)
MLP = ("gate and up", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Int4Case(Case):
    """N rows times a matrix [O, I]."""

    matrix: str
    outputs: int
    inputs: int
    rows: int


def all_cases() -> list[Int4Case]:
    """Every matrix with every number of rows; the goals' first."""

    def everything() -> Iterator[Int4Case]:
        for model, matrix, outputs, inputs in SHAPES:
            for rows in ROWS:
                first = matrix in MLP and rows in (1, 16, 32, 64, 128, 256, 1024)
                yield Int4Case(
                    model=model, dtype="bfloat16", matrix=matrix, outputs=outputs, inputs=inputs, rows=rows,
                    importance=0 if first and outputs == 27392 else 1 if first or rows == 1 else 2,
                )  # fmt: skip

    return list(everything())


LADDER = next(case for case in all_cases() if (case.matrix, case.rows) == ("gate and up", 1))


def make_inputs(case: Int4Case, device: torch.device, seed: int) -> Inputs:
    """x [N, I], and the matrix as stored: uint8 [O, I / 2] and scales [O, groups]."""
    random, dtype = generator(device, seed), case.torch_dtype
    x = torch.randn(case.rows, case.inputs, generator=random, device=device, dtype=dtype)
    shape = (case.outputs, case.inputs // 2)
    packed = torch.randint(0, 256, shape, generator=random, device=device, dtype=torch.uint8)
    scales = torch.rand(case.outputs, case.inputs // GROUP, generator=random, device=device)
    return {"x": x, "packed": packed, "scales": ((0.5 + scales) * case.inputs**-0.5 / 5).to(dtype)}


def work(case: Int4Case) -> Work:
    """See the head of this file."""
    weights = case.outputs * case.inputs
    moved = 2 * case.rows * (case.inputs + case.outputs)
    return Work(weights / 2 + 2 * weights / GROUP + moved, 2 * case.rows * weights)


def outputs(case: Int4Case) -> float:
    """Bytes of y."""
    return 2 * case.rows * case.outputs


# ----------------------------------------------------------------------------- the sides


def integers(packed: Tensor) -> Tensor:
    """The codes 0 to 15, uint8 [O, I]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dense(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] in `dtype`."""
    q = (integers(inputs["packed"]).to(dtype) - 8).unflatten(-1, (-1, GROUP))
    weight: Tensor = (q * inputs["scales"].to(dtype)[..., None]).flatten(-2)
    return weight


def ours(case: Int4Case, inputs: Inputs) -> Call:
    """The kernel of this project, with the matrix laid out for it."""
    prepacked = find(OURS, "int4_prepack")(inputs["packed"], inputs["scales"])
    return partial(find(OURS, "int4_matmul"), inputs["x"], *prepacked, group=GROUP)


def in_full(case: Int4Case, inputs: Inputs) -> Call:
    """cuBLAS with the matrix in bfloat16."""
    return partial(F.linear, inputs["x"], dense(inputs, case.torch_dtype))


def tinygemm(case: Int4Case, inputs: Inputs) -> Call:
    """torch's own kernel: w = (code - 8) s + z, even columns in the high nibble."""
    on_gpu(inputs["x"], "tinygemm")
    swapped = (inputs["packed"] >> 4) | (inputs["packed"] << 4)
    weight = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    scales = inputs["scales"].mT
    pairs = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
    return partial(torch.ops.aten._weight_int4pack_mm, inputs["x"], weight, GROUP, pairs)


def gemlite(case: Int4Case, inputs: Inputs) -> Call:
    """gemlite, its tuning on "max"."""
    on_gpu(inputs["x"], "gemlite")
    layer, kind = find("gemlite.core", "GemLiteLinear"), find("gemlite.core", "DType").BF16
    find("gemlite.core", "set_autotune")("max")
    module = layer(4, GROUP, case.inputs, case.outputs, input_dtype=kind, output_dtype=kind)
    scales = inputs["scales"].reshape(-1, 1)
    codes = integers(inputs["packed"])
    module.pack(codes, scales, torch.full_like(scales, 8), None)
    return partial(module, inputs["x"])


def unwritten(name: str, case: Int4Case, inputs: Inputs) -> Call:
    """A peer whose call is not written: it would have to take these integers, not quantise the matrix itself."""
    on_gpu(inputs["x"], name)
    find(name, "__name__")
    raise MissingError(f"{name} is installed, but no call that takes given integers is written for it yet")


def sides(case: Int4Case) -> list[Side]:
    """Ours and the peers."""
    others = [Side(name, partial(unwritten, name, case)) for name in ("humming", "torchao", "bitsandbytes")]
    return [
        Side(OURS, partial(ours, case)),
        Side("cuBLAS bf16", partial(in_full, case)),
        Side("tinygemm", partial(tinygemm, case)),
        Side("gemlite", partial(gemlite, case)),
        *others,
    ]


def expected(case: Int4Case, inputs: Inputs) -> list[Expected]:
    """Some rows and some outputs of y, against float64 of the dequantised matrix."""
    device = inputs["x"].device
    rows, columns = sample(case.rows, 64).to(device), sample(case.outputs, 2048).to(device)
    some = {"x": inputs["x"][rows], "packed": inputs["packed"][columns], "scales": inputs["scales"][columns]}

    def y(output: Tensor) -> Tensor:
        return output[rows][:, columns]

    plain = F.linear(some["x"], dense(some, case.torch_dtype))
    return [Expected("y", y, plain, F.linear(some["x"].double(), dense(some, torch.float64)))]


def label(case: Int4Case) -> str:
    """As "ChatGLM3-6B down 4096×13696"."""
    return f"{case.model} {case.matrix} {case.outputs}×{case.inputs}"


SUBJECT = Subject(
    "int4", "int4 weights", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("rows", case.rows),
)  # fmt: skip
