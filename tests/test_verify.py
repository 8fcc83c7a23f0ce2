"""glm/verify.py: every golden agrees, and whatever is wrong is found, named and measured."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from shutil import copytree

import pytest
import torch
from golden_folders import ELSEWHERE, GOLDENS, HERE, folders
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm.errors import CheckpointError, GLMError
from glm.layout import Causal, Layout
from glm.verify import Golden, Report, Row, until, verify

LOGITS = {"logits", "logits, own layout", "decode logits", "decode logits, at once"}
DEQUANTISED = "dequantised.transformer.layers.0.mlp.dense_4h_to_h.weight"
EVERYTHING = LOGITS | {"hidden states", "positions", "decode positions", "greedy"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("folder", HERE, ids=lambda path: path.name)
def test_goldens_of_the_repository(folder: Path, dtype: torch.dtype) -> None:
    report = verify(folder, dtype=dtype)
    assert report.ok, over(report)
    assert len(report.rows) >= 8
    if dtype == torch.float64:  # far below the tolerance of 1e-9: what is left is rounding
        assert max(row.relative for row in report.rows if row.quantity in LOGITS) < 1e-12


@pytest.mark.parametrize("folder", folders(ELSEWHERE) or [None], ids=lambda path: path.name if path else "absent")
def test_all_goldens(folder: Path | None) -> None:
    if folder is None:
        pytest.skip(f"there are no goldens in {ELSEWHERE}; GLM_GOLDENS can name another folder")
    report = verify(folder)
    assert report.ok, over(report)


def test_the_lean_copy_is_lean() -> None:
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()) <= 12_000_000


def test_everything_is_compared() -> None:
    compared: dict[str, set[str]] = {}
    for folder in HERE:
        for row in verify(folder).rows:
            compared.setdefault(f"{folder.name}/{row.scenario}", set()).add(row.quantity)
    assert compared["chatglm1-base/left_pad_tokenizer"] == EVERYTHING
    assert compared["chatglm1-base/far_positions"] == {"logits"}
    assert compared["chatglm1-sensitive/far_positions"] == EVERYTHING - {"logits, own layout", "positions", "greedy"}
    assert compared["chatglm2-32k-rope_interp/left_pad"] == EVERYTHING
    assert compared["glm4-9b-chatglm_format/single"] == EVERYTHING
    assert compared["hf_glm-base/single"] == compared["hf_glm4-base/left_pad"] == EVERYTHING
    assert compared["chatglm2-int4/the model itself"] == {"dequantised weights"}
    assert compared["chatglm3-ptuning-proj/the model itself"] == {"learned prefix"}
    assert compared["chatglm1-base/the model itself"] == {"rotary frequencies"}


def over(report: Report) -> list[Row]:
    return [row for row in report.rows if not row.ok]


# ----------------------------------------------------------------------------- what is wrong is found


def changed(tmp_path: Path, case: str, file: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a golden with one of its files changed."""
    folder = tmp_path / case
    copytree(GOLDENS / case, folder)
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    return folder


