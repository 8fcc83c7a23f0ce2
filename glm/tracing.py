"""A forward pass with everything it computes on the way, by name.

    trace = glm.trace(model, "Attention is [MASK].", tokenizer)
    trace["block 3 / attention / probabilities"]          # a tensor, [B, H, T, S]
    print(trace.step("block 3 / attention / q"))          # its equation, shape and size
    trace.lens()                                          # what each layer would say
    trace.write("trace.html")                             # a page to step through

The model is not written down a second time: it runs as it is, and is watched. Hooks see what goes into its modules and
comes out of them. What happens between modules (queries after their rotation, the scores of a router or an indexer) is
seen where it passes through torch, by a `TorchFunctionMode`. Only scores and probabilities of attention are computed
anew, since the model leaves them to torch's fused attention: by the equation in `attention.py`, from the queries, keys
and mask that were handed to it. Their product with the values has to be what came out, to rounding, or there is no
trace.

Names are paths: the block's number from 0 on, the sublayer, the tensor. They are listed in `traced_names.py` with the
equation of each. A module that is not known there goes by its own path.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property, partial
from os import PathLike
from typing import Any, NamedTuple

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from glm.errors import TraceError
from glm.experts import ExpertsModule, RouterModule
from glm.feed_forward import FeedForwardModule
from glm.latent_attention import LatentAttentionModule
from glm.layout import Layout, Mask
from glm.model import GLM, BlockModule
from glm.norms import wide
from glm.sparse_attention import IndexerModule, SparseAttentionModule, visible
from glm.tokenizer import Tokenizer
from glm.traced_names import described, output_of, prefix_of

SCORES = 4 << 30  # bytes that scores and probabilities of all layers may take


# ----------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class Step:
    """One tensor of the pass: its name, the equation that made it, and the letters of its axes."""

    name: str
    equation: str
    axes: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    @cached_property
    def numbers(self) -> Tensor:
        """All of its finite numbers, float64."""
        x = self.tensor.double()
        return x[x.isfinite()]

    @property
    def finite(self) -> bool:
        """Whether it has neither NaN nor infinities."""
        return self.numbers.numel() == self.tensor.numel()

    @property
    def rms(self) -> float:
        """The root of the mean square of what is finite, NaN where nothing is."""
        return float(self.numbers.square().mean().sqrt())

    @property
    def min(self) -> float:
        """The smallest finite number, NaN where there is none."""
        return float(self.numbers.min()) if self.numbers.numel() else float("nan")

    @property
    def max(self) -> float:
        """The largest finite number, NaN where there is none."""
        return float(self.numbers.max()) if self.numbers.numel() else float("nan")

    def summary(self) -> dict[str, Any]:
        """What can be said of it in numbers and words, without the tensor; JSON can hold it."""
        numbers = {"rms": self.rms, "min": self.min, "max": self.max}
        return {
            "name": self.name,
            "equation": self.equation,
            "axes": self.axes,
            "shape": list(self.shape),
            "dtype": str(self.tensor.dtype).removeprefix("torch."),
            **{key: None if x != x else x for key, x in numbers.items()},
            "finite": self.finite,
        }

    def __str__(self) -> str:
        known = f"rms {self.rms:.3g}, from {self.min:.3g} to {self.max:.3g}{'' if self.finite else ', not all finite'}"
        return f"{self.name}: {self.equation}  [{self.axes}] = {list(self.shape)}  {known}"


class Lens(NamedTuple):
    """The likeliest next tokens by layer: [L + 1, B, T, count] each, before the first block and after each."""

    ids: Tensor
    probabilities: Tensor


class Trace(Mapping[str, Tensor]):
    """All steps of one forward pass, in the order in which they were computed; a mapping from names to tensors.

    model    what ran; ids [B, T] and layout are what it was given
    pieces   the tokens of the first row as text; their ids where there was no tokenizer
    shift    learned prefix tokens, which stand before the T tokens in every matrix of attention
    """

    def __init__(
        self, model: GLM, ids: Tensor, layout: Layout, steps: Sequence[Step], tokenizer: Tokenizer | None
    ) -> None:
        self.model, self.ids, self.layout, self.tokenizer = model, ids, layout, tokenizer
        self.steps = tuple(steps)
        self._by_name = {step.name: step for step in steps}

    def step(self, name: str) -> Step:
        """The step called so. TraceError, with names like it, where there is none."""
        if name not in self._by_name:
            close = get_close_matches(name, self._by_name, n=3)
            instead = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise TraceError(f"no step of this pass is called {name!r}{instead}")
        return self._by_name[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.step(name).tensor

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def shift(self) -> int:
        """How many learned prefix tokens stand before the tokens of the text."""
        return 0 if self.model.spec.prefix is None else self.model.spec.prefix.length

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """The tokens of the first row as text."""
        return tuple(self.piece(id) for id in self.ids[0].tolist())

    def piece(self, id: int) -> str:
        """A token as text."""
        return str(id) if self.tokenizer is None else self.tokenizer.piece(id)

    def only(self, pattern: str) -> "Trace":
        """The steps whose names match a pattern with `*`, such as "block 0 / *". TraceError where none does."""
        steps = [step for step in self.steps if fnmatchcase(step.name, pattern)]
        if not steps:
            raise TraceError(f"no step's name matches {pattern!r}; there are {', '.join(list(self)[:6])} …")
        return Trace(self.model, self.ids, self.layout, steps, self.tokenizer)

    @property
    def streams(self) -> list[Tensor]:
        """The residual stream [B, T, D] before the first block and after each."""
        return [self["stream"], *(self[f"block {i} / stream"] for i in range(len(self.model.blocks)))]

    @torch.no_grad()
    def lens(self, count: int = 5) -> Lens:
        """The `count` likeliest next tokens, read off the stream between blocks: the "logit lens".

        The model's own final norm and head are applied to every stream as if it were the last. The last one's are the
        model's answer; those before it are what it would say if it ended there, for which it was never trained.
        """
        ids, probabilities = [], []
        for x in self.streams:
            p = wide(self.model.head(self.model.final_norm(x))).softmax(-1)
            likeliest = p.topk(count, dim=-1)
            ids.append(likeliest.indices)
            probabilities.append(likeliest.values)
        return Lens(torch.stack(ids), torch.stack(probabilities))

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))

    def __rich__(self) -> Table:
        """A line a step, under the path it shares with those beside it."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, how in (("step", {}), ("shape", {}), *((n, {"justify": "right"}) for n in ("rms", "min", "max"))):
            table.add_column(name, no_wrap=name != "step", **how)  # type: ignore[arg-type]
        table.add_column("equation")
        above: list[str] = []
        for step in self.steps:
            *path, name = step.name.split(" / ")
            for depth, part in enumerate(path):
                if above[: depth + 1] != path[: depth + 1]:
                    table.add_row("  " * depth + escape(part), style="bold")
            above = path
            numbers = [f"{x:.3g}" for x in (step.rms, step.min, step.max)]
            equation = escape(step.equation) if step.finite else f"[red]not all finite[/]  {escape(step.equation)}"
            shape = " ".join(map(str, step.shape))
            table.add_row("  " * len(path) + escape(name), shape, *numbers, equation)
        return table

    def json(self) -> str:
        """The summaries of all steps, a JSON object a line."""
        return "\n".join(json.dumps(step.summary(), ensure_ascii=False) for step in self.steps)

    def page(self, row: int = 0) -> str:
        """One row as a self-contained HTML page. TraceError for a text that is too long for one."""
        from glm.trace_page import page

        return page(self, row)

    def write(self, path: str | PathLike[str], row: int = 0) -> None:
        """Write that page to a file, complete or not at all."""
        from glm.trace_page import write

        write(path, self.page(row))


