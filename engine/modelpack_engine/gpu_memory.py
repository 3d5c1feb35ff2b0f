"""How much memory the GPU has, and how much of it is used: Metal and CUDA say it in other words."""

from __future__ import annotations

import mlx.core as mx


def total_memory() -> int:
    """Return the bytes of the GPU's memory that may be used."""
    info = mx.device_info()
    total = int(info["memory_size"] if "memory_size" in info else info["total_memory"])
    return min(total, int(info.get("max_recommended_working_set_size", total)))


def used_memory() -> int:
    """Return the bytes that are used: by MLX, and where the GPU tells, by other processes, too."""
    info = mx.device_info()
    used = mx.get_active_memory()
    if "free_memory" in info and "total_memory" in info:
        used = max(used, int(info["total_memory"]) - int(info["free_memory"]))
    return used
