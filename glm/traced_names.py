"""What the tensors of a forward pass are called, with the equation and the axes of each. `tracing.py` finds them.

Names are paths: `block 3 / attention / q`. `PATHS` says which module's output goes by which name, `EQUATIONS` what each
name stands for; numbers in names are written N there. The equations are those at the top of the idea files, for one
block: x is the stream, h what a sublayer reads, a what it answers. Axes are in the letters of `glm/__init__.py`, with

    E  experts         R  channels of a latent      N  plain channels of a query       J  heads of an indexer
    k  chosen of them  P  rotary channels           U  channels of a value head        w  channels that turn
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from glm.attention import Attention
from glm.experts import Experts
from glm.latent_attention import LatentAttention
from glm.positions import Rotary
from glm.residual import Deep
from glm.sparse_attention import SparseAttention
from glm.spec import Block, Spec

BLOCK = r"blocks\.(\d+)\."
LATENT = r"blocks\.(\d+)\.mixer\.(?:attention\.)?"

PATHS: tuple[tuple[str, str], ...] = (  # of a module, and the name of what it computes; "": not kept
    (r"embedding", "embedding"),
    (r"places", "learned positions"),
    (r"places\.tables\.(\d+)", r"learned positions / axis \1"),
    (r"prefix(\..*)?", ""),  # its keys and values are kept by block
    (r"final_norm", "final norm"),
    (r"head", ""),  # "logits", whatever was asked of the model
    (r"blocks\.\d+", ""),  # the stream after its feed-forward
    (BLOCK + "wire_mixer", r"block \1 / stream between"),
    (BLOCK + "wire_feed_forward", r"block \1 / stream"),
    (BLOCK + r"wire_\w+\.before", ""),  # the sublayer's input
    (BLOCK + r"wire_mixer\.after", r"block \1 / attention / after"),
    (BLOCK + r"wire_feed_forward\.after", r"block \1 / feed-forward / after"),
    (BLOCK + "mixer", r"block \1 / attention / output"),
    (BLOCK + r"mixer\.qk_norm", ""),
    (BLOCK + r"mixer\.qk_norm\.([qk])", r"block \1 / attention / normed \2"),
    (LATENT + "out", ""),
    (LATENT + "query_down", r"block \1 / attention / query down"),
    (LATENT + "query_norm", r"block \1 / attention / query bottleneck"),
    (LATENT + "query(?:_up)?", r"block \1 / attention / queries"),
    (LATENT + "down", r"block \1 / attention / down"),
    (LATENT + "norm", r"block \1 / attention / latent"),
    (LATENT + "up", r"block \1 / attention / keys and values"),
    (BLOCK + r"mixer\.indexer\.query", r"block \1 / attention / indexer / queries"),
    (BLOCK + r"mixer\.indexer\.down", r"block \1 / attention / indexer / down"),
    (BLOCK + r"mixer\.indexer\.norm", r"block \1 / attention / indexer / key"),
    (BLOCK + r"mixer\.indexer\.weigh", r"block \1 / attention / indexer / weights"),
)

PREFIXES: tuple[tuple[str, str], ...] = (
    (BLOCK, r"block \1 / "),
    (r"mixer\.attention\b|mixer\b", "attention"),
    (r"feed_forward\b", "feed-forward"),
    (r"\.", " / "),
)


def prefix_of(path: str, args: Sequence[Any]) -> str:
    """What the steps within a module at `path` begin with. Of stacked experts, `args` end in the number of one."""
    for pattern, words in PREFIXES:
        path = re.sub(pattern, words, path)
    expert = rf" / expert {args[-1]}" if args and isinstance(args[-1], int) else " / experts"
    return path.replace(" / experts", expert)


def output_of(path: str, args: Sequence[Any]) -> str:
    """What the output of a module at `path` is called; empty where it is kept under another name, or not at all.

    In a feed-forward the output of `up` is that of all branches, and `down` has that of the whole.
    """
    for pattern, name in PATHS:
        if found := re.fullmatch(pattern, path):
            return found.expand(name)
    *_, sublayer, last = f"..{path}".split(".")
    if "feed_forward" in path and last == "up":
        return prefix_of(path.removesuffix(".up"), args) + " / branches"
    if "feed_forward" in path and last == "down":
        return ""
    if last in ("feed_forward", "experts", "shared") and (sublayer, last) != ("", "experts"):
        return prefix_of(path, args) + " / output"
    return prefix_of(path, args)


Equation = str | Callable[[Spec, Block], str]


def wired(**ways: str) -> Equation:
    """An equation that depends on the residual wiring."""
    return lambda spec, block: ways[type(block.wiring).__name__.lower()]


def norm(block: Block) -> str:
    """A block's norm, by name."""
    return type(block.norm).__name__


def biased(matrix: str, x: str, bias: bool) -> str:
    """W x, or W x + b."""
    return f"{matrix} {x}" + (" + b" if bias else "")


