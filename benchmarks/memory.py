"""Measure time, memory and disk for serving SmolLM2-135M (Q4_1 GGUF, 98 MB) on a CPU.

    python benchmarks/memory.py

Prints processor seconds to the first token, including imports, and resident memory (Linux) after
each stage. Uses one process without parallel work: run it on an idle machine.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

from modelpack_engine.request import EngineRequest

_MEBIBYTE = 1 << 20


def report(stage: str) -> None:
    """Print the processor time and memory of the process so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = int(status["VmRSS"].split()[0]) // 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{stage:12} {time.process_time():5.2f} CPU s   {now:5} MiB resident, peak {peak}")


def main() -> None:
    from modelpack_engine import Engine, SamplingParams

    report("imported")
    from modelpack.testing.weights import smollm2_gguf
    from modelpack_engine.models import ModelFiles, load

    weights = smollm2_gguf()
    loaded = load(ModelFiles.from_directory(weights), device="cpu")
    report("loaded")
    engine = Engine(loaded)
    report("engine")
    engine.add_request(
        "first", EngineRequest(list(range(5, 21)), SamplingParams(max_tokens=1, temperature=0))
    )
    while engine.has_work:
        engine.step()
    report("first token")
    engine.generate([[*range(100, 164)] for _ in range(8)], SamplingParams(max_tokens=32))
    report("8 requests")
    print(f"weights: {weights.stat().st_size / _MEBIBYTE:.0f} MiB on disk, ", end="")
    print(f"{loaded.weight_bytes / _MEBIBYTE:.0f} MiB in memory (float32)")


if __name__ == "__main__":
    main()
