"""What is right in the exercises of chapter 4, by `glm` itself."""

from collections.abc import Iterator

import torch
from torch import Tensor

import glm
from docs.check import Case, Exercise
from glm.attention import Attention, attend
from glm.cache import Cache
from glm.checkpoint import PerHead
from glm.info import cache_bytes_per_token, parameters
from glm.layout import Layout
from glm.linear import Dense
from glm.positions import Unturned


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grouped_attention_cases() -> Iterator[Case]:
    """Many key heads, few and one; causal, both ways up to a place, and behind a cache."""
    blanks = Layout.blanks(4, [(2, 3)])
    layouts = (Layout.causal(1, 5), blanks, blanks.repeat(2), blanks.following(2, (0, 1)))
    for seed, (layout, (H, G)) in enumerate(zip(layouts, ((2, 2), (4, 2), (6, 3), (4, 1)), strict=True)):
        B, T, _ = layout.positions.shape
        q = random(B, H, T, 8, seed=10 * seed)
        k, v = (random(B, G, layout.keys, 8, seed=10 * seed + i) for i in (1, 2))
        arguments = {"q": q, "k": k, "v": v, "visible": layout.visible}
        yield Case(arguments, {"result": attend(q, k, v, Layout(layout.positions, layout.visible).mask())})


def step_cases() -> Iterator[Case]:
    """One token behind one other, behind several, in two rows."""
    for seed, (B, S, H, G) in enumerate(((1, 1, 2, 1), (1, 6, 4, 2), (2, 3, 4, 4))):
        D, K = 16, 8
        module = Attention(heads=H, groups=G, head_width=K, qkv_bias=True, out_bias=False).build(D, Dense()).double()
        names = ("qkv.weight", "qkv.bias", "out.weight")
        shapes = (((H + 2 * G) * K, D), ((H + 2 * G) * K,), (D, H * K))
        weights = {name: random(*shape, seed=100 + seed) for name, shape in zip(names, shapes, strict=True)}
        module.load_state_dict(weights)
        cache = Cache([[(G, K)] * 2], B, S + 1, dtype=torch.float64, device=torch.device("cpu"))
        before = Layout.causal(B, S)
        x = random(B, S + 1, D, seed=seed)
        with torch.inference_mode():
            module(x[:, :S], Unturned().rotation(before.positions, x.dtype), before.mask(), cache.memories()[0])
            cache.advance(before)
            keys, values = (buffer[:, :, :S].clone() for buffer in cache.buffers[0])
            after = before.following(1, (1,))
            y = module(x[:, S:], Unturned().rotation(after.positions, x.dtype), after.mask(), cache.memories()[0])
        qkv, bias, out = weights.values()
        yield Case(
            {"x": x[:, S:], "qkv": qkv, "bias": bias, "out": out, "keys": keys, "values": values, "heads": H},
            {"y": y, "keys": cache.buffers[0][0], "values": cache.buffers[0][1]},
        )


def flat_rows_cases() -> Iterator[Case]:
    """One head, two, and several."""
    for seed, (H, K, D) in enumerate(((1, 4, 3), (2, 2, 4), (4, 8, 16))):
        flat = random(3 * H * K, D, seed=seed)
        rows = PerHead(H).on_disk(flat).reshape(3 * H * K, D)
        yield Case({"rows": rows, "heads": H}, {"result": flat})


def equal_length_cases() -> Iterator[Case]:
    """Many key heads and few."""
    for name in ("chatglm-6b", "chatglm2-6b", "glm-4-9b-chat-1m", "glm-4-32b-0414"):
        spec = glm.release(name).spec
        weights, token = parameters(spec) * torch.bfloat16.itemsize, cache_bytes_per_token(spec, torch.bfloat16)
        yield Case({"spec": spec}, {"result": -(-weights // token)})


EXERCISES = [
    Exercise("4.1", "grouped_attention", cases=grouped_attention_cases),
    Exercise("4.2", "step", cases=step_cases),
    Exercise("4.3", "flat_rows", cases=flat_rows_cases),
    Exercise("4.4", "equal_length", cases=equal_length_cases),
]
