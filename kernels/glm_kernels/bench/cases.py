"""The published models whose shapes are measured. (A kernel knows tensors only; a benchmark may know where from.)"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Sizes of one model's layers.

    heads, groups      query heads H, and key and value heads G
    key, value         width of a head's keys K and values Kv
    hidden, inner      width of the residual stream D, and of the feed-forward layer F (the dense one)
    norm               "layer", or "rms" with the weight applied "before" or "after" the cast
    activation         of the feed-forward layer
    rotary             "interleaved" or "halves", and how many of the K channels turn on each position axis
    latent             width of the cached latent and of its values, where there is one
    """

    name: str
    dtype: str
    heads: int
    groups: int
    key: int
    value: int
    hidden: int
    inner: int
    norm: str
    activation: str
    rotary: tuple[str, tuple[int, ...]]
    latent: tuple[int, int] | None = None


# fmt: off
GLM_10B = Model(
    "GLM-10B", "float16", 64, 64, 64, 64, 4096, 16384, "layer", "gelu erf", ("", ()))
GLM_130B = Model(
    "GLM-130B", "float16", 96, 96, 128, 128, 12288, 32768, "layer", "geglu erf", ("halves", (128,)))
CHATGLM_6B = Model(
    "ChatGLM-6B", "float16", 32, 32, 128, 128, 4096, 16384, "layer", "gelu tanh", ("halves", (64, 64)))
CHATGLM3_6B = Model(
    "ChatGLM3-6B", "float16", 32, 2, 128, 128, 4096, 13696, "rms before", "swiglu", ("interleaved", (64,)))
GLM_4_9B = Model(
    "GLM-4-9B", "bfloat16", 32, 2, 128, 128, 4096, 13696, "rms before", "swiglu", ("interleaved", (64,)))
GLM_4_32B = Model(
    "GLM-4-32B", "bfloat16", 48, 2, 128, 128, 6144, 23040, "rms after", "swiglu", ("interleaved", (64,)))
GLM_4_5_AIR = Model(
    "GLM-4.5-Air", "bfloat16", 96, 8, 128, 128, 4096, 10944, "rms after", "swiglu", ("halves", (64,)))
GLM_4_7_FLASH = Model(
    "GLM-4.7-Flash", "bfloat16", 20, 20, 256, 256, 2048, 10240, "rms after", "swiglu", ("interleaved", (64,)),
    latent=(576, 512))
# fmt: on

NAMED = (CHATGLM_6B, CHATGLM3_6B, GLM_4_9B, GLM_4_32B, GLM_4_5_AIR, GLM_4_7_FLASH)
MODELS = {model.name: model for model in (GLM_10B, GLM_130B, *NAMED)}

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
DECODE_CONTEXTS = (*CONTEXTS, 131072)
BATCHES = (1, 8, 32)
