"""Reading a prompt: seconds up to its first new token, and flops against those of a matrix product."""

from collections.abc import Mapping
from typing import Any

from glm.bench import sides as every
from glm.bench.cases import RuntimeCase
from glm.bench.decode import CHECKED
from glm.bench.prompts import prompts
from glm.bench.sides import Maker, Setting, Side
from glm.bench.truth import Truth
from glm.bench.turns import Place, admitted, check_again, in_turn, lasting
from glm.bench.weights import random_model
from glm.bench.work import flops, weights_read


def measure(case: RuntimeCase, place: Place, makers: Mapping[str, Maker] | None = None) -> dict[str, Any]:
    """The figures of a case: of every side seconds of `batch` prompts, one after the other."""
    model, rows = random_model(case, place.device), case.batch
    setting = Setting(model, case, max(case.context, CHECKED) + 2 * rows + 16)
    truth = Truth(model, prompts(case.spec, rows, min(CHECKED, case.context), 1), 1)
    sides, found = admitted(every.makers() if makers is None else makers, setting, truth, place)

    def read(side: Side, turn: int) -> float:
        texts = prompts(case.spec, rows, case.context, 1000 + turn)  # new ones: what was read may be remembered

        def all_of_them() -> None:
            for text in texts:
                side.prefill(text)

        return lasting(all_of_them, place.device)

    in_turn(sides, found, place, read)
    check_again(sides, found, truth, place)
    spec, tokens = case.spec, rows * case.context
    return {
        "bytes": rows * weights_read(spec, case.torch_dtype, case.context),
        "flops": rows * flops(spec, case.context), "tokens": tokens, "sides": found,
    }  # fmt: skip
