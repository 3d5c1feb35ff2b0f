"""Compare the sampling kernel with MLX's functions on a GPU.

    python benchmarks/sampling.py [--vocabulary 128256]

Logits are bfloat16. Prints a line for each number of token rows and each sampling method with the
milliseconds of a call, as the median of five evaluations of 16 calls each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from modelpack_engine.platform.device import Staging
from modelpack_engine.request import SamplingParams
from modelpack_engine.sampling import plan, sampler
from modelpack_engine.sampling.plan import Draws, Entry, plan_draws

CALLS, TIMES, ROWS = 16, 5, (1, 32, 128)
WAYS = {
    "temperature": SamplingParams(temperature=0.7),
    "top-k 20, top-p 0.8": SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    "top-p 0.9": SamplingParams(temperature=0.7, top_p=0.9),
    "min-p 0.05": SamplingParams(temperature=0.7, min_p=0.05),
}
Way = Callable[[mx.array, Draws, sampler.Keys, Staging], mx.array]


def by_kernel(logits: mx.array, draws: Draws, keys: sampler.Keys, staging: Staging) -> mx.array:
    """Return the tokens that the kernel draws."""
    settings = sampler.settings_of(draws, keys)
    return sampler.by_kernel(logits, staging.put(settings.ravel()))[0]


def milliseconds(way: Way, logits: mx.array, draws: Draws, keys: sampler.Keys) -> float:
    """Return the mean time of several calls that are evaluated in sequence."""
    staging = Staging()
    start = time.perf_counter()
    mx.eval([way(logits, draws, keys, staging) for _ in range(CALLS)])
    return (time.perf_counter() - start) / CALLS * 1e3


def compare(name: str, params: SamplingParams, rows: int, vocab_size: int) -> None:
    """Measure both alternately after a warm-up, and print the result."""
    logits = (mx.random.normal((rows, vocab_size), key=mx.random.key(1)) * 3).astype(mx.bfloat16)
    draws = plan_draws([Entry(params, seed, None, ()) for seed in range(rows)], rows, vocab_size)
    assert draws is not None, "all rows are drawn"
    keys = plan.draw_keys(draws.seeds, np.zeros(len(draws.seeds), dtype=np.uint64))
    mx.eval(logits)
    ways: dict[str, Way] = {"kernel": by_kernel, "functions": sampler.by_functions}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + TIMES):
        for way, function in ways.items():
            found[way].append(milliseconds(function, logits, draws, keys))
    taken = {way: round(statistics.median(times[1:]), 4) for way, times in found.items()}
    ratio = round(taken["functions"] / taken["kernel"], 2)
    print(json.dumps({"rows": rows, "by": name, **taken, "ratio": ratio}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128256)
    size = parser.parse_args().vocabulary
    found = {str(dtype): sampler.verdict(dtype, size) for dtype in (mx.bfloat16, mx.float32)}
    print(json.dumps({"mlx": mx.__version__, "verdicts": found, **mx.device_info()}), flush=True)  # type: ignore[attr-defined]
    for rows in ROWS:
        for name, params in WAYS.items():
            compare(name, params, rows, size)


if __name__ == "__main__":
    main()
