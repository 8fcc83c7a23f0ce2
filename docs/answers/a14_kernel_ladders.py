"""What is right in the exercises of chapter 14, by `glm_kernels`."""

from collections.abc import Iterator

import torch
from glm_kernels import attention
from glm_kernels.attention import Bounds, visible
from glm_kernels.packing import words_of
from torch import Tensor

from docs.check import Case, Exercise


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def carried_softmax_cases() -> Iterator[Case]:
    """A block, several, a part of one, and scores that overflow without the maximum."""
    for seed, (T, block, size) in enumerate(((4, 4, 1.0), (12, 4, 1.0), (13, 5, 1.0), (9, 1, 1.0), (12, 4, 40.0))):
        q, k, v = (random(T, 8, seed=10 * seed + i) for i in range(3))
        q = size * q
        y, lse = attention(q[None, None], k[None, None], v[None, None], return_lse=True)
        yield Case({"q": q, "k": k, "v": v, "block": block}, {"y": y[0, 0], "lse": lse[0, 0]}, tolerance=1e-10)


def joined_cases() -> Iterator[Case]:
    """Two splits, several, empty ones among them, and large scores."""
    for seed, (sizes, size) in enumerate((((3, 5), 1.0), ((1, 4, 0, 2), 1.0), ((0, 6), 1.0), ((4, 4, 4), 4000.0))):
        S = sum(sizes)
        q, k, v = size * random(1, 8, seed=10 * seed), random(S, 8, seed=10 * seed + 1), random(S, 8, seed=seed + 70)
        whole = attention(q[None, None], k[None, None], v[None, None])[0, 0, 0]
        found = [
            part(q[0] @ keys.T * 8**-0.5, values) for keys, values in zip(k.split(sizes), v.split(sizes), strict=True)
        ]
        m, z, a = (torch.stack(each) for each in zip(*found, strict=True))
        yield Case({"m": m, "z": z, "a": a}, {"result": whole}, tolerance=1e-9)


def part(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, z and a of one split."""
    m = s.max() if len(s) else torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)
    p = torch.exp(s - m)
    return m, p.sum(), p @ v


def words_cases() -> Iterator[Case]:
    """One tile and several."""
    for outputs, inputs in ((1, 128), (3, 128), (5, 384)):
        generator = torch.Generator().manual_seed(inputs + outputs)
        codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.int32)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        yield Case({"codes": codes}, {"result": words_of(packed, 4).int() & 0xFFFF})


def blocks_of_keys_cases() -> Iterator[Case]:
    """Counted in the mask: blocks alike, wider and narrower, and a first query anywhere."""
    for first, rows, columns in ((0, 64, 64), (128, 64, 64), (128, 128, 64), (64, 64, 128), (37, 16, 24)):
        keys = -(-(first + rows) // columns) * columns
        seen = visible(first + rows, first + rows, Bounds())[0, 0, first:]
        blocks = torch.nn.functional.pad(seen, (0, keys - first - rows)).unflatten(1, (-1, columns))
        whole, some = int(blocks.all(2).all(0).sum()), int(blocks.any(2).any(0).sum())
        yield Case({"first": first, "rows": rows, "columns": columns}, {"whole": whole, "masked": some - whole})


EXERCISES = [
    Exercise("14.1", "carried_softmax", cases=carried_softmax_cases),
    Exercise("14.2", "joined", cases=joined_cases),
    Exercise("14.3", "words", cases=words_cases),
    Exercise("14.4", "blocks_of_keys", cases=blocks_of_keys_cases),
]
