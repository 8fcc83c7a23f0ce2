"""How many operations a step has beside its layers: each is a launch, some 1.7 µs of a recorded step."""

from typing import Any

import pytest
import torch
from test_generation import blank_spec, model_of, native_spec
from torch.utils._python_dispatch import TorchDispatchMode

from glm import Engine, PromptLookup
from glm.runtime import norms
from glm.runtime.decoding import advance
from glm.runtime.sampling import Choice

START_NOTHING = {"empty", "new_empty", "empty_like", "_unsafe_view", "detach"}


class Launches(TorchDispatchMode):
    """The names of all operations that compute something, in order: views and empty tensors do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "aten":  # in inference mode what consists of others arrives whole
            with self:
                whole = op.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in op._schema.returns)
        name = op.overloadpacket.__name__
        if not view and name not in START_NOTHING:
            self.names.append(name)
        return op(*args, **kwargs)


def launches(engine: Engine, rows: int, choice: Choice) -> list[str]:
    """Of one step, without its layers."""
    engine.composed.blocks, engine.slots.buffers = [], []
    with torch.inference_mode(), Launches() as seen:
        advance(engine.composed, engine.slots, engine.rows, rows, choice)
    return seen.names


@pytest.fixture(autouse=True)
def folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The final norm in the product of the head, as in bfloat16."""
    monkeypatch.setattr(norms, "FOLDED", frozenset({torch.float32}))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_greedy_step_is_five_operations_beside_its_layers(rows: int) -> None:
    engine = Engine(model_of(native_spec(), 1).float(), max_batch=4, max_length=32)
    assert launches(engine, rows, "greedy") == ["index", "embedding", "dense_product", "likeliest", "accept"]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("choice", "count"), [("sampled", 28), ("nucleus", 46)])
def test_sampling(choice: Choice, count: int, rows: int) -> None:
    """So many more than a greedy step; nothing is sorted where no row asks for it."""
    engine = Engine(model_of(native_spec(), 1).float(), max_batch=4, max_length=32)
    found = launches(engine, rows, choice)
    assert len(found) == 5 + count
    assert found.count("sort") == (choice == "nucleus")


def test_two_axes_of_positions_are_two_gathers_and_a_join() -> None:
    engine = Engine(model_of(blank_spec(), 1).float(), max_length=32)
    found = ["index", "index", "cat", "embedding", "norm", "dense_product", "likeliest", "accept"]  # a LayerNorm
    assert launches(engine, 1, "greedy") == found


def test_guesses_cost_their_positions() -> None:
    engine = Engine(model_of(native_spec(), 1).float(), max_length=32, draft=PromptLookup(3))
    found = ["arange", "mul", "add", "index", "embedding", "dense_product", "likeliest", "accept"]
    assert launches(engine, 1, "greedy") == found


def test_the_count_sees_what_is_computed() -> None:
    x = torch.ones(3, 4)
    with torch.inference_mode(), Launches() as seen:
        x.T.flatten()[2:].view(2, 5).unbind(0)  # a copy, since transposed axes do not lie side by side
        x.isfinite()
        x[:, 0] += 1
    assert seen.names == ["clone", "abs", "ne", "eq", "mul", "add_", "copy_"]
