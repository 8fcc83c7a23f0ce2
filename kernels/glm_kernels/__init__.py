"""Triton kernels for the GLM family. They know tensors, never a model.

Every function computes the same everywhere: on a GPU with a Triton kernel, elsewhere, or without Triton, with plain
torch. With TRITON_INTERPRET=1 in the environment the kernels themselves run on CPU tensors.
"""

from glm_kernels.acceptance import accept
from glm_kernels.activations import geglu, gelu, swiglu
from glm_kernels.append_attention import append_attention
from glm_kernels.attention import attention
from glm_kernels.choice import likeliest
from glm_kernels.decode import decode_attention, decode_latent_attention
from glm_kernels.dense_matmul import dense_matmul, dense_matmul_experts
from glm_kernels.int_matmul import (
    int4_matmul,
    int4_matmul_experts,
    int4_prepack,
    int8_matmul,
    int8_matmul_experts,
    int8_prepack,
)
from glm_kernels.norms import layer_norm, rms_norm
from glm_kernels.rotary import rotary, rotary_append

__all__ = [
    "accept",
    "append_attention",
    "attention",
    "decode_attention",
    "decode_latent_attention",
    "dense_matmul",
    "dense_matmul_experts",
    "geglu",
    "gelu",
    "int4_matmul",
    "int4_matmul_experts",
    "int4_prepack",
    "int8_matmul",
    "int8_matmul_experts",
    "int8_prepack",
    "layer_norm",
    "likeliest",
    "rms_norm",
    "rotary",
    "rotary_append",
    "swiglu",
]
