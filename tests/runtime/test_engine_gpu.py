"""The engine on a GPU: kernels, recorded steps and a device that is a step ahead, held to the pure model there."""

import pytest
import torch
from glm_kernels.overlap import can_overlap
from harness import gpu, judge
from test_engine import generations, model, run, wide_model
from test_generation import model_of, native_spec
from texts import ALL, texts
from two_processes import TOYS, made
from two_processes import prompts as toy_prompts

import glm
from glm import GLM, Engine, PromptLookup, SmallerModel
from glm.runtime.recording import Recording

pytestmark = gpu
CUDA = "cuda"


@torch.inference_mode()
def logits_of(model: GLM, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids], device=model.device))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(ALL))
def test_goldens(name: str, dtype: torch.dtype) -> None:
    """At most twice as far from float64 as the pure model on the same device."""
    pure = GLM.from_pretrained(ALL[name], dtype=dtype, device=CUDA)
    exact = GLM.from_pretrained(ALL[name], dtype=dtype, device=CUDA).double()
    engine = Engine(pure, max_length=64)
    every = [ids for ids, layout in texts(ALL[name]) if layout is None]
    ours = torch.cat([engine.read(ids) for ids in every])
    judge(ours, torch.cat([logits_of(pure, ids) for ids in every]), torch.cat([logits_of(exact, ids) for ids in every]))


@pytest.mark.parametrize("name", TOYS)
def test_recorded_steps_give_the_tokens_of_the_pure_model(name: str) -> None:
    """In float64, where rounding tips no choice; requests come and go between the recorded steps."""
    pure = made(TOYS[name]).to(CUDA)
    prompts = [*toy_prompts(pure.spec), toy_prompts(pure.spec)[0]]
    for how in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "seed": 5}):
        truth = glm.generate(pure, prompts, max_new_tokens=20, stop=(), **how)
        for batch in (1, 2, 4):
            engine = Engine(pure, max_batch=batch, max_length=64, chunk=4)
            assert engine.generate(prompts, max_new_tokens=20, stop=(), **how) == truth
            assert engine.generate(prompts, max_new_tokens=20, stop=(), **how) == truth, "replayed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_a_replayed_step_is_the_step(dtype: torch.dtype, weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of recorded steps are bit for bit those of the same steps launched one kernel at a time."""
    pure = wide_model(3).to(CUDA, dtype)
    prompts = [[3, 4, 5], [6] * 40, [7, 8]]
    engine = Engine(pure, max_batch=4, max_length=256, weights=weights)
    new = engine.generate(prompts, max_new_tokens=60, stop=())
    assert len({tuple(ids) for ids in new}) > 1
    assert all(recording.graph is not None for recording in engine.recordings.values())
    monkeypatch.setattr(Recording, "__call__", lambda recording: recording.function())
    assert (
        Engine(pure, max_batch=4, max_length=256, weights=weights).generate(prompts, max_new_tokens=60, stop=()) == new
    )


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_overlapped_steps_give_the_same_tokens(weights: str | None) -> None:
    """Recorded and replayed many times, one row and several, bit for bit: a kernel that did not wait would show."""
    if not can_overlap(torch.device(CUDA, 0)):
        pytest.skip("needs compute capability 9.0")
    pure = wide_model(6).to(CUDA, torch.bfloat16)
    prompts = [[3, 4, 5], [6] * 40, [7, 8], [9]]
    for batch in (1, 4):
        plain = Engine(pure, max_batch=batch, max_length=256, weights=weights)
        new = plain.generate(prompts, max_new_tokens=150, stop=())
        assert len({tuple(ids) for ids in new}) > 1
        engine = Engine(pure, max_batch=batch, max_length=256, weights=weights, overlap=True)
        for _ in range(5):
            assert engine.generate(prompts, max_new_tokens=150, stop=()) == new


@pytest.mark.parametrize("name", ["experts", "experts, groups, int8", "latent", "sparse"])
def test_a_replayed_step_of_experts_is_the_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of what is recorded in half precision only, greedy and sampled."""
    pure = made(TOYS[name], torch.bfloat16).to(CUDA)
    prompts = toy_prompts(pure.spec)
    for how in ({}, {"temperature": 1.0, "top_k": 20, "seed": 5}):
        engine = Engine(pure, max_batch=2, max_length=64)
        new = engine.generate(prompts, max_new_tokens=30, stop=(), **how)
        assert all(recording.graph is not None for recording in engine.recordings.values())
        with monkeypatch.context() as launched:
            launched.setattr(Recording, "__call__", lambda recording: recording.function())
            other = Engine(pure, max_batch=2, max_length=64)
            assert other.generate(prompts, max_new_tokens=30, stop=(), **how) == new


def test_what_waits_is_not_recorded() -> None:
    """Experts in float32: their products read on the host where each expert's rows begin."""
    pure = made(TOYS["experts"], torch.float32).to(CUDA)
    engine = Engine(pure, max_batch=2, max_length=64)
    engine.generate(toy_prompts(pure.spec), max_new_tokens=9, stop=())
    assert engine.recordings
    assert all(recording.graph is None for recording in engine.recordings.values())


@pytest.mark.parametrize("guesses", [1, 3, 7])
def test_guesses(guesses: int) -> None:
    pure = model().to(CUDA)
    prompts = [[3, 4, 5], [6], [7, 8, 7, 8]]
    truth = glm.generate(pure, prompts, max_new_tokens=20, stop=())
    for draft in (PromptLookup(guesses), SmallerModel(pure, guesses)):
        engine = Engine(pure, max_batch=2, max_length=64, draft=draft)
        assert engine.generate(prompts, max_new_tokens=20, stop=()) == truth


def test_nan_and_a_request_beside_it() -> None:
    pure = model().to(CUDA)
    engine = Engine(pure, max_batch=2, max_length=64)
    truth = glm.generate(pure, [[3, 4]], max_new_tokens=9, stop=())[0]
    wrong = min(set(range(7, 30)) - set(truth))
    engine.composed.embedding = engine.composed.embedding.clone()
    engine.composed.embedding[wrong] = torch.inf
    good, bad = (engine.submit(prompt, max_new_tokens=9, stop=()) for prompt in ([3, 4], [wrong, 3]))
    run(engine, good, bad)
    assert (good.ids, bad.state) == (truth, "failed")
    assert "the embedding" in str(bad.error)


def test_memory_stays_flat() -> None:
    engine = Engine(model_of(native_spec(layers=1), 1).to(CUDA), max_batch=8, max_length=16)
    generations(engine, 200)
    before = torch.cuda.memory_allocated()
    assert generations(engine, 2000) < 8 << 20
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_peak_memory_is_weights_cache_and_logits() -> None:
    """At most 1.03 times those, with 64 MB for what a library takes once."""
    spec = native_spec(vocabulary=65024, layers=8, groups=2, each=16, head_width=128)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    pure = GLM(spec, device=CUDA, dtype=torch.bfloat16, seed=1)
    engine = Engine(pure, max_batch=1, max_length=4096, release=True)
    engine.generate([[3] * 1000], max_new_tokens=50, stop=())
    weights = sum(x.nbytes for x in pure.state_dict().values()) + sum(
        matrix.bytes
        for block in engine.composed.blocks
        for matrix in (block.mixer.qkv, block.mixer.out, block.feed_forward.up, block.feed_forward.down)  # type: ignore[union-attr]
    )
    floor = weights + engine.bytes + 4 * spec.vocabulary
    assert torch.cuda.max_memory_allocated() - start <= 1.03 * floor + (64 << 20)
