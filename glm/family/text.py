"""Which release's prompts belong to a folder: told by its vocabulary where that can tell, else by its name."""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from glm.chat import TextFormat
from glm.errors import TokenizerError
from glm.family.text_chatglm import CHATGLM, CHATGLM_BYTES
from glm.family.text_chatglm2 import CHATGLM2
from glm.family.text_chatglm3 import CHATGLM3
from glm.family.text_glm4 import GLM4, GLM4_HF
from glm.family.text_glm4_0414 import GLM4_0414, GLM_Z1
from glm.family.text_glm4_moe import GLM4_MOE
from glm.family.text_glm_10b import GLM_BERT, GLM_CHINESE, GLM_GPT2
from glm.family.text_glm_130b import GLM_130B

# By the kind of vocabulary: the generations whose prompts can go with it.
SENTENCEPIECE = {"chatglm3": CHATGLM3, "chatglm2": CHATGLM2, "codegeex2": CHATGLM2}
ICE_TEXT = {"chatglm": CHATGLM, "glm_130b": GLM_130B}
IMAGES = {"chatglm": 0, "glm_130b": 20000}  # image tokens that are counted before the text
MERGES, WORDS, COG = {"glm": GLM_GPT2}, {"glm": GLM_BERT}, {"glm": GLM_CHINESE}
RANKS = {"glm4": GLM4}
JSON = {
    "glm4": GLM4_HF,
    "glm4_0414": GLM4_0414,
    "glm_z1": GLM_Z1,
    "glm4_moe": GLM4_MOE,
    "chatglm": CHATGLM_BYTES,
}


def named(formats: Mapping[str, TextFormat], generation: str) -> TextFormat:
    """The format asked for by name; TokenizerError where this kind of vocabulary cannot go with it."""
    if generation not in formats:
        raise TokenizerError(f"no generation {generation!r} has this vocabulary; choose from {', '.join(formats)}")
    return formats[generation]


def of_ice_text(config: Mapping[str, Any]) -> str:
    """ChatGLM-6B and GLM-130B share one file; the latter's config.json is one we write."""
    return "glm_130b" if config.get("model_type") == "glm-130b" else "chatglm"


def of_sentencepiece(names: Iterable[str], added: Container[str]) -> str:
    """ChatGLM2 and ChatGLM3 share one file; `names` are what the folder is called, the most telling first."""
    if "<|user|>" in added:
        return "chatglm3"
    found = (re.search(r"chatglm[23]|codegeex2", name.lower()) for name in names)
    return next((name[0] for name in found if name), "chatglm3")


def of_json(tokens: Container[str], config: Mapping[str, Any], names: Iterable[str]) -> str:
    """A tokenizer.json shows by its special tokens which prompts it was made for."""
    if "<|user|>" not in tokens:
        if "[gMASK]" in tokens and "<sop>" in tokens:
            return "chatglm"
        raise TokenizerError("it has neither the <|user|> of GLM-4 nor the [gMASK] and <sop> of ChatGLM-6B")
    if "<think>" in tokens and "<tool_call>" in tokens:
        return "glm4_moe"
    if any("glm-z1" in name.lower() for name in names):
        return "glm_z1"
    return "glm4_0414" if config.get("model_type") == "glm4" else "glm4"
