"""What integer weights cost: the same text through the same model, its matrices dense and in every form asked for.

For each form and method

    layers       rms error of the stream after each block, over the stream's rms
    KL           Σ_v p(v) log(p(v) / q(v)) of the next token, mean over the tokens to be predicted; p is the dense model
    perplexity   exp of the mean -log q(token)
    agreement    how often both models think the same token likeliest

The dense model computes in float32 from the numbers in the files, and so do the others from theirs: what differs is the
weights alone. A block at a time is in memory (`walk.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm.checkpoint import Checkpoint, Stored
from glm.compress import matrices, quantize_block
from glm.errors import GLMError
from glm.grouped import Grouped, dequantize
from glm.hub import fetch
from glm.linear import Dense
from glm.quantization import METHODS, quantize
from glm.tensor_file import Progress
from glm.texts import Text
from glm.walk import Stream, Walk


@dataclass(frozen=True)
class Variant:
    """A way to store the matrices of the blocks; without a form they are rounded to bfloat16."""

    form: Grouped | None
    method: str

    @property
    def weights(self) -> str:
        """The kind of number."""
        return "bf16" if self.form is None else f"int{self.form.bits}"

    @property
    def group(self) -> str:
        """Columns with a scale of their own."""
        return "" if self.form is None else str(self.form.group or "row")


BFLOAT16 = Variant(None, "nearest")


def variants(forms: Sequence[Grouped], methods: Sequence[str]) -> list[Variant]:
    """bfloat16, and every form by every method."""
    return [BFLOAT16, *(Variant(form, method) for form in forms for method in methods)]


def weighed(source: str | PathLike[str]) -> int:
    """Bytes of all matrices that `measure` quantises once a variant."""
    checkpoint = Checkpoint.open(fetch(source))
    walk = Walk(checkpoint, Path(source).name)
    places = matrices(walk.generation, walk.spec, checkpoint, Grouped(8, None, True))
    return sum(checkpoint.tensors[name].nbytes for name in places)


@dataclass
class Result:
    """What one variant costs; see the head of this file."""

    variant: Variant | None  # None is the dense model itself
    layers: list[float] = field(default_factory=list)
    kl: float = 0.0
    perplexity: float = 0.0
    agreement: float = 0.0

    def row(self) -> dict[str, Any]:
        """As a result file has it."""
        form = None if self.variant is None else self.variant.form
        return {
            "weights": "as stored" if self.variant is None else self.variant.weights,
            "method": "" if self.variant is None else self.variant.method,
            "group": "" if self.variant is None else self.variant.group,
            "symmetric": None if form is None else form.symmetric,
            "layers": self.layers,
            "KL": self.kl,
            "perplexity": self.perplexity,
            "agreement": self.agreement,
        }


@torch.inference_mode()
def measure(
    source: str | PathLike[str],
    texts: Sequence[Text],
    ways: Sequence[Variant],
    calibration: Sequence[Text] = (),
    progress: Progress | None = None,
) -> list[Result]:
    """The dense model first, then every variant in `ways`; `calibration` is what gptq reads.

    `progress` is told bytes of matrices quantised. Raises GLMError where a variant cannot be.
    """
    if any(way.method not in (*METHODS, "gptq") for way in ways):
        raise GLMError(f"the methods are {', '.join((*METHODS, 'gptq'))}")
    if not calibration and any(way.method == "gptq" for way in ways):
        raise GLMError("gptq takes calibration text")
    walk = Walk(Checkpoint.open(fetch(source)), Path(source).name)
    if walk.spec.weights != Dense():
        raise GLMError(f"{source}: is quantised already; start from the original")
    forms = dict.fromkeys(way.form for way in ways if way.form is not None) or [Grouped(8, None, True)]
    places, *_ = (matrices(walk.generation, walk.spec, walk.checkpoint, form) for form in forms)  # all are tried
    streams = walk.start(text.ids for text in texts)
    studies = walk.start(text.ids for text in calibration)
    xs = [[stream.x for stream in streams] for _ in ways]
    studied = [[study.x for study in studies] if way.method == "gptq" else [] for way in ways]
    results = [Result(way) for way in ways]
    for i, block in enumerate(walk.blocks()):
        lines = [stored for stored in walk.lines(f"blocks.{i}") if stored.name in places]
        before = {name: x.clone() for name, x in block.state_dict().items()}
        truth = [stream.through(block) for stream in streams]
        for w, way in enumerate(ways):
            for study, x in zip(studies, studied[w], strict=False):
                study.x = x
            change(walk, block, f"blocks.{i}", lines, way, studies)
            xs[w] = [stream.through(block, x) for stream, x in zip(streams, xs[w], strict=True)]
            studied[w] = [study.through(block, x) for study, x in zip(studies, studied[w], strict=False)]
            results[w].layers.append(relative(xs[w], truth))
            block.load_state_dict(before)
            if progress is not None:
                progress(sum(walk.checkpoint.tensors[stored.name].nbytes for stored in lines))
        for stream, x in zip(streams, truth, strict=True):
            stream.x = x
    results.insert(0, Result(None, [0.0] * len(walk.model.blocks)))
    judge(results, texts, walk.tail(), [[stream.x for stream in streams], *xs])
    return results


def change(walk: Walk, block: nn.Module, name: str, lines: list[Stored], way: Variant, studies: list[Stream]) -> None:
    """Puts the block's matrices into the variant's numbers."""
    if way.form is not None and way.method == "gptq":
        quantize_block(walk.checkpoint, block, name, lines, studies, way.form)
        return
    state = block.state_dict()
    for stored in lines:
        target = stored.on_disk(state[stored.parameter.removeprefix(f"{name}.")])
        weight = walk.checkpoint.read(stored.name)
        if way.form is None:
            rounded = weight.to(torch.bfloat16)
        else:
            rounded = dequantize(*quantize(weight, way.form, way.method), way.form, target.dtype)
        target.copy_(rounded.view(target.shape))


def relative(xs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The rms difference of several tensors over the rms of the true ones."""
    errors = sum(float((x - y).double().square().sum()) for x, y in zip(xs, truth, strict=True))
    return float((errors / sum(float(y.double().square().sum()) for y in truth)) ** 0.5)


def judge(
    results: Sequence[Result], texts: Sequence[Text], tail: Callable[[Tensor], Tensor], xs: Sequence[Sequence[Tensor]]
) -> None:
    """Fills in what the logits tell, for streams `xs` by result and text; the first result is the truth."""
    tokens = sum(len(text.ids) - text.start for text in texts)
    sums = torch.zeros(len(results), 3, dtype=torch.float64)  # KL, -log q, agreement
    for t, text in enumerate(texts):
        targets = torch.tensor(text.ids[text.start :])[:, None]
        predicting = slice(text.start - 1, len(text.ids) - 1)
        p = tail(xs[0][t][:, predicting])[0].double().log_softmax(-1)
        for r, ours in enumerate(xs):
            q = tail(ours[t][:, predicting])[0].double().log_softmax(-1) if r else p
            sums[r, 0] += (p.exp() * (p - q)).sum()
            sums[r, 1] -= q.gather(1, targets).sum()
            sums[r, 2] += (p.argmax(-1) == q.argmax(-1)).sum()
    for result, (kl, loss, same) in zip(results, sums / tokens, strict=True):
        result.kl, result.perplexity, result.agreement = float(kl), float(loss.exp()), float(same)