def lens_table(found: Trace, count: int = 4) -> Table:
    """What would come after the last token of the first row, layer by layer, with probabilities."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("final norm and head on", no_wrap=True)
    for n in range(count):
        table.add_column(f"{n + 1}." if n else "likeliest next token")
    lens = found.lens(count)
    for layer in range(len(lens.ids)):
        ids, probabilities = (x[layer, 0, -1].tolist() for x in lens)
        said = [f"{found.piece(id)!r} {p:.2f}" for id, p in zip(ids, probabilities, strict=True)]
        table.add_row(f"block {layer - 1} / stream" if layer else "stream", *map(escape, said))
    return table


# ----------------------------------------------------------------------------- the pass


@torch.no_grad()
def trace(
    model: GLM,
    what: str | Sequence[int] | Tensor,
    tokenizer: Tokenizer | None = None,
    *,
    layout: Layout | None = None,
) -> Trace:
    """Run the model once and keep every tensor on the way.

    what       ids [B, T] or of one row; or a text, which is read as `glm infill` reads it where it has a blank, else
               as `glm complete` does, and needs the tokenizer.
    tokenizer  only names the tokens otherwise.
    layout     positions and visibility; None is what the release makes of the ids.

    What the model computes is not changed by being watched. Kept is a copy of everything; the attention of long texts
    is what takes room. Raises TraceError for a text that has too little, LayoutError for a layout that does not fit.
    """
    if isinstance(what, str):
        if tokenizer is None:
            raise TraceError("a text is traced by its ids: give the tokenizer too, or ids")
        what = asked(tokenizer, what)
    ids = (what if isinstance(what, Tensor) else torch.tensor([list(what)])).to(model.device)
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
        raise TraceError(f"ids are whole numbers [B, T] with T ≥ 1, not {ids.dtype} {list(ids.shape)}")
    layout = model.layout(ids) if layout is None else layout
    watch = Watch(model, *ids.shape)
    watch.keep("ids", ids)
    watch.keep("positions", layout.positions)
    with watch.hooked(), Functions(watch.saw):
        watch.keep("logits", model(ids, layout))
    return Trace(model, ids, layout, watch.steps, tokenizer)


def asked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that ask for what belongs in the blank of a text, or for what comes after a text without one."""
    if any(name in text for name in tokenizer.format.blanks):
        return tokenizer.infill(text)
    return tokenizer.continuation(text)


