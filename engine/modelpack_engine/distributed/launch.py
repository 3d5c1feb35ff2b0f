"""Launch the ranks of a group on this machine, and end them together.

Each rank but 0 gets its own directory for the kernels that MLX compiles at run time. MLX leaves
them in the directory for temporary files (`mlx/backend/cuda/jit_module.cpp`,
`mlx/backend/cpu/compiled.cpp`), and loads an existing file without checking that it is complete.
Ranks need the same kernel at the same time, so one would load a file that another is writing.
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
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from modelpack_engine.distributed.channel import (
    TOKEN_BYTES,
    FollowerChannel,
    LeaderChannel,
    OnFailure,
)
from modelpack_engine.distributed.follower import Follower
from modelpack_engine.distributed.group import Group, find_place
from modelpack_engine.distributed.leader import Ranks
from modelpack_engine.errors import EngineError

#: The variable with MLX's directory for CUDA kernels, if it is not that for temporary files.
PTX_DIRECTORY = "MLX_PTX_CACHE_DIR"


def separate(rank: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Give a rank other than 0 its own persistent directories, before MLX compiles anything."""
    if rank == 0:
        return
    from platformdirs import user_cache_path

    directory = user_cache_path("modelpack") / "ranks" / str(rank)
    directory.mkdir(parents=True, exist_ok=True)
    environ["TMPDIR"] = str(directory)
    if given := environ.get(PTX_DIRECTORY):
        environ[PTX_DIRECTORY] = str(Path(given, f"rank-{rank}"))


#: The variable with the descriptor of a pipe that ends when the launcher of a rank ends.
LIFELINE = "MODELPACK_LIFELINE"

#: Seconds that ranks have to report why they end, once one has ended.
PATIENCE = 3.0
#: The number of signals that are forwarded to rank 0; the next one kills all ranks.
_SIGNALS = 2
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the ranks ended: rank 0's exit code, and an error unless rank 0 ended by itself."""

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
                        # NCCL prints to stdout that it has connected; only rank 0's output is ours.
                        stdout=None if rank == 0 else 2,
                    )
                    ranks.append(process)
                return _wait(ranks, deadline)
        finally:
            _kill(ranks)
            os.close(held)
            os.close(lifeline)


def visible_gpus(size: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES for each rank; raises `EngineError` for too few GPUs."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        import mlx.core as mx

        listed = ",".join(str(i) for i in range(mx.device_count(mx.gpu)))
    devices = [part.strip() for part in listed.split(",") if part.strip()]
    if len(devices) < size:
        raise EngineError(
            f"{size} ranks need {size} GPUs, but only {len(devices)} are visible",
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
    """Return once all ranks have ended, or `PATIENCE` seconds after the first has ended."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def report(rank: int) -> None:
        ranks[rank].wait()
        ended.put(rank)

    for rank in range(len(ranks)):
        threading.Thread(target=report, args=(rank,), daemon=True).start()
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
    """Forward SIGINT and SIGTERM to rank 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    num_signals = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        for process in ranks if num_signals > _SIGNALS else ranks[:1]:
            process.send_signal(number if num_signals <= _SIGNALS else signal.SIGKILL)

    signals = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.signal(number, forward) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def join(size: int, on_failure: OnFailure) -> Ranks | Follower:
    """Join the other ranks, of which there are `size` in all; waits for them.

    MLX's default device has to be the one to compute on. `on_failure` is called from another thread
    when a rank ends or fails. This thread may wait for that rank inside MLX, so `on_failure` can
    only end the process. Raises `EngineError` if no launcher started this process as a rank.
    """
    place = find_place()
    if place is None:
        raise EngineError(
            "this process is not a rank: MLX_RANK is not set",
            hint="start it with mlx.launch or modelpack_engine.distributed.launch.launch",
        )
    separate(place.rank)
    end_with_launcher(on_failure)
    group = Group(place, size)
    if group.rank == 0:
        leader = LeaderChannel(size, place.host, on_failure)
        port = leader.address[1]
        group.broadcast(leader.token + f"{place.host}:{port}".encode())
        leader.accept()
        return Ranks(group, leader)
    said = group.broadcast(b"")
    host, _, number = said[TOKEN_BYTES:].decode().rpartition(":")
    channel = FollowerChannel(group.rank, (host, int(number)), said[:TOKEN_BYTES], on_failure)
    return Follower(group, channel)


def end_with_launcher(on_failure: OnFailure, environ: Mapping[str, str] = os.environ) -> None:
    """Call `on_failure` when our launcher ends; does nothing under another launcher."""
    lifeline = environ.get(LIFELINE)
    if lifeline is None:
        return

    def watch() -> None:
        os.read(int(lifeline), 1)  # returns at the end of the pipe: nothing is ever written
        on_failure(EngineError("the launcher of the ranks has ended"))

    threading.Thread(target=watch, name="modelpack-lifeline", daemon=True).start()
