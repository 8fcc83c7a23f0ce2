"""The engine: the parameters of a `GLM`, composed a second time, for speed.

The pure model says what is computed; this says how to have it soon: fused kernels on a static cache, one recording a
step, many requests side by side. Whatever `glm` computes, the engine computes too, and the tests hold it to that.
"""

from glm.runtime.engine import Engine
from glm.runtime.requests import Request

__all__ = ["Engine", "Request"]