class Functions(TorchFunctionMode):
    """Tells `saw` of every call of a torch function: the function, its arguments and its result."""

    def __init__(self, saw: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]) -> None:
        super().__init__()
        self.saw = saw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.saw(func, args, kwargs or {}, result)
        return result


class Call(NamedTuple):
    """A module at work: its path in the model, and what its steps are called by."""

    module: nn.Module
    path: str
    name: str


class Watch:
    """Gathers the steps of one pass of `model` over [B, T] tokens."""

    def __init__(self, model: GLM, B: int, T: int) -> None:
        self.model, self.B, self.T = model, B, T
        self.steps: list[Step] = []
        self.times: Counter[str] = Counter()  # how often a name came up
        self.calls: list[Call] = []  # those at work now, the innermost last

    def keep(self, name: str, x: Tensor, form: str = "") -> None:
        """Add a step. A name that is there already (a module was asked twice) is counted on."""
        axes, equation = described(name, self.model.spec, x.dim(), form)
        self.times[name] += 1
        if (times := self.times[name]) > 1:
            name = f"{name} ({times})"
        self.steps.append(Step(name, equation, axes, x.detach().clone(memory_format=torch.contiguous_format)))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on all modules of the model, which are gone afterwards however it ends."""
        hooks = []
        try:
            for path, module in self.model.named_modules():
                if path:
                    hooks.append(module.register_forward_pre_hook(partial(self.enter, path)))
                    hooks.append(module.register_forward_hook(partial(self.leave, path)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module begins, called with `args`."""
        if isinstance(module, BlockModule) and module is self.model.blocks[0]:
            self.start(*args)
        self.calls.append(Call(module, path, prefix_of(path, args)))
        last = path.rpartition(".")[2]
        if path.count(".") == 2 and last in ("mixer", "feed_forward"):
            self.keep(f"{self.calls[-1].name} / input", args[0])
        elif last == "experts" and isinstance(args[-1], int):
            chosen = next(step.tensor for step in reversed(self.steps) if step.name.endswith("router / chosen"))
            self.keep(f"{self.calls[-1].name} / tokens", (chosen.flatten(0, 1) == args[-1]).any(-1).nonzero()[:, 0])
        elif last == "down" and len(self.calls) > 1 and isinstance(self.calls[-2].module, FeedForwardModule):
            self.keep(f"{self.calls[-2].name} / product", args[0])

    def leave(self, path: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A module has computed `result`."""
        self.calls.pop()
        if path == "prefix":
            for i, (k, v) in enumerate(result):
                self.keep(f"prefix / block {i} / k", k)
                self.keep(f"prefix / block {i} / v", v)
        elif isinstance(module, RouterModule):
            for what, x in zip(("chosen", "weights"), result, strict=True):
                self.keep(f"{prefix_of(path, args)} / {what}", self.rows(x))
        elif isinstance(module, IndexerModule):
            self.keep(f"{prefix_of(path, args)} / chosen", result)
        elif isinstance(result, Tensor) and (name := output_of(path, args)):
            self.keep(name, result)

    def start(self, x: Tensor, rotation: Any, mask: Mask, memory: Any) -> None:
        """What the first block is given, which all the others are given too, but for the stream."""
        for axis, turn in enumerate(rotation.turns):
            for what, y in zip(("cos", "sin"), turn, strict=True):
                self.keep(f"rotation / axis {axis} / {what}", y[:, :, 0])
        keys = self.T + (0 if self.model.spec.prefix is None else self.model.spec.prefix.length)
        self.keep("visible", visible(mask, self.T, keys, x.device).expand(self.B, -1, -1))
        self.keep("stream", x)

    def rows(self, x: Tensor) -> Tensor:
        """What was computed of all tokens one after another, [B · T, …], as [B, T, …]."""
        return x.view(self.B, self.T, *x.shape[1:])

    def saw(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """A function of torch was called within the module that is at work."""
        if not self.calls:
            return
        module, _, name = self.calls[-1]
        if func is F.scaled_dot_product_attention:
            self.attended(args, kwargs, result)
        elif isinstance(module, FeedForwardModule) and func in (F.silu, F.gelu):
            self.keep(f"{name} / activated", result)
        elif isinstance(module, RouterModule):
            if func is Tensor.sigmoid:
                self.keep(f"{name} / scores", self.rows(result))
            elif func is Tensor.topk and args[0].shape[-1] == len(module.bias):
                self.keep(f"{name} / choice", self.rows(args[0]))
        elif isinstance(module, IndexerModule) and func is Tensor.masked_fill:
            self.keep(f"{name} / scores", args[0])
        elif isinstance(module, ExpertsModule) and func is Tensor.add:
            self.keep(f"{name} / routed", self.rows(args[0]) if args[0].dim() == 2 else args[0])

    def attended(self, args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor) -> None:
        """Fused attention was asked for y, [B, H, T, …]."""
        q, k, v = args
        name = next(call.name for call in reversed(self.calls) if call.path.endswith("mixer"))
        q, y = (x.reshape(self.B, -1, self.T, x.shape[-1]) for x in (q, y))  # one query a head may come otherwise
        mask = Mask(kwargs.get("attn_mask"), bool(kwargs.get("is_causal")))
        sees = visible(mask, self.T, k.shape[2], q.device).expand(self.B, -1, -1)
        self.room(q.shape[1], k.shape[2], wide(q).element_size())
        latent = any(isinstance(call.module, LatentAttentionModule | SparseAttentionModule) for call in self.calls)
        form = "" if not latent else "absorbed" if k is v else "naive"
        for what, x in (("q", q), ("k", k), ("v", v)):
            self.keep(f"{name} / {what}", x, form)
        if any(isinstance(call.module, SparseAttentionModule) for call in self.calls):
            self.keep(f"{name} / visible", sees)
        scores, probabilities = attention(q, k, sees, kwargs.get("scale"))
        reproduced(name, q, k, v, sees, kwargs.get("scale"), y)
        self.keep(f"{name} / scores", scores, form)
        self.keep(f"{name} / probabilities", probabilities)
        self.keep(f"{name} / heads", y, form)

    def room(self, heads: int, keys: int, size: int) -> None:
        """Raise TraceError where scores and probabilities of all layers would take too much memory."""
        takes = 2 * len(self.model.blocks) * self.B * heads * self.T * keys * size
        if takes > SCORES:
            fit = int(self.T * (SCORES / takes) ** 0.5)
            raise TraceError(
                f"the attention of {self.T} tokens takes {takes / 1e9:.1f} GB to keep, and a trace keeps up to "
                f"{SCORES / 1e9:.1f}: give it {fit} tokens or fewer"
            )


def attention(q: Tensor, k: Tensor, sees: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Scores s = scale · q kᵀ and softmax over those of them that are seen, [B, H, T, S] each; `sees` is [B, T, S]."""
    q, k = wide(q), repeated(wide(k), q.shape[1])
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores, scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Key heads [B, G, S, K], each as often as it has query heads: [B, H, S, K]."""
    y: Tensor = x.repeat_interleave(heads // x.shape[1], dim=1)
    return y


def reproduced(name: str, q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float | None, y: Tensor) -> None:
    """Raise TraceError unless softmax(scale · q kᵀ) v, in float64, is the observed y [B, H, T, …] to rounding.

    With u the rounding unit of the numbers and w that of the sums, n channels and S keys: a score is off by at most
    δ = (4u + n w) · scale · Σ|q||k|, so a probability by a factor of exp(±2δ); y is off by that and by the rounding
    of p, v and their sum, (4u + S w), both of Σ p|v|. What is not finite here must not be so there either.
    """
    u, sums = torch.finfo(q.dtype).eps / 2, torch.finfo(wide(q).dtype).eps / 2
    _, p = attention(q.double(), k.double(), sees, scale)
    k, v = (repeated(x.double(), q.shape[1]) for x in (k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    sizes = (q.double().abs() @ k.abs().transpose(-1, -2) * factor).masked_fill(~sees[:, None], 0)
    delta = (4 * u + q.shape[-1] * sums) * sizes.amax(-1, keepdim=True)
    off = torch.expm1(2 * delta) + 4 * u + k.shape[2] * sums
    expected, most = p @ v, off * (p @ v.abs())
    error = (y.double() - expected).abs()
    wrong = ~(error <= most) & (expected.isfinite() | y.isfinite())
    if bool(wrong.any()):
        raise TraceError(
            f"{name}: softmax of the observed scores times the observed values is not what attention returned "
            f"(off by {float(error[wrong].max()):.2e}, where rounding explains {float(most[wrong].max()):.2e})"
        )
