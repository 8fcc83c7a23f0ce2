"""Every kernel in every form it can be launched in, compiled without a GPU.

A kernel file lists its `variants(target)`: one for each combination of dtypes and compile-time values that a launch on
that device can ask for. `compile` builds the machine code with the compiler Triton brings along, which needs no
device, and reads from it what decides speed: registers, spills, shared memory and the instructions used.
"""

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


@dataclass(frozen=True)
class Compiled:
    """What one compilation came to.

    registers     of one thread (on AMD vector registers)
    spilled       bytes of a thread's registers kept in memory, or on AMD the number of registers
    shared        bytes of shared memory of one program
    instructions  how often each machine instruction stands in the code, by its full name, as "HGMMA.64x128x16.F32"
    text          the disassembly
    """

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    text: str

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
    return from_cubin(built.asm["cubin"], shared) if target.backend == "cuda" else from_amd(built.asm["amdgcn"], shared)


def from_cubin(cubin: bytes, shared: int) -> Compiled:
    """Read NVIDIA machine code with the tools in Triton's wheel."""
    from triton.backends import nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, option: str) -> str:
            return subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage, text = run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "--print-code")
    spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", text, re.M)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Compiled(int(registers[1]), spilled, shared, Counter(names), text)


def from_amd(text: str, shared: int) -> Compiled:
    """Read AMD assembly, whose end has the resources."""
    spilled = sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", text))
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    assert registers is not None, "no register count in the assembly"
    names = re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text, re.M)
    return Compiled(int(registers[1]), spilled, shared, Counter(names), text)
