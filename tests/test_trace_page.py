"""The page of a trace: what it holds, how large it may get, and that it can be used in a browser."""

import base64
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Page
from golden_folders import GOLDENS, HERE

import glm
from glm import trace_page
from glm.errors import GLMError, TraceError
from glm.model import GLM
from glm.trace_page import SLOT, TEMPLATE
from glm.tracing import Trace
from glm.verify import Golden

SCHEME = re.compile(r"https?://(?!www\.w3\.org/)")  # the name of SVG's namespace is not fetched


@cache
def traced(folder: Path) -> Trace:
    model = GLM.from_pretrained(folder, dtype=torch.float64)
    scenarios = [each for each in Golden(folder, torch.float64).scenarios if 4 <= each.ids.shape[1] <= 64]
    return glm.trace(model, scenarios[-1].ids, layout=scenarios[-1].layout(torch.device("cpu")))


@cache
def tiny() -> Trace:
    model, tokenizer = GLM.from_pretrained(glm.embedded()), glm.Tokenizer.from_pretrained(glm.embedded())
    ids = tokenizer.chat([{"role": "user", "content": "What is </script><b>空白</b>?"}])
    return glm.trace(model, ids + glm.generate(model, [ids], max_new_tokens=5)[0], tokenizer)


def data(html: str) -> Any:
    found = re.search(r"^const trace = (.*);$", html, re.MULTILINE)
    assert found is not None
    return json.loads(found[1])


def matrix(text: str, *shape: int) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.float64).view(*shape) / 255


@pytest.mark.parametrize("folder", HERE, ids=lambda folder: folder.name)
def test_the_page_holds_what_the_trace_does(folder: Path) -> None:
    found = traced(folder)
    row = len(found.ids) - 1
    html = found.page(row)
    assert not SCHEME.search(html)
    told, T = data(html), found.ids.shape[1]
    S = T + found.shift
    assert [token["id"] for token in told["tokens"]] == found.ids[row].tolist()
    assert [token["at"] for token in told["tokens"]] == found["positions"][row].tolist()
    assert [step["name"] for step in told["steps"]] == list(found)
    assert torch.equal(matrix(told["visible"], T, S).bool(), found["visible"][row])
    for name, layer in told["attention"].items():
        p = found[f"{name} / probabilities"][row]
        assert layer["heads"] == len(p)
        assert float((matrix(layer["bytes"], *p.shape) - p).abs().max()) <= 0.5 / 255 + 1e-9
        if layer["visible"] is not None:
            assert torch.equal(matrix(layer["visible"], T, S).bool(), found[f"{name} / visible"][row])
    assert len(told["attention"]) == len(found.model.blocks)
    sizes = {step["name"]: step["tokens"] for step in told["steps"]}
    for name in ("stream", "block 0 / attention / q", "block 1 / feed-forward / output", "logits"):
        x = found[name][row].transpose(0, 1) if name.endswith("q") else found[name][row]
        expected = x.flatten(1).square().mean(-1).sqrt()
        assert torch.allclose(torch.tensor(sizes[name], dtype=torch.float64), expected, rtol=1e-3)
    assert sizes["block 0 / attention / probabilities"] is None
    last = told["lens"][-1]
    assert [each[0][0] for each in last] == [str(id) for id in found["logits"][row].argmax(-1).tolist()]
    for block, tokens in told["experts"].items():
        assert [[e for e, _ in each] for each in tokens] == found[f"{block} / feed-forward / router / chosen"][
            row
        ].tolist()


def test_text_cannot_end_the_script() -> None:
    html = tiny().page()
    assert html.count("</script>") == 1
    assert "".join(token["piece"] for token in data(html)["tokens"]).startswith("What is </script><b>空白</b>?")


def test_a_page_has_one_slot_for_its_numbers() -> None:
    assert TEMPLATE.read_text(encoding="utf-8").count(SLOT) == 1


