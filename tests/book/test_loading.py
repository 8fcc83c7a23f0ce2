"""There is a page on loading for each generation, and what its cells find out is so."""

from pathlib import Path

import pytest

from docs import loading
from glm.errors import PromptError
from glm.family import GENERATIONS
from glm.family.text_chatglm import CHATGLM
from glm.family.text_glm_10b import GLM_GPT2

PAGES = Path(loading.__file__).parent / "load"


def test_every_generation_has_a_page() -> None:
    pages = {path.stem for path in PAGES.glob("*.py")}
    assert pages == {generation.name for generation in GENERATIONS}
    contents = (PAGES / "index.md").read_text(encoding="utf-8").split("```{toctree}")[1].split()
    assert [name for name in contents if name in pages] == [generation.name for generation in GENERATIONS]


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
def test_a_page_has_files_memory_prompt_and_proof(generation: object) -> None:
    name = generation.name  # type: ignore[attr-defined]
    page = (PAGES / f"{name}.py").read_text(encoding="utf-8")
    assert f'loading.files("{name}")' in page
    assert f'loading.memory("{name}")' in page
    assert "loading.prompt(" in page or "loading.fill(" in page
    assert "loading.verified(" in page
    assert "glm chat" in page or "glm infill" in page


def test_tables_have_a_line_a_release() -> None:
    for generation in GENERATIONS:
        for made in (loading.files(generation.name), loading.memory(generation.name)):
            lines = made.splitlines()
            assert len(lines) == 2 + len(generation.releases)
            assert len({line.count("|") for line in lines}) == 1
            assert all(f"| `{release.name}` |" in made for release in generation.releases)


def test_prompts() -> None:
    assert loading.prompt(CHATGLM, loading.TALK[:1]) == "```text\nWhat is a blank?[gMASK]<sop>\n```"
    assert "[Round 1]\n问：And a mask?" in loading.prompt(CHATGLM)
    assert loading.fill(GLM_GPT2, "a [MASK]") == "```text\n[CLS]a [MASK]<|endoftext|><|startofpiece|>\n```"
    with pytest.raises(PromptError, match="not trained to converse"):
        loading.prompt(GLM_GPT2)


def test_conversion_is_tried_both_ways() -> None:
    assert "bit for bit" in loading.converted("chatglm1-int4")
    assert "--names hf" in loading.converted("glm4-9b-chatglm_format", names="hf")


def test_a_model_that_computes_something_else_stops_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    good = loading.GOLDENS / "chatglm3-base"
    bad = tmp_path / "chatglm3-base"
    bad.mkdir()
    for path in good.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    tensors = load_file(bad / "model.safetensors")
    name = next(name for name in tensors if name.endswith("final_layernorm.weight"))
    save_file(tensors | {name: tensors[name] * torch.tensor(1.01)}, bad / "model.safetensors")
    monkeypatch.setattr(loading, "GOLDENS", tmp_path)
    with pytest.raises(AssertionError):
        loading.verified("chatglm3-base")
