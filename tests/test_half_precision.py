"""Half precision: about as wrong as the official code itself, and rounded in the same places."""

from pathlib import Path

import pytest
import torch
from golden_folders import ELSEWHERE, GOLDENS, HERE, folders
from torch import Tensor
from transformers.models.glm.modeling_glm import GlmRMSNorm

from glm.norms import RMSNorm
from glm.positions import Rotary, Rotation
from glm.verify import HALF, HALF_RATIO, verify

CASES = [
    pytest.param(folder, dtype, id=f"{folder.parent.parent.name}-{folder.name}-{name}")
    for dtype, name in HALF.items()
    for folder in [*HERE, *folders(ELSEWHERE)]
    if (folder / f"reference_{name}.safetensors").exists()
]


@pytest.mark.parametrize(("folder", "dtype"), CASES)
def test_error_is_about_the_reference_s_own(folder: Path, dtype: torch.dtype) -> None:
    report = verify(folder, dtype=dtype)
    *each, everything = report.rows
    assert report.ok, [row for row in each if not row.ok]
    assert everything.scenario == "all scenarios"
    assert 0.3 < everything.relative <= HALF_RATIO  # far below would mean that it did not run in half precision
    assert any(row.quantity == "decode logits" for row in each)


def test_four_models_of_the_repository_are_held_to_it() -> None:
    names = {folder.name for folder in HERE if (folder / "reference_bf16.safetensors").exists()}
    assert names == {"chatglm1-base", "chatglm3-base", "hf_glm-base", "hf_glm4-base"}


def test_a_tolerance_can_be_missed() -> None:
    assert not verify(GOLDENS / "hf_glm-base", dtype=torch.bfloat16, tolerance=0.3).ok


@pytest.mark.parametrize("case", ["chatglm1-base", "hf_glm-base"])
def test_a_rotary_table_in_bfloat16_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Rotary.rotation

    def coarse(rotary: Rotary, positions: Tensor, dtype: torch.dtype) -> Rotation:
        return exact(rotary, positions.to(dtype).long(), dtype)  # bfloat16 has 8 bits: 300 and 301 are one position

    monkeypatch.setattr(Rotary, "rotation", coarse)
    report = verify(GOLDENS / case, dtype=torch.bfloat16)
    assert {row.scenario for row in report.rows if not row.ok} >= {"far_positions", "all scenarios"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_first", [True, False])
def test_rms_norm_rounds_where_its_release_does(dtype: torch.dtype, weight_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator).to(dtype)
    norm = RMSNorm(1e-5, weight_first).build(256).to(dtype)
    torch.nn.init.normal_(norm.weight, 1, 0.3, generator=generator)
    if weight_first:  # ChatGLM2: the weight multiplies in float32, then everything is rounded
        wide = x.float()
        expected = (norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5))).to(dtype)
    else:
        theirs = GlmRMSNorm(256, 1e-5).to(dtype)
        theirs.weight.data = norm.weight.data
        expected = theirs(x)
    other = RMSNorm(1e-5, not weight_first).build(256).to(dtype)
    other.weight.data = norm.weight.data
    assert torch.equal(norm(x), expected)
    assert (other(x) == expected).float().mean() < 0.9