def test_the_template_is_part_of_the_package() -> None:
    project = tomllib.loads((GOLDENS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert TEMPLATE.name in project["tool"]["setuptools"]["package-data"]["glm"]


def test_integer_weights_are_said_to_be() -> None:
    assert "weights RowScaled(bits=4)" in data(traced(GOLDENS / "chatglm2-int4").page())["title"]


def test_a_text_too_long_for_a_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().model
    most = glm.trace(model, [5] * trace_page.TOKENS)
    assert len(most.page()) < 8 << 20
    with pytest.raises(TraceError, match=r"257 tokens are too many .* give it 256 or fewer"):
        glm.trace(model, [5] * 257).page()
    monkeypatch.setattr(trace_page, "ATTENTION", 4 * 4 * 30 * 30)
    glm.trace(model, [5] * 30).page()
    with pytest.raises(TraceError, match=r"31 tokens are too many .* give it 30 or fewer"):
        glm.trace(model, [5] * 31).page()
    with pytest.raises(TraceError, match="rows 0 … 0"):
        most.page(1)


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path: Path, page: Page) -> None:
    model = GLM(tiny().model.spec, seed=0)
    model.blocks[1].mixer.qkv.weight.data[3, 4] = torch.nan
    file = tmp_path / "nan.html"
    glm.trace(model, [5, 6, 7]).write(file)
    page.open(file)
    assert page.faults() == []
    assert "not finite" in page.texts("#lens")[0]


def test_written_complete_or_not_at_all(tmp_path: Path) -> None:
    tiny().write(tmp_path / "trace.html")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]
    with pytest.raises(GLMError, match="cannot be written"):
        tiny().write(tmp_path / "nowhere" / "trace.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(GLMError, match="cannot be written"):
        tiny().write(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "trace.html"]


# ----------------------------------------------------------------------------- in a browser


KINDS = ["chatglm1-ptuning-proj", "chatglm3-base", "glm10b-base", "hf_glm4_moe-air", "hf_glm_moe_dsa-base"]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["tiny-glm", *KINDS])
def test_the_page_of_any_generation_works(page: Page, tmp_path: Path, kind: str, width: int) -> None:
    found = tiny() if kind == "tiny-glm" else traced(GOLDENS / kind)
    file = tmp_path / "trace.html"
    found.write(file)
    page.open(file, width)
    assert page.run("return window.innerWidth") == width
    names = list(found)
    first = names.index("block 0 / attention / probabilities")
    assert page.texts("#step .name") == [names[first]]
    assert len(page.texts("#tokens button")) == found.ids.shape[1]
    assert page.overflow() <= 0
    page.click("#next")
    assert page.texts("#step .name") == [names[first + 1]]
    assert page.texts("#step dd")[0] == found.step(names[first + 1]).equation
    page.click("#back")
    page.click("#back")
    assert page.texts("#step .name") == [names[first - 1]]
    for i in range(0, len(names), 5):
        page.run("go(arguments[0])", i)
        assert page.texts("#step .name") == [names[i]]
        assert page.overflow() <= 0
    page.run("go(names.indexOf('block 1 / attention / probabilities'))")
    page.click("#tokens button", 1)
    seen = found["block 1 / attention / visible"] if "block 1 / attention / visible" in found else found["visible"]
    assert f"sees {int(seen[0, 1].sum())} of {seen.shape[-1]} keys" in page.texts("#looks")[0]
    page.click("#heads button", 2)
    row = found["block 1 / attention / probabilities"][0, 1, 1]
    assert float(page.texts("#keys .number")[0]) == pytest.approx(float(row.max()), abs=0.003)
    experts = "block 1 / feed-forward / router / chosen" in found
    assert page.run("return document.getElementById('experts-section').hidden") is not experts
    assert page.run("return matrix.width") > 0
    assert page.overflow() <= 0
    assert page.faults() == []
    assert page.asked() == [], "nothing is fetched"
