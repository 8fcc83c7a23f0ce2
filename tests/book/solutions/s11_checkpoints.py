"""Solutions of chapter 11, right and wrong."""

import torch
from torch import Tensor

import glm


def flat(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def flat_as_it_is(rows: Tensor, heads: int) -> Tensor:
    return rows


def flat_the_other_way(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def merged(parts: list[Tensor], axis: int, gated: bool) -> Tensor:
    if not gated:
        return torch.cat(parts, dim=axis)
    halves = [part.chunk(2) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in halves])


def merged_on_top(parts: list[Tensor], axis: int, gated: bool) -> Tensor:
    return torch.cat(parts, dim=axis)


def nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    unsigned = weight.to(torch.int16) % 256
    return tuple((x + 8) % 16 - 8 for x in (unsigned // 16, unsigned % 16))  # type: ignore[return-value]


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.stack(nibbles(weight), dim=-1).flatten(1) * scale[:, None]


def dequantised_low_first(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.stack(nibbles(weight)[::-1], dim=-1).flatten(1) * scale[:, None]


def dequantised_without_signs(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.stack([x % 16 for x in nibbles(weight)], dim=-1).flatten(1) * scale[:, None]


def eights(words: Tensor) -> Tensor:
    """[…, n] -> […, 8 n]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    return (words.to(torch.int64)[..., None] >> shifts & 15).flatten(-2)


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, version: int) -> Tensor:
    u = eights(qweight.T)  # [out, in]
    z = (eights(qzeros) + (version == 1)) % 16  # [groups, out]
    each = u.shape[1] // len(scales)
    return scales.T.repeat_interleave(each, 1) * (u - z.T.repeat_interleave(each, 1))


def from_gptq_without_the_one(qweight: Tensor, qzeros: Tensor, scales: Tensor, version: int) -> Tensor:
    return from_gptq(qweight, qzeros, scales, 2)


def from_gptq_beyond_four_bits(qweight: Tensor, qzeros: Tensor, scales: Tensor, version: int) -> Tensor:
    right = from_gptq(qweight, qzeros, scales, version)
    sixteen = ((eights(qzeros) == 15) & (version == 1)).T.repeat_interleave(right.shape[1] // len(scales), 1)
    return right - 16 * sixteen * scales.T.repeat_interleave(right.shape[1] // len(scales), 1)


def which_mistake(right: glm.GLM, wrong: glm.GLM) -> str:
    if right.spec.rotary != wrong.spec.rotary:
        return "rotary"
    names = {"qkv": "q k v", "feed_forward.up": "gate up", "wire": "norms", "head": "head"}
    theirs = wrong.state_dict()
    for name, x in right.state_dict().items():
        if not torch.equal(x, theirs[name]):
            return next(mistake for part, mistake in names.items() if part in name)
    raise AssertionError("they are the same")


def which_mistake_of_shape(right: glm.GLM, wrong: glm.GLM) -> str:
    theirs = wrong.state_dict()
    same = all(x.shape == theirs[name].shape for name, x in right.state_dict().items())
    return "rotary" if same else "q k v"


RIGHT = {
    "11.1": [flat],
    "11.2": [merged],
    "11.3": [dequantised],
    "11.4": [from_gptq],
    "11.5": [which_mistake],
}
WRONG = {
    "11.1": [(flat_as_it_is, "result"), (flat_the_other_way, "result")],
    "11.2": [(merged_on_top, "result")],
    "11.3": [(dequantised_low_first, "result"), (dequantised_without_signs, "result")],
    "11.4": [(from_gptq_without_the_one, "result"), (from_gptq_beyond_four_bits, "result")],
    "11.5": [(which_mistake_of_shape, "result")],
}
