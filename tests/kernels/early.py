"""What a kernel does before it waits for the kernel before it, read from its PTX."""

import re
from collections.abc import Collection, Sequence

WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


def faults(ptx: str, arguments: Sequence[str], pointers: Collection[str], weights: Collection[str]) -> list[str]:
    """What is wrong with the beginning of an overlapped kernel; nothing if it waits as it should.

    The wait must stand in the first block, which all others follow, behind the one release. Before it nothing may touch
    memory, which in PTX is what has an operand in brackets, but reading arguments, and prefetches whose address comes
    from one of the `weights` and no other of the `pointers`. `arguments` are those of the kernel, in order.
    """
    wrong, found = [], {WAIT: 0, RELEASE: 0}
    sources: dict[str, set[str]] = {}  # of every register, the arguments that it comes from
    for line in body(ptx):
        if line in found:
            found[line] += 1
        if found[WAIT]:
            continue
        if line == RELEASE:
            continue
        if line.endswith(":"):
            if not line.startswith(("$L__tmp", "$L__func_begin")):  # which are places in the source
                wrong.append(f"a branch may lead to {line} before the wait")
            continue
        guard, name, operands = re.match(r"(@!?%\w+\s+)?([\w.]+)\s*(.*)", line, re.DOTALL).groups("")  # type: ignore[union-attr]
        if name.split(".")[0] in ("bra", "brx", "ret", "exit", "call", "trap"):
            wrong.append(f"`{line}` stands before the wait")
        address = re.search(r"\[(.*?)\]", operands)
        come = set().union(*(sources.get(register, set()) for register in registers(guard + operands)))
        if address is None or name.startswith("ld.param"):
            argument = re.search(r"_param_(\d+)", operands) if address else None
            if argument:
                number = int(argument[1])
                come.add(arguments[number] if number < len(arguments) else f"scratch {number}")
            for register in registers(target(operands)):
                sources[register] = sources.get(register, set()) | come
            continue
        theirs = come & set(pointers) or {"nothing"}
        if not name.startswith("prefetch.global") or not theirs <= set(weights):
            wrong.append(f"`{line}` of {', '.join(sorted(theirs))} stands before the wait")
    wrong += [f"{name} stands there {count} times" for name, count in found.items() if count != 1]
    return wrong


def body(ptx: str) -> list[str]:
    """The labels and instructions of the kernel, in order."""
    text = re.sub(r"//.*", "", ptx[ptx.index(".entry") :])
    text = text[text.index("{") + 1 :]
    text = re.sub(r"^\s*\.(loc|reg|pragma|file)\b.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(\$\w+:)", r"\1;", text, flags=re.MULTILINE)
    return [line for part in text.split(";") if (line := part.strip(" \t\n{}"))]


def target(operands: str) -> str:
    """The first operand, which is what an instruction writes."""
    return operands[: operands.index("}")] if operands.startswith("{") else operands.split(",")[0]


def registers(text: str) -> list[str]:
    """Those that are named in a text."""
    return re.findall(r"%\w+(?:\.\w)?", text)
