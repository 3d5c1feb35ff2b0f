"""The embedded registry as a process, and clients that keep it busy."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.errors import ModelpackError
from modelpack.operations.remote import RemoteOptions
from modelpack.registry import RetryPolicy, Timeouts
from tests.faults.victim import forked
from tests.scenarios.processes import wait_until
from tests.weights import write_safetensors

MIB = 1024 * 1024
#: Gives up at the first failure: what a registry does when it is killed is what we look at.
IMPATIENT = RemoteOptions(
    timeouts=Timeouts(connect=5, idle=10, commit=10), retry=RetryPolicy(tries=1), concurrency=2
)


@dataclass
class Served:
    """A server process; `host` is empty if it died before it was ready."""

    process: ForkServerProcess
    calls: Path
    host: str = ""

    def stop(self) -> int:
        """Ask it to end; return the number of its system calls. It has to end well."""
        assert self.process.pid is not None
        self.process.terminate()
        self.process.join(60)
        assert self.process.exitcode == 0, self.process.exitcode
        return int(self.calls.read_text())

    def kill(self) -> None:
        """Kill it if it lives, and wait for its end."""
        self.process.kill()
        self.process.join(60)
        assert self.process.exitcode in (-signal.SIGKILL, 0), self.process.exitcode


@contextmanager
def serving(root: Path, last: int = 0, *options: str) -> Iterator[Served]:
    """Serve the store at `root` in a process that is killed at its system call number `last`.

    `options` are more words for `modelpack registry serve`.
    """
    output, calls = root.with_name("served"), root.with_name("calls")
    output.write_bytes(b"")
    calls.unlink(missing_ok=True)
    words = ["registry", "serve", "--addr", "127.0.0.1:0", "--root", root, "--quiet", *options]
    process = forked(words, last=last, output=output, calls=calls)
    try:
        wait_until(
            lambda: output.read_bytes().endswith(b"\n") or not process.is_alive(), "a server"
        )
        lines = output.read_text().split()
        yield Served(process, calls, lines[0] if lines and process.is_alive() else "")
    finally:
        process.kill()
        process.join(60)
        process.close()


@dataclass
class Load:
    """Models that `threads` threads push and pull back; `done` are those that were accepted."""

    work: Path
    models: int = 6
    threads: int = 3
    done: dict[str, Digest] = field(default_factory=dict)
    sent: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._origin = modelpack.Store(self.work / "origin")
        for number in range(self.models):
            folder = self.work / f"files-{number}"
            data = random.Random(number).randbytes(MIB + number)
            write_safetensors(folder / "model.safetensors", data)
            request = modelpack.PackageRequest(safetensors_dir=folder)
            modelpack.package(f"team/m{number}:v1", request, store=self._origin)

    @property
    def size(self) -> int:
        """The bytes of all blobs of all models."""
        models = [m.references[0] for m in self._origin.models()]
        inspected = [modelpack.inspect(str(name), store=self._origin) for name in models]
        return len(
            b"".join(
                self._origin.blob_path(digest).read_bytes()
                for digest in {b.digest for one in inspected for b in one.manifest.blobs}
            )
        )

    def forget(self) -> None:
        """Forget what was accepted: a new server has none of it, even if it never serves."""
        self.done, self.sent = {}, 0

    def run(self, host: str) -> list[ModelpackError]:
        """Push and pull everything at once; return what went wrong."""
        self.forget()
        errors: list[ModelpackError] = []

        def work(first: int) -> None:
            try:
                for number in range(first, self.models, self.threads):
                    self._exchange(host, number)
            except ModelpackError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    def _exchange(self, host: str, number: int) -> None:
        name, there = f"team/m{number}:v1", f"{host}/team/m{number}:v1"
        origin = modelpack.Store(self._origin.root)
        origin.tag(name, modelpack.Reference.parse(there))
        pushed = modelpack.push(there, store=origin, remote=IMPATIENT)
        with self._lock:
            self.done[name] = pushed.digest
            self.sent += pushed.transfer.bytes_written
        back = modelpack.Store(self.work / "back")
        modelpack.pull(there, store=back, remote=IMPATIENT)
        back.remove(there, force=True)
        origin.remove(there)
