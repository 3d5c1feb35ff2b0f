"""Measure speculative decoding on a CPU with SmolLM2-135M, alternating with plain decoding.

    python benchmarks/speculation.py                            the tables
    python benchmarks/speculation.py --streams 1 2 --rounds 1   some of it
    python benchmarks/speculation.py --backend mlx              the same by MLX, in float32
    python benchmarks/speculation.py --model DIR                another model's files, such as bf16
    python benchmarks/speculation.py --as-on-gpu                how many steps a GPU would take

`copy` continues a Python file in the prompt, like an edit of that file; `chat` answers a question;
`story` repeats only its own text. The streams run concurrently, each with a different prompt, and
`--texts` runs of a case have other prompts in turn. Times are processor times of all
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


QUESTIONS = (
    "What is lightning?",
    "Explain sailing to a child.",
    "Write a short story about the violin.",
    "List five facts about penguins.",
    "Why is recycling important?",
    "Give me advice on yoga.",
    "What are the advantages of solar panels?",
    "Write an email about a winter festival.",
)


def prompts(workload: str, streams: int, text: int) -> list[str]:
    """Return a prompt for each stream of run `text`."""
    first = streams * text
    if workload == "chat":
        asked = [QUESTIONS[(first + i) % len(QUESTIONS)] for i in range(streams)]
        turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        return [turns.format(question) for question in asked]
    if workload == "story":
        years = range(1800 + first, 1800 + first + streams)
        return [f"Once upon a time, in the year {year}, there was a" for year in years]
    files = sorted(SOURCES.glob("**/*.py"), key=lambda path: -path.stat().st_size)
    files = files[first : first + streams]
    texts = [path.read_text()[:SHOWN] for path in files]
    return [f"```python\n{text}\n```\nThe same again:\n```python\n{text[:80]}" for text in texts]


def measure(loaded: Any, case: Case, texts: int, num_tokens: int) -> Result:
    """Run one case with `texts` sets of prompts, and return its result."""
    from modelpack_engine.config import EngineConfig
    from modelpack_engine.engine import Engine
    from modelpack_engine.request import EngineRequest, SamplingParams

    config = EngineConfig(
        device="cpu", max_num_seqs=16, max_model_len=2048, self_test=False,
        speculative_method=case.method, num_speculative_tokens=case.num_tokens or None,
        speculative_disable_by_batch_size=16,
    )  # fmt: skip
    engine = Engine(loaded, config, draft=loaded if case.method == "draft" else None)
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    seconds, tokens, steps = 0.0, 0, 0
    for run in range(texts):
        for number, text in enumerate(prompts(case.workload, case.streams, run)):
            engine.add_request(str(number), EngineRequest(loaded.tokenizer.encode(text), params))
        started, begun, first = set[str](), 0.0, 0
        while engine.has_work:
            for event in engine.step():
                tokens += len(event.token_ids) if begun else 0
                started.add(event.request_id)
            if not begun and len(started) == case.streams:
                begun, first = time.process_time(), engine.stats().num_steps
        seconds += time.process_time() - begun
        steps += engine.stats().num_steps - first
    stats = engine.stats()
    return Result(seconds / tokens, steps, stats.proposed_tokens, stats.accepted_tokens)


def cases(streams: list[int], *, draft: bool) -> Iterator[list[Case]]:
    """Yield the cases to alternate, starting with the case without speculation."""
    for count in streams:
        plain = Case("copy", None, 0, count)
        yield [plain, *(Case("copy", "ngram", length, count) for length in (8, 15))]
    for count in streams[:1]:
        for workload in ("chat", "story"):
            yield [Case(workload, None, 0, count), Case(workload, "ngram", 15, count)]
        if draft:
            yield [Case("copy", None, 0, count), Case("copy", "draft", 4, count)]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from measuring import print_machine

    from modelpack_engine.platform import blas

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--backend", choices=["auto", "mlx"], default="auto")
    parser.add_argument(
        "--as-on-gpu", action="store_true", help="lookups as long as on a GPU, to count steps"
    )
    parser.add_argument("--model", type=Path, help="SmolLM2 in Q4_1 if omitted")
    args = parser.parse_args()
    blas.prepare()
    if args.as_on_gpu:
        from modelpack_engine.speculation import ngram, speculator

        speculator.CPU_COST = ngram.GPU_COST
    from modelpack.testing.weights import smollm2_gguf
    from modelpack_engine.models import ModelFiles, load

    files = ModelFiles.from_directory(args.model or smollm2_gguf())
    loaded = load(files, device="cpu", packed=args.backend == "auto")
    print_machine()
    print("computed by", "the library for CPUs" if loaded.packed else "MLX")
    print("| workload | streams | proposed by | ms a token | speed-up | steps | right |")
    print("|---|---|---|---|---|---|---|")
    for group in cases(args.streams, draft=loaded.packed is None):
        rounds = [
            [measure(loaded, case, args.texts, args.tokens) for case in group]
            for _ in range(args.rounds)
        ]
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
