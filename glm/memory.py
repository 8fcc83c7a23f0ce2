"""How much memory there is: what the device, the operating system and the container's limit leave."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch


class Found(NamedTuple):
    """Free memory in bytes, and of what."""

    bytes: int
    where: str


def memory_found(device: torch.device | str | None = None) -> Found | None:
    """Free memory of a device: the GPU, or of the system and within the container's limit; None where unknown."""
    device = torch.device(device or torch.get_default_device())
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Found(free + ours, f"free on {torch.cuda.get_device_name(device)}")
    if device.type in ("cpu", "mps"):
        known = [found for found in (_system(), _control_group()) if found is not None]
        return min(known, default=None)
    return None


def _system(meminfo: Path = Path("/proc/meminfo")) -> Found | None:
    """What Linux calls available (free, or a cache it can drop); elsewhere what sysconf knows."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return Found(int(lines["MemAvailable"].split()[0]) * 1024, "available")
    except (OSError, ValueError, KeyError, IndexError):
        pass
    for pages, where in (("SC_AVPHYS_PAGES", "free"), ("SC_PHYS_PAGES", "installed")):
        try:
            return Found(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE"), where)
        except (AttributeError, OSError, ValueError):  # no sysconf (Windows), or not this name (macOS)
            continue
    return None


def _control_group(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Found | None:
    """What the limits of this process's control groups (a container's memory limit) leave, the tightest of them.

    Version 2 keeps memory.max and memory.current in the group's folder, version 1 memory.limit_in_bytes and
    memory.usage_in_bytes in that of its memory controller. Every parent's limit holds as well. Pages of files not
    used lately count as used there, but give way.
    """
    left = []
    for folder, limit_name, usage_name, inactive in _groups(root, membership):
        try:
            limit = int((folder / limit_name).read_text())  # "max" is none
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(max(0, limit - usage + int(stat.get(inactive, 0))))
        except (OSError, ValueError):
            continue
    return Found(min(left), "left within the container's limit") if left else None


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The folders of this process's memory groups and their parents, and what the files in them are called."""
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    version_2 = ("memory.max", "memory.current", "inactive_file")
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            top, names = root, version_2
        elif "memory" in controllers.split(","):
            top, names = root / "memory", version_1
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield folder, *names


def size(count: float) -> str:
    """Bytes as people read them: 512 B, 28.0 KiB, 11.6 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
