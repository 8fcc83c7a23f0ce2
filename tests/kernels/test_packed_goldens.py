"""The official int4 and int8 models, with every product of their quantised matrices taken by the kernel."""

import os
from pathlib import Path

import pytest
import torch
from glm_kernels import int4_matmul, int8_matmul, packing
from harness import PROJECT, directly, needs_triton, rerun
from torch import Tensor

from glm.linear import RowScaledLinear
from glm.verify import verify

NAMES = "chatglm1-int4", "chatglm1-int8", "chatglm2-int4", "chatglm2-int8"
PLACES = (
    PROJECT / "tests" / "goldens",
    Path(os.environ.get("GLM_GOLDENS", PROJECT.parent / "shared" / "goldens")),
)


def golden(name: str) -> Path:
    """Its folder in the repository, or else in the collection."""
    for place in PLACES:
        if (place / name / "model.safetensors").is_file():
            return place / name
    pytest.skip(f"{name} lies neither in tests/goldens nor in {PLACES[1]}; GLM_GOLDENS can name another folder")


@pytest.mark.parametrize("name", NAMES)
def test_official_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, hidden states, decoded logits and greedy ids within the golden's float32 tolerance."""
    calls = 0

    def forward(self: RowScaledLinear, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        product = int4_matmul if self.bits == 4 else int8_matmul
        packed = packing.from_row_scaled(self.weight, self.bits)
        return product(x, packed, self.weight_scale[:, None].contiguous(), group=x.shape[-1], bias=self.bias)

    monkeypatch.setattr(RowScaledLinear, "forward", forward)
    report = verify(golden(name), dtype=torch.float32)
    assert report.ok, [row for row in report.rows if not row.ok]
    assert {"logits", "greedy"} <= {row.quantity for row in report.rows}
    assert calls > 10


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    here = sum((PLACES[0] / name / "model.safetensors").is_file() for name in NAMES)
    rerun(__file__, at_least=here)