def latent(block: Block) -> LatentAttention:
    """The latent attention of a block, on its own or beneath an indexer."""
    found = block.mixer.attention if isinstance(block.mixer, SparseAttention) else block.mixer
    assert isinstance(found, LatentAttention)
    return found


def read(spec: Spec, block: Block) -> str:
    """What a sublayer reads."""
    return "h = x" if isinstance(block.wiring, Deep) else f"h = {norm(block)}(x)"


def turned(spec: Spec, block: Block, what: str) -> str:
    """Queries or keys as attention gets them."""
    if not isinstance(block.mixer, Attention):
        return f"{what}, as given to attention"
    normed = f"normed {what}" if block.mixer.qk_norm else f"the {what} of qkv"
    return f"rotate({normed})" if isinstance(spec.rotary, Rotary) else normed


def answered(spec: Spec, block: Block) -> str:
    """What attention answers."""
    if isinstance(block.mixer, Attention):
        return "a = " + biased("W_o", "concat_h heads", block.mixer.out_bias)
    if isinstance(block.mixer, LatentAttention | SparseAttention):
        return "a = " + biased("W_o", "concat_h heads; absorbed: of V_h heads", latent(block).bias)
    return "a"


def branches(block: Block) -> list[str]:
    """The activated branches of a feed-forward."""
    transform = block.feed_forward
    names = getattr(transform.expert if isinstance(transform, Experts) else transform, "branches", ())
    return [f"u_{i}" if name == "identity" else f"{name}(u_{i})" for i, name in enumerate(names, 1)]


def branched(spec: Spec, block: Block) -> str:
    """All branches, which lie in one matrix."""
    names = [f"u_{i}" for i, _ in enumerate(branches(block), 1)]
    return f"{names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'} = W_up h"


def activated(spec: Spec, block: Block) -> str:
    """Those of them that have an activation."""
    return ", ".join(branch for branch in branches(block) if "(" in branch)


def product(spec: Spec, block: Block) -> str:
    """The product of activated branches."""
    return " ⊙ ".join(branches(block))


def routed(spec: Spec, block: Block) -> str:
    """The weights of chosen experts."""
    router = block.feed_forward.router
    weights = "s_e / Σ_chosen s" if router.normalised else "s_e"
    return f"{router.scale:g} {weights}" if router.scale != 1 else weights


