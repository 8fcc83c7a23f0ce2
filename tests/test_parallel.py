"""Several processes compute what one does: narrower sublayers add up, and each training step is the same step."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import HERE, PROJECT
from test_training import recipe
from two_processes import FOLDERS, TOYS, V2, made

from glm import cli, parallel
from glm.checkpoint import Checkpoint, fill
from glm.errors import MemoryFitError, ParallelError
from glm.info import require_fit
from glm.linear import RowScaled
from glm.memory import Found
from glm.model import GLM
from glm.pretrained import described, load
from glm.shares import Run, columns, rows

ROUNDING = 1e-12  # of float64, over a few hundred terms a sum and a few layers; measured are 1e-15 to 1e-14
QUESTIONS = "What is blank infilling?\n/clear\nWho are you?\n"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/two_processes.py found."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("float64", "float32"):
        recipe(folder / name, clip=0.5)
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "kernels"), os.environ.get("PYTHONPATH", "")])
    pair = subprocess.Popen(
        [*TORCHRUN, "tests/two_processes.py", str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, cwd=PROJECT, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, errors = pair.communicate(QUESTIONS, timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(pair.pid, signal.SIGKILL)  # they wait for each other
        raise
    assert pair.returncode == 0, errors
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result | {"printed": printed}


# -- who holds what ----------------------------------------------------------------------------------------------------


def test_runs_are_dealt_out_whole_and_in_order() -> None:
    heads = Run("query heads", 8, 3)
    assert [list(heads.held(rank, 4)) for rank in range(4)] == [
        list(range(6 * rank, 6 * rank + 6)) for rank in range(4)
    ]
    keys = Run("key heads", 2, 3, repeated=True)
    assert [list(keys.held(rank, 4)) for rank in range(4)] == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    tokens = Run("tokens", 7, ragged=True)
    assert [list(tokens.held(rank, 3)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert rows(heads, keys, keys).held(1, 2) == [*range(12, 24), *range(27, 30), *range(33, 36)]
    assert columns(heads).held(0, 2) == list(range(12))


@pytest.mark.parametrize(("run", "ranks"), [(Run("heads", 4), 3), (Run("keys", 2, repeated=True), 3), (Run("x", 2), 4)])
def test_what_cannot_be_dealt_out_is_said(run: Run, ranks: int) -> None:
    with pytest.raises(ParallelError, match=f"{run.units} {run.what} cannot be dealt out to {ranks} processes"):
        run.held(0, ranks)


def parts(model: GLM, ranks: int) -> list[GLM]:
    """The narrower models of all ranks, without what joins them."""
    state = model.state_dict()
    narrow = []
    for rank in range(ranks):
        part = GLM(parallel.narrower(model.spec, rank, ranks), device="meta", dtype=model.dtype)
        held = parallel.shares(model.spec, state, rank, ranks)
        numbers = {name: held[name].of(x) if name in held else x for name, x in state.items()}
        for name, x in part.state_dict().items():
            if not name.startswith(("embedding", "head")):  # these stay whole in the spec
                assert x.shape == numbers[name].shape, name
        vocabulary = torch.cat([numbers["embedding.weight"], state["embedding.weight"]])[: model.spec.vocabulary]
        numbers |= dict.fromkeys(("embedding.weight", "head.weight"), vocabulary)
        part.load_state_dict(numbers, assign=True)
        narrow.append(part)
    return narrow


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", TOYS)
def test_narrower_sublayers_add_up(name: str, ranks: int) -> None:
    model = made(TOYS[name])
    narrow = parts(model, ranks)
    x = torch.randn(2, 5, model.spec.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    layout = model.layout(torch.full((2, 5), 50))
    rotation = model.spec.rotary.rotation(layout.positions, torch.float64)
    mask = layout.mask(always=model.spec.prefix.length if model.spec.prefix else 0)

    def close(whole: torch.Tensor, *some: torch.Tensor) -> None:
        torch.testing.assert_close(sum(some), whole, rtol=0, atol=ROUNDING * whole.abs().max().item())

    close(*(m.blocks[1].mixer(x, rotation, mask, m.start()[1]) for m in (model, *narrow)))
    close(*(m.blocks[1].feed_forward(x) for m in (model, *narrow)))


@pytest.mark.parametrize("folder", HERE, ids=lambda folder: folder.name)
def test_a_rank_reads_just_its_share(folder: Path) -> None:
    whole = load(folder, dtype=torch.float64)
    checkpoint = Checkpoint.open(folder)
    generation, spec = described(checkpoint, folder.name)
    empty = GLM(spec, device="meta")
    table = generation.table(spec, checkpoint.config, empty.state_dict())
    state, compared = whole.state_dict(), 0
    for rank in range(2):
        try:
            held = parallel.shares(spec, empty.state_dict(), rank, 2)
            part = GLM(parallel.narrower(spec, rank, 2), device="meta")
        except ParallelError:
            pytest.skip("two ranks cannot share this one")
        ignorable = (*generation.ignorable, *generation.spare_head(spec))
        fill(empty, checkpoint, table, ignorable, dtype=torch.float64, shares=held, part=part)
        for name, x in part.state_dict().items():
            wanted = held[name].of(state[name]) if name in held else state[name]
            assert torch.equal(x, wanted), name
            compared += x.numel() < state[name].numel()
    assert compared > 4
    assert all(x.is_meta for x in empty.state_dict().values())


def test_four_bits_are_not_torn_apart() -> None:
    odd = replace(V2.blocks[0], feed_forward=replace(V2.blocks[0].feed_forward, inner=42))
    spec = replace(V2, weights=RowScaled(4), blocks=(odd,))
    with pytest.raises(ParallelError, match="inside of 2 weights"):
        parallel.shares(spec, GLM(spec, device="meta").state_dict(), 0, 2)


def test_memory_is_asked_for_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(V2, vocabulary=10_000_000)
    dtype = torch.float32
    part = parallel.narrower(spec, 0, 2)
    monkeypatch.setattr("glm.info.memory_found", lambda device: Found(1_800_000_000, "free"))
    require_fit(part, dtype, "cuda", ranks=2)
    with pytest.raises(MemoryFitError):
        require_fit(spec, dtype, "cuda")
    with pytest.raises(MemoryFitError, match="each of 2 processes"):
        require_fit(part, dtype, "cpu", ranks=2)


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_logits_of_two_processes_are_those_of_one(found: dict[str, Any], name: str) -> None:
    toy = found["toys"][name]
    assert toy["logits"] < ROUNDING
    assert toy["cached"] < ROUNDING
    for ours, theirs in (toy["greedy"], toy["sampled"]):
        assert ours == theirs
        assert [len(row) for row in ours] == [8, 8]
    assert toy["greedy"][0] != toy["sampled"][0]


@pytest.mark.parametrize("name", TOYS)
def test_each_of_two_processes_holds_about_half(found: dict[str, Any], name: str) -> None:
    toy, one_key_head = found["toys"][name], name.endswith("one key head")
    assert 0.49 < toy["held"] < (0.62 if "projected" in name or name == "sparse" else 0.56)
    assert toy["cache"][1] == toy["cache"][0] // (1 if one_key_head or "latent" in name or name == "sparse" else 2)


def test_single_rows_in_float32(found: dict[str, Any]) -> None:
    assert found["float32"]["logits"] < 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_references_hold_for_two_processes(found: dict[str, Any], name: str) -> None:
    report = found["folders"][name]
    assert report["ok"]
    assert report["logits"] < ROUNDING * 1e3  # what the reference itself is held to
    assert {"logits", "hidden states", "greedy"} <= set(report["quantities"])


def test_a_folder_that_cannot_be_dealt_out(found: dict[str, Any]) -> None:
    assert found["refused"]["error"] == "ParallelError"
    assert "5 query heads cannot be dealt out to 2 processes" in found["refused"]["says"]


def test_a_head_that_the_config_denies_is_refused_by_all(found: dict[str, Any]) -> None:
    """The first process says so as well, though the row that differs is none of its own."""
    assert found["spare head"]["copy"] == "loaded"
    assert re.match(r"CheckpointError: .*lm_head\.weight is another: set tie_word", found["spare head"]["another"])


def test_a_share_is_not_saved_as_a_model(found: dict[str, Any]) -> None:
    assert found["refused"]["saving"] == "ParallelError"


def test_all_are_seeded_alike(found: dict[str, Any]) -> None:
    both, twice_the_first = found["dice"]
    assert both == twice_the_first


def test_training_by_two_processes_is_training_by_one(found: dict[str, Any]) -> None:
    for name, tolerance in (("float64", ROUNDING), ("float32", 1e-5)):
        both, one = found["training"][name]["losses"]
        assert both == pytest.approx(one, rel=tolerance, abs=0)
        assert len(set(one)) == 4
        assert 0.4 < found["training"][name]["held"] < 0.6
    assert found["training"]["float64"]["weights"] < 1e-9  # AdamW divides by the size of gradients, also of tiny ones


def test_training_by_two_processes_is_taken_up_again(found: dict[str, Any]) -> None:
    both, again = found["training"]["float32"]["resumed"]
    assert both == again
    assert len(both) == 5


def test_a_process_without_a_sample_takes_part(found: dict[str, Any]) -> None:
    assert found["training"]["float32"]["lonely"] == pytest.approx(found["training"]["float32"]["alone"], rel=1e-5)


def test_the_command_line_in_two_processes(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTIONS))
    assert cli.main(["chat"]) == 0
    assert found["printed"] == capsys.readouterr().out
    assert len(found["printed"].splitlines()) == 2


def test_a_gpu_each_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ParallelError, match="4 processes cannot have a GPU each where there are 2"):
        parallel.mesh_of_all("cuda")


def test_a_mistake_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParallelError, match="synthesize is the work of one process, not of 2"):
        cli.alone("synthesize")
    monkeypatch.setenv("WORLD_SIZE", "1")
    cli.alone("synthesize")
