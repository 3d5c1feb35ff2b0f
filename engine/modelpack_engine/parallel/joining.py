"""join: from the environment of a launcher to a rank that leads or follows."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from modelpack_engine.errors import EngineError
from modelpack_engine.parallel.channel import (
    TOKEN_BYTES,
    FollowerChannel,
    LeaderChannel,
    OnFailure,
)
from modelpack_engine.parallel.following import Load, follow
from modelpack_engine.parallel.group import Group
from modelpack_engine.parallel.kernel_files import separate
from modelpack_engine.parallel.launching import LIFELINE
from modelpack_engine.parallel.leading import Ranks
from modelpack_engine.parallel.place import find_place


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
            hint="start it with mlx.launch or modelpack_engine.parallel.launching.launch",
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
