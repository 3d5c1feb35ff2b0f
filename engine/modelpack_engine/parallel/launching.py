"""launch: the ranks of this machine as processes, all of which end if one does.

A rank that waits for another inside MLX hears nothing: so the launcher is no rank itself, and ends
the others when one has ended. Ranks are in process groups of their own: of a Ctrl-C only rank 0
hears, by way of the launcher, and it lets the others go when its requests are done.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from modelpack_engine.errors import EngineError

#: The descriptor whose end tells a rank that its launcher is gone.
LIFELINE = "MODELPACK_LIFELINE"

#: Seconds that ranks get to say why they end, once one has ended.
PATIENCE = 3.0
#: Signals after which rank 0 has heard enough: the next kills all.
_SIGNALS = 2
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the ranks ended: rank 0's exit code, and a text if it was not by rank 0's own doing."""

    code: int
    failure: str = ""


def launch(
    command: Sequence[str],
    size: int,
    *,
    backend: Literal["ring", "nccl"],
    environ: Mapping[str, str] = os.environ,
    deadline: float | None = None,
) -> Outcome:
    """Run `command` as `size` ranks on this machine; return when all have ended.

    With "nccl", rank i gets the i-th of the GPUs that are visible here. All are killed after
    `deadline` seconds. Raises `EngineError` if there are too few GPUs.
    """
    devices = visible_gpus(size, environ) if backend == "nccl" else None
    with tempfile.TemporaryDirectory(prefix="modelpack-ranks-") as directory:
        shared = _group_environment(backend, size, directory)
        lifeline, held = os.pipe()
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            with _forwarding(ranks):
                for rank in range(size):
                    own = {"MLX_RANK": str(rank), LIFELINE: str(lifeline)}
                    if devices is not None:
                        own["CUDA_VISIBLE_DEVICES"] = devices[rank]
                    process = subprocess.Popen(
                        command,
                        env={**environ, **shared, **own},
                        pass_fds=[lifeline],
                        process_group=0,
                        stdin=subprocess.DEVNULL,
                        # NCCL says on stdout that it has connected; what rank 0 prints is ours.
                        stdout=None if rank == 0 else 2,
                    )
                    ranks.append(process)
                return _wait(ranks, deadline)
        finally:
            _kill(ranks)
            os.close(held)
            os.close(lifeline)


def visible_gpus(size: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES has to be for each rank; raises `EngineError`."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        import mlx.core as mx

        listed = ",".join(str(i) for i in range(mx.device_count(mx.gpu)))
    devices = [part.strip() for part in listed.split(",") if part.strip()]
    if len(devices) < size:
        raise EngineError(
            f"{size} ranks need as many GPUs, and this machine shows {len(devices)}",
            hint="lower --tensor-parallel-size, or set CUDA_VISIBLE_DEVICES",
        )
    return devices[:size]


def _group_environment(backend: str, size: int, directory: str) -> dict[str, str]:
    if backend == "nccl":
        [port] = _free_ports(1)
        return {"NCCL_HOST_IP": _HOST, "NCCL_PORT": str(port), "MLX_WORLD_SIZE": str(size)}
    path = os.path.join(directory, "hosts.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump([[f"{_HOST}:{port}"] for port in _free_ports(size)], file)
    return {"MLX_HOSTFILE": path}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((_HOST, 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline: float | None) -> Outcome:
    """Return once all have ended; who has not when another ends is given a moment, no more."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for rank, process in enumerate(ranks):
        threading.Thread(target=_report, args=(rank, process, ended), daemon=True).start()
    last = None if deadline is None else time.monotonic() + deadline
    first: int | None = None
    for _ in ranks:
        left = None if last is None else max(0.0, last - time.monotonic())
        try:
            rank = ended.get(timeout=left)
        except queue.Empty:
            if first is None:
                return Outcome(124, f"the ranks had not ended after {deadline:.0f} s")
            break
        if first is None:
            first, last = rank, time.monotonic() + PATIENCE
    assert first is not None
    code = ranks[0].poll()
    if first != 0 and (code is None or code < 0):
        return Outcome(1, f"rank {first} of {len(ranks)} {_ending(ranks[first])}")
    assert code is not None
    if code < 0:
        return Outcome(128 - code, f"rank 0 of {len(ranks)} {_ending(ranks[0])}")
    return Outcome(code)


def _report(rank: int, process: subprocess.Popen[bytes], ended: queue.SimpleQueue[int]) -> None:
    process.wait()
    ended.put(rank)


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code >= 0:
        return f"ended with the exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by the signal {-code}"


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()
    for process in ranks:
        process.wait()


@contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Have rank 0 get what the launcher is told by SIGINT and SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    heard = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        for process in ranks if heard > _SIGNALS else ranks[:1]:
            process.send_signal(number if heard <= _SIGNALS else signal.SIGKILL)

    signals = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.signal(number, forward) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
