"""Drafting: whoever guesses and however badly, the tokens are those of plain decoding; the published block is read."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from golden_folders import GOLDENS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_generation import GLM, cases, choices, few, generate, native_spec, steady
from test_transformers_oracle import close, doubled, random_ids
from torch import Tensor
from transformers import Glm4MoeForCausalLM
from transformers.modeling_layers import MtpModel

from glm.drafting import Guess, NextToken, PromptLookup, Tally
from glm.errors import CacheError, CheckpointError, ConfigError, GenerationError
from glm.family import recognise
from glm.generation import stream
from glm.layout import Layout

PUBLISHED = ["hf_glm4_moe-sensitive", "hf_glm4_moe_lite-sensitive", "hf_glm_moe_dsa-base"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Told:
    """Guesses the right tokens, except for every `wrong`-th."""

    def __init__(self, texts: list[list[int]], guesses: int, wrong: int) -> None:
        self.texts, self.guesses, self.wrong, self.tally = texts, guesses, wrong, Tally()

    def start(self, model: GLM, ids: Tensor, real: Tensor, length: int) -> Guess:
        done = [1 - int(keep.sum()) for keep in real]  # the prompt comes first, without its first token
        padding = [int((~keep).sum()) for keep in real]
        number = count(1)

        def guess(tokens: Tensor, states: Tensor, layout: Layout) -> Tensor:
            assert states.shape[:2] == tokens.shape == layout.positions.shape[:2]
            rows = []
            for b, text in enumerate(self.texts):
                done[b] += tokens.shape[1] - padding[b]
                padding[b] = 0
                ahead = (text + [0] * 99)[done[b] : done[b] + self.guesses]
                rows.append([id if next(number) % self.wrong else (id + 1) % model.spec.vocabulary for id in ahead])
            return torch.tensor(rows)

        return guess


@steady
@given(cases(), choices, st.integers(1, 6), st.integers(1, 7))
def test_every_drafter_gives_the_plain_tokens(
    case: tuple[GLM, list[list[int]]], choice: dict[str, Any], guesses: int, wrong: int
) -> None:
    model, prompts = case
    plain = generate(model, prompts, max_new_tokens=9, **choice)
    for draft in (Told(plain, guesses, wrong), Told(plain, guesses, 10**9), PromptLookup(guesses)):
        assert generate(model, prompts, max_new_tokens=9, draft=draft, **choice) == plain
        assert 0 <= draft.tally.right <= draft.tally.guessed
        assert draft.tally.passes <= 8


def test_right_guesses_save_passes() -> None:
    model, prompts = GLM(native_spec(), dtype=torch.float64, seed=1), [[3, 4, 5], [6]]
    plain = generate(model, prompts, max_new_tokens=13, stop=())
    told = Told(plain, guesses=3, wrong=10**9)
    assert generate(model, prompts, max_new_tokens=13, stop=(), draft=told) == plain
    assert told.tally == Tally(passes=3, guessed=9, right=9)  # one token of the prompt's pass, then 4 a pass
    assert str(told.tally) == "9 of 9 guesses were right in 3 passes"
    wrong = Told(plain, guesses=3, wrong=1)
    assert generate(model, prompts, max_new_tokens=13, stop=(), draft=wrong) == plain
    assert (wrong.tally.passes, wrong.tally.right) == (12, 0)
    assert list(stream(model, prompts[0], max_new_tokens=13, stop=(), draft=Told(plain[:1], 3, 2))) == plain[0]


@few
@given(cases(causal=True), st.integers(1, 5))
def test_prompts_in_pieces_and_stops_within_guesses(case: tuple[GLM, list[list[int]]], chunk: int) -> None:
    model, prompts = case
    plain = generate(model, prompts, max_new_tokens=8, stop=())
    stop = plain[0][4]
    for options in ({"chunk": chunk}, {"stop": stop}, {"stop": stop, "keep_stop": True}):
        options = {"stop": ()} | options
        want = generate(model, prompts, max_new_tokens=8, **options)
        assert generate(model, prompts, max_new_tokens=8, draft=Told(plain, 4, 10**9), **options) == want


def test_lookup_finds_the_latest_place_of_the_longest_end() -> None:
    lookup = PromptLookup(guesses=3, longest=2)
    assert lookup.found([1, 2, 9, 9, 9, 1, 2, 8, 7, 6, 1, 2]) == [8, 7, 6]
    assert lookup.found([5, 2, 7, 3, 2]) == [7, 3, 2]
    assert lookup.found([5, 6, 5]) == [6, 5, 5]
    assert lookup.found([4]) == [4, 4, 4]
    for wrong in ({"guesses": 0}, {"longest": 0}):
        with pytest.raises(GenerationError):
            PromptLookup(**wrong)


def test_lookup_is_right_where_text_repeats() -> None:
    model = GLM(native_spec(), dtype=torch.float64, seed=1)
    model.head.weight.data.zero_()  # every answer is 0, 0, 0 …
    lookup = PromptLookup(4)
    assert generate(model, [[3, 0, 0]], max_new_tokens=11, stop=(), draft=lookup) == [[0] * 11]
    assert lookup.tally == Tally(passes=2, guessed=8, right=8)


def test_a_cache_goes_back_only_to_what_it_holds() -> None:
    model = GLM(native_spec(), dtype=torch.float64, seed=1)
    cache, ids = model.new_cache(1, 9), random_ids(1, 6) % 30
    with torch.no_grad():
        want = model(ids)
        model(ids[:, :3], cache=cache)
        model(torch.cat((ids[:, 3:4], ids[:, :2]), dim=1), cache=cache)
        assert cache.layout is not None
        cache.rewind(cache.layout.without_last(2))
        assert len(cache) == 4
        torch.testing.assert_close(model(ids[:, 4:], cache=cache), want[:, 4:])
    with pytest.raises(CacheError, match="no way back to 12"):
        cache.rewind(Layout.causal(1, 12))


# --- the published block ----------------------------------------------------------------------------------------------


def published(case: str, folder: Path, copies: bool = True) -> Path:
    """A golden's checkpoint with a random block behind the last, embedding and head beside it or not."""
    copytree(GOLDENS / case, folder)
    model = GLM.from_pretrained(folder, dtype=torch.float32)
    drafter = NextToken(model.spec).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(5)
    state = {
        name: torch.randn(x.shape, generator=generator) * x.shape[-1] ** -0.5
        for name, x in drafter.state_dict().items()
    }
    state |= {"embedding.weight": model.embedding.weight, "head.weight": model.head.weight}
    config = json.loads((folder / "config.json").read_text())
    table = recognise(config).next_table(model.spec, config, state)
    tensors = load_file(folder / "model.safetensors")
    for line in table:
        if copies or line.parameter not in ("embedding.weight", "head.weight"):
            tensors[line.name] = line.on_disk(state[line.parameter]).detach().clone().contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("guesses", [1, 3])
