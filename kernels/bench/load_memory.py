"""Peak memory of loading a checkpoint: a child process loads it, and reports its peak resident size.

    python kernels/bench/load_memory.py [chatglm3-6b] [--folder DIR] [--keep]

Synthesises the release at its full size where no folder is given (`glm synthesize`), loads it on the CPU in the dtype
it is stored in, and writes results/load_memory.json: peak resident memory beyond the weights themselves, file pages
included, against the bound "largest tensor + 0.5 GB".
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from glm_kernels.bench.machine import ROOT, provenance, write

CHILD = """
import json, sys, time, resource
import glm
from glm.pretrained import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
model = load(sys.argv[1])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tensors = list(model.state_dict().values())
print(json.dumps({
    "seconds": seconds,
    "dtype": str(model.dtype).removeprefix("torch."),
    "weights": sum(x.nbytes for x in tensors),
    "largest tensor": max(x.nbytes for x in tensors),
    "before loading": before,
    "peak": peak,
}))
"""


def measure(folder: Path) -> dict[str, float | str | bool]:
    """Load `folder` in a fresh process; bytes and seconds."""
    run = subprocess.run([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    found: dict[str, float | str | bool] = json.loads(run.stdout)
    beyond = float(found["peak"]) - float(found["weights"])
    bound = float(found["largest tensor"]) + 0.5e9
    return found | {"beyond the weights": beyond, "bound": bound, "within": beyond < bound}


def main() -> None:
    """Synthesise where needed, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="?", default="chatglm3-6b")
    parser.add_argument("--folder", type=Path, help="an existing checkpoint instead of a synthetic one")
    parser.add_argument("--under", type=Path, help="where to put the synthetic one (needs its full size)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.under) as place:
        folder = options.folder
        if folder is None:
            from glm.synthesize import synthesize

            folder = Path(place) / options.release
            start = time.perf_counter()
            synthesize(options.release, folder)
            print(f"synthesised in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        result = provenance() | {"release": options.release} | measure(folder)
    print(write("load_memory", result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
