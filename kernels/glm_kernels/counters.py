"""Counters on the device: programs that share a result count themselves in, and the last to come finishes it.

They are zero between calls, since who finishes sets them back. Kernels of one stream run one after the other and share
its counters; `splits.py` and `decode.py` use them.
"""

import torch
from torch import Tensor

COUNTERS = 1 << 16
kept: dict[tuple[torch.device, int], Tensor] = {}


def counters_for(x: Tensor, count: int) -> Tensor:
    """At least `count` counters, int32, of the current stream on the device of x.

    Graphs that use them must not run at the same time as each other if they were captured on the same stream. Where
    there are too few, or none yet while a graph is captured, whose memory is not ours to keep, they are made for one
    call: that costs a launch.
    """
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    key = (x.device, stream)
    if count <= COUNTERS and key not in kept and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        kept[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
    if count <= COUNTERS and key in kept:
        return kept[key]
    return torch.zeros(count, dtype=torch.int32, device=x.device)
