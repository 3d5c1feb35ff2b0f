"""The memory budget for the models of a pool."""

from __future__ import annotations

from collections.abc import Collection

from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import OutOfMemoryError
from modelpack_engine.platform import blas
from modelpack_server.pool.entry import Entry

_CPU_SHARE = 0.8


def device_memory(config: EngineConfig) -> int:
    """Return the bytes that all models together may use.

    On a GPU, that is the share `gpu_memory_utilization` of its recommended working set; on a CPU,
    four fifths of the memory that is available without swapping.
    """
    blas.prepare()
    from modelpack_engine.platform.device import available_memory, choose_device, total_memory

    if choose_device(config) == "cpu":
        return int(available_memory() * _CPU_SHARE)
    return int(total_memory() * config.gpu_memory_utilization)


# The share of the memory left after its weights that an engine may use for its KV cache.
_KV_SHARE = 0.5


class MemoryBudget:
    """The budget of `total` bytes for all of `entries`; None: only the machine's limit."""

    def __init__(self, total: int | None, entries: Collection[Entry]) -> None:
        self.total = total
        #: The bytes reserved for abandoned loads whose threads still run.
        self.abandoned = 0
        self._entries = entries

    def free(self) -> int | None:
        """Return the bytes that no model uses or has reserved."""
        if self.total is None:
            return None
        return self.total - self.abandoned - sum(entry.memory for entry in self._entries)

    def obtainable(self, but: Entry) -> int | None:
        """Return the bytes that are free once all idle models but one are unloaded."""
        free = self.free()
        if free is None:
            return None
        return free + sum(e.memory for e in self._entries if e is not but and e.may_go)

    def reserve(self, entry: Entry, need: int) -> int | None:
        """Reserve memory for a load; return the bytes that it may use.

        An engine uses a share of the free memory for its KV cache; the rest is for other loads.
        """
        entry.memory = 0
        room = self.free()
        entry.memory = need + int(max(0, (room or 0) - need) * _KV_SHARE)
        return room

    def holds(self, need: int) -> bool:
        """Return whether `need` bytes fit at all, if no other model is loaded."""
        return self.total is None or need <= self.total - self.abandoned

    def may_grow(self, but: Entry, need: int) -> bool:
        """Return whether models that are loading or just loaded may leave `need` bytes free."""
        if self.total is None or not self.holds(need):
            return False
        return any(
            entry is not but and entry.memory and not entry.users and entry.is_wanted
            for entry in self._entries
        )

    def victim(self, but: Entry) -> Entry | None:
        """Return the least recently used idle model, or None."""
        idle = [entry for entry in self._entries if entry is not but and entry.may_go]
        return min(idle, key=lambda entry: entry.last_used, default=None)

    def too_large(self, entry: Entry, need: int) -> OutOfMemoryError:
        """Return the error for a model that does not fit, with the free memory and its users."""
        holders = [
            f"{other.name} {_shown(other.memory)} ({'pinned' if other.pinned else 'in use'})"
            for other in self._entries
            if other.memory and other is not entry
        ]
        held = f"; held by {', '.join(holders)}" if holders else ""
        return OutOfMemoryError(
            f"the model {entry.name} needs about {_shown(need)}; free are "
            f"{_shown(max(0, self.free() or 0))} of {_shown(self.total or 0)}{held}",
            hint="unload a model, lower --kv-cache-bytes, or raise --memory",
        )


def _shown(number: int) -> str:
    return f"{number / 1024**3:.2f} GiB" if number >= 1024**3 else f"{number / 1024**2:.1f} MiB"
