"""Compare the engine with mlx-lm on a CPU, with SmolLM2-135M (float32, dense).

    python benchmarks/engine.py                         the comparisons with mlx-lm
    python benchmarks/engine.py --workload load-m-32    one workload, as JSON   [--sessions 8]

Each measurement runs in a separate process with its own BLAS: `bundled` is MLX as pip installs it,
`openblas` is the BLAS that modelpack_engine loads. Both run the same weights, loaded by the same
loader, and the same prompts. The workloads are those of modelpack_server.bench.workloads;
`gpu_engine.py` runs them on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 3
PROMPT, ANSWER, STREAMS = 64, 64, 8
LONG, PREFIX = 2000, 1800  # tokens of a prompt, and of its shared prefix: 90 %


def prompts(count: int, length: int, seed: int = 7) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(1000, 40000) for _ in range(length)] for _ in range(count)]


def load(blas: str) -> Any:
    """Load the requested BLAS, then return SmolLM2."""
    from modelpack_engine.platform import blas as real

    if blas == "bundled":
        real.leave_bundled()
    found = real.prepare()
    assert (found.kind is real.BlasKind.BUNDLED) == (blas == "bundled"), found.note
    from modelpack.testing.weights import smollm2_gguf
    from modelpack_engine.models import ModelFiles
    from modelpack_engine.models import load as load_model

    return load_model(ModelFiles.from_directory(smollm2_gguf()), device="cpu")


def mlx_lm_single(blas: str) -> float:
    """Return tokens per second of mlx-lm's single-request path."""
    loaded = load(blas)
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    first = 0.0
    for _ in generate_step(mx.array(prompts(1, PROMPT)[0]), loaded.model, max_tokens=ANSWER):
        first = first or time.perf_counter()
    return (ANSWER - 1) / (time.perf_counter() - first)


def mlx_lm_batch(blas: str) -> float:
    """Return tokens per second of all streams of BatchGenerator, including prompt processing."""
    loaded = load(blas)
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        loaded.model, completion_batch_size=STREAMS, prefill_batch_size=STREAMS
    )
    generator.insert(prompts(STREAMS, PROMPT), max_tokens=[ANSWER] * STREAMS)
    start, done, tokens = time.perf_counter(), 0, 0
    while done < STREAMS:
        for response in generator.next_generated():
            tokens += 1
            done += response.finish_reason is not None
    elapsed = time.perf_counter() - start
    generator.close()
    return tokens / elapsed


def engine_for(blas: str) -> Any:
    """Return our engine."""
    loaded = load(blas)
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.engine import Engine

    return Engine(loaded, EngineConfig(device="cpu", max_num_seqs=STREAMS, max_model_len=2048))


def params(tokens: int) -> Any:
    """Return greedy parameters for exactly this many tokens."""
    from modelpack_engine.request import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def request(prompt: list[int], tokens: int) -> Any:
    """Return a greedy request for exactly this many tokens."""
    from modelpack_engine.request import EngineRequest

    return EngineRequest(prompt, params(tokens))


def ours_single(blas: str) -> float:
    """Return tokens per second of one stream."""
    engine = engine_for(blas)
    engine.add_request("r", request(prompts(1, PROMPT)[0], ANSWER))
    first, tokens = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            tokens += len(event.token_ids)
            first = first or time.perf_counter()
    return (tokens - 1) / (time.perf_counter() - first)


def ours_batch(blas: str) -> float:
    """Return tokens per second of all streams, including prompt processing."""
    engine = engine_for(blas)
    start = time.perf_counter()
    answers = engine.generate(prompts(STREAMS, PROMPT), params(ANSWER))
    tokens = sum(len(event.token_ids) for events in answers for event in events)
    return tokens / (time.perf_counter() - start)


