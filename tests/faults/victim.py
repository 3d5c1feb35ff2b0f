"""A process that runs one command of ours and is killed on the way, at an instant chosen before.

It is forked off a server that has the command line imported already, so that hundreds of them take
no longer than their work. An instant is a number of system calls that change files or move bytes:
the process kills itself (SIGKILL: nothing of it runs after that) as the call of that number is
about to be made, in whichever thread. Python shows those calls to a profile function.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

# Of these modules; reading and looking leave nothing half done.
_MODULES = frozenset({"posix", "fcntl", "_io", None})  # methods of sockets and files have no module
_CALLS = frozenset(
    {
        *("open", "close", "write", "pwrite", "truncate", "ftruncate", "fsync", "sendfile"),
        *("copy_file_range", "posix_fadvise", "posix_fallocate", "chmod", "fchmod", "utime"),
        *("replace", "rename", "link", "unlink", "mkdir", "rmdir", "flock"),
        *("send", "sendall", "recv", "recv_into"),
    }
)


class Instant:
    """Counts calls, and kills this process at the one with the number `last` (0: never)."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._numbers = itertools.count(1)
        self.seen = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "c_call" or argument.__name__ not in _CALLS:
            return
        if argument.__module__ in _MODULES:
            self.seen = next(self._numbers)
            if self.seen == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


def run_command(
    arguments: Sequence[str], environment: Mapping[str, str], last: int, output: Path, calls: Path
) -> None:
    """Run `modelpack` with `arguments`; what it prints goes to `output`, its calls to `calls`."""
    os.environ.clear()
    os.environ.update(environment)
    with output.open("wb", buffering=0) as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    from modelpack.cli.main import run

    instant = Instant(last)
    threading.setprofile(instant)
    sys.setprofile(instant)
    code = run(list(arguments))
    sys.setprofile(None)
    threading.setprofile(None)
    # A kill may still come: there is the whole number, or none.
    part = calls.with_name(f"{calls.name}.part")
    part.write_text(str(instant.seen))
    part.replace(calls)
    sys.stdout.flush()
    os._exit(code)


def forked(
    arguments: Sequence[str | Path], *, last: int = 0, output: Path, calls: Path
) -> ForkServerProcess:
    """Start a process that does `run_command`."""
    words = [str(argument) for argument in arguments]
    process = SERVER.Process(
        target=run_command, args=(words, dict(os.environ), last, output, calls)
    )
    process.start()
    return process


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_PRELOADED])
    return context


# What commands import when they need it: here once for all.
_PRELOADED = (
    "modelpack.cli.main", "modelpack.cli.package", "modelpack.cli.transfer", "modelpack.cli.store",
    "modelpack.cli.archives", "modelpack.cli.registry", "modelpack.registry.http_client",
    "modelpack.registry.blob_upload", "modelpack.registry_server.server",
)  # fmt: skip
SERVER = _server()
