"""Compare scheduling policies for waiting prompts: shortest first, and first come, first served.

    python benchmarks/scheduling.py [--rounds 3]

Runs SmolLM2-135M (float32, dense) on a CPU with four requests at a time, alternating the policies.
Lengths are an eighth of load M's: prompts of 8 to 128 tokens, responses of 4 to 32. `burst`: 32
requests arrive at once. `stream`: 48 requests arrive at random, nearly at the rate of the server,
and every sixteenth prompt has 512 tokens. Prints the medians of the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import replace
from typing import get_args

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine import Engine, EngineConfig
from modelpack_engine.config import SchedulingPolicy
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_server.bench.engine_load import run_workload
from modelpack_server.bench.report import Report
from modelpack_server.bench.workloads import Workload, single_turns

BURST, STREAM, AT_ONCE, EVERY, LONG = 32, 48, 4, 16, 512
PER_SECOND = 1.8


def burst() -> Workload:
    """Return 32 requests that arrive at once."""
    lengths = random.Random(7)
    pairs = [(lengths.randint(8, 128), lengths.randint(4, 32)) for _ in range(BURST)]
    return single_turns("burst", pairs)


def stream() -> Workload:
    """Return 48 requests that arrive at random, a few of them long."""
    lengths, now, sessions = random.Random(11), 0.0, []
    pairs = [
        (LONG if i % EVERY == EVERY // 2 else lengths.randint(8, 128), lengths.randint(4, 32))
        for i in range(STREAM)
    ]
    for session in single_turns("stream", pairs).sessions:
        now += lengths.expovariate(PER_SECOND)
        label = "long" if len(session.turns[0].token_ids) == LONG else "short"
        sessions.append(replace(session, arrival=now, label=label))
    return Workload("stream", tuple(sessions))


def served(loaded: LoadedModel, workload: Workload, policy: SchedulingPolicy) -> Report:
    config = EngineConfig(
        device="cpu",
        max_num_seqs=AT_ONCE,
        max_model_len=workload.longest + 1,
        enable_prefix_caching=False,  # the policies must not share a cache
        scheduling_policy=policy,
    )
    return run_workload(Engine(loaded, config), workload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
    print("| workload | policy | first token, mean | p50 | p90 | p99 | duration |")
    print("|---|---|---|---|---|---|---|")
    for workload in (burst(), stream()):
        found: dict[SchedulingPolicy, list[Report]] = {
            policy: [] for policy in get_args(SchedulingPolicy)
        }
        for _ in range(rounds):
            for policy, reports in found.items():
                reports.append(served(loaded, workload, policy))
        for policy, reports in found.items():
            times = [
                f"{statistics.median(report.ttft[key] for report in reports):.2f} s"
                for key in ("mean", "p50", "p90", "p99")
            ]
            duration = statistics.median(report.duration for report in reports)
            print(f"| {workload.name} | {policy} | {' | '.join(times)} | {duration:.1f} s |")


if __name__ == "__main__":
    main()