def time_to_first(engine: Any, prompt: list[int], name: str) -> float:
    """Return the seconds to the first token."""
    start = time.perf_counter()
    engine.add_request(name, request(prompt, 1))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def ours_prefix(blas: str) -> float:
    """Return the time to first token with 90 % of the prompt cached, relative to a cold prompt."""
    engine = engine_for(blas)
    prefix, *tails = prompts(1, PREFIX) + prompts(4, LONG - PREFIX, seed=8)
    time_to_first(engine, prompts(1, LONG, seed=9)[0], "warm-up")
    cold = time_to_first(engine, prefix + tails[0], "cold")
    return statistics.median(
        time_to_first(engine, prefix + tail, f"shared-{i}") / cold
        for i, tail in enumerate(tails[1:])
    )


def ours_first_token(blas: str) -> float:
    """Return the seconds from the imported engine to the first token, including loading."""
    start = time.perf_counter()
    engine = engine_for(blas)
    time_to_first(engine, prompts(1, 16)[0], "first")
    return time.perf_counter() - start


def run_one(name: str, sessions: int | None) -> dict[str, Any]:
    """Run one workload and return its report."""
    loaded = load("openblas")
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.engine import Engine
    from modelpack_server.bench.engine_load import run_workload
    from modelpack_server.bench.workloads import WORKLOADS

    workload = WORKLOADS[name]()
    workload = workload.first(sessions) if sessions else workload
    seqs = workload.concurrency or 64
    config = EngineConfig(device="cpu", max_num_seqs=seqs, max_model_len=workload.longest + 1)
    return run_workload(Engine(loaded, config), workload).to_json()


KINDS: dict[str, Callable[[str], float]] = {
    function.__name__: function
    for function in (
        mlx_lm_single, mlx_lm_batch, ours_single, ours_batch, ours_prefix, ours_first_token,
    )
}  # fmt: skip


def measure(kind: str, blas: str) -> float:
    """Run one measurement in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, kind, blas], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{kind} {blas} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def compare(label: str, ours: tuple[str, str], theirs: tuple[str, str], goal: float) -> None:
    """Print the median ratio of alternating measurements."""
    pairs = [(measure(*ours), measure(*theirs)) for _ in range(ROUNDS)]
    ratios = sorted(our / their for our, their in pairs)
    print(
        f"{label}: {statistics.median(ratios):.2f}x (min {ratios[0]:.2f}, max {ratios[-1]:.2f}, "
        f"goal >= {goal}); ours {statistics.median(p[0] for p in pairs):.1f} tok/s, "
        f"peer {statistics.median(p[1] for p in pairs):.1f} tok/s",
        flush=True,
    )


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from measuring import print_machine

    print_machine()
    ours, theirs = ("ours_single", "openblas"), "mlx_lm_single"
    compare("one stream, mlx-lm as installed", ours, (theirs, "bundled"), 2.5)
    compare("one stream, mlx-lm with our BLAS", ours, (theirs, "openblas"), 1.0)
    compare(
        f"{STREAMS} streams, BatchGenerator with our BLAS",
        ("ours_batch", "openblas"), ("mlx_lm_batch", "openblas"), 1.2,
    )  # fmt: skip
    prefix = sorted(measure("ours_prefix", "openblas") for _ in range(ROUNDS))
    print(f"time to first token, 90 % shared / cold: {prefix[ROUNDS // 2]:.2f} (goal <= 0.15)")
    first = sorted(measure("ours_first_token", "openblas") for _ in range(ROUNDS))
    print(f"load to first token: {first[ROUNDS // 2]:.2f} s (goal <= 3)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", nargs="*", help="a measurement and its BLAS (internal)")
    parser.add_argument("--workload", help="a workload's name")
    parser.add_argument("--sessions", type=int, help="only so many of its first sessions")
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    if args.workload:
        print(json.dumps(run_one(args.workload, args.sessions), indent=2))
    elif args.measurement:
        kind, blas_name = args.measurement
        print(json.dumps(KINDS[kind](blas_name)))
    else:
        main()
