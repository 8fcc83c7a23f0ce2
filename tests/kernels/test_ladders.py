"""Every step of every ladder runs in Triton's interpreter, and on a GPU, and computes the same."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICES, DTYPES, INTERPRETED, PROJECT, directly, judge, needs_triton, rerun
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(PROJECT / "kernels" / "ladders"))

import ladder

Case = tuple[dict[str, Tensor], Callable[..., Tensor]]  # the arguments of a step; the same in plain torch

FILES = [path for name in ladder.ladders() for path in ladder.files(name)]


def decode(dtype: torch.dtype, device: str) -> Case:
    """Lengths at the edges of a block and of the cache; NaN in the cache behind them."""
    generator = torch.Generator().manual_seed(0)
    length = torch.tensor([1, 65, 150], dtype=torch.int32)
    B, H, G, S, K = 3, 6, 2, 150, 32
    after = torch.arange(S)[None, None, :, None] >= length[:, None, None, None]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    k, v = (draw(B, G, S, K).masked_fill(after, torch.nan) for _ in "kv")
    arguments = {"q": draw(B, H, 1, K), "k": k, "v": v, "length": length}

    def plain(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        seen = torch.arange(S, device=q.device) < length[:, None, None, None]
        k, v = (x.nan_to_num(0.0) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    return {name: value.to(device) for name, value in arguments.items()}, plain


def attention(dtype: torch.dtype, device: str) -> Case:
    """A little more than two blocks of queries, and of keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 140, 32, generator=generator).to(device, dtype) for heads in (4, 2, 2))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {"q": q, "k": k, "v": v}, plain


def int4(dtype: torch.dtype, device: str) -> Case:
    """Rows, outputs and columns that fill no tile; groups of 32."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (70, 80), generator=generator, dtype=torch.uint8)
    scales = (0.5 + torch.rand(70, 5, generator=generator)).to(dtype)
    x = torch.randn(3, 160, generator=generator).to(dtype) / 32

    def plain(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(x.dtype) - 8
        return F.linear(x, q * scales.repeat_interleave(32, 1))

    return {"x": x.to(device), "packed": packed.to(device), "scales": scales.to(device)}, plain


CASES: dict[str, Callable[[torch.dtype, str], Case]] = {"attention": attention, "decode": decode, "int4": int4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_step(path: Any, dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("run by the rerun in the interpreter")
    arguments, plain = CASES[path.parent.name](dtype, device)
    y = ladder.load(path).call(**arguments)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    judge(y, plain(**arguments), plain(**exact))


@directly
@needs_triton
@pytest.mark.parametrize("name", ladder.ladders())
def test_form(name: str) -> None:
    """Short files with one sentence each, numbered without a gap, all of them in the table."""
    steps, table = ladder.steps(name), ladder.README.read_text(encoding="utf-8")
    assert [int(step.name[:2]) for step in steps] == list(range(1, len(steps) + 1))
    assert 5 <= len(steps) <= 7
    for step, path in zip(steps, ladder.files(name), strict=True):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path
        assert step.idea.endswith("."), path
        assert step.idea.count(". ") == 0, path
        assert f"| [`{step.name}`]({name}/{step.name}.py) | {step.idea} | " in table, "run the benchmark, or ladder.py"


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=2 * len(FILES))
