"""The product with a matrix of int4 weights in groups of 128, against the same matrix in bfloat16 and other kernels.

Bytes: the integers, the scales and x read, y written. Flops: 2 N O I. Every side gets the matrix in its own layout,
made before anything is timed. The roof is R until about 45 rows, C from there on.

Some peers take integers, others quantise a matrix themselves. So that all compute the same, every group has a -8 and a
7, and scales have three binary digits: then the matrix is exact in half precision, and the step between its least and
its greatest number is the scale again. bitsandbytes has no integers but the sixteen numbers of NF4; it is held to its
own matrix. How fast a product is does not depend on the values, only on how many bytes they take.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
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
    packed[:, :: GROUP // 2] = 0xF0
    scales = torch.rand(case.outputs, case.inputs // GROUP, generator=random, device=device)
    scales = ((0.5 + scales) * case.inputs**-0.5 / 5).to(torch.float8_e5m2)
    return {"x": x, "packed": packed, "scales": scales.to(dtype)}


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


@cache
def tune_gemlite() -> None:
    """Its tuning on "max", once: this loads its kernels anew, and what was tuned before is lost."""
    find("gemlite.core", "set_autotune")("max")


def gemlite(case: Int4Case, inputs: Inputs) -> Call:
    """gemlite, which takes codes from 0 on and their zero point."""
    on_gpu(inputs["x"], "gemlite")
    tune_gemlite()
    kinds, layer = find("gemlite.core", "DType"), find("gemlite.core", "GemLiteLinear")
    kind = kinds.BF16 if case.torch_dtype == torch.bfloat16 else kinds.FP16
    module = layer(4, GROUP, case.inputs, case.outputs, input_dtype=kind, output_dtype=kind)
    scales = inputs["scales"].reshape(-1, 1)
    codes = integers(inputs["packed"])
    module.pack(codes, scales, torch.full_like(scales, 8), None)
    return partial(module, inputs["x"])


def humming(case: Int4Case, inputs: Inputs) -> Call:
    """humming, which stores integers as compressed-tensors does, and as we do. It compiles at the first call."""
    on_gpu(inputs["x"], "humming")
    layer = find("humming.layer", "HummingLayer")(
        shape_n=case.outputs, shape_k=case.inputs, weight_config={"dtype": "uint4", "group_size": GROUP},
        torch_dtype=case.torch_dtype,
    ).to(inputs["x"].device)  # fmt: skip
    layer.load_from_tensors({"weight": inputs["packed"].view(torch.int32), "weight_scale": inputs["scales"]})
    layer.transform()
    return partial(layer, inputs["x"])


def torchao(case: Int4Case, inputs: Inputs, packing: str) -> Call:
    """torchao as `quantize_` leaves a linear layer: "plain" takes mslk's kernel, "tile_packed_to_4d" tinygemm."""
    on_gpu(inputs["x"], "torchao")
    config = find("torchao.quantization", "Int4WeightOnlyConfig")(
        group_size=GROUP, int4_packing_format=packing, set_inductor_config=False
    )
    layer = nn.Linear(case.inputs, case.outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(dense(inputs, case.torch_dtype), requires_grad=False)
    find("torchao.quantization", "quantize_")(layer, config)
    if type(layer.weight) is nn.Parameter:  # what does not fit is passed over in silence
        raise MissingError(f"torchao leaves a matrix of {case.outputs}×{case.inputs} as it is")
    return partial(F.linear, inputs["x"], layer.weight)


def nf4(case: Int4Case, inputs: Inputs) -> tuple[Tensor, Any]:
    """The matrix as bitsandbytes quantises it, with what it needs to read it again: NF4, a float32 scale a group."""
    quantise = find("bitsandbytes.functional", "quantize_4bit")
    packed, state = quantise(dense(inputs, torch.float32), blocksize=GROUP, quant_type="nf4")
    return packed, state


def bitsandbytes(case: Int4Case, inputs: Inputs) -> Call:
    """bitsandbytes, which chooses between its kernel and one that writes the matrix out by the number of rows."""
    packed, state = nf4(case, inputs)
    return partial(find("bitsandbytes", "matmul_4bit"), inputs["x"], packed, quant_state=state)


def expected_nf4(case: Int4Case, inputs: Inputs) -> list[Expected]:
    """The product with the matrix of bitsandbytes."""
    matrix: Tensor = find("bitsandbytes.functional", "dequantize_4bit")(*nf4(case, inputs))
    return product(case, inputs["x"], lambda outputs: matrix[outputs])


def sides(case: Int4Case) -> list[Side]:
    """Ours and the peers."""
    return [
        Side(OURS, partial(ours, case)),
        Side("cuBLAS bf16", partial(in_full, case)),
        Side("tinygemm", partial(tinygemm, case)),
        Side("gemlite", partial(gemlite, case)),
        Side("humming", partial(humming, case)),
        Side("torchao plain", partial(torchao, case, packing="plain")),
        Side("torchao tiled", partial(torchao, case, packing="tile_packed_to_4d")),
        Side("bitsandbytes", partial(bitsandbytes, case), expected=partial(expected_nf4, case)),
    ]


def expected(case: Int4Case, inputs: Inputs) -> list[Expected]:
    """The product with the dequantised matrix."""

    def matrix(outputs: Tensor) -> Tensor:
        return dense({name: inputs[name][outputs] for name in ("packed", "scales")}, torch.float32)

    return product(case, inputs["x"], matrix)


def product(case: Int4Case, x: Tensor, matrix: Callable[[Tensor], Tensor]) -> list[Expected]:
    """Some rows and some outputs of x Wᵀ; `matrix` gives W in float32 at these outputs."""
    rows, outputs = sample(case.rows, 64).to(x.device), sample(case.outputs, 2048).to(x.device)
    x, weight = x[rows], matrix(outputs)

    def y(output: Tensor) -> Tensor:
        return output[rows][:, outputs]

    return [Expected("y", y, F.linear(x, weight.to(x.dtype)), F.linear(x.double(), weight.double()))]


def label(case: Int4Case) -> str:
    """As "ChatGLM3-6B down 4096×13696"."""
    return f"{case.model} {case.matrix} {case.outputs}×{case.inputs}"


SUBJECT = Subject(
    "int4", "int4 weights", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("rows", case.rows),
)  # fmt: skip
