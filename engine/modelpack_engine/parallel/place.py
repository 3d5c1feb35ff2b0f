"""Place: which rank this process is, as the environment of `mlx.launch` or our launcher says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from modelpack_engine.errors import EngineError

Backend = Literal["ring", "nccl", "jaccl"]

#: Where rank 0 listens for the others, where its address in the group is not the right one.
CHANNEL_HOST = "MODELPACK_CHANNEL_HOST"


@dataclass(frozen=True, slots=True)
class Place:
    """A rank of a group that MLX connects by `backend`; `host` is rank 0's address."""

    rank: int
    backend: Backend
    host: str


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that MLX's variables give this process; None if nothing launched it so.

    Raises `EngineError` where they make no sense. Source: MLX's documentation, "Distributed
    Communication", section "Distributed Without mlx.launch".
    """
    rank = environ.get("MLX_RANK")
    if rank is None:
        return None
    if not rank.isascii() or not rank.isdigit():
        raise EngineError(f"MLX_RANK is {rank!r}, expected a number from 0")
    backend, host = _backend(environ)
    return Place(int(rank), backend, environ.get(CHANNEL_HOST) or host)


def _backend(environ: Mapping[str, str]) -> tuple[Backend, str]:
    if host := environ.get("NCCL_HOST_IP"):
        return "nccl", host
    if coordinator := environ.get("MLX_JACCL_COORDINATOR"):
        return "jaccl", _host_of(coordinator)
    if path := environ.get("MLX_HOSTFILE"):
        return "ring", _host_of(_first_address(path))
    raise EngineError(
        "MLX_RANK is set, but neither MLX_HOSTFILE (ring), NCCL_HOST_IP (NCCL) nor "
        "MLX_JACCL_COORDINATOR (JACCL)",
        hint="start the ranks with mlx.launch, or leave MLX_RANK out: then they are started here",
    )


def _first_address(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            address = json.load(file)[0][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"MLX_HOSTFILE {path}: no list of the ranks' addresses: {error}"
        ) from None
    return str(address)


def _host_of(address: str) -> str:
    return address.rpartition(":")[0] or address
