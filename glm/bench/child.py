"""Processes of their own, for what a process can only tell once: its peak of memory, and how soon it begins.

    python -m glm.bench.child NAME '{"…": …}'

prints one line of JSON, the last of its output.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from typing import Any

from glm.errors import GLMError

MARK = "result: "
TASKS = {"memory": "glm.bench.memory", "start": "glm.bench.start"}


def ask(task: str, **arguments: Any) -> dict[str, Any]:
    """What a fresh process finds; `begun` is the moment it was started. Raises GLMError with its last words."""
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "glm.bench.child", task]
    run = subprocess.run(
        [*command, json.dumps({**arguments, "begun": time.time()})], env=place, capture_output=True, text=True
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    if run.returncode or not lines:
        said = [line for line in run.stderr.splitlines() if line.strip()]
        raise GLMError(f"the process that measures {task} ended with {run.returncode}: {said[-1] if said else ''}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return found


def main() -> None:
    """Do one task."""
    begun = time.time()
    task, arguments = sys.argv[1], json.loads(sys.argv[2])
    found = import_module(TASKS[task]).inside(began=begun, **arguments)
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
