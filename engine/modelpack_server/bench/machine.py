"""The machine a benchmark ran on: processor, memory, system, and a Mac's power supply."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import modelpack

#: Distributions whose versions decide how fast a model of ours runs.
_PACKAGES = ("mlx", "mlx-lm", "llama-cpp-python")
_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Machine:
    """`memory` is in bytes; `power` is "AC" or "battery" where the system tells."""

    processor: str
    cores: int
    memory: int
    system: str
    gpu: str = ""
    power: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what is known."""
        found: dict[str, Any] = {
            "processor": self.processor,
            "cores": self.cores,
            "memory_bytes": self.memory,
            "system": self.system,
            "gpu": self.gpu,
            "power": self.power,
            "versions": dict(self.versions),
        }
        return {name: value for name, value in found.items() if value}


def this_machine() -> Machine:
    """Return what can be found out of this machine; unknown parts are empty."""
    mac = platform.system() == "Darwin"
    return Machine(
        processor=(_output("sysctl", "-n", "machdep.cpu.brand_string") if mac else _cpuinfo())
        or platform.machine(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"macOS {platform.mac_ver()[0]}" if mac else platform.platform(),
        gpu=_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").replace("\n", ", "),
        power=_power(_output("pmset", "-g", "batt")) if mac else "",
        versions={"python": platform.python_version()},
    )


def our_versions() -> dict[str, str]:
    """Return the versions of what a server that is started here runs."""
    found = {"modelpack": modelpack.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _power(text: str) -> str:
    return "battery" if "Battery Power" in text else "AC" if "AC Power" in text else ""


def _cpuinfo() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "")


def _output(*command: str) -> str:
    """Return what a program prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