def nudge(name: str, by: float, *where: int) -> Callable[[dict[str, Tensor]], None]:
    """Add `by` to one element, by default the last, of the tensor `name`."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][where or (-1,) * tensors[name].dim()] += by

    return change


@pytest.mark.parametrize(
    ("case", "file", "change", "expected"),
    [
        ("chatglm1-base", "64", nudge("gmask.logits", 1e-7), {"logits", "logits, own layout"}),
        ("hf_glm-base", "64", nudge("single.decode.logits", 1e-7), {"decode logits", "decode logits, at once"}),
        ("hf_glm4-base", "", nudge("single.hidden.layer_1", 3e-4), {"hidden states"}),
        ("hf_glm4-sensitive", "", nudge("single.hidden.layer_1", 1e-5), {"hidden states"}),
        ("chatglm3-base", "", nudge("left_pad.generated", 1), {"greedy"}),
        ("chatglm3-base", "", nudge("far_positions.generated", 1), {"greedy"}),
        ("chatglm3-base", "", nudge("single.decode.position_ids", 1), {"decode positions", "decode logits, at once"}),
        ("chatglm1-int4", "", nudge(DEQUANTISED, 1e-7), {"dequantised weights"}),
        ("chatglm3-ptuning-proj", "", nudge("prefix.past_key_values", 3e-4), {"learned prefix"}),
        ("chatglm1-base", "", nudge("rotary.inv_freq", 1e-7), {"rotary frequencies"}),
        ("chatglm1-base", "64", nudge("mask.logits", float("nan")), {"logits", "logits, own layout"}),
    ],
)
def test_a_wrong_number_is_found(
    tmp_path: Path, case: str, file: str, change: Callable[[dict[str, Tensor]], None], expected: set[str]
) -> None:
    report = verify(changed(tmp_path, case, f"reference{file}.safetensors", change))
    assert {row.quantity for row in over(report)} == expected
    assert not report.ok


def test_positions_that_no_logit_shows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_one(rule: Causal, ids: Tensor, real: Tensor | None = None) -> Layout:
        layout = right(rule, ids, real)
        layout.positions = layout.positions + 1  # rotary embedding sees differences only
        return layout

    right = Causal.read
    monkeypatch.setattr(Causal, "read", from_one)
    rows = over(verify(GOLDENS / "hf_glm-base"))
    assert {(row.scenario, row.quantity) for row in rows} == {("left_pad", "positions"), ("single", "positions")}


def test_the_first_layer_over_is_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for layer in ("layer_1", "layer_2", "final_norm"):
            tensors[f"single.hidden.{layer}"] += 1e-3

    report = verify(changed(tmp_path, "hf_glm4-base", "reference.safetensors", change))
    (row,) = over(report)
    assert row.layer == "layer_1"
    assert row.absolute == pytest.approx(1e-3, rel=0.05)


def test_a_wrong_weight_is_found(tmp_path: Path) -> None:
    folder = changed(tmp_path, "hf_glm4-base", "model.safetensors", nudge("model.layers.1.mlp.down_proj.weight", 0.01))
    rows = {row.scenario: row for row in over(verify(folder)) if row.quantity == "hidden states"}
    assert {row.layer for row in rows.values()} == {"layer_1"}


def test_padding_is_not_compared(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["left_pad.logits"][2, 0] = float("nan")

    assert verify(changed(tmp_path, "hf_glm-base", "reference64.safetensors", change)).ok


def test_tolerance(tmp_path: Path) -> None:
    folder = changed(tmp_path, "hf_glm-base", "reference64.safetensors", nudge("single.logits", 1e-6))
    assert not verify(folder).ok
    assert verify(folder, tolerance=1e-5).ok
    assert not verify(GOLDENS / "hf_glm-base", tolerance=1e-17).ok


def test_float32_references_alone(tmp_path: Path) -> None:
    folder = tmp_path / "hf_glm-base"
    copytree(ELSEWHERE / "hf_glm-base" if (ELSEWHERE / "hf_glm-base").exists() else GOLDENS / "hf_glm-base", folder)
    exact = load_file(folder / "reference64.safetensors")
    single = load_file(folder / "reference.safetensors")
    rounded = {name: x.float() for name, x in exact.items() if name.endswith("logits")}
    save_file(rounded | single, folder / "reference.safetensors")
    (folder / "reference64.safetensors").unlink()
    report = verify(folder)
    assert report.ok
    assert max(row.relative for row in report.rows if row.quantity in LOGITS) > 1e-8


def test_generation_that_stops_early(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        new = tensors["single.generated"][0, tensors["single.input_ids"].shape[1] :]
        stops.append(int(new[2]))
        new[3:] = 0

    stops: list[int] = []
    folder = changed(tmp_path, "hf_glm-base", "reference.safetensors", change)
    assert {row.quantity for row in over(verify(folder))} == {"greedy"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": stops}))
    assert verify(folder).ok


def test_until() -> None:
    assert until([5, 6, 7, 6], (6, 7)) == [5]
    assert until([5, 6], ()) == [5, 6]


def test_report_is_a_table() -> None:
    report = Report(
        Path("somewhere/case"),
        "chatglm",
        torch.float64,
        (
            Row("first", "logits", 1e-14, 3e-15, ok=True),
            Row("first", "hidden states", 2.5e-3, 1e-3, ok=False, layer="layer_7"),
        ),
    )
    console = Console(width=100, record=True, file=StringIO())
    console.print(report)
    text = console.export_text()
    for part in ("case", "chatglm", "float64", "first", "3.0e-15", "2.5e-03", "layer_7", "over"):
        assert part in text
    assert text.count("first ") == 2  # the scenario once, and the head of a column
    assert not report.ok


# ----------------------------------------------------------------------------- the format


def golden(tmp_path: Path, **tensors: Tensor) -> Golden:
    """A folder with one scenario `s`, read in float64."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "meta.json").write_text("{}")
    named = {f"s.{name}": x.contiguous() for name, x in tensors.items()}
    save_file(named, tmp_path / "reference.safetensors")
    return Golden(tmp_path, torch.float64)


def rows(text: str) -> Tensor:
    """'110 100' -> [[1, 1, 0], [1, 0, 0]]."""
    return torch.tensor([[int(c) for c in row] for row in text.split()])


