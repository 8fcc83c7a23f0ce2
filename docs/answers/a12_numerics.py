"""What is right in the exercises of chapter 12, by torch and `glm` themselves."""

from collections.abc import Iterator

import torch
from glm_kernels import rms_norm
from torch import Tensor
from torch.nn import functional as F

from docs.check import Case, Exercise
from glm.norms import RMSNorm


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_cases() -> Iterator[Case]:
    """Any numbers of any size; those just between two, to either side; carries."""
    ties = 1 + torch.arange(8) / 256
    for x in (random(500, seed=1) * 10.0 ** random(500, seed=2).mul(9), torch.cat((ties, -ties, 2 - ties / 128))):
        yield Case({"x": x}, {"result": x.bfloat16().float()}, tolerance=0.0)


def counts_to_cases() -> Iterator[Case]:
    """By counting, where that does not take long."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        n = torch.arange((1 << 24) + 2, dtype=torch.int32)
        missing = (n.to(dtype).to(torch.int32) != n).nonzero()[0].item()
        yield Case({"dtype": dtype}, {"result": int(missing) - 1})


def careful_scores_cases() -> Iterator[Case]:
    """A late layer and an early one."""
    for seed, (layer, size) in enumerate(((27, 120.0), (3, 50.0))):
        q, k = ((size + size / 10 * random(5, 128, seed=10 * seed + i)).half() for i in range(2))
        assert (q.float() @ k.float().T).min() > torch.finfo(torch.float16).max
        exact = q.double() @ k.double().T / 128**0.5
        yield Case({"q": q, "k": k, "layer": layer}, {"result": exact}, tolerance=2e-3)


def judged_cases() -> Iterator[Case]:
    """A norm, with sums in float32 and in float16; a single wrong element; NaN; and where torch is exact."""
    x, weight = random(64, 512, seed=1).half(), (1 + random(512, seed=2) / 10).half()
    exact = RMSNorm(1e-5, weight_first=True).build(512).double()
    exact.load_state_dict({"weight": weight.double()})
    truth, plain = exact(x.double()).detach(), F.rms_norm(x, (512,), weight, 1e-5)
    right = rms_norm(x, weight, 1e-5, weight_first=True)
    total = torch.zeros(64, dtype=torch.float16)
    for column in x.unbind(-1):
        total = total + column * column
    narrow = x * torch.rsqrt(total / 512 + 1e-5)[:, None] * weight
    spoilt, poisoned = right.clone(), right.clone()
    spoilt[3, 5] += 0.05
    poisoned[-1, -1] = torch.nan
    for kernel, good in ((right, True), (narrow, False), (spoilt, False), (poisoned, False)):
        yield Case({"kernel": kernel, "plain": plain, "exact": truth}, {"result": good})
    ones = torch.ones(8, dtype=torch.float16)
    for steps, good in ((0, True), (1, True), (2, False)):  # torch happens to be exact; a step is one rounding
        kernel = ones + steps * torch.finfo(torch.float16).eps
        yield Case({"kernel": kernel, "plain": ones, "exact": ones.double()}, {"result": good})


EXERCISES = [
    Exercise("12.1", "rounded", rounded_cases),
    Exercise("12.2", "counts_to", counts_to_cases),
    Exercise("12.3", "careful_scores", careful_scores_cases),
    Exercise("12.4", "judged", judged_cases),
]
