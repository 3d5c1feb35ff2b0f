"""What this machine's processor can do."""

from __future__ import annotations

from pathlib import Path


def processor_flags() -> frozenset[str]:
    """Return the words of Linux's description of the processor; none on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split() if cpuinfo.exists() else ())
