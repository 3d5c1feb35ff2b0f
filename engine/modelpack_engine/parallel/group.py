"""Group: MLX's group of ranks, and what is shared over it.

**Who chooses a token.** Rank 0 samples, and its tokens are added to the others' zeros on the
device: every rank has them without the host having seen them, so that a step can still be built
while the one before it runs. Each rank could sample for itself, as all have the same logits. But it
would have to know each request's parameters, seed, penalties and masks; and where two ranks differ
in the last bit (two kinds of Macs, another BLAS), one tie that falls the other way would leave
their caches with different texts from there on, unnoticed. The sum of a few integers costs less
than one of a layer's.
"""

from __future__ import annotations

import time

import mlx.core as mx

from modelpack_engine.errors import EngineError
from modelpack_engine.parallel import order
from modelpack_engine.parallel.place import Place

#: Seconds that a rank may start later than another; MLX itself gives up after 15.
_JOINING = 60.0
# Integers that the address of the channel is sent in: a length, then a byte each.
_ADDRESS = 256


class Group:
    """The ranks that MLX has connected; `mlx` is its own group."""

    def __init__(self, place: Place, size: int) -> None:
        """Connect, which waits for all ranks; raises `EngineError`."""
        order.install()
        self.mlx = _join(place)
        self.rank: int = self.mlx.rank()
        self.size: int = self.mlx.size()
        if self.size != size:
            raise EngineError(
                f"{self.size} ranks were started, and the tensor parallel size is {size}",
                hint=f"start as many ranks, or give --tensor-parallel-size {self.size}",
            )

    def broadcast(self, data: bytes) -> bytes:
        """Return rank 0's `data`, at most 255 bytes, on every rank; theirs are ignored."""
        numbers = [0] * _ADDRESS
        if self.rank == 0:
            assert len(data) < _ADDRESS
            numbers[: len(data) + 1] = [len(data), *data]
        total: list[int] = mx.distributed.all_sum(
            mx.array(numbers, mx.int32), group=self.mlx
        ).tolist()  # type: ignore[assignment]
        return bytes(total[1 : total[0] + 1])

    def give_tokens(self, token_ids: mx.array) -> mx.array:
        """Rank 0: return the tokens, int32 [rows], as every rank gets them."""
        return mx.distributed.all_sum(token_ids, group=self.mlx)

    def take_tokens(self, count: int, logits: mx.array) -> mx.array:
        """Any other rank: return the tokens that rank 0 samples, int32 [count].

        `logits` come first, as at rank 0: the ranks have to come by all sums in one order.
        """
        zeros = mx.depends([mx.zeros((count,), mx.int32)], [logits])[0]
        return mx.distributed.all_sum(zeros, group=self.mlx)


def _join(place: Place) -> mx.distributed.Group:
    """Return MLX's group; a rank that is not there yet is tried again, as it may start slowly."""
    deadline = time.monotonic() + _JOINING
    while True:
        try:
            return mx.distributed.init(strict=True, backend=place.backend)
        except (RuntimeError, ValueError) as error:
            if "connect" not in str(error) or time.monotonic() > deadline:
                raise EngineError(
                    f"rank {place.rank} cannot join the others by {place.backend}: {error}"
                ) from error
