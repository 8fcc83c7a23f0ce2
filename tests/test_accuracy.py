"""What `glm accuracy` says is what two whole models, side by side, would say."""

from pathlib import Path

import pytest
import torch

from glm.accuracy import BFLOAT16, Variant, measure, variants, weighed
from glm.checkpoint import Checkpoint
from glm.compress import compress
from glm.errors import GLMError
from glm.grouped import Grouped
from glm.model import GLM
from glm.texts import Text, random_texts

GOLDENS = Path(__file__).parent / "goldens"
SOURCE = GOLDENS / "hf_glm4-base"
FORM = Grouped(4, None, True)


@pytest.fixture(scope="module")
def texts() -> tuple[list[Text], list[Text]]:
    spec = GLM.from_pretrained(SOURCE).spec
    return random_texts(spec, 40, 4, seed=0), random_texts(spec, 64, 24, seed=1)


@pytest.mark.parametrize("method", ["nearest", "search", "gptq"])
def test_what_is_measured_is_what_is_written(tmp_path: Path, texts: tuple[list[Text], list[Text]], method: str) -> None:
    read, learnt = texts
    dense, found = measure(SOURCE, read, [Variant(FORM, method)], learnt)
    compress(
        SOURCE, tmp_path / "out", FORM, method=method, calibration=learnt if method == "gptq" else None, quiet=True
    )
    models = GLM.from_pretrained(SOURCE), GLM.from_pretrained(tmp_path / "out")
    kl, losses, same, squares = 0.0, [0.0, 0.0], 0.0, torch.zeros(2, 3, dtype=torch.float64)
    for text in read:
        ids = torch.tensor([text.ids])
        with torch.inference_mode():
            (p, a), (q, b) = (model(ids, hidden=True) for model in models)
        p, q = (x[0, text.start - 1 : -1].double().log_softmax(-1) for x in (p, q))
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        for i, x in enumerate((p, q)):
            losses[i] -= float(x[torch.arange(len(x)), ids[0, text.start :]].sum())
        for layer in range(3):
            x, y = a[layer + 1].double(), b[layer + 1].double()
            squares[:, layer] += torch.stack([(y - x).square().sum(), x.square().sum()])
    tokens = sum(len(text.ids) - text.start for text in read)
    assert found.kl == pytest.approx(kl / tokens, rel=1e-3)
    assert found.agreement == pytest.approx(same / tokens)
    for result, loss in zip((dense, found), losses, strict=True):
        assert torch.tensor(result.perplexity).log() == pytest.approx(loss / tokens, rel=1e-5)
    assert found.layers == pytest.approx((squares[0] / squares[1]).sqrt().tolist(), rel=1e-3)


def test_better_methods_and_more_bits_cost_less(texts: tuple[list[Text], list[Text]]) -> None:
    read, learnt = texts
    ways = variants([FORM, Grouped(8, None, True)], ("nearest", "search", "gptq"))
    dense, bf16, nearest, search, gptq, *int8 = measure(SOURCE, read, ways, learnt)
    assert ways[0] == BFLOAT16
    assert (dense.kl, dense.agreement, dense.layers) == (0.0, 1.0, [0.0, 0.0, 0.0])
    assert 0 < bf16.kl < gptq.kl < search.kl < nearest.kl
    assert max(result.kl for result in int8) < 0.1 * gptq.kl
    assert all(result.layers[-1] > 0 for result in (bf16, nearest, search, gptq, *int8))


def test_the_bytes_that_progress_is_told(texts: tuple[list[Text], list[Text]]) -> None:
    done: list[int] = []
    measure(SOURCE, texts[0], [BFLOAT16, Variant(FORM, "nearest")], progress=done.append)
    assert sum(done) == 2 * weighed(SOURCE) < 2 * Checkpoint.open(SOURCE).nbytes


def test_what_cannot_be_measured(tmp_path: Path, texts: tuple[list[Text], list[Text]]) -> None:
    for way, says in ((Variant(FORM, "gptq"), "calibration text"), (Variant(FORM, "awq"), "the methods are")):
        with pytest.raises(GLMError, match=says):
            measure(SOURCE, texts[0], [way])
    compress(SOURCE, tmp_path / "out", FORM, quiet=True)
    for source in (tmp_path / "out", GOLDENS / "chatglm1-int4"):
        with pytest.raises(GLMError, match="quantised already"):
            measure(source, texts[0], [BFLOAT16])
