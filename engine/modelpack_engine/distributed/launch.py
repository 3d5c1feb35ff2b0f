"""Launch the ranks of a group on this machine, and end them together.

Each rank but 0 gets its own directory for the kernels that MLX compiles at run time. MLX leaves
them as files in the directory for temporary ones (`mlx/backend/cuda/jit_module.cpp`,
`mlx/backend/cpu/compiled.cpp`), and loads a file that is there without asking whether it is whole.
Ranks come to the same kernel at the same moment, so that one would load what another is writing.
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
from modelpack_engine.distributed.follower import Load, follow
from modelpack_engine.distributed.group import Group, find_place
from modelpack_engine.distributed.leader import Ranks
from modelpack_engine.errors import EngineError

#: Where MLX keeps CUDA's kernels, if they are not to go with the temporary files.
PTX_DIRECTORY = "MLX_PTX_CACHE_DIR"


def separate(rank: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Let a rank but 0 have directories of its own, which stay; before MLX compiles anything."""
    if rank == 0:
        return
    from platformdirs import user_cache_path

    directory = user_cache_path("modelpack") / "ranks" / str(rank)
    directory.mkdir(parents=True, exist_ok=True)
    environ["TMPDIR"] = str(directory)
    if given := environ.get(PTX_DIRECTORY):
        environ[PTX_DIRECTORY] = str(Path(given, f"rank-{rank}"))


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


@dataclass(frozen=True, slots=True)
class Follower:
    """A rank other than 0, connected to it."""

    group: Group
    channel: FollowerChannel

    def follow(self, load: Load) -> None:
        """Do what rank 0 says until it is done; raises what goes wrong."""
        follow(self.group, self.channel, load)


def join(size: int, on_failure: OnFailure) -> Ranks | Follower:
    """Join the other ranks, of which there are `size` in all; waits for them.

    MLX's default device has to be the one to compute on. `on_failure` is called from another thread
    when a rank ends or fails: this one may wait for it inside MLX by then, so that all it can do is
    to end the process. Raises `EngineError` if no launcher started this process as a rank.
    """
    place = find_place()
    if place is None:
        raise EngineError(
            "this process is no rank: MLX_RANK is not set",
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
    """Call `on_failure` when our launcher is gone, however it ended; does nothing under others."""
    lifeline = environ.get(LIFELINE)
    if lifeline is None:
        return

    def watch() -> None:
        os.read(int(lifeline), 1)  # nothing is ever written: this is its end
        on_failure(EngineError("the launcher of the ranks has ended"))

    threading.Thread(target=watch, name="modelpack-lifeline", daemon=True).start()
