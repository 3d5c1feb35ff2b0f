"""Machine: what of this computer decides which variant of a model it runs best."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

GPU = Literal["metal", "cuda", "none"]

#: Share of the memory that weights may take: keys and values, and everything else, need the rest.
WEIGHTS_SHARE: Final = 0.75
# image-spec names processors as Go does (GOARCH).
_ARCHITECTURES: Final = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_NVIDIA: Final = Path("/proc/driver/nvidia/version")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Machine:
    """`platform` is os/architecture as image-spec spells them; `memory` are bytes, None unknown.

    With a GPU of its own memory, that is meant. `backend` is what was asked to run the model with:
    `mlx`, `llama.cpp` or `vllm`; None leaves it open.
    """

    platform: str
    gpu: GPU = "none"
    memory: int | None = None
    backend: str | None = None

    @classmethod
    def here(cls, backend: str | None = None) -> Machine:
        """Return this machine."""
        system = "darwin" if sys.platform == "darwin" else sys.platform
        machine = platform.machine().lower()
        name = f"{system}/{_ARCHITECTURES.get(machine, machine)}"
        if name == "darwin/arm64":
            return cls(name, "metal", _physical_memory(), backend)
        if _NVIDIA.exists():
            return cls(name, "cuda", _nvidia_memory(), backend)
        return cls(name, "none", _memory_limit(), backend)

    @property
    def room(self) -> int | None:
        """Bytes that weights may take; None if that is unknown."""
        return None if self.memory is None else int(self.memory * WEIGHTS_SHARE)


def _physical_memory() -> int | None:
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _memory_limit() -> int | None:
    """Return the memory of the machine, or of the container that this is."""
    limits = [_physical_memory()]
    with suppress(OSError, ValueError):
        limits.append(int(_CGROUP_LIMIT.read_text()))
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _nvidia_memory(
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> int | None:
    """Return the bytes of the first GPU, if its driver's own program says."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        done = run(command, capture_output=True, text=True, check=True, timeout=10)
        return int(done.stdout.split()[0]) * 1024**2
    return None
