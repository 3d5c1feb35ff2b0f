"""How much memory there is for models on this machine."""

from __future__ import annotations

from modelpack_engine import blas
from modelpack_engine.config import EngineConfig

_CPU_SHARE = 0.8


def device_memory(config: EngineConfig) -> int:
    """Return the bytes that all models together may take.

    On a GPU, `gpu_memory_utilization` of what it recommends; on a CPU, four fifths of what is
    available without swapping.
    """
    blas.prepare()
    from modelpack_engine.gpu_memory import total_memory
    from modelpack_engine.platform.device import choose_device
    from modelpack_engine.sizing import available_memory

    if choose_device(config) == "cpu":
        return int(available_memory() * _CPU_SHARE)
    return int(total_memory() * config.gpu_memory_utilization)
