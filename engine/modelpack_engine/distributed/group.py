"""Group: the ranks that MLX connects, and collectives that run in the same order on all of them.

MLX runs independent operations in any order, and the ranks' graphs differ a little (only rank 0
samples), so their orders may differ too. In most models every collective needs the result of the
one before it. But where sequences are computed one by one, their collectives are independent: two
ranks that run them in different orders add up parts of different sequences, without any error.
Each collective is therefore made to depend on the one before it in its step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import StepBatch
from modelpack_engine.errors import EngineError
from modelpack_engine.patches import functions
from modelpack_engine.runner.fallback import FallbackRunner
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_runner import ModelRunner, make_engine_runner
from modelpack_engine.runner.paged import PagedRunner


class OrderedPagedRunner(PagedRunner):
    """A paged runner of one rank's part of a model; its collectives run in order."""

    def forward(
        self, batch: StepBatch, token_ids: mx.array, input_embeddings: mx.array | None = None
    ) -> mx.array:
        functions.begin_collectives()
        logits = super().forward(batch, token_ids, input_embeddings)
        if self.is_compiled(batch):
            # The arrays of a trace must not be used outside it; its graph is connected anyway.
            functions.begin_collectives()
        return logits


class OrderedFallbackRunner(FallbackRunner):
    """A fallback runner of one rank's part of a model; its collectives run in order."""

    def forward(
        self, batch: StepBatch, token_ids: mx.array, input_embeddings: mx.array | None = None
    ) -> mx.array:
        functions.begin_collectives()
        return super().forward(batch, token_ids, input_embeddings)


def make_ordered_runner(model: nn.Module, sizes: Sizes, config: EngineConfig) -> ModelRunner:
    """Return the runner of a rank's part of a model."""
    return make_engine_runner(
        model,
        sizes,
        config,
        paged_runner=OrderedPagedRunner,
        fallback_runner=OrderedFallbackRunner,
    )


Backend = Literal["ring", "nccl", "jaccl"]

#: The variable with the address on which rank 0 listens, if not its address in the group.
CHANNEL_HOST = "MODELPACK_CHANNEL_HOST"


@dataclass(frozen=True, slots=True)
class Place:
    """A rank of a group that MLX connects by `backend`; `host` is rank 0's address."""

    rank: int
    backend: Backend
    host: str


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that MLX's variables give this process, or None if they are not set.

    Raises `EngineError` if they are not valid. Source: MLX's documentation, "Distributed
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
        try:
            with open(path, encoding="utf-8") as file:
                return "ring", _host_of(str(json.load(file)[0][0]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            why = f"not a list of the ranks' addresses: {error}"
            raise EngineError(f"MLX_HOSTFILE {path}: {why}") from None
    raise EngineError(
        "MLX_RANK is set, but neither MLX_HOSTFILE (ring), NCCL_HOST_IP (NCCL) nor "
        "MLX_JACCL_COORDINATOR (JACCL)",
        hint="start the ranks with mlx.launch, or unset MLX_RANK to start them on this machine",
    )


def _host_of(address: str) -> str:
    return address.rpartition(":")[0] or address


#: Seconds that a rank may start later than another; MLX itself gives up after 15.
_JOINING = 60.0
# The number of integers in a broadcast: the length of the data, then one for each byte.
_ADDRESS = 256


class Group:
    """The ranks that MLX has connected; `mlx` is MLX's group."""

    def __init__(self, place: Place, size: int) -> None:
        """Connect, which waits for all ranks; raises `EngineError`."""
        functions.install(functions.COLLECTIVES)
        self.mlx = _join(place)
        self.rank: int = self.mlx.rank()
        self.size: int = self.mlx.size()
        if self.size != size:
            raise EngineError(
                f"{self.size} ranks were started, but the tensor parallel size is {size}",
                hint=f"start {size} ranks, or use --tensor-parallel-size {self.size}",
            )

    def broadcast(self, data: bytes) -> bytes:
        """Return rank 0's `data`, at most 255 bytes, on every rank; ignore that of other ranks."""
        numbers = [0] * _ADDRESS
        if self.rank == 0:
            assert len(data) < _ADDRESS
            numbers[: len(data) + 1] = [len(data), *data]
        total: list[int] = mx.distributed.all_sum(
            mx.array(numbers, mx.int32), group=self.mlx
        ).tolist()  # type: ignore[assignment]
        return bytes(total[1 : total[0] + 1])

    def give_tokens(self, token_ids: mx.array) -> mx.array:
        """Rank 0: send the sampled tokens, int32 [rows], to every rank; return them."""
        return mx.distributed.all_sum(token_ids, group=self.mlx)

    def take_tokens(self, logits: mx.array) -> mx.array:
        """Any other rank: return the tokens that rank 0 samples, int32 [rows of `logits`].

        The result depends on `logits`, as on rank 0, so that all collectives run in one order.
        """
        zeros = mx.depends([mx.zeros((logits.shape[0],), mx.int32)], [logits])[0]
        return mx.distributed.all_sum(zeros, group=self.mlx)


def _join(place: Place) -> mx.distributed.Group:
    """Return MLX's group; try again while a rank that starts slowly is missing."""
    deadline = time.monotonic() + _JOINING
    while True:
        try:
            return mx.distributed.init(strict=True, backend=place.backend)
        except (RuntimeError, ValueError) as error:
            if "connect" not in str(error) or time.monotonic() > deadline:
                raise EngineError(
                    f"rank {place.rank} cannot join the others over {place.backend}: {error}"
                ) from error
