"""Time whole processes in alternating pairs, with the kernel's accounting of each process."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODELPACK = str(Path(sys.executable).with_name("modelpack"))
MEASURED = str(Path(__file__).parents[1] / "scripts" / "measured")
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process: wall seconds, CPU seconds and peak resident bytes."""

    wall: float
    cpu: float
    peak: int


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
