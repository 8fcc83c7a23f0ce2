"""What is aimed at, and what is accepted at first, on a GPU and for whole models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm_kernels.bench.results import Results, Row

OURS, GPT_FAST, EAGER, STATIC = "glm", "gpt-fast style", "transformers", "transformers static"  # sides
OVERLAP = "glm overlapped"  # ours too, with kernels that begin while those before them still run
MODELS = "chatglm-6b", "chatglm3-6b", "glm-4-9b", "glm-4-32b-0414"


@dataclass(frozen=True)
class Goal:
    """A number for every case it covers: `value` of it is to be at least `goal`, or with `most` at most."""

    name: str
    subject: str
    covers: Callable[[dict[str, Any]], bool]
    value: Callable[[Row, Results], float | None]
    goal: float
    accept: float | None = None
    unit: str = "×"
    most: bool = False

    def verdict(self, value: float) -> str:
        """ "goal", "accepted" or "miss"."""
        if self.reached(value, self.goal):
            return "goal"
        return "accepted" if self.accept is not None and self.reached(value, self.accept) else "miss"

    def reached(self, value: float, level: float) -> bool:
        """Whether a value is on the good side of a level."""
        return value <= level if self.most else value >= level

    def written(self, number: float | None) -> str:
        """A value or a level, with its unit."""
        return "–" if number is None else f"{number:.2f}{self.unit}"

    @property
    def sign(self) -> str:
        """Which side of the level is the good one."""
        return "≤" if self.most else "≥"

    def of(self, row: Row) -> bool:
        """Whether it covers a row: no smaller model than was published."""
        fields = row["fields"]
        whole = fields["layers"] is None and fields["model"] in (*MODELS, "chatglm2-6b")
        return bool(row["subject"] == self.subject and whole and self.covers(fields))


def seconds(row: Row, side: str = OURS) -> float | None:
    """A side's figure, if it has one."""
    found: float | None = row.get("sides", {}).get(side, {}).get("seconds")
    return found


def speed(row: Row, side: str = OURS) -> float | None:
    """Tokens a second of all rows together."""
    taken = seconds(row, side)
    return None if taken is None else float(row["tokens"]) / taken


def fraction(row: Row, results: Results) -> float | None:
    """The part of the read stream that the floor's bytes in our time come to."""
    taken = seconds(row)
    return None if taken is None else float(row["bytes"] / taken / results.run_of(row)["roofs"]["read"])


def of_matmul(row: Row, results: Results) -> float | None:
    """The part of the matrix product's rate that a prompt's flops in our time come to."""
    taken = seconds(row)
    return None if taken is None else float(row["flops"] / taken / results.run_of(row)["roofs"]["multiply"])


def times(side: str) -> Callable[[Row, Results], float | None]:
    """How many times as fast as a side in the same row."""

    def value(row: Row, results: Results) -> float | None:
        mine, theirs = seconds(row), seconds(row, side)
        return None if mine is None or theirs is None else theirs / mine

    return value


def ahead(row: Row, results: Results) -> float | None:
    """How many times as fast as the fastest of the others."""
    mine = seconds(row)
    sides = [side for side in row.get("sides", {}) if side not in (OURS, OVERLAP)]
    others = [taken for side in sides if (taken := seconds(row, side)) is not None]
    return None if mine is None or not others else min(others) / mine


def own_bf16(row: Row, results: Results) -> float | None:
    """How many times as fast as our own bf16 in the same sizes, of the same commit."""
    mine, commit = seconds(row), results.run_of(row)["commit"]
    wanted = row["fields"] | {"weights": "bf16"}
    for other in results.rows:
        if other["subject"] == row["subject"] and other["fields"] == wanted:
            theirs = seconds(other)
            if results.run_of(other)["commit"] == commit and mine is not None and theirs is not None:
                return theirs / mine
    return None


def ours(name: str, scale: float = 1.0) -> Callable[[Row, Results], float | None]:
    """One of our own figures."""

    def value(row: Row, results: Results) -> float | None:
        found = row.get("sides", {}).get(OURS, {}).get(name)
        return None if found is None else float(found) * scale

    return value


def one(weights: str) -> Callable[[dict[str, Any]], bool]:
    """Cases of one row."""
    return lambda fields: fields["batch"] == 1 and fields["weights"] == weights and fields["model"] in MODELS


def chatglm2(fields: dict[str, Any]) -> bool:
    """The case that the official code needs 5.1 GB for."""
    return (fields["model"], fields["weights"], fields["context"]) == ("chatglm2-6b", "int4", 8192)


GOALS = (
    Goal("decode bf16, batch 1: of the read stream", "decode", one("bf16"), fraction, 0.92, 0.85, " R"),
    Goal("decode bf16, batch 1: against gpt-fast style", "decode", one("bf16"), times(GPT_FAST), 1.15),
    Goal("decode int4, batch 1: of the read stream", "decode", one("int4"), fraction, 0.75, 0.60, " R"),
    Goal("decode int4, batch 1: against gpt-fast style with tinygemm", "decode", one("int4"), times(GPT_FAST), 2.0),
    Goal("decode int4, batch 1: against our own bf16", "decode", one("int4"), own_bf16, 2.8),
    Goal("decode, batch 1: against transformers", "decode", lambda f: f["batch"] == 1, times(EAGER), 5.0),
    Goal("decode, batch 32: against every other side", "decode", lambda f: f["batch"] == 32, ahead, 1.0),
    Goal("memory: over weights, cache and logits", "memory", lambda f: True, ours("over needed"), 1.03, most=True),
    Goal("memory: ChatGLM2-6B int4, 8192 tokens", "memory", chatglm2, ours("peak", 1e-9), 4.2, unit=" GB", most=True),
    Goal("start: process to first token, int4", "start", one("int4"), ours("seconds"), 3.0, 5.0, " s", most=True),
)  # fmt: skip


def goals_of(row: Row, results: Results) -> list[Goal]:
    """Those that cover a row."""
    return [goal for goal in GOALS if goal.of(row)] if results.device.get("kind", "cuda") == "cuda" else []
