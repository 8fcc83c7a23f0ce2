"""What two processes find, for test_parallel.py: `torchrun --nproc-per-node 2 tests/two_processes.py FOLDER`.

One start of a pair of processes is many times dearer than all it does here, so there is one, and the tests read what it
found: FOLDER/found.json, written by the first process. Before that it is `glm chat`, with what it is given to read.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from golden_folders import GOLDENS
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm import cli, training
from glm.attention import Attention
from glm.errors import GLMError
from glm.experts import Experts, Router
from glm.export import save_pretrained
from glm.family import chatglm, chatglm2, glm4, glm4_0414, glm4_moe
from glm.feed_forward import FeedForward
from glm.generation import generate
from glm.grouped import Grouped
from glm.latent_attention import LatentAttention
from glm.linear import RowScaled
from glm.model import GLM
from glm.norms import LayerNorm, RMSNorm
from glm.parallel import agreed, first, mesh_of_all, tensor_parallel, whole
from glm.positions import Plain, Rotary
from glm.prefix import Prefix
from glm.recipe import Recipe
from glm.sparse_attention import Indexer, SparseAttention
from glm.spec import Mixer, Spec
from glm.verify import verify

V1 = chatglm.build(
    layers=2, width=32, inner=48, heads=4, vocabulary=101, context=64, eps=1e-5, two_axes=True, sop=98, mask=95,
    gmask=96, pad=3, stop=(99,),
)  # fmt: skip
V2 = chatglm2.build(
    layers=3, width=24, inner=40, heads=8, groups=2, head_width=8, vocabulary=100, context=64, base=1e4, pad=0,
    stop=(7,), norm=RMSNorm(1e-5, weight_first=True), scaling=Plain(),
)  # fmt: skip


def sandwich(groups: int, tied: bool) -> Spec:
    """A toy of GLM-4-0414: 4 query heads, `groups` key heads, a vocabulary that two processes cannot halve."""
    return glm4.build(
        layers=2, width=24, inner=36, heads=4, groups=groups, head_width=8, vocabulary=97, context=64, eps=1e-5,
        rotary=replace(glm4.half_rotary(1e4), widths=(4,)), qkv_bias=True, pad=0, stop=(7,), tied=tied,
        wiring=glm4_0414.Sandwich(),
    )  # fmt: skip


def with_experts(mixer: Mixer, rotary: int, groups: int = 1) -> Spec:
    """A toy with one dense layer and two of experts, 3 of 8 and 2 shared ones."""
    return glm4_moe.build(
        layers=3, dense=1, width=24, inner=36, mixers=(mixer,) * 3, vocabulary=96, context=64,
        experts=Experts(
            expert=FeedForward(inner=12, branches=("silu", "identity"), bias=False), count=8, top=3, shared=2,
            router=Router(groups=groups, kept=(groups + 1) // 2, normalised=True, scale=1.8),
        ),
        norm=NORM, pad=0, stop=(7,),
        rotary=Rotary(widths=(rotary,), pairing="interleaved", base=1e4, scaling=Plain(), rounding=None),
    )  # fmt: skip


NORM = RMSNorm(1e-5, weight_first=False)
NORMED = Attention(heads=4, groups=2, head_width=8, qkv_bias=True, out_bias=False, qk_norm=NORM)
LATENT = LatentAttention(heads=4, query_rank=16, rank=12, plain=8, rotary=4, value=10, norm=NORM, bias=True)
SPARSE = SparseAttention(LATENT, Indexer(heads=6, width=12, top=4, norm=LayerNorm(1e-6)))


def even(spec: Spec) -> Spec:
    """The same with inner channels of which halves fill whole words."""
    return replace(spec, blocks=tuple(replace(b, feed_forward=replace(b.feed_forward, inner=64)) for b in spec.blocks))


TOYS = {
    "chatglm": V1,
    "chatglm2": V2,
    "chatglm2, prefix": replace(V2, prefix=Prefix(5, None)),
    "chatglm2, projected prefix": replace(V2, prefix=Prefix(5, (2 * 3 * 2 * 8, 24))),
    "chatglm2, int8": replace(V2, weights=RowScaled(8)),
    "chatglm2, int4": replace(V2, weights=RowScaled(4)),
    "chatglm2, groups": replace(even(V2), weights=Grouped(4, 8, symmetric=False)),
    "chatglm2, groups but in attention": replace(
        even(V2),
        weights=Grouped(4, 8, symmetric=False),
        blocks=tuple(replace(block, dense=("mixer",)) for block in even(V2).blocks),
    ),
    "sandwich": sandwich(4, tied=False),
    "sandwich, tied": sandwich(2, tied=True),
    "sandwich, one key head": sandwich(1, tied=False),
    "experts": with_experts(NORMED, 4),
    "experts, groups, int8": replace(with_experts(NORMED, 4, groups=4), weights=RowScaled(8)),
    "latent": with_experts(LATENT, 4),
    "latent, no bottleneck": with_experts(replace(LATENT, query_rank=None), 4),
    "sparse": with_experts(SPARSE, 4),
}
FOLDERS = ("chatglm1-ptuning-proj", "hf_glm4_moe-air", "hf_glm_moe_dsa-base")


def made(spec: Spec, dtype: torch.dtype = torch.float64) -> GLM:
    """A model of random numbers so large that every part of it is heard; biases, norms and integers too."""
    model = GLM(spec, dtype=dtype, device="cpu", seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, x in model.state_dict().items():
        if x.dtype == torch.int8:
            x.copy_(torch.randint(-128, 128, x.shape, generator=generator))
        elif x.dtype == torch.int32:
            x.copy_(torch.randint(-(2**31), 2**31, x.shape, generator=generator))
        elif name.endswith("weight_scale"):
            x.copy_(torch.rand(x.shape, generator=generator) * 0.005)
        else:
            x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64) * 0.3 + (x.dim() == 1))
    return model.eval()


def prompts(spec: Spec) -> list[list[int]]:
    """Two of different lengths."""
    rows = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24]]
    return [[*row, 96, 98] for row in rows] if spec is V1 else rows


@torch.inference_mode()
def toy(spec: Spec) -> dict[str, Any]:
    """How far a model dealt out is from the whole one."""
    model = made(spec)
    part = tensor_parallel(model, mesh_of_all("cpu"))
    rows = prompts(spec)
    ids = torch.tensor([rows[0], rows[0][::-1]]) if spec is not V1 else torch.tensor([rows[0], rows[0]])
    caches = [m.new_cache(2, ids.shape[1] + 2) for m in (model, part)]
    steps = [
        [m(ids, cache=c, last=True), *(m(torch.full((2, 1), t), cache=c) for t in (30, 31))]
        for m, c in zip((model, part), caches, strict=True)
    ]
    greedy = [generate(m, rows, max_new_tokens=8, stop=()) for m in (model, part)]
    sampled = [generate(m, rows, max_new_tokens=8, stop=(), temperature=2.0, seed=3) for m in (model, part)]
    return {
        "logits": relative(part(ids), model(ids)),
        "cached": relative(torch.cat(steps[1], 1), torch.cat(steps[0], 1)),
        "greedy": greedy,
        "sampled": sampled,
        "cache": [cache.bytes for cache in caches],
        "held": numbers(part.state_dict()) / numbers(model.state_dict()),
    }


def numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers this process holds."""
    return sum((x.to_local() if hasattr(x, "to_local") else x).numel() for x in tensors.values())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the rms of what was expected."""
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


def half_precision() -> dict[str, Any]:
    """Single rows in float32 take a way of their own through a linear layer."""
    model = made(TOYS["sandwich, tied"], torch.float32)
    part = tensor_parallel(model, mesh_of_all("cpu"))
    return {"logits": relative(part(torch.tensor([[5]])), model(torch.tensor([[5]])))}


def folder(name: str) -> dict[str, Any]:
    """What `verify` says of a checkpoint of which each process reads its share."""
    report = verify(GOLDENS / name, mesh=mesh_of_all("cpu"))
    return {
        "ok": report.ok,
        "logits": max(row.relative for row in report.rows if "logits" in row.quantity),
        "quantities": sorted({row.quantity for row in report.rows}),
    }


def refused() -> dict[str, Any]:
    """What is said of a folder that cannot be dealt out."""
    try:
        GLM.from_pretrained(GOLDENS / "chatglm3-base", mesh=mesh_of_all("cpu"))
    except GLMError as error:
        found = {"error": type(error).__name__, "says": str(error)}
    try:
        save_pretrained(tensor_parallel(made(V2), mesh_of_all("cpu")), Path("/nowhere"))
    except GLMError as error:
        found |= {"saving": type(error).__name__}
    return found


def spare_head(folder: Path) -> dict[str, str]:
    """What is said of a model whose head is its embedding and whose files hold one all the same, a copy or another."""
    found = {}
    for name, factor in (("copy", 1), ("another", 2)):
        if first():
            save_pretrained(made(TOYS["sandwich, tied"]), folder / name)
            file = folder / name / "model.safetensors"
            tensors = load_file(file)
            head = tensors["model.embed_tokens.weight"].clone()
            head[-1] *= factor  # which only the second process holds
            save_file(tensors | {"lm_head.weight": head}, file)
        agreed(None)
        try:
            GLM.from_pretrained(folder / name, mesh=mesh_of_all("cpu"))
            found[name] = "loaded"
        except GLMError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def trained(folder: Path, double: bool) -> dict[str, Any]:
    """Some steps by two processes, the same by one, and what a run that is taken up again makes of it."""
    plan = Recipe.read(folder / "recipe.toml")
    initialised, mesh_of = training.initialised, training.mesh_of_all
    if double:
        training.initialised = lambda spec, seed: initialised(spec, seed).double()  # type: ignore[assignment]
    try:
        both = training.Run(plan, folder / "both")
        training.mesh_of_all = lambda device: None  # type: ignore[assignment]
        one = training.Run(plan, folder / "one")
    finally:
        training.initialised, training.mesh_of_all = initialised, mesh_of
    for _ in range(4):
        both.advance()
        one.advance()
    weights = [whole(x.detach()) for x in both.parameters.values()]
    found: dict[str, Any] = {
        "losses": [[*both.losses], one.losses],
        "weights": max(relative(x, y.detach()) for x, y in zip(weights, one.parameters.values(), strict=True)),
        "held": numbers(both.parameters) / sum(x.numel() for x in weights),
    }
    if not double:
        both.save()
        agreed(None)
        again = training.Run(plan, folder / "both")
        again.resume()
        both.advance()
        again.advance()
        found["resumed"] = [both.losses, again.losses]
        sample = max(next(both.batches), key=len)
        lonely = both.loss([sample])  # the second process has no sample of its own
        lonely.backward()
        both.optimiser.zero_grad()
        found["lonely"] = float(training.summed(lonely.detach(), both.mesh)) / 2
        one.model.load_state_dict(
            dict(zip(both.parameters, [whole(x.detach()) for x in both.parameters.values()], strict=True))
        )
        found["alone"] = float(one.loss([sample]))
    return found


def main() -> None:
    """Everything, in the order of the tests."""
    torch.set_num_threads(1)
    cli.chat()
    place = Path(sys.argv[1])
    own = torch.rand((), dtype=torch.float64)
    found = {
        "toys": {name: toy(spec) for name, spec in TOYS.items()},
        "float32": half_precision(),
        "folders": {name: folder(name) for name in FOLDERS},
        "refused": refused(),
        "spare head": spare_head(place / "heads"),
        "training": {name: trained(place / name, name == "float64") for name in ("float64", "float32")},
        "dice": [float(training.summed(own, mesh_of_all("cpu"))), 2 * float(own)],
    }
    if first():
        (place / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    cli.app.command("find")(main)
    sys.exit(cli.main(["find"]))
