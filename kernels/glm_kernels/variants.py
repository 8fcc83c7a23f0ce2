"""Every kernel in every form it can be launched in, compiled without a GPU.

A kernel file lists its `variants(target)`: one for each combination of dtypes and compile-time values that a launch on
that device can ask for. `compile` builds the machine code with the compiler Triton brings along, which needs no
device, and reads from it what decides speed: registers, spills, shared memory and the instructions used.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from glm_kernels.dispatch import Target

TARGETS = Target("cuda", 80), Target("cuda", 89), Target("cuda", 90), Target("cuda", 100), Target("hip", "gfx942")
WARP = {"cuda": 32, "hip": 64}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Variant:
    """One compilation of `kernel`.

    label     what tells it from the kernel's other variants, as "float16 K=128"
    types     Triton's type of every argument that is not compile-time, in order: "*fp16", "i32", "fp32" …
    values    the compile-time arguments; None stands for a tensor not given
    options   num_warps, num_stages …
    unaligned names of integers and pointers not known to be multiples of 16 (which launches usually are)
    hot       whether its speed matters so that no register may spill
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    values: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    unaligned: Iterable[str] = ()
    hot: bool = True

    @property
    def name(self) -> str:
        """Of the kernel and of the variant."""
        return f"{self.kernel.fn.__name__} {self.label}"

    @property
    def twin(self) -> bool:
        """Whether it is float16, which differs from bfloat16 in the type of some instructions: quick tests skip it."""
        return "*fp16" in self.types.values()


@dataclass(frozen=True)
class Compiled:
    """What one compilation came to.

    registers     of one thread (on AMD vector registers)
    spilled       bytes of a thread's registers kept in memory, or on AMD the number of vector registers (scalar ones
                  are kept in lanes of vector registers)
    shared        bytes of shared memory of one program
    code          the machine code, on AMD its assembly
    ptx           on NVIDIA what it was assembled from
    """

    registers: int
    spilled: int
    shared: int
    code: bytes
    ptx: str = ""

    @functools.cached_property
    def text(self) -> str:
        """The disassembly."""
        return tool("nvdisasm", "--print-code", self.code) if self.code.startswith(b"\x7fELF") else self.code.decode()

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """How often each machine instruction stands in the code, by its full name, as "HGMMA.64x128x16.F32"."""
        if self.code.startswith(b"\x7fELF"):
            pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)"
        else:
            pattern = r"^\s+([a-z]\w+)(?:\s|$)"
        return Counter(re.findall(pattern, self.text, re.M))

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def compile(variant: Variant, target: Target) -> Compiled:
    """Compile for `target`, which need not be present."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = variant.kernel
    signature = {name: variant.types.get(name, "constexpr") for name in kernel.arg_names}
    strange = (set(variant.types) | set(variant.values)) ^ set(kernel.arg_names)
    assert not strange, f"{variant.name}: arguments that do not fit the kernel: {sorted(strange)}"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") or kind.startswith("i")) and name not in variant.unaligned
    }
    source = triton.compiler.ASTSource(kernel, signature, dict(variant.values), aligned)
    built = triton.compile(
        source, target=GPUTarget(target.backend, target.arch, WARP[target.backend]), options=dict(variant.options)
    )
    shared = int(built.metadata.shared)
    if target.backend == "hip":
        text = built.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", text))
        return Compiled(number(r"\.vgpr_count:\s*(\d+)", text), spilled, shared, text.encode())
    usage = tool("cuobjdump", "--dump-resource-usage", built.asm["cubin"])
    spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))  # tensor memory brings functions of its own
    return Compiled(registers, spilled, shared, built.asm["cubin"], built.asm["ptx"])


def number(pattern: str, text: str) -> int:
    """The number that the pattern finds."""
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in {text[:200]}"
    return int(found[1])


def tool(name: str, option: str, cubin: bytes) -> str:
    """What one of the tools in Triton's wheel says of NVIDIA machine code."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(nvidia.__file__).parent / "bin" / name), option, file.name]
        return str(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
