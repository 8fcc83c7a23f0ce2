"""Solutions of chapter 16, right and wrong."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from glm.infilling import Marks


def training_row(
    text: list[int], spans: list[tuple[int, int]], order: list[int], marks: Marks
) -> tuple[list[int], list[int]]:
    ids, end = [], 0
    for start, stop in spans:
        ids += [*text[end:start], marks.mask]
        end = stop
    ids += text[end:]
    targets = [-100] * len(ids)
    for number in order:
        written = text[slice(*spans[number])]
        ids += [marks.sop, *written]
        targets += [*written, marks.eop]
    return ids, targets


def training_row_from_left_to_right(
    text: list[int], spans: list[tuple[int, int]], order: list[int], marks: Marks
) -> tuple[list[int], list[int]]:
    return training_row(text, spans, sorted(order), marks)


def training_row_shifted(
    text: list[int], spans: list[tuple[int, int]], order: list[int], marks: Marks
) -> tuple[list[int], list[int]]:
    ids, targets = training_row(text, spans, order, marks)
    return ids, [-100, *targets[:-1]]


def training_row_of_everything(
    text: list[int], spans: list[tuple[int, int]], order: list[int], marks: Marks
) -> tuple[list[int], list[int]]:
    ids, targets = training_row(text, spans, order, marks)
    return ids, [after if target == -100 else target for target, after in zip(targets, [*ids[1:], -100], strict=True)]


def infilling_loss(logits: Tensor, targets: Tensor) -> Tensor:
    written = targets >= 0
    chances = logits[written].log_softmax(-1)
    return -chances.gather(1, targets[written][:, None]).mean()


def infilling_loss_shifted(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


def infilling_loss_over_all(logits: Tensor, targets: Tensor) -> Tensor:
    return infilling_loss(logits, targets) * (targets >= 0).double().mean()


def infilling_loss_by_row(logits: Tensor, targets: Tensor) -> Tensor:
    rows = [infilling_loss(z, y) for z, y in zip(logits, targets, strict=True) if (y >= 0).any()]
    return torch.stack(rows).mean()


def learning_rate(step: int, steps: int, top: float, warm_up: int) -> float:
    up = (step + 1) / warm_up if step < warm_up else 1.0
    return top * up * (1 + math.cos(math.pi * step / steps)) / 2


def learning_rate_from_nothing(step: int, steps: int, top: float, warm_up: int) -> float:
    up = step / warm_up if step < warm_up else 1.0
    return top * up * (1 + math.cos(math.pi * step / steps)) / 2


def learning_rate_in_a_line(step: int, steps: int, top: float, warm_up: int) -> float:
    up = (step + 1) / warm_up if step < warm_up else 1.0
    return top * up * (1 - step / steps)


def adamw(
    x: Tensor, gradients: list[Tensor], rate: float, beta1: float, beta2: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for n, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        x = x * (1 - rate * decay) - rate * (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + 1e-8)
    return x, m, v


def adam(
    x: Tensor, gradients: list[Tensor], rate: float, beta1: float, beta2: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The decay goes into the gradient."""
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for n, each in enumerate(gradients, 1):
        g = each + decay * x
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        x = x - rate * (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + 1e-8)
    return x, m, v


def adamw_uncorrected(
    x: Tensor, gradients: list[Tensor], rate: float, beta1: float, beta2: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for g in gradients:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        x = x * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8)
    return x, m, v


RIGHT = {"16.1": [training_row], "16.2": [infilling_loss], "16.3": [learning_rate], "16.4": [adamw]}
WRONG = {
    "16.1": [
        (training_row_from_left_to_right, "ids"),
        (training_row_shifted, "targets"),
        (training_row_of_everything, "targets"),
    ],
    "16.2": [
        (infilling_loss_shifted, "result"),
        (infilling_loss_over_all, "result"),
        (infilling_loss_by_row, "result"),
    ],
    "16.3": [(learning_rate_from_nothing, "result"), (learning_rate_in_a_line, "result")],
    "16.4": [(adam, "x"), (adamw_uncorrected, "x")],
}
