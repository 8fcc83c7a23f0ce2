"""transformers as a side: the same weights under the names of its `glm` and `glm4`, in memory and mostly not copied.

Integer weights are written out in full for it: it computes with the same numbers, and what it reads is larger.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from glm_kernels.bench.subject import MissingError
from torch import Tensor

from glm.bench.sides import Prompts, Setting
from glm.errors import ConfigError
from glm.export import chosen, exported
from glm.grouped import GroupedLinear
from glm.linear import Dense
from glm.model import GLM

CLASSES = {"glm4": ("GlmConfig", "GlmForCausalLM"), "glm4_0414": ("Glm4Config", "Glm4ForCausalLM")}
"""Of each generation whose files transformers reads: the classes of its config and of its model."""


def written_out(model: GLM) -> dict[str, Tensor]:
    """The model's tensors with every matrix in full; those that are so already are the same tensors."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            state[f"{name}.weight"] = module.dense(model.dtype)
            for part in ("weight_packed", "weight_scale", "weight_zero_point"):
                state.pop(f"{name}.{part}", None)
    return state


KNOWN: "WeakKeyDictionary[GLM, Any]" = WeakKeyDictionary()  # both sides hold one model


def as_transformers(model: GLM) -> Any:
    """The model as transformers has it. Raises MissingError where it is not installed, or has no such model."""
    if model not in KNOWN:
        KNOWN[model] = converted(model)
    return KNOWN[model]


def converted(model: GLM) -> Any:
    """The same, made anew."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise MissingError(f"transformers cannot be imported: {error}") from None
    state, spec = written_out(model), replace(model.spec, weights=Dense(), head=Dense())
    for name, (config_name, model_name) in CLASSES.items():
        try:
            generation = chosen(spec, name)
        except ConfigError:
            continue
        fields, tensors = exported(
            generation, spec, state, lambda x: x.on_disk(state[x.parameter]), lambda _: model.dtype
        )
        given = {tensor.name: tensor.make() for tensor in tensors}
        if spec.tied:
            given["lm_head.weight"] = given["model.embed_tokens.weight"]
        config = getattr(transformers, config_name)(**fields)
        with torch.device("meta"):
            made = getattr(transformers, model_name)(config)
        made.load_state_dict(given, strict=True, assign=True)
        rotary = made.model.rotary_emb  # its frequencies are in no file
        made.model.rotary_emb = type(rotary)(config).to(model.device)
        if any(x.is_meta for x in (*made.parameters(), *made.buffers())):
            raise MissingError(f"{model_name} has tensors that no checkpoint holds")
        return made.train(False).requires_grad_(False)
    raise MissingError("transformers has no model of this shape among glm and glm4")


class Eager:
    """Called as it is, with its growing cache."""

    def __init__(self, setting: Setting) -> None:
        self.model = as_transformers(setting.model)
        self.device, self.length = setting.model.device, setting.length
        self.forward: Any = self.model
        self.cache: Any = None
        self.chosen: list[Tensor] = []

    def emptied(self) -> Any:
        """A cache without tokens."""
        return import_module("transformers").DynamicCache(config=self.model.config)

    @torch.no_grad()
    def logits(self, prompt: Sequence[int]) -> Tensor:
        """[T, V]."""
        found: Tensor = self.model(torch.tensor([list(prompt)], device=self.device), use_cache=False).logits[0]
        return found

    @torch.no_grad()
    def start(self, prompts: Prompts) -> None:
        """All prompts at once."""
        self.cache = self.emptied()
        ids = torch.tensor([list(p) for p in prompts], device=self.device)
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.chosen = [logits[:, -1:].argmax(-1)]

    @torch.no_grad()
    def step(self) -> None:
        """One call."""
        logits = self.forward(self.chosen[-1], past_key_values=self.cache, use_cache=True).logits
        self.chosen.append(logits[:, -1:].argmax(-1))

    def tokens(self) -> list[list[int]]:
        """By row."""
        rows: list[list[int]] = torch.cat(self.chosen, dim=1).tolist()
        return rows

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Not compiled."""
        found: Tensor = self.model(self.chosen[-1], past_key_values=self.cache, use_cache=True).logits[:, -1]
        return found

    def prefill(self, prompt: Sequence[int]) -> None:
        """One row."""
        self.start([prompt])
        self.chosen[0].tolist()


class Static(Eager):
    """With its static cache, and on a GPU a compiled step, as its documentation advises."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.caches: dict[int, Any] = {}
        if self.device.type == "cuda":
            self.forward = torch.compile(self.model, mode="reduce-overhead", fullgraph=True)

    def start(self, prompts: Prompts) -> None:
        """One cache for every number of rows, since a graph knows where it lies."""
        self.rows = len(prompts)
        super().start(prompts)

    def emptied(self) -> Any:
        """The cache of these rows, from its beginning."""
        if self.rows in self.caches:
            self.caches[self.rows].reset()
        else:
            static = import_module("transformers").StaticCache
            self.caches[self.rows] = static(config=self.model.config, max_cache_len=self.length)
        return self.caches[self.rows]

    @torch.no_grad()
    def step(self) -> None:
        """One replay."""
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        logits = self.forward(self.chosen[-1], past_key_values=self.cache, use_cache=True).logits
        self.chosen.append(logits[:, -1:].argmax(-1).clone())
