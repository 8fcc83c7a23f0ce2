"""What is right in the exercises of chapter 16, by torch and `glm` themselves."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

import glm
from docs.check import Case, Exercise
from glm.infilling import IGNORED, Marks, blanked, loss
from glm.recipe import Recipe
from glm.training import rate

MARKS = Marks(mask=90, gmask=91, sop=92, eop=93)


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def training_row_cases() -> Iterator[Case]:
    """One blank, two in both orders, at the edges, and as many as fit."""
    text = list(range(10, 22))
    for spans in ([(3, 5)], [(1, 3), (6, 10)], [(0, 2), (11, 12)], [(0, 1), (2, 4), (5, 6), (8, 11)]):
        for seed in range(2):
            shuffled = list(range(len(spans)))
            Random(seed).shuffle(shuffled)
            sample = blanked([f"{id} " for id in text], spans, lambda s: [*map(int, s.split())], MARKS, Random(seed))
            arguments = {"text": text, "spans": spans, "order": shuffled, "marks": MARKS}
            yield Case(arguments, {"ids": sample.ids, "targets": sample.targets})


def infilling_loss_cases() -> Iterator[Case]:
    """Rows in which more or less is written; large logits."""
    for seed, size in enumerate((1.0, 1000.0)):
        targets = random(3, 7, seed=seed).mul(1000).long() % 11
        targets[0, :5], targets[1, :2], targets[2] = IGNORED, IGNORED, IGNORED
        logits = size * random(3, 7, 11, seed=seed + 10)
        yield Case({"logits": logits, "targets": targets}, {"result": loss(logits, targets)})


def learning_rate_cases() -> Iterator[Case]:
    """The beginning, the end and between, of a short run and of tiny-glm's."""
    recipe = Recipe.read(glm.embedded() / "recipe.toml")
    for steps, warm_up in ((recipe.steps, recipe.warm_up), (10, 4), (10, 0)):
        run = replace(recipe, steps=steps, warm_up=warm_up)
        for step in (0, 1, 3, 4, steps // 2, steps - 1):
            arguments = {"step": step, "steps": steps, "top": run.learning_rate, "warm_up": warm_up}
            yield Case(arguments, {"result": rate(run, step)})


def adamw_cases() -> Iterator[Case]:
    """One step, and several with decay."""
    for seed, (count, decay) in enumerate(((1, 0.0), (6, 0.1))):
        x, gradients = random(4, seed=seed), [random(4, seed=seed + 10 + i) for i in range(count)]
        parameter = torch.nn.Parameter(x.clone())
        optimiser = torch.optim.AdamW([parameter], lr=0.05, betas=(0.9, 0.98), eps=1e-8, weight_decay=decay)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimiser.step()
        state = optimiser.state[parameter]
        arguments = {"x": x, "gradients": gradients, "rate": 0.05, "beta1": 0.9, "beta2": 0.98, "decay": decay}
        yield Case(arguments, {"x": parameter.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]})


EXERCISES = [
    Exercise("16.1", "training_row", training_row_cases),
    Exercise("16.2", "infilling_loss", infilling_loss_cases),
    Exercise("16.3", "learning_rate", learning_rate_cases),
    Exercise("16.4", "adamw", adamw_cases),
]
