"""Operators of torch that do not bring its compiler along.

`torch.library.custom_op` has its kernels called by way of `torch._dynamo.disable`, and so imports the compiler and
sympy at the first call: more than a second of every start, for the sake of compiling around them. Here that is done
only in a process that has the compiler already. All else (fake tensors, gradients, `torch.compile`) is as custom_op
has it.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

NAMESPACE = "glm_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def operator(name: str, mutates_args: Sequence[str] = ()) -> "Callable[[Callable[..., Any]], CustomOpDef]":
    """Makes a function the operator `glm_kernels::name`, the same for every device; see `torch.library.custom_op`."""

    def define(function: Callable[..., Any]) -> "CustomOpDef":
        defined = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=mutates_args, device_types=())

        @cache
        def apart() -> Callable[..., Any]:
            disabled: Callable[..., Any] = torch.compiler.disable(function)
            return disabled

        def kernel(*arguments: Any) -> Any:
            return (apart() if "torch._dynamo" in sys.modules else function)(*arguments)

        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        return defined

    return define
