"""Random prompts, right after which a model writes. (A file of its own: the process whose start is timed reads it.)"""

import random

from glm.layout import Blank
from glm.spec import Spec


def prompts(spec: Spec, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Random prompts of so many tokens; for a model that fills blanks the last two are a blank and the start."""
    dice = random.Random(seed)
    reading = spec.reading
    if not isinstance(reading, Blank):
        return [[dice.randrange(spec.vocabulary) for _ in range(tokens)] for _ in range(rows)]
    special = {reading.sop, *reading.masks}
    plain = [id for id in range(min(spec.vocabulary, 4096)) if id not in special]
    end = [reading.masks[0], reading.sop][-tokens:]
    return [[*dice.choices(plain, k=tokens - len(end)), *end] for _ in range(rows)]
