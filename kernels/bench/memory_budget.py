"""Does a run stay within the memory that `glm info` predicts? A child process loads a checkpoint and writes with it.

    python kernels/bench/memory_budget.py [glm-4.7-flash] [--layers 4] [--context 2048] [--under DIR]

Synthesises the release with its first layers at their full size, loads it on the CPU in the dtype it is stored in,
reads a prompt and writes up to `context` tokens in all. Writes results/memory_budget.json: the peak of resident memory
beyond what the process had before, against the prediction (weights + cache + working space) and 3 % more.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from glm_kernels.bench.machine import ROOT, provenance, write

CHILD = """
import json, re, sys
import torch
import glm
from glm.generation import generate
from glm.info import describe
from glm.pretrained import load
torch.set_num_threads(1)
a = torch.ones(64, 64, dtype=torch.bfloat16); (a @ a).float().softmax(-1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024  # not the parent's
folder, context, written = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
predicted = describe(folder, context).need
before = peak()
model = load(folder)
loaded = peak()
ids = torch.randint(5, 1000, (context - written,), generator=torch.Generator().manual_seed(0)).tolist()
generate(model, [ids], max_new_tokens=written, stop=(), chunk=2048)
print(json.dumps({
    "context": context,
    "predicted": predicted.bytes,
    "predicted weights": predicted.weights,
    "predicted cache": predicted.cache,
    "predicted working": predicted.working,
    "loading": loaded - before,
    "run": peak() - before,
}))
"""


def measure(folder: Path, context: int, written: int) -> dict[str, float | bool]:
    """Load and run `folder` in a fresh process; bytes."""
    command = [sys.executable, "-c", CHILD, str(folder), str(context), str(written)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    found: dict[str, float | bool] = json.loads(run.stdout)
    ratio = float(found["run"]) / float(found["predicted"])
    return found | {"run over predicted": ratio, "within": ratio <= 1.03}


def main() -> None:
    """Synthesise, measure, write, and remove what was synthesised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="?", default="glm-4.7-flash")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--written", type=int, default=8, help="how many of the context are written, not read")
    parser.add_argument("--under", type=Path, help="where to put the checkpoint meanwhile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.under) as place:
        from glm.synthesize import synthesize

        folder = Path(place) / options.release
        synthesize(options.release, folder, layers=options.layers)
        found = measure(folder, options.context, options.written)
    result = provenance() | {"release": options.release, "layers": options.layers} | found
    print(write("memory_budget", result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
