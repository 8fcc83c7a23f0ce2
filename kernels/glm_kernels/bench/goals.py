"""What is aimed at, and what is accepted at first: `goal` and `accept` are numbers that a case's value is held to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm_kernels.bench.peers import OURS
from glm_kernels.bench.results import Results, Row

MEGABYTE = 1e6


@dataclass(frozen=True)
class Goal:
    """A number for every case it covers.

    The value of a case is `base` seconds over ours (a multiple, the more the better), or without a base our
    microseconds (the fewer the better).
    """

    subject: str
    cases: str
    covers: Callable[[Row], bool]
    against: str
    base: Callable[[Row, Results], float | None] | None
    goal: float
    accept: float | None = None

    def value(self, row: Row, results: Results) -> float | None:
        """Of a case that has a figure, if what it is compared with has one too."""
        mine = seconds(row)
        if mine is None:
            return None
        if self.base is None:
            return mine * 1e6
        base = self.base(row, results)
        return None if base is None else base / mine

    def needs(self, row: Row, results: Results, level: float) -> float | None:
        """Seconds that a case may take at this level."""
        if self.base is None:
            return level / 1e6
        base = self.base(row, results)
        return None if base is None else base / level

    def verdict(self, value: float) -> str:
        """ "goal", "accepted" or "miss"."""
        if self.reached(value, self.goal):
            return "goal"
        return "accepted" if self.accept is not None and self.reached(value, self.accept) else "miss"

    def reached(self, value: float, level: float) -> bool:
        """Whether a value is on the good side of a level."""
        return value <= level if self.base is None else value >= level

    def written(self, number: float | None) -> str:
        """A value or a level, with its unit."""
        if number is None:
            return "–"
        if self.base is None:
            return f"{number:.1f} µs"
        return f"{number:.2f} {self.against}" if len(self.against) == 1 else f"{number:.2f}×"

    @property
    def sign(self) -> str:
        """Which side of the level is the good one."""
        return "≤" if self.base is None else "≥"


def seconds(row: Row, side: str = OURS) -> float | None:
    """A side's figure, if it has one."""
    found: float | None = row.get("sides", {}).get(side, {}).get("seconds")
    return found


def peer(name: str) -> Callable[[Row, Results], float | None]:
    """Seconds of a peer in the same row."""
    return lambda row, results: seconds(row, name)


def fastest_peer(row: Row, results: Results) -> float | None:
    """Seconds of the fastest of the others in the same row, if there is one with a figure."""
    others = [seconds(row, name) for name in row.get("sides", {}) if name != OURS]
    return min((each for each in others if each is not None), default=None)


def at_read_roof(row: Row, results: Results) -> float | None:
    """Seconds of the bytes at R."""
    return float(row["bytes"] / results.run_of(row)["roofs"]["read"])


def at_multiply_roof(row: Row, results: Results) -> float | None:
    """Seconds of the flops at C."""
    return float(row["flops"] / results.run_of(row)["roofs"]["multiply"])


def at_causal_rate(row: Row, results: Results) -> float | None:
    """Seconds of the flops at the rate of our own causal attention in the same shape and run."""
    wanted = row["fields"] | {"mask": "causal"}
    for other in results.rows:
        if (other["subject"], other["fields"], other["run"]) == (row["subject"], wanted, row["run"]):
            base = seconds(other)
            return None if base is None else base * row["flops"] / other["flops"]
    return None


def long_causal(row: Row) -> bool:
    """Causal prefill in bfloat16, heads of 128, 4k to 32k."""
    case: dict[str, Any] = row["fields"]
    shape = case["mask"], case["dtype"], case["key"], case["backward"], case["batch"]
    return shape == ("causal", "bfloat16", 128, False, 1) and 4096 <= case["queries"] <= 32768


def bidirectional(row: Row) -> bool:
    """A prefix or an infilling mask, forward."""
    return row["fields"]["mask"] in ("prefix", "infilling") and not row["fields"]["backward"]


def large_cache(row: Row) -> bool:
    """64 MB of cache or more."""
    return bool(row["bytes"] >= 64 * MEGABYTE)


def short_cache(row: Row) -> bool:
    """One sequence of at most 1k."""
    return bool(row["fields"]["batch"] == 1 and row["fields"]["keys"] <= 1024)


def one_row(row: Row) -> bool:
    """One row of x."""
    return bool(row["fields"]["rows"] == 1)


def mlp_rows(*rows: int) -> Callable[[Row], bool]:
    """A matrix of a feed-forward layer, times so many rows."""
    return lambda row: row["fields"]["rows"] in rows and row["fields"]["matrix"] in ("gate and up", "up", "down")


MASKED = "prefix and infilling masks"
CAUSAL = "causal, head 128, bf16, 4k–32k"
GOALS = (
    Goal("attention", CAUSAL, long_causal, "SDPA cuDNN", peer("SDPA cuDNN"), 1.00, 0.85),
    Goal("attention", CAUSAL, long_causal, "C", at_multiply_roof, 0.78),
    Goal("attention", MASKED, bidirectional, "flex_attention", peer("flex_attention"), 1.5, 1.1),
    Goal("attention", MASKED, bidirectional, "our causal rate", at_causal_rate, 0.95),
    Goal("decode", "64 MB of cache or more", large_cache, "R", at_read_roof, 0.92, 0.85),
    Goal("decode", "64 MB of cache or more", large_cache, "flashinfer", peer("flashinfer"), 1.05),
    Goal("decode", "one sequence, at most 1k", short_cache, "", None, 6.0, 8.0),
    Goal("dense", "1 row", one_row, "R", at_read_roof, 0.92, 0.85),
    Goal("dense", "1 row", one_row, "cuBLAS", peer("cuBLAS"), 1.00, 0.95),
    Goal("int4", "MLP, 1 row", mlp_rows(1), "R", at_read_roof, 0.90, 0.80),
    Goal("int4", "MLP, 1 row", mlp_rows(1), "cuBLAS bf16", peer("cuBLAS bf16"), 3.4),
    Goal("int4", "MLP, 1 row", mlp_rows(1), "tinygemm", peer("tinygemm"), 1.6),
    Goal("int4", "MLP, 1 row", mlp_rows(1), "the fastest peer", fastest_peer, 1.0),
    Goal("int4", "MLP, 16 rows", mlp_rows(16), "cuBLAS bf16", peer("cuBLAS bf16"), 3.3, 2.5),
    Goal("int4", "MLP, 32 rows", mlp_rows(32), "cuBLAS bf16", peer("cuBLAS bf16"), 3.0, 2.2),
    Goal("int4", "MLP, 64 rows", mlp_rows(64), "cuBLAS bf16", peer("cuBLAS bf16"), 2.2, 1.6),
    Goal("int4", "MLP, 128 rows", mlp_rows(128), "cuBLAS bf16", peer("cuBLAS bf16"), 1.15, 1.0),
    Goal("int4", "MLP, 256 rows", mlp_rows(256), "cuBLAS bf16", peer("cuBLAS bf16"), 1.0, 0.85),
    Goal("int4", "MLP, 1024 rows or more", mlp_rows(1024, 4096), "cuBLAS bf16", peer("cuBLAS bf16"), 0.92, 0.85),
)


def goals_of(row: Row) -> list[Goal]:
    """Those that cover a row."""
    return [goal for goal in GOALS if goal.subject == row["subject"] and goal.covers(row)]
