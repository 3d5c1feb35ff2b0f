"""MemoryBudget: what loaded models may take together, and who gives way."""

from __future__ import annotations

from collections.abc import Collection

from modelpack_engine.errors import OutOfMemoryError
from modelpack_engine.pool.entry import Entry


class MemoryBudget:
    """`total` bytes for all of `entries`; None: no limit but the machine's."""

    def __init__(self, total: int | None, entries: Collection[Entry]) -> None:
        self.total = total
        self._entries = entries

    def free(self) -> int | None:
        """Return the bytes that nobody has."""
        if self.total is None:
            return None
        return self.total - sum(entry.memory for entry in self._entries)

    def victim(self, but: Entry) -> Entry | None:
        """Return the idle model that was used longest ago."""
        idle = [entry for entry in self._entries if entry is not but and entry.may_go]
        return min(idle, key=lambda entry: entry.last_used, default=None)

    def too_large(self, entry: Entry, need: int) -> OutOfMemoryError:
        """Return the error for what does not fit: what it needs, what there is, and who has it."""
        holders = [
            f"{other.name} {_shown(other.memory)} ({'pinned' if other.pinned else 'in use'})"
            for other in self._entries
            if other.memory and other is not entry
        ]
        held = f"; held by {', '.join(holders)}" if holders else ""
        return OutOfMemoryError(
            f"the model {entry.name} needs about {_shown(need)}; free are "
            f"{_shown(max(0, self.free() or 0))} of {_shown(self.total or 0)}{held}",
            hint="unload a model, give its KV cache less (--kv-cache-bytes), or raise --memory",
        )


def _shown(number: int) -> str:
    return f"{number / 1024**3:.2f} GiB" if number >= 1024**3 else f"{number / 1024**2:.1f} MiB"
