"""The ranks of `modelpack serve --tensor-parallel-size`: started, led, or followed."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Literal

from modelpack.cli.options import Settings
from modelpack.cli.output import note, show_error
from modelpack.cli.request_log import request_log
from modelpack.errors import ModelpackError, UsageError

if TYPE_CHECKING:
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.parallel.leading import Ranks


def is_parallel(size: int | None) -> bool:
    """Return whether models are to be divided; raise `UsageError` if ranks would not know it."""
    if size is None and os.environ.get("MLX_RANK", "0") != "0":
        raise UsageError(
            f"this is rank {os.environ['MLX_RANK']} of several (MLX_RANK)",
            hint="give --tensor-parallel-size, or start one process without mlx.launch",
        )
    return size is not None and size > 1


def join_ranks(settings: Settings, size: int, config: EngineConfig) -> Ranks | int:
    """Return the ranks for rank 0 to lead.

    Returns the exit code where there is nothing to lead: once all ranks that were started from here
    have ended, or, in any rank but 0, once rank 0 is done.
    """
    from modelpack_engine import blas

    blas.prepare()  # before MLX
    from modelpack_engine.parallel.joining import Follower, join
    from modelpack_engine.parallel.launching import launch
    from modelpack_engine.parallel.place import find_place
    from modelpack_engine.platform.device import choose_device
    from modelpack_server.rank_models import parts_of

    device = choose_device(config)
    if find_place() is None:
        command = [sys.executable, "-m", "modelpack", *sys.argv[1:]]
        outcome = launch(command, size, backend=_backend(device))
        if outcome.failure:
            raise ModelpackError(outcome.failure)
        return outcome.code
    joined = join(size, _end)
    if not isinstance(joined, Follower):
        note(settings, f"{size} ranks have joined")
        return joined
    # Ctrl-C in a terminal reaches all ranks; rank 0 lets this one go when its requests are done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with request_log(settings):
        joined.follow(parts_of(settings.store(), config))
    return 0


def _backend(device: str) -> Literal["ring", "nccl"]:
    import mlx.core as mx

    return "nccl" if device == "gpu" and mx.cuda.is_available() else "ring"


def _end(error: ModelpackError) -> None:
    """End the process: its other threads may wait inside MLX for a rank that is gone."""
    show_error(error)
    sys.stdout.flush()
    os._exit(error.exit_code)
