"""Measure speculative decoding on a CPU with SmolLM2-135M, alternating with plain decoding.

    python benchmarks/speculation.py                            the tables
    python benchmarks/speculation.py --streams 1 2 --rounds 1   some of it

`copy` continues a Python file in the prompt, like an edit of that file; `story` repeats only its
own text. The streams run concurrently, each with a different file. Times are processor times of all
threads, which other work on the machine affects least, and exclude prompts. `draft` uses the model
as its own draft model: this cannot be faster, but all proposals should be accepted, and it shows
the cost of drafting.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent.parent / "engine" / "modelpack_engine"
TOKENS = 64  # for each stream
SHOWN = 1200  # characters of the file in a prompt


@dataclass(frozen=True)
class Case:
    """A measurement: a workload, a method of speculation and a number of streams."""

    workload: str
    method: str | None
    num_tokens: int
    streams: int


@dataclass(frozen=True)
class Result:
    """Processor seconds per token, steps, and proposed and accepted tokens."""

    seconds: float
    steps: int
    proposed: int
    accepted: int


def prompts(workload: str, streams: int) -> list[str]:
    """Return a prompt for each stream."""
    if workload == "story":
        return [f"Once upon a time, in the year {1800 + i}, there was a" for i in range(streams)]
    files = sorted(SOURCES.glob("*.py"), key=lambda path: -path.stat().st_size)[:streams]
    texts = [path.read_text()[:SHOWN] for path in files]
    return [f"```python\n{text}\n```\nThe same again:\n```python\n{text[:80]}" for text in texts]


def measure(loaded: Any, case: Case) -> Result:
    """Run one case and return its result."""
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.engine import Engine
    from modelpack_engine.request import EngineRequest, SamplingParams

    config = EngineConfig(
        device="cpu", max_num_seqs=16, max_model_len=2048, self_test=False,
        speculative_method=case.method, num_speculative_tokens=case.num_tokens or None,
        speculative_disable_by_batch_size=16,
    )  # fmt: skip
    engine = Engine(loaded, config, draft=loaded if case.method == "draft" else None)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    texts = prompts(case.workload, case.streams)
    for number, text in enumerate(texts):
        engine.add_request(str(number), EngineRequest(loaded.tokenizer.encode(text), params))
    started, begun, tokens, steps = set[str](), 0.0, 0, 0
    while engine.has_work:
        for event in engine.step():
            tokens += len(event.token_ids) if begun else 0
            started.add(event.request_id)
        if not begun and len(started) == case.streams:
            begun, steps = time.process_time(), engine.stats().num_steps
    seconds = time.process_time() - begun
    stats = engine.stats()
    return Result(
        seconds / tokens, stats.num_steps - steps, stats.proposed_tokens, stats.accepted_tokens
    )


def cases(streams: list[int]) -> Iterator[list[Case]]:
    """Yield the cases to alternate, starting with the case without speculation."""
    for count in streams:
        plain = Case("copy", None, 0, count)
        yield [plain, *(Case("copy", "ngram", length, count) for length in (4, 8))]
    for count in streams[:1]:
        yield [Case("story", None, 0, count), Case("story", "ngram", 8, count)]
        yield [Case("copy", None, 0, count), Case("copy", "draft", 4, count)]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from measuring import print_machine

    from modelpack_engine.platform import blas

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    blas.prepare()
    from modelpack.testing.weights import smollm2_gguf
    from modelpack_engine.models import ModelFiles, load

    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
    print_machine()
    print("| workload | streams | proposed by | ms a token | speed-up | steps | right |")
    print("|---|---|---|---|---|---|---|")
    for group in cases(args.streams):
        rounds = [[measure(loaded, case) for case in group] for _ in range(args.rounds)]
        for index, case in enumerate(group):
            results = [found[index] for found in rounds]
            gains = sorted(found[0].seconds / found[index].seconds for found in rounds)
            by = f"{case.method}, {case.num_tokens}" if case.method else "–"
            shown = statistics.median(found.seconds for found in results)
            some = results[0]
            right = f"{some.accepted} of {some.proposed}" if some.proposed else "–"
            gain = f"{statistics.median(gains):.2f} ({gains[0]:.2f} … {gains[-1]:.2f})"
            print(
                f"| {case.workload} | {case.streams} | {by} | {shown * 1000:.1f} | "
                f"{gain if case.method else '–'} | {some.steps} | {right} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