IDS = torch.tensor([[7, 8, 9]])


@pytest.mark.parametrize(
    ("mask", "visible", "real"),
    [
        (None, "100 110 111", "111"),
        (rows("011"), "000 010 011", "011"),
        (torch.tensor([2]), "110 110 111", "111"),
        (rows("001 001 000").to(torch.uint8)[None, None], "110 110 111", "111"),
        (rows("111 110 100").to(torch.uint8)[None, None], "000 001 011", "001"),
        (rows("110 110 111")[None, None], "110 110 111", "111"),
    ],
)
def test_masks_of_four_kinds(tmp_path: Path, mask: Tensor | None, visible: str, real: str) -> None:
    given = {} if mask is None else {"attention_mask": mask}
    (scenario,) = golden(tmp_path, input_ids=IDS, **given).scenarios
    assert torch.equal(scenario.visible[0], rows(visible).bool())
    assert torch.equal(scenario.real[0], rows(real)[0].bool())


@pytest.mark.parametrize(
    ("positions", "mask", "natural"),
    [
        (None, None, True),
        ([[0, 1, 2]], None, True),
        ([[1, 2, 3]], None, False),
        ([[0, 1, 3]], None, False),
        ([[5, 0, 1]], [[0, 1, 1]], True),
        ([[0, 1, 2]], [2], False),
        ([[[0, 1, 0], [0, 0, 1]]], None, True),
        ([[[0, 1, 0], [0, 0, 2]]], None, False),
        ([[[0, 1, 0], [0, 1, 0]]], None, False),
    ],
)
def test_natural_layouts(tmp_path: Path, positions: object, mask: object, natural: bool) -> None:
    given = {"position_ids": positions, "attention_mask": mask}
    tensors = {name: torch.tensor(x) for name, x in given.items() if x is not None}
    (scenario,) = golden(tmp_path, input_ids=IDS, **tensors).scenarios
    assert scenario.natural is natural


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def replaced(name: str, x: Tensor | None, file: str = "reference.safetensors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        if x is None:
            del tensors[name]
        else:
            tensors[name] = x
        save_file(tensors, folder / file)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "config.json"),
        (without("meta.json"), "meta.json"),
        (without("model.safetensors"), "model.safetensors"),
        (without("reference.safetensors"), "reference.safetensors"),
        (truncated("reference.safetensors"), "not a safetensors file"),
        (truncated("model.safetensors"), "model.safetensors"),
        (replaced("single.logits", None, "reference64.safetensors"), "no tensor single.logits"),
        (replaced("single.logits", torch.zeros(1, 9, 7), "reference64.safetensors"), "single.logits should be numbers"),
        (replaced("single.input_ids", torch.zeros(9, dtype=torch.long)), "single.input_ids should be integers"),
        (replaced("single.input_ids", torch.zeros(1, 9)), "single.input_ids should be integers"),
        (replaced("single.input_ids", torch.full((1, 9), 300)), "outside the vocabulary"),
        (replaced("single.decode.tokens", torch.full((1, 6), -1)), "outside the vocabulary"),
        (replaced("single.decode.tokens", torch.zeros(2, 6, dtype=torch.long)), "single.decode.tokens should be"),
        (replaced("single.position_ids", torch.zeros(1, 8, dtype=torch.long)), "single.position_ids should be"),
        (replaced("left_pad.attention_mask", torch.zeros(3, 8, dtype=torch.long)), "hides every token"),
        (replaced("left_pad.attention_mask", torch.ones(3, 7, dtype=torch.long)), "left_pad.attention_mask should"),
        (replaced("single.hidden.layer_2", torch.zeros(1, 9, 64)), "the model has 2 blocks"),
        (replaced("single.generated", torch.zeros(1, 9, dtype=torch.long)), "no longer than its prompt"),
        (replaced("single.position_ids", torch.zeros(1, 2, 9, dtype=torch.long)), "2 axes"),
        (replaced("prefix.past_key_values", torch.zeros(2)), "the model has no prefix"),
        (replaced("dequantised.lm_tail.weight", torch.zeros(2)), "the model has no such weight"),
    ],
)
def test_a_bad_folder_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "hf_glm-base"
    copytree(GOLDENS / "hf_glm-base", folder)
    damage(folder)
    with pytest.raises(GLMError, match=message) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_no_scenario(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no scenario"):
        golden(tmp_path)


def test_no_such_reference() -> None:
    with pytest.raises(CheckpointError, match="reference_bf16"):
        verify(GOLDENS / "hf_glm-sensitive", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="no reference was computed"):
        verify(GOLDENS / "hf_glm-sensitive", dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify(GOLDENS)