EQUATIONS: dict[str, tuple[str, Equation]] = {
    "ids": ("B T", "the tokens"),
    "positions": ("B T A", "p, a column an axis"),
    "embedding": ("B T D", "row `id` of the embedding"),
    "learned positions": ("B T D", "Σ_a table_a[p_a]"),
    "learned positions / axis N": ("B T D", "table_a[p_a]"),
    "prefix / block N / k": ("1 G p K", "learned keys that stand before the text"),
    "prefix / block N / v": ("1 G p K", "learned values that stand before the text"),
    "rotation / axis N / cos": ("B T w/2", "cos(p_a ω), ω_i = base^(-2i / w)"),
    "rotation / axis N / sin": ("B T w/2", "sin(p_a ω), ω_i = base^(-2i / w)"),
    "visible": ("B T S", "who may see whom: start ≤ j and (j < prefix or j ≤ t)"),
    "stream": ("B T D", lambda spec, _: "x = embedding" + (" + learned positions" if spec.learned else "")),
    "final norm": (
        "B T D",
        lambda spec, _: "x" if spec.final_norm is None else f"{type(spec.final_norm).__name__}(x)",
    ),
    "logits": ("B T V", lambda spec, _: f"W final norm, W {'the embedding' if spec.tied else 'the head'}"),
    "block N / attention / input": ("B T D", read),
    "block N / attention / qkv": ("B T (H+2G)K", lambda _, block: biased("W_qkv", "h", block.mixer.qkv_bias)),
    "block N / attention / normed q": ("B T H K", lambda _, block: f"{type(block.mixer.qk_norm).__name__}(q) by head"),
    "block N / attention / normed k": ("B T G K", lambda _, block: f"{type(block.mixer.qk_norm).__name__}(k) by head"),
    "block N / attention / query down": ("B T Q", lambda _, block: biased("W_a", "h", latent(block).bias)),
    "block N / attention / query bottleneck": ("B T Q", lambda _, block: f"{type(latent(block).norm).__name__}(W_a h)"),
    "block N / attention / queries": (
        "B T H(N+P)",
        lambda _, block: "[a_h, b_h] = W_q " + ("h" if latent(block).query_rank is None else "query bottleneck"),
    ),
    "block N / attention / down": ("B T R+P", lambda _, block: biased("[W_c, W_r]", "h", latent(block).bias)),
    "block N / attention / latent": ("B T R", lambda _, block: f"c = {type(latent(block).norm).__name__}(W_c h)"),
    "block N / attention / keys and values": ("B S H(N+U)", "[U_h, V_h] c, all heads"),
    "block N / attention / indexer / queries": ("B T JK", "q_j, all index heads, before the rotation"),
    "block N / attention / indexer / down": ("B T K", "W_k h"),
    "block N / attention / indexer / key": (
        "B T K",
        lambda _, block: f"k = {type(block.mixer.indexer.norm).__name__}(W_k h), before the rotation",
    ),
    "block N / attention / indexer / weights": ("B T J", "w_j = W_w h"),
    "block N / attention / indexer / scores": ("B T S", "Σ_j w_j relu(q_j · k) / √(K J), before the mask"),
    "block N / attention / indexer / chosen": ("B T k", "the keys of the highest scores"),
    "block N / attention / q": ("B H T K", lambda spec, block: turned(spec, block, "q")),
    "block N / attention / k": ("B G S K", lambda spec, block: turned(spec, block, "k")),
    "block N / attention / v": ("B G S K", "the v of qkv"),
    "block N / attention / q, naive": ("B H T N+P", "[a_h, rotate(b_h)]"),
    "block N / attention / k, naive": ("B H S N+P", "[U_h c, r], r = rotate(W_r h)"),
    "block N / attention / v, naive": ("B H S U", "V_h c"),
    "block N / attention / q, absorbed": ("B H T R+P", "[U_hᵀ a_h, rotate(b_h)]"),
    "block N / attention / k, absorbed": ("B 1 S R+P", "[c, r], r = rotate(W_r h), for all heads"),
    "block N / attention / v, absorbed": ("B 1 S R+P", "[c, r]; of the answer only Σ_s p c is used"),
    "block N / attention / scores, naive": ("B H T S", "q_h k_hᵀ / √(N + P), before the mask"),
    "block N / attention / scores, absorbed": ("B H T S", "q_h kᵀ / √(N + P), before the mask"),
    "block N / attention / heads, naive": ("B H T U", "Σ_s probabilities v"),
    "block N / attention / heads, absorbed": ("B H T R+P", "Σ_s probabilities [c, r]"),
    "block N / attention / visible": ("B T S", "visible and chosen"),
    "block N / attention / scores": ("B H T S", "q_h k_g(h)ᵀ / √K, before the mask"),
    "block N / attention / probabilities": ("B H T S", "softmax of the scores of what is visible, 0 elsewhere"),
    "block N / attention / heads": ("B H T K", "Σ_s probabilities v"),
    "block N / attention / output": ("B T D", answered),
    "block N / attention / after": ("B T D", wired(sandwich="m(a)", deep="n(αx + a)")),
    "block N / stream between": (
        "B T D",
        wired(pre="x + a", sandwich="x + m(a)", deep="n(αx + a)", scaled="αh + a"),
    ),
    "block N / feed-forward / input": ("B T D", read),
    "block N / feed-forward / router / scores": ("B T E", "s = sigmoid(W_r h)"),
    "block N / feed-forward / router / choice": ("B T E", "s + b, -∞ in groups that are not kept"),
    "block N / feed-forward / router / chosen": ("B T k", "the experts of the highest choice"),
    "block N / feed-forward / router / weights": ("B T k", routed),
    "block N / feed-forward / routed": ("B T D", "Σ_chosen weight_e expert_e(h)"),
    "block N / feed-forward / output": (
        "B T D",
        lambda _, block: (
            "a = routed + shared"
            if isinstance(block.feed_forward, Experts) and block.feed_forward.shared
            else "a = routed"
            if isinstance(block.feed_forward, Experts)
            else "a = " + biased("W_down", "product", block.feed_forward.bias)
        ),
    ),
    "block N / feed-forward / after": ("B T D", wired(sandwich="m(a)", deep="n(αx + a)")),
    "block N / stream": (
        "B T D",
        wired(pre="x + a", sandwich="x + m(a)", deep="n(αx + a)", scaled="αh + a"),
    ),
    "block N / feed-forward / expert N / tokens": ("n", "the tokens, of B·T, that chose this expert"),
}
for place, axes in (("", "B T"), (" / shared", "B T"), (" / expert N", "n")):
    inside = f"block N / feed-forward{place}"
    EQUATIONS[f"{inside} / branches"] = (f"{axes} F…", branched)
    EQUATIONS[f"{inside} / activated"] = (f"{axes} F", activated)
    EQUATIONS[f"{inside} / product"] = (f"{axes} F", product)
    if place:
        EQUATIONS[f"{inside} / output"] = (f"{axes} D", "W_down product")


def described(name: str, spec: Spec, dimensions: int, form: str = "") -> tuple[str, str]:
    """The axes and the equation of a step; of one that is not listed, what can be said of any tensor.

    `form` tells between two ways to compute what has one name: latent attention is "naive" or "absorbed".
    """
    general = re.sub(r"\d+", "N", name)
    axes, equation = EQUATIONS.get(f"{general}, {form}") or EQUATIONS.get(general, ("", "the output of this module"))
    if callable(equation):
        number = re.search(r"block (\d+)", name)
        equation = equation(spec, spec.blocks[int(number[1]) if number else 0])
    if len(axes.split()) != dimensions:
        axes = " ".join("?" * dimensions)
    return axes, equation
