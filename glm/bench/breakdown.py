"""Where the time of a step goes: calls and seconds of every kernel (on the CPU, operator), by torch's profiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from glm.bench.sides import wait


def breakdown(run: Callable[[], None], steps: int, device: torch.device) -> dict[str, Any]:
    """Of a `run` of so many steps: kernels a step, and a table of them, those that take longest first.

    Copies to the host are in the table, and are no kernels. Raises RuntimeError where the profiler saw nothing.
    """
    gpu = device.type == "cuda"
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as watched:
        run()
        wait(device)
    rows = []
    for event in watched.key_averages():
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        if microseconds > 0 and (event.device_type == DeviceType.CUDA) == gpu:
            rows.append({"name": event.key, "count": event.count / steps, "seconds": microseconds / 1e6 / steps})
    if not rows:
        raise RuntimeError("the profiler saw no kernels")
    kernels = sum(row["count"] for row in rows if not row["name"].startswith(("Memcpy", "Memset")))
    rows.sort(key=lambda row: -row["seconds"])
    what = "kernels" if gpu else "operators"
    return {"what": what, "per step": kernels, "seconds": sum(row["seconds"] for row in rows), "table": rows}
