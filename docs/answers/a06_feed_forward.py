"""What is right in the exercises of chapter 6, by `glm` itself."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from docs.check import Case, Exercise
from glm.family import chatglm, chatglm2
from glm.feed_forward import FeedForward
from glm.linear import Dense
from glm.norms import RMSNorm
from glm.parts import Cut
from glm.positions import Plain

BRANCHES = (
    ("gelu_tanh",),
    ("gelu",),
    ("silu", "identity"),
    ("identity", "gelu"),
    ("gelu_tanh", "identity"),
    ("identity", "silu"),
)


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(branches: tuple[str, ...], seed: int, width: int = 6, inner: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    """A feed-forward, and its two matrices."""
    module = FeedForward(inner, branches, bias=False).build(width, Dense()).double().requires_grad_(False)
    up, down = random(len(branches) * inner, width, seed=seed), random(width, inner, seed=seed + 1)
    module.load_state_dict({"up.weight": up, "down.weight": down})
    return module, up, down


def feed_forward_cases() -> Iterator[Case]:
    """One branch and two, in either order."""
    for seed, branches in enumerate(BRANCHES):
        module, up, down = built(branches, seed=10 * seed)
        x = random(2, 3, 6, seed=seed)
        yield Case({"x": x, "up": up, "down": down, "branches": branches}, {"result": module(x)})


def gate_first_cases() -> Iterator[Case]:
    """Matrices of two sizes; what comes out must compute the same, which the case makes sure of."""
    for seed, inner in ((1, 4), (2, 8)):
        module, up, down = built(("identity", "gelu"), seed=seed, inner=inner)
        other, _, _ = built(("gelu", "identity"), seed=seed, inner=inner)
        swapped = torch.cat((up[inner:], up[:inner]))
        other.load_state_dict({"up.weight": swapped, "down.weight": down})
        x = random(1, 3, 6, seed=seed)
        assert torch.allclose(other(x), module(x), rtol=1e-12, atol=1e-12)
        yield Case({"up": up}, {"result": swapped})


def merged_cases() -> Iterator[Case]:
    """One device, two, four."""
    cut = Cut("", axis=0, blocks=2)
    for devices in (1, 2, 4):
        whole = random(16, 3, seed=devices)
        yield Case({"parts": cut.split(whole, devices)}, {"result": whole})


def which_branches_cases() -> Iterator[Case]:
    """All of those above."""
    for seed, branches in enumerate(BRANCHES):
        module, up, down = built(branches, seed=100 * seed)
        yield Case({"f": module.__call__, "up": up, "down": down}, {"result": branches})


def chatglm2_cases() -> Iterator[Case]:
    """Two small ones."""
    for heads, groups, head_width, inner in ((4, 2, 16, 216), (6, 3, 8, 100)):
        width = heads * head_width
        before = chatglm.build(
            layers=2, width=width, inner=4 * width, heads=heads, vocabulary=320, context=96, eps=1e-6, two_axes=True,
            sop=316, mask=312, gmask=313, pad=3, stop=(317,),
        )  # fmt: skip
        after = chatglm2.build(
            layers=2, width=width, inner=inner, heads=heads, groups=groups, head_width=head_width, vocabulary=256,
            context=96, norm=RMSNorm(1e-6, weight_first=True), base=10000.0, scaling=Plain(), pad=0, stop=(2,),
        )  # fmt: skip
        whole = {name: getattr(after, name) for name in ("reading", "rotary", "final_norm", "tied")}
        block = {name: getattr(after.blocks[0], name) for name in ("wiring", "norm", "mixer", "feed_forward")}
        yield Case({"spec": before, "groups": groups, "inner": inner}, whole | block)


EXERCISES = [
    Exercise("6.1", "feed_forward", cases=feed_forward_cases),
    Exercise("6.2", "gate_first", cases=gate_first_cases),
    Exercise("6.3", "merged", cases=merged_cases),
    Exercise("6.4", "which_branches", cases=which_branches_cases),
    Exercise("6.5", "chatglm2_from_chatglm", cases=chatglm2_cases),
]
