"""The official int4 and int8 models, with every product of their quantised matrices taken by the kernel."""

import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from glm_kernels import int4_matmul, int8_matmul, packing
from harness import PROJECT, directly, judge, needs_triton, rerun
from torch import Tensor

from glm.linear import RowScaledLinear
from glm.model import GLM
from glm.verify import Golden, pairs, verify

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


def by_kernel(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> list[int]:
    """Quantised matrices are multiplied by the kernel from now on, which appends its bits; scales may be off."""
    calls: list[int] = []

    def forward(self: RowScaledLinear, x: Tensor) -> Tensor:
        calls.append(self.bits)
        product = int4_matmul if self.bits == 4 else int8_matmul
        packed = packing.from_row_scaled(self.weight, self.bits)
        scales = factor * self.weight_scale[:, None]
        return product(x, packed, scales.contiguous(), group=x.shape[-1], bias=self.bias)

    monkeypatch.setattr(RowScaledLinear, "forward", forward)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_official_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, hidden states, decoded logits and greedy ids within the golden's float32 tolerance."""
    calls = by_kernel(monkeypatch)
    report = verify(golden(name), dtype=torch.float32)
    assert report.ok, [row for row in report.rows if not row.ok]
    assert {"logits", "greedy"} <= {row.quantity for row in report.rows}
    assert len(calls) > 10


def computed(model: GLM, folder: Path) -> dict[str, Tensor]:
    """What the model makes of the golden's inputs, by the names of the reference."""
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        for scenario in Golden(folder, torch.float64).scenarios:
            own = {p.name: p.ours for p in pairs(model, scenario) if p.ours.is_floating_point()}
            found |= {f"{scenario.name}.{name}": x for name, x in own.items()}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_official_model_in_float16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice plain torch's error against the same float16 weights in float64; scales 2 % off are found out."""
    folder = golden(name)
    model = GLM.from_pretrained(folder, dtype=torch.float16)
    plain, truth = computed(model, folder), computed(deepcopy(model).double(), folder)
    calls = by_kernel(monkeypatch)
    ours = computed(model, folder)
    assert len(calls) > 10
    assert {"prompt.logits", "prompt.decode.logits"} <= ours.keys()
    for quantity, x in ours.items():
        judge(x, plain[quantity], truth[quantity])
    by_kernel(monkeypatch, factor=1.02)
    wrong = computed(model, folder)["prompt.logits"]
    with pytest.raises(AssertionError, match="norm of the error"):
        judge(wrong, plain["prompt.logits"], truth["prompt.logits"])


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    here = sum((PLACES[0] / name / "model.safetensors").is_file() for name in NAMES)
    rerun(__file__, at_least=2 * here)
