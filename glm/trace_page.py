"""A traced forward pass as one HTML file: nothing else is fetched, so that it can be kept, sent and opened anywhere.

The template `trace_page.html` holds the page and its script; what stands here fills in the numbers. Per token and step
there is one number (the rms over the channels), per head a matrix of one byte a probability, per layer and token the
likeliest next tokens; of the tensors themselves nothing. So the size is bounded, and a text that is too long refused.
"""

import base64
import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm.errors import GLMError, TraceError
from glm.experts import Experts
from glm.linear import Dense
from glm.norms import wide
from glm.tracing import Lens, Step, Trace

TOKENS = 256  # more can neither be read nor drawn
ATTENTION = 6 << 20  # bytes that all matrices of attention may take
LIKELIEST = 5
TEMPLATE = Path(__file__).with_name("trace_page.html")
SLOT = "/*trace*/null"  # where the numbers go


def page(trace: Trace, row: int = 0) -> str:
    """One row of a trace as HTML. Raises TraceError where there is no such row, or it is too long."""
    B, T = trace.ids.shape
    if not 0 <= row < B:
        raise TraceError(f"the trace has rows 0 … {B - 1}, not {row}")
    matrices = {name: x[row] for name, x in trace.items() if name.endswith("attention / probabilities")}
    takes = sum(x.numel() for x in matrices.values())
    fit = min(TOKENS, int(T * (ATTENTION / max(1, takes)) ** 0.5))
    if fit < T or takes > ATTENTION:
        raise TraceError(f"{T} tokens are too many for a page of this model: give it {fit} or fewer")
    data = json.dumps(numbers(trace, row, matrices), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace(SLOT, data.replace("<", "\\u003c"))


def numbers(trace: Trace, row: int, matrices: dict[str, Tensor]) -> dict[str, Any]:
    """All that the page shows, as JSON has it."""
    spec, lens = trace.model.spec, trace.lens(LIKELIEST)
    dtype = str(trace.model.dtype).removeprefix("torch.")
    stored = "" if isinstance(spec.weights, Dense) else f", weights {spec.weights}"
    return {
        "title": f"{len(spec.blocks)} blocks, width {spec.width}, {dtype}{stored}",
        "tokens": [
            {"piece": trace.piece(id), "id": id, "at": at}
            for id, at in zip(trace.ids[row].tolist(), trace["positions"][row].tolist(), strict=True)
        ],
        "shift": trace.shift,
        "steps": [said(trace, step, row) for step in trace.steps],
        "visible": packed(trace["visible"][row]),
        "attention": {
            name.removesuffix(" / probabilities"): {
                "heads": len(p),
                "bytes": packed(p),
                "visible": packed(trace[sparse][row]) if (sparse := sees(name)) in trace else None,
            }
            for name, p in matrices.items()
        },
        "streams": ["stream", *(f"block {i} / stream" for i in range(len(spec.blocks)))],
        "lens": likeliest(trace, lens, row),
        "experts": {
            f"block {i}": chosen(trace, i, row)
            for i, block in enumerate(spec.blocks)
            if isinstance(block.feed_forward, Experts)
        },
    }


def sees(name: str) -> str:
    """The step that says which keys a layer of its own accord attends to, by the name of its probabilities."""
    return name.replace("probabilities", "visible")


def said(trace: Trace, step: Step, row: int) -> dict[str, Any]:
    """A step's summary, and its size for each token of the row, where it has a number of channels for each."""
    return {**step.summary(), "tokens": sizes(step, trace.ids.shape[1], row)}


def sizes(step: Step, T: int, row: int) -> list[float | None] | None:
    """The rms of what a step holds of each token; None where it holds something else. Not finite: None for a token."""
    axes, x = step.axes.split(), step.tensor
    if not x.is_floating_point() or "T" not in axes or axes[0] != "B" or "S" in axes:
        return None
    of_row = x[row].double().movedim(axes.index("T") - 1, 0).reshape(T, -1)
    return [rounded(float(value)) for value in of_row.square().mean(-1).sqrt()]


def rounded(x: float) -> float | None:
    """Four digits of a number; None for what JSON has no number for."""
    return float(f"{x:.4g}") if x - x == 0 else None


def packed(x: Tensor) -> str:
    """Probabilities or truth values as bytes, 255 for one, in base64. NaN becomes nothing."""
    scaled = (wide(x) * 255).round() if x.is_floating_point() else x * 255
    whole = scaled.nan_to_num(0).clamp(0, 255).to(torch.uint8)
    return base64.b64encode(bytes(whole.flatten().tolist())).decode()


def likeliest(trace: Trace, lens: Lens, row: int) -> list[list[list[list[Any]]]]:
    """By layer and token, pairs of a token and its probability."""
    return [
        [
            [[trace.piece(id), rounded(p)] for id, p in zip(ids, values, strict=True)]
            for ids, values in zip(layer_ids.tolist(), layer_p.tolist(), strict=True)
        ]
        for layer_ids, layer_p in zip(lens.ids[:, row], lens.probabilities[:, row], strict=True)
    ]


def chosen(trace: Trace, block: int, row: int) -> list[list[list[float | None]]]:
    """The experts of each token with their weights."""
    name = f"block {block} / feed-forward / router"
    ids, weights = trace[f"{name} / chosen"][row], trace[f"{name} / weights"][row]
    return [
        [[id, rounded(weight)] for id, weight in zip(*pair, strict=True)]
        for pair in zip(ids.tolist(), weights.tolist(), strict=True)
    ]


def write(path: str | PathLike[str], text: str) -> None:
    """A file that appears complete or not at all. Raises GLMError where it cannot be written."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise GLMError(f"{target}: cannot be written ({error.strerror})") from None
