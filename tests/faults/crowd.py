"""Processes that use one store at once, each at its own kind of work, until a time is up."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.faults.victim import SERVER

Words = list[str]


def tagging(me: str, work: Path, remote: str) -> Iterator[Words]:
    """Give one model more and more names, and take every fourth away again."""
    number = 0
    while True:
        number += 1
        yield ["tag", "team/pinned:v1", f"team/pinned:{me}-{number}"]
        if number % 4 == 0:
            yield ["rm", f"team/pinned:{me}-{number}"]


def packaging(me: str, work: Path, remote: str) -> Iterator[Words]:
    """Package other bytes under the same name each time: what was there becomes rubbish."""
    from tests.weights import write_safetensors

    number = 0
    while True:
        number += 1
        folder = work / me
        write_safetensors(folder / "model.safetensors", os.urandom(200_000))
        yield ["package", "--safetensors-dir", str(folder), f"team/{me}:v1"]
        yield ["resolve", f"team/{me}:v1"]


def pulling(me: str, work: Path, remote: str) -> Iterator[Words]:
    """Pull a model, and remove it as often."""
    del me, work
    while True:
        yield ["pull", remote]
        yield ["inspect", remote]


def removing(me: str, work: Path, remote: str) -> Iterator[Words]:
    """Pull a model of one's own and remove it."""
    del work
    own = remote.replace("/model:", f"/{me}:")
    while True:
        yield ["pull", own]
        yield ["rm", own]


def collecting(me: str, work: Path, remote: str) -> Iterator[Words]:
    """Collect everything that nobody needs, and look the store through."""
    del me, work, remote
    while True:
        yield ["gc", "--grace", "0"]
        yield ["fsck", "--fast"]


#: Commands that each process runs however slow the machine is.
LEAST = 4
#: What each process does; the server is the eighth.
ROLES: dict[str, Callable[[str, Path, str], Iterator[Words]]] = {
    "tagger-1": tagging,
    "tagger-2": tagging,
    "packager-1": packaging,
    "packager-2": packaging,
    "puller": pulling,
    "remover": removing,
    "collector": collecting,
}


def work_until(deadline: float, role: str, store: Path, work: Path, remote: str) -> None:
    """Do the role's work until `deadline`; say which names are there at the end, or what failed.

    In `work`: ROLE.done has a line for each command, ROLE.out what the last one printed.
    """
    from modelpack.cli.main import run

    done = (work / f"{role}.done").open("w")
    code = 0
    for number, words in enumerate(ROLES[role](role, work, remote), 1):
        with (work / f"{role}.out").open("wb", buffering=0) as output:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            code = run(["--store", str(store), "--progress", "none", *words])
            with suppress(OSError):
                sys.stderr.flush()
        done.write(f"{code} {' '.join(words)}\n")
        if code or (time.monotonic() > deadline and number >= LEAST):
            break
    done.close()
    os._exit(code)


def started(deadline: float, role: str, store: Path, work: Path, remote: str) -> ForkServerProcess:
    """Start a process that does `work_until`."""
    process = SERVER.Process(target=work_until, args=(deadline, role, store, work, remote))
    process.start()
    return process


def commands(work: Path, role: str) -> list[tuple[int, list[str]]]:
    """Return what a role has run: exit codes and words."""
    lines = (work / f"{role}.done").read_text().splitlines()
    return [(int(code), words) for code, *words in map(str.split, lines)]
