"""What runs in a worker process: jobs from standard input, results to standard output.

A job that exceeds a limit of the operating system ends the process; the server starts another one.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelpack_engine.worker import frames

if TYPE_CHECKING:
    from modelpack_engine.templates.rendering import Renderer

# A worker that holds this much is replaced: Python seldom gives memory back.
_MAX_RESIDENT = 384 * 1024 * 1024


def main() -> None:
    """Do jobs until standard input ends."""
    memory = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    source = os.fdopen(os.dup(0), "rb")
    target = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # what a library prints is no message
    jobs = _Jobs()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, memory)
    target.write(frames.encoded({"ready": True}))
    target.flush()
    if sys.argv[2] == "render":
        jobs.prepare()
    while (job := frames.read(source)) is not None:
        _allow_seconds(float(job["seconds"]))
        result = jobs.run(job)
        result["last"] = _resident() > _MAX_RESIDENT
        target.write(frames.encoded(result))
        target.flush()


class _Jobs:
    @cached_property
    def _renderer(self) -> Renderer:
        from modelpack_engine.templates.rendering import Renderer

        return Renderer()

    def prepare(self) -> None:
        """Import what renders templates."""
        assert self._renderer is not None

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        if job["kind"] == "tokenizer":
            return _try_tokenizer(job["path"])
        from modelpack_engine.templates.go_syntax import GoSyntaxError
        from modelpack_engine.templates.rendering import TemplateFailedError

        try:
            return {"value": self._do(job)}
        except (TemplateFailedError, GoSyntaxError) as error:
            return {"error": str(error)}
        except (MemoryError, RecursionError) as error:
            return {"error": f"{type(error).__name__}: it takes too much memory"}
        except Exception as error:  # noqa: BLE001 - one job's trouble stays its own
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    def _do(self, job: Mapping[str, Any]) -> Any:
        match job["kind"]:
            case "render":
                return self._renderer.render(job["source"], job["variables"])
            case "check":
                return self._renderer.check(job["source"])
            case "from_go":
                from modelpack_engine.templates.go_template import as_jinja

                return as_jinja(job["source"])
        raise AssertionError(f"unknown job {job['kind']!r}")


def _try_tokenizer(path: str) -> dict[str, Any]:
    from modelpack_engine.worker.probing import BadTokenizerError, try_tokenizer

    try:
        try_tokenizer(path)
    except (BadTokenizerError, MemoryError) as error:
        return {"error": str(error) or "it takes too much memory"}
    return {"value": None}


def _limit(which: int, value: int) -> None:
    """Lower a limit; some systems refuse some of them (macOS RLIMIT_AS)."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (OSError, ValueError):
        return


def _allow_seconds(seconds: float) -> None:
    """Have the system end this process if the server that would is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _resident() -> int:
    """Return the bytes of memory that this process holds, or where unknown, has held."""
    try:
        with open("/proc/self/statm") as file:  # the peak of getrusage counts that of our parent
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS has it in bytes
