"""Renders a chat template that somebody else wrote, in a process of its own.

A template is a program that came with a download. jinja2's sandbox keeps it away from Python's internals but not
from the clock or the memory: `'x' * 10**10` or three nested loops never return to code that could stop them. So a
small worker process does the rendering, and is killed when its time is up. It starts with the first template
(about 0.1 s), then answers in about a millisecond until this process ends.

The file is both ends of the pipe: imported, it is the `Sandbox`; run as a script, the worker. It imports nothing of
this package, so that the worker never loads torch. One line of JSON goes in, one comes out.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 3.0  # for one rendering, start of the worker not counted
CHARACTERS = 8_000_000  # of output; a million tokens of English are about four million
MEMORY = 512 * 2**20  # bytes of address space of the worker, where the system can limit it
START_SECONDS = 60.0


class Sandbox:
    """The end of the pipe on this side: `ask` renders one template, or says why it cannot be rendered."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, template: str, variables: dict[str, Any], seconds: float = SECONDS) -> dict[str, str]:
        """`{"text": …}` or `{"error": why}`, within `seconds`.

        TypeError or ValueError if `variables` do not fit into JSON.
        """
        question = json.dumps({"template": template, "variables": variables, "seconds": seconds}).encode()
        with self._lock:
            worker, self._worker = self._worker, None  # ours again only when it has answered, whatever interrupts us
            if worker is None or self._owner != os.getpid() or worker.poll() is not None:
                worker, self._owner = _started(), os.getpid()
                if worker is None:
                    return {"error": "the worker process for templates did not start"}
            answer = _exchange(worker, question, seconds)
            if answer is None:
                return {"error": f"it took more than {seconds:g} s or {MEMORY >> 20} MiB"}
            self._worker = worker
        reply: dict[str, str] = json.loads(answer)
        return reply

    def close(self) -> None:
        """Ends the worker; the next `ask` starts another."""
        worker, self._worker = self._worker, None
        if worker is not None and self._owner == os.getpid():
            _stop(worker)


def _started() -> subprocess.Popen[bytes] | None:
    """A worker that has greeted; None if that fails."""
    try:
        worker = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: this folder's modules do not shadow the standard library's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
    except OSError:
        return None
    return worker if _exchange(worker, b"", START_SECONDS) else None


def _stop(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    with contextlib.suppress(OSError):
        worker.communicate()


def _exchange(worker: subprocess.Popen[bytes], question: bytes, seconds: float) -> bytes | None:
    """One line to the worker (none if empty) and one back; None, and a dead worker, when that takes too long."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    late = threading.Event()

    def expire() -> None:
        late.set()
        worker.kill()

    timer = threading.Timer(seconds, expire)
    timer.start()
    answer = b""
    try:
        if question:
            worker.stdin.write(question + b"\n")
            worker.stdin.flush()
        answer = worker.stdout.readline(8 * CHARACTERS)
    except OSError:
        pass  # killed while we were writing
    finally:
        timer.cancel()
        timer.join()
    if late.is_set() or not answer.endswith(b"\n"):
        _stop(worker)
        return None
    return answer


def _serve() -> None:
    """The worker: greets, then answers line by line until its input is closed."""
    _limit_memory()
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        question = json.loads(line)
        _alarm(question["seconds"] + 1)  # a worker whose parent is gone must not run for ever
        answer = _render(question["template"], question["variables"])
        _alarm(0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit, macOS refuses it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _alarm(seconds: float) -> None:
    """Ends this process after `seconds`, whatever it is doing; 0 is never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _render(template: str, variables: dict[str, Any]) -> dict[str, str]:
    chunks, size = [], 0
    try:
        for chunk in _compiled(template)(variables):
            chunks.append(chunk)
            size += len(chunk)
            if size > CHARACTERS:
                return {"error": f"it writes more than {CHARACTERS:,} characters"}
        return {"text": "".join(chunks)}
    except MemoryError:
        return {"error": f"it took more than {MEMORY >> 20} MiB"}
    except Exception as error:
        return {"error": str(error)[:500] or type(error).__name__}


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Callable[[dict[str, Any]], Iterator[str]]:
    """The template in the environment that checkpoints write theirs for: that of transformers."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said, for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own name and type)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template).generate


if __name__ == "__main__":
    _serve()