def test_the_published_block_gives_the_plain_tokens(case: str, guesses: int, tmp_path: Path) -> None:
    folder = published(case, tmp_path / case, copies=guesses == 1)
    model = GLM.from_pretrained(folder, dtype=torch.float64)
    drafter = NextToken.from_pretrained(folder, model, guesses=guesses)
    assert drafter.embedding is model.embedding
    assert drafter.head is model.head
    prompts = [ids.tolist() for ids in (random_ids(11), random_ids(4), random_ids(1))]
    for options in ({"stop": ()}, {"stop": (), "temperature": 0.8, "seed": 3}, {"stop": (), "chunk": 3}):
        plain = generate(model, prompts, max_new_tokens=8, **options)
        assert generate(model, prompts, max_new_tokens=8, draft=drafter, **options) == plain
    assert drafter.tally.guessed > 0


@torch.inference_mode()
def test_its_guesses_do_not_depend_on_what_was_guessed_before(tmp_path: Path) -> None:
    """What the block remembers after wrong guesses is what it would have remembered without them."""
    folder = published(PUBLISHED[0], tmp_path / "next")
    model = GLM.from_pretrained(folder, dtype=torch.float64)
    drafter = NextToken.from_pretrained(folder, model, guesses=3)
    ids = random_ids(2, 12)
    states, _ = model.stream(ids)
    real = torch.ones_like(ids, dtype=torch.bool)
    whole, pieces = drafter.start(model, ids, real, 12), drafter.start(model, ids, real, 12)
    layout = model.layout(ids)
    pieces(ids[:, 1:6], states[:, :5], Layout.rule(layout.positions[:, :5]))
    last = pieces(ids[:, 6:], states[:, 5:11], Layout.rule(layout.positions[:, 5:11], 11))
    assert torch.equal(whole(ids[:, 1:], states[:, :11], Layout.rule(layout.positions[:, :11])), last)


