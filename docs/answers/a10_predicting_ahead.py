"""What is right in the exercises of chapter 10, by `glm` itself."""

from collections.abc import Iterator
from itertools import product
from math import prod

import torch

import glm
from docs.check import Case, Exercise
from glm.cache import Cache
from glm.drafting import NextToken, PromptLookup
from glm.family.chatglm2 import build
from glm.layout import Layout
from glm.norms import RMSNorm
from glm.positions import Plain


def toy(seed: int) -> glm.GLM:
    """A small causal model whose choices are not all alike, float64."""
    spec = build(
        layers=2, width=16, inner=24, heads=2, groups=1, head_width=8, vocabulary=30, context=64,
        norm=RMSNorm(1e-5, weight_first=True), base=1e4, scaling=Plain(), pad=None, stop=(),
    )  # fmt: skip
    model = glm.GLM(spec, dtype=torch.float64, seed=seed).requires_grad_(False)
    for x in model.parameters():
        x.mul_(12 if x.dim() > 1 else 1)
    return model


def found_cases() -> Iterator[Case]:
    """A long match, a short one, overlapping ones, none."""
    for text, guesses, longest in (
        ([1, 2, 9, 9, 9, 1, 2, 8, 7, 6, 1, 2], 3, 2),
        ([1, 2, 8, 5, 2, 7, 3, 2], 3, 3),
        ([5, 6, 5], 3, 3),
        ([4, 4, 4, 4], 2, 3),
        ([4], 3, 3),
        ([1, 2, 3, 1, 2, 4, 0, 2, 3, 1, 2], 2, 3),
    ):
        arguments = {"text": text, "guesses": guesses, "longest": longest}
        yield Case(arguments, {"result": PromptLookup(guesses, longest).found(text)})


def kept_cases() -> Iterator[Case]:
    """All right, none, some; and a right one behind a wrong one."""
    model, prompt = toy(1), [3, 4, 5]
    [first, *plain] = glm.generate(model, [prompt], max_new_tokens=6)[0]
    assert len(set(plain)) > 2
    for change in ((), (0,), (2,), (3,)):
        guesses = [(id + 1) % 30 if i in change else id for i, id in enumerate(plain[:4])]
        logits = model(torch.tensor([[*prompt, first, *guesses]]))[0, len(prompt) :]
        right = min(change, default=4)
        yield Case({"guesses": guesses, "logits": logits}, {"result": plain[: right + 1]})


def tokens_a_pass_cases() -> Iterator[Case]:
    """By going through all that can happen."""
    for chances in ([0.7, 0.7, 0.7], [0.9, 0.5, 0.2, 0.1], [0.0, 1.0], []):
        mean = 0.0
        for right in product((True, False), repeat=len(chances)):
            happens = prod(p if good else 1 - p for p, good in zip(chances, right, strict=True))
            mean += happens * (1 + (*right, False).index(False))
        yield Case({"chances": chances}, {"result": mean})


def joined_cases() -> Iterator[Case]:
    """Two models; what their block is given is caught before it."""
    for seed in (1, 2):
        model = toy(seed)
        drafter = NextToken(model.spec).double().to_empty(device="cpu").requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for x in drafter.state_dict().values():
            x.normal_(generator=generator)
        drafter.embedding = model.embedding
        read: list[torch.Tensor] = []
        drafter.block.register_forward_pre_hook(lambda module, given, read=read: read.append(given[0]))
        tokens = torch.randint(30, (2, 6), generator=generator)
        stream, _ = model.stream(tokens)
        cache = Cache([model.spec.blocks[0].mixer.remembers], 2, 5, dtype=model.dtype, device=model.device)
        drafter(tokens[:, 1:], stream[:, :-1], Layout.causal(2, 5), cache)
        arguments = {
            "model": model,
            "tokens": tokens,
            "token_norm": drafter.token_norm.weight,
            "stream_norm": drafter.stream_norm.weight,
            "join": drafter.join.weight,
        }
        yield Case(arguments, {"result": read[0]})


EXERCISES = [
    Exercise("10.1", "found", found_cases),
    Exercise("10.2", "kept", kept_cases),
    Exercise("10.3", "tokens_a_pass", tokens_a_pass_cases),
    Exercise("10.4", "joined", joined_cases),
]
