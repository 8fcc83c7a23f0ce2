"""Experts held to the equation token by token, and their router to what it must never lose."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glm.errors import ConfigError
from glm.experts import Experts, ExpertsModule, Router
from glm.family import release
from glm.feed_forward import FeedForward
from glm.linear import Dense, RowScaled
from glm.model import GLM

SPEC = Experts(FeedForward(6, ("silu", "identity"), bias=True), 8, 3, 2, Router(4, 2, normalised=True, scale=1.7))


def module(spec: Experts = SPEC, width: int = 10) -> ExpertsModule:
    built = spec.build(width, Dense())
    assert isinstance(built, ExpertsModule)
    generator = torch.Generator().manual_seed(1)
    built.double()
    for x in built.state_dict().values():
        x.copy_(torch.randn(x.shape, generator=generator))
    return built


def one_by_one(m: ExpertsModule, x: Tensor) -> Tensor:
    """The equation, a token and an expert at a time."""
    spec, rows = SPEC, []
    for token in x.flatten(0, -2):
        s = (m.router.weight @ token).sigmoid()
        c = s + m.router.bias
        worth = [sum(sorted(c[g * 2 : g * 2 + 2].tolist())) for g in range(4)]
        groups = sorted(range(4), key=lambda g: -worth[g])[:2]
        order = sorted((e for g in groups for e in (2 * g, 2 * g + 1)), key=lambda e: -float(c[e]))[:3]
        y = m.shared(token) if m.shared is not None else 0
        for e in order:
            up, down = m.experts.up, m.experts.down
            a, b = (up.weight[e] @ token + up.bias[e]).chunk(2)
            done = down.weight[e] @ (torch.nn.functional.silu(a) * b) + down.bias[e]
            y = y + spec.router.scale * s[e] / s[order].sum() * done
        rows.append(y)
    return torch.stack(rows).view_as(x)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 1)])
def test_the_sum_is_that_of_one_token_at_a_time(shape: tuple[int, int]) -> None:
    m, x = module(), torch.randn(*shape, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(m(x), one_by_one(m, x), rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_expert_that_was_chosen_and_the_router() -> None:
    m, x = module(), torch.randn(1, 40, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    m(x).square().sum().backward()
    chosen = set(m.router(x[0])[0].flatten().tolist())
    assert set(m.experts.up.weight.grad.flatten(1).any(dim=1).nonzero().flatten().tolist()) == chosen
    assert m.router.weight.grad.any()


def test_the_bias_of_the_router_is_never_narrowed() -> None:
    m = module().float()
    m.router.bias.fill_(0.12345678)
    for narrow in (torch.bfloat16, torch.float16):
        m.to(narrow)
        assert (m.router.weight.dtype, m.router.bias.dtype) == (narrow, torch.float32)
        assert torch.equal(m.router.bias, torch.full((8,), 0.12345678))
    assert m.double().router.bias.dtype == torch.float64
    flash = replace(release("glm-4.7-flash").spec, blocks=release("glm-4.7-flash").spec.blocks[:2])
    assert GLM(flash, device="meta", dtype=torch.bfloat16).blocks[1].feed_forward.router.bias.dtype == torch.float32


@pytest.mark.parametrize("changed", [{"top": 5}, {"count": 6}, {"count": 4}])
def test_experts_that_cannot_be_chosen_are_refused(changed: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(SPEC, **changed).build(10, Dense())


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_stacks_are_their_scaled_matrices(bits: int) -> None:
    spec = replace(SPEC, expert=replace(SPEC.expert, bias=False), shared=0)
    ours, dense = spec.build(10, RowScaled(bits)), module(spec)
    generator = torch.Generator().manual_seed(3)
    ours.double()
    ours.router.load_state_dict(dense.router.state_dict())
    for name in ("up", "down"):
        stack = getattr(ours.experts, name)
        stack.weight.copy_(torch.randint(-128, 128, stack.weight.shape, generator=generator, dtype=torch.int8))
        stack.weight_scale.copy_(torch.rand(stack.weight_scale.shape, generator=generator))
        high, low = stack.weight >> 4, (stack.weight << 4) >> 4
        whole = stack.weight if bits == 8 else torch.stack((high, low), dim=-1).flatten(-2)
        getattr(dense.experts, name).weight.copy_(whole.double() * stack.weight_scale[..., None])
    x = torch.randn(2, 5, 10, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(ours(x), dense(x), rtol=1e-12, atol=1e-9)
