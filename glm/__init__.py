"""The GLM family of language models in readable PyTorch.

    model = glm.GLM.from_pretrained("zai-org/chatglm3-6b")
    tok = glm.Tokenizer.from_pretrained("zai-org/chatglm3-6b")
    ids = tok.chat([{"role": "user", "content": "What is a general language model?"}])
    print(tok.decode(glm.generate(model, [ids], max_new_tokens=200, stop=tok.stop)[0]))

Shape letters, the same everywhere:

    B  rows of a batch               H  query heads            V  vocabulary
    T  tokens given in this call     G  groups of key heads    F  channels inside a feed-forward
    S  tokens seen: cached and new   K  channels of a head     L  layers
    D  width of the stream           A  position axes

The names below are imported when first used, so that `import glm` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm.blanks import score
    from glm.cache import Cache
    from glm.changes import diff
    from glm.drafting import NextToken, PromptLookup, SmallerModel
    from glm.errors import (
        CacheError,
        CheckpointError,
        ConfigError,
        GenerationError,
        GLMError,
        LayoutError,
        MemoryFitError,
        ParallelError,
        PromptError,
        TokenizerError,
    )
    from glm.export import save_pretrained
    from glm.family import release, releases
    from glm.generation import generate, stream
    from glm.layout import Layout
    from glm.model import GLM
    from glm.packaged import embedded
    from glm.parallel import tensor_parallel
    from glm.runtime import Engine
    from glm.spec import Block, Spec
    from glm.tokenizer import Tokenizer

HOMES = {
    "glm.blanks": ("score",),
    "glm.cache": ("Cache",),
    "glm.changes": ("diff",),
    "glm.packaged": ("embedded",),
    "glm.errors": (
        "CacheError",
        "CheckpointError",
        "ConfigError",
        "GLMError",
        "GenerationError",
        "LayoutError",
        "MemoryFitError",
        "ParallelError",
        "PromptError",
        "TokenizerError",
    ),
    "glm.drafting": ("NextToken", "PromptLookup", "SmallerModel"),
    "glm.export": ("save_pretrained",),
    "glm.family": ("release", "releases"),
    "glm.generation": ("generate", "stream"),
    "glm.layout": ("Layout",),
    "glm.model": ("GLM",),
    "glm.parallel": ("tensor_parallel",),
    "glm.runtime": ("Engine",),
    "glm.spec": ("Block", "Spec"),
    "glm.tokenizer": ("Tokenizer",),
}
HOME = {name: home for home, names in HOMES.items() for name in names}

__all__ = [
    "GLM",
    "Block",
    "Cache",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "GLMError",
    "GenerationError",
    "Layout",
    "LayoutError",
    "MemoryFitError",
    "NextToken",
    "ParallelError",
    "PromptError",
    "PromptLookup",
    "SmallerModel",
    "Spec",
    "Tokenizer",
    "TokenizerError",
    "diff",
    "embedded",
    "generate",
    "release",
    "releases",
    "save_pretrained",
    "score",
    "stream",
    "tensor_parallel",
]


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'glm' has no attribute {name!r}")
    return getattr(import_module(HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
