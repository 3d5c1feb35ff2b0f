"""WorkerProcess: one worker and its messages.

A message is a big-endian length of 4 bytes, JSON in one line, and bytes (`raw`) after it, if any.
"""

from __future__ import annotations

import json
import os
import selectors
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import modelpack
import modelpack_engine

#: The most bytes of a message.
MAX_FRAME = 256 * 1024 * 1024

LENGTH = struct.Struct(">I")


def encoded(message: dict[str, Any], raw: bytes | None = None) -> bytes:
    """Return a message as bytes; raise `ValueError` if it is not JSON or too large."""
    # ASCII: halves of surrogate pairs have no UTF-8.
    body = json.dumps(message).encode()
    if raw is not None:
        body += b"\n" + raw
    if len(body) > MAX_FRAME:
        raise ValueError(f"it has {len(body)} bytes, the limit is {MAX_FRAME}")
    return LENGTH.pack(len(body)) + body


def decoded(body: bytes) -> dict[str, Any]:
    """Return a message without its length; its bytes, if any, are in the field `raw`."""
    text, line_end, raw = body.partition(b"\n")
    message: dict[str, Any] = json.loads(text)
    if line_end:
        message["raw"] = raw
    return message


def read(source: BinaryIO) -> dict[str, Any] | None:
    """Return the next message, or None at the end of the stream."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = source.read(size)
    return decoded(body) if len(body) == size else None


def pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the streams of messages to and from this process, and detach its standard ones.

    What libraries print must not be read as messages.
    """
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return source, target


#: The module that a worker process runs.
PROGRAM = "modelpack_engine.worker.program"
_CHUNK = 1 << 16
_START_SECONDS = 60.0  # for busy machines
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from {} import main; main()"


class WorkerDiedError(Exception):
    """The process ended before it responded."""


class WorkerTimeoutError(Exception):
    """The process did not respond in time."""


class WorkerProcess:
    """Runs `main` of the module `program` in another process; one call at a time.

    `memory` limits its address space in bytes, where the system supports that. With the `purpose`
    "render" or "media", the process imports the renderer or Pillow when it starts.
    """

    def __init__(self, memory: int, *, program: str = PROGRAM, purpose: str = "render") -> None:
        self._process = subprocess.Popen(
            # -I and -S ignore the environment and the hooks of site-packages, and start quickly.
            python_command(program, str(memory), purpose, flags=("-I", "-S")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=worker_environment(),
            start_new_session=True,  # only the server gets the terminal's signals
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._killed = self._is_ready = False
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether the process runs and was not killed."""
        return not self._killed and self._process.poll() is None

    def call(self, message: bytes, seconds: float) -> bytes:
        """Send an encoded message; return the response without its length.

        `seconds` start once the process is ready. Raises `WorkerTimeoutError` and
        `WorkerDiedError`; the process cannot be used after that.
        """
        if not self._is_ready:
            self._exchange(b"", _START_SECONDS)
            self._is_ready = True
        return self._exchange(message, seconds)

    def _exchange(self, message: bytes, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        received, left = bytearray(), memoryview(message)
        missing, size = LENGTH.size, 0
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            if message:
                selector.register(self._to, selectors.EVENT_WRITE)
            while len(received) < missing:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    raise WorkerTimeoutError
                for key, _ in ready:
                    if key.fd == self._to:
                        left = left[self._write(left) :]
                        if not left:
                            selector.unregister(self._to)
                    else:
                        received += self._read()
                if not size and len(received) >= LENGTH.size:
                    (size,) = LENGTH.unpack_from(received)
                    if size > MAX_FRAME:
                        raise WorkerDiedError
                    missing += size
        return bytes(received[LENGTH.size :])

    def kill(self) -> None:
        """Kill the process; any thread may call it."""
        self._killed = True
        self._process.kill()

    def close(self) -> None:
        """Kill the process, wait for its end, and close its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._to, data[:_CHUNK])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise WorkerDiedError from error

    def _read(self) -> bytes:
        try:
            data = os.read(self._from, _CHUNK)
        except BlockingIOError:
            return b""
        if not data:
            raise WorkerDiedError
        return data


def python_command(program: str, *arguments: str, flags: tuple[str, ...] = ()) -> list[str]:
    """Return a command that runs `main` of the module `program` in another Python.

    Its `sys.path` is ours, with the directories of our packages. -P: `-c` would put the current
    directory before the standard library, whose modules are imported before the path is ours.
    """
    packages = [str(Path(next(iter(p.__path__))).parent) for p in (modelpack_engine, modelpack)]
    path = json.dumps(list(dict.fromkeys([*filter(None, sys.path), *packages])))
    return [sys.executable, "-P", *flags, "-c", _START.format(program), *arguments, path]


def worker_environment() -> dict[str, str]:
    """Return the environment variables of a worker, which contain no tokens."""
    kept = ("LANG", "LC_ALL", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    given = {name: os.environ[name] for name in kept if name in os.environ}
    return given | {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # each thread reserves memory
    }
