"""What a model asks of a cluster, worked out from the size of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modelpack.errors import UnsupportedError
from modelpack.model import Model

GIB = 2**30
#: Beside the weights: KV cache and activations, as a share of them; and a process, in bytes.
_BESIDE = 0.2
_PROCESS = 2 * GIB
#: Bytes a second at which weights are taken to come off a volume, and seconds for all else.
_LOADING = 100 * 10**6
_STARTING = 300


@dataclass(frozen=True, slots=True)
class Demands:
    """`weights` in bytes; `memory` of a process that computes on a CPU, `host_memory` of one that
    computes on GPUs, `disk` of a copy, in GiB; `start_seconds` until it answers, at the most.
    """

    weights: int

    @property
    def memory(self) -> int:
        """Weights, KV cache and the process."""
        return _gib(self.weights * (1 + _BESIDE) + _PROCESS)

    @property
    def host_memory(self) -> int:
        """What loading takes: the files pass through the page cache, which counts as well."""
        return _gib(self.weights / 2 + 4 * _PROCESS)

    @property
    def disk(self) -> int:
        """A copy, and room to write."""
        return _gib(self.weights * 1.05 + GIB)

    @property
    def start_seconds(self) -> int:
        """Loading, compiling and warming up."""
        return _STARTING + math.ceil(self.weights / _LOADING)

    def gpus(self, memory: int) -> int:
        """How many GPUs of `memory` bytes it takes: a power of two, as heads divide by."""
        needed = math.ceil(self.weights * (1 + _BESIDE) / (memory * 0.9))
        return 1 << (needed - 1).bit_length() if needed > 1 else 1


def demands_of(model: Model) -> Demands:
    """Return what `model` asks for; raise `UnsupportedError` for one without weights."""
    weights = sum(file.descriptor.size for file in model.files() if file.format)
    if not weights:
        raise UnsupportedError(f"{model.reference or model.short_id} has no weights to serve")
    return Demands(weights)


def _gib(size: float) -> int:
    return math.ceil(size / GIB)