@torch.inference_mode()
def test_transformers_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(PUBLISHED[0], tmp_path / "next")
    model = GLM.from_pretrained(folder, dtype=torch.float64)
    drafter, ids = NextToken.from_pretrained(folder, model), random_ids(2, 10)
    states, _ = model.stream(ids)
    layout = Layout.causal(2, 9)
    cache = drafter_cache(model, drafter)
    ours = drafter(ids[:, 1:], states[:, :-1], layout, cache)

    monkeypatch.setattr(
        Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{len(model.blocks)}.*"]
    )
    main = Glm4MoeForCausalLM.from_pretrained(folder)
    single = MtpModel.from_pretrained(main)
    main.set_experts_implementation("eager")
    with doubled():
        main.double()
        main.model.rotary_emb = type(main.model.rotary_emb)(main.config)
        theirs = MtpModel(main, 1)
        theirs.load_state_dict({name: x.double() for name, x in single.state_dict().items()})
        theirs.config._experts_implementation = theirs.config._attn_implementation = "eager"
        places = torch.arange(1, 10)[None].expand(2, -1)
        last = main.model(ids).last_hidden_state[:, :-1]
        expected = theirs.forward_layer(0, last, places, None, input_ids=ids[:, 1:])
    assert close(states[:, :-1], last)
    assert close(ours, expected)


def drafter_cache(model: GLM, drafter: NextToken) -> Any:
    from glm.cache import Cache

    remembers = [model.spec.blocks[-1].mixer.remembers]
    return Cache(remembers, 2, 20, dtype=model.dtype, device=model.device)


def test_an_embedding_and_head_of_its_own_are_kept(tmp_path: Path) -> None:
    folder = published(PUBLISHED[0], tmp_path / "next")
    tensors = load_file(folder / "model.safetensors")
    [name] = [name for name in tensors if name.endswith("shared_head.head.weight")]
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors")
    model = GLM.from_pretrained(folder)
    drafter = NextToken.from_pretrained(folder, model)
    assert drafter.embedding is model.embedding
    assert torch.equal(drafter.head.weight, model.head.weight + 1)


def test_loading_is_strict(tmp_path: Path) -> None:
    folder = published(PUBLISHED[0], tmp_path / "next")
    model, whole = GLM.from_pretrained(folder), load_file(folder / "model.safetensors")
    block = f"model.layers.{len(model.blocks)}."
    with pytest.raises(CheckpointError, match=r"holds no model\.layers"):
        NextToken.from_pretrained(GOLDENS / PUBLISHED[0], model)
    with pytest.raises(ConfigError, match="another model"):
        NextToken.from_pretrained(GOLDENS / "hf_glm4_moe-air", model)
    save_file({name: x for name, x in whole.items() if name != f"{block}enorm.weight"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the tensor .*enorm"):
        NextToken.from_pretrained(folder, model)
    save_file(whole | {f"{block}mlp.extra.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="extra"):
        NextToken.from_pretrained(folder, model)
    for name in (f"{block}other.weight", f"model.layers.{len(model.blocks) + 1}.enorm.weight"):
        save_file(whole | {name: torch.zeros(1)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="no place for"):
            GLM.from_pretrained(folder)
    old = GLM.from_pretrained(GOLDENS / "hf_glm4-base")
    with pytest.raises(ConfigError, match="no block that predicts"):
        NextToken.from_pretrained(GOLDENS / "hf_glm4-base", old)
