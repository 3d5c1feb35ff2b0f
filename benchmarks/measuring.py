"""Time whole processes in alternating pairs, with the kernel's accounting of each process.

Ratios of byte-moving commands depend on the machine: `machine_rates` measures how fast it hashes,
writes, reads and sends, so that the figures of two machines can be told apart.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELPACK = str(Path(sys.executable).with_name("modelpack"))
MEASURED = str(Path(__file__).parents[1] / "scripts" / "measured")
MIB = 1024**2
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process: wall seconds, CPU seconds and peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def host_ms(before: Any, after: Any) -> dict[str, float]:
    """Return the host's milliseconds to build, launch and wait for a step between `EngineStats`."""
    steps = after.num_steps - before.num_steps
    seconds = {
        "build": after.build_seconds - before.build_seconds,
        "launch": after.launch_seconds - before.launch_seconds,
        "wait": after.wait_seconds - before.wait_seconds,
    }
    return {part: 1e3 * each / steps for part, each in seconds.items()}


def measure(command: Sequence[str | Path], env: dict[str, str] | None = None) -> Run:
    """Run `command` and return its figures; raise an error if it fails.

    Python writes bytecode, as for an installed package, whatever the environment says.
    """
    environment = {**os.environ, **(env or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.NamedTemporaryFile() as figures:
        done = subprocess.run(
            [sys.executable, "-I", "-S", MEASURED, figures.name, *map(str, command)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{command}: exit code {done.returncode}\n{done.stderr.decode()}")
        return Run(**json.load(figures))


def compare(
    label: str,
    ours: Callable[[], Run],
    theirs: Callable[[], Run],
    *,
    runs: int,
    goal: float,
) -> None:
    """Run both alternately after a warm-up; print the median of the ratios of all pairs."""
    compare_all(label, ours, {"peer": theirs}, runs=runs, goal=goal)


def compare_all(
    label: str,
    ours: Callable[[], Run],
    peers: Mapping[str, Callable[[], Run]],
    *,
    runs: int,
    goal: float,
) -> None:
    """Run ours and all `peers` alternately after a warm-up; print the ratios as `compare` does."""
    ours()
    for peer in peers.values():
        peer()
    rounds = [(ours(), {name: peer() for name, peer in peers.items()}) for _ in range(runs)]
    our_wall = statistics.median(our.wall for our, _ in rounds)
    peak = max(our.peak for our, _ in rounds)
    for name in peers:
        ratios = sorted(our.wall / theirs[name].wall for our, theirs in rounds)
        wall = statistics.median(theirs[name].wall for _, theirs in rounds)
        their_peak = max(theirs[name].peak for _, theirs in rounds)
        print(
            f"{label}: ratio {statistics.median(ratios):.2f} (min {ratios[0]:.2f}, max "
            f"{ratios[-1]:.2f}, goal <= {goal}); ours {our_wall:.2f} s, {name} {wall:.2f} s; "
            f"peak RSS ours {peak / 1e6:.0f} MB, {name} {their_peak / 1e6:.0f} MB",
            flush=True,
        )


def random_file(path: Path, size: int) -> Path:
    """Write `size` random bytes; return the path."""
    with path.open("wb") as stream:
        for _ in range(size // (16 * 1024**2)):
            stream.write(os.urandom(16 * 1024**2))
    return path


def weights(path: Path, size: int) -> Path:
    """Write a valid safetensors file of about `size` random bytes; return the path."""
    size -= size % (16 * 1024**2)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    header += " " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header.encode())
        for _ in range(size // (16 * 1024**2)):
            stream.write(os.urandom(16 * 1024**2))
    return path


def warm(*paths: Path) -> None:
    """Read the files once, to bring them into the page cache."""
    for path in paths:
        with path.open("rb") as stream:
            while stream.read(16 * 1024**2):
                pass


def print_machine(*versions: Sequence[str]) -> None:
    """Print the description of the machine and the output of the commands `versions`."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if "model name" in line), model)
    print(f"machine: {os.cpu_count()} cores, {model}; {platform.platform()}")
    print(f"python: {platform.python_version()}")
    for command in versions:
        if shutil.which(command[0]) is None:
            sys.exit(f"{command[0]} is not installed")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"{command[0]}: {(done.stdout or done.stderr).strip().splitlines()[0]}")
    print(flush=True)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second of one core's SHA-256, of the disk without the page cache, of loopback."""

    sha256: float
    write: float
    read: float
    loopback: float

    def __str__(self) -> str:
        return (
            f"SHA-256 {self.sha256 / 1e9:.2f} GB/s a core; disk: write {self.write / 1e9:.2f} GB/s,"
            f" read {self.read / 1e9:.2f} GB/s; loopback {self.loopback / 1e9:.2f} GB/s"
        )

    def bound(self, size: int, *, files: int = 1) -> str:
        """Return, as text, the shortest time to hash and write `size` bytes, and what limits it.

        Each of the `files` can be hashed on another core.
        """
        cores = min(files, os.cpu_count() or 1)
        times = {"SHA-256": size / self.sha256 / cores, "disk writes": size / self.write}
        limit = max(times, key=lambda name: times[name])
        return f"bound {times[limit]:.2f} s ({limit})"


def machine_rates(directory: Path, size: int = 512 * MIB) -> Rates:
    """Measure and print the rates of this machine and the disk of `directory`, best of three."""
    tries = [_rates(directory, size) for _ in range(3)]
    rates = Rates(
        max(rates.sha256 for rates in tries),
        max(rates.write for rates in tries),
        max(rates.read for rates in tries),
        max(rates.loopback for rates in tries),
    )
    print(f"rates: {rates}", flush=True)
    return rates


def _rates(directory: Path, size: int) -> Rates:
    buffer = memoryview(mmap.mmap(-1, MIB))  # whole pages, as direct writes need them
    buffer[:] = os.urandom(MIB)
    direct = getattr(os, "O_DIRECT", 0)
    path = directory / "rates"
    hasher = hashlib.sha256()

    def timed(step: Callable[[], object]) -> float:
        started = time.perf_counter()
        for _ in range(size // MIB):
            step()
        return size / (time.perf_counter() - started)

    try:
        sha256 = timed(lambda: hasher.update(buffer))
        file = os.open(path, os.O_RDWR | os.O_CREAT | direct, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
            write = timed(lambda: os.writev(file, [buffer]))
            os.fsync(file)
            os.lseek(file, 0, os.SEEK_SET)
            read = timed(lambda: os.readv(file, [buffer]))
        finally:
            os.close(file)
        return Rates(sha256, write, read, _loopback_rate(path, size))
    finally:
        path.unlink(missing_ok=True)


def _loopback_rate(path: Path, size: int) -> float:
    """Return the rate at which one thread sends a cached file by `sendfile` and another reads."""
    warm(path)
    with (
        path.open("rb") as stream,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
    ):
        receiver, _ = listener.accept()
        with receiver:
            unused = bytearray(MIB)
            started = time.perf_counter()
            thread = threading.Thread(target=sender.sendfile, args=(stream,))
            thread.start()
            left = size
            while left and (count := receiver.recv_into(unused)):
                left -= count
            thread.join()
            return size / (time.perf_counter() - started)
