"""Compare the engine's two backends and plain llama.cpp on a CPU, with SmolLM2-135M Q4_1.

    python benchmarks/cpu.py

`mlx` unpacks the weights to float32 and computes with the BLAS that modelpack_engine loads,
`llama.cpp` is our engine with that backend, and `raw` only calls llama.cpp's decode with the most
likely token. Each variant runs all loads in a separate process, one after the other. All use one
thread, so that tokens per second of processor time can be compared on a machine with other work;
wall time is printed too. Needs llama-cpp-python in this environment, or in the one of the
interpreter MODELPACK_LLAMA_CPP_PYTHON.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from modelpack_engine.platform import blas

sys.path.insert(0, str(Path(__file__).parent))

ROUNDS, MOST = 3, 8
#: Concurrent requests, tokens of a prompt, tokens of a response.
LOADS = {
    "1 stream, 64 + 64": (1, 64, 64),
    "8 streams, 64 + 64": (8, 64, 64),
    "8 prompts of 128": (8, 128, 1),
}
KINDS = ("mlx", "llama.cpp", "raw")


def prompts(count: int, length: int) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = random.Random(length)
    return [[generator.randrange(1000, 40000) for _ in range(length)] for _ in range(count)]


def tokens_of(streams: int, prompt: int, answer: int) -> int:
    """Return the number of tokens to count: those of responses, or of prompts in prompt loads."""
    return streams * (prompt if answer == 1 else answer)


def engine(backend: str) -> Any:
    """Return our engine with SmolLM2."""
    from modelpack.testing.weights import smollm2_gguf
    from modelpack_engine import EngineConfig
    from modelpack_engine.engine import Engine
    from modelpack_engine.models import ModelFiles, load

    files = ModelFiles.from_directory(smollm2_gguf())
    config = EngineConfig(device="cpu", max_num_seqs=MOST, max_model_len=2048)
    if backend == "mlx":
        return Engine(load(files, device="cpu"), config)
    from modelpack_engine.llama_cpp.engine import LlamaCppEngine
    from modelpack_engine.llama_cpp.model import LlamaModel
    from modelpack_engine.models.loader import gguf_tokenizer_of

    return LlamaCppEngine(LlamaModel(files.weights), gguf_tokenizer_of(files), config)


def ours(backend: str) -> dict[str, tuple[float, float]]:
    """Return tokens per second of wall time and of processor time, by load."""
    from modelpack_engine import SamplingParams

    made = engine(backend)
    made.generate([[5] * 8], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    found = {}
    for load, (streams, prompt, answer) in LOADS.items():
        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        wall, cpu = time.perf_counter(), time.process_time()
        answers = made.generate(prompts(streams, prompt), params)
        assert all(len([t for e in events for t in e.token_ids]) == answer for events in answers)
        count = tokens_of(streams, prompt, answer)
        found[load] = count / (time.perf_counter() - wall), count / (time.process_time() - cpu)
    return found


def raw() -> dict[str, tuple[float, float]]:
    """Return the same figures for llama.cpp without our engine."""
    from modelpack.testing.weights import smollm2_gguf
    from modelpack_engine.llama_cpp.model import Context, LlamaModel
    from modelpack_engine.models import ModelFiles

    model = LlamaModel(ModelFiles.from_directory(smollm2_gguf()).weights)
    context = Context(model, num_cells=2048, num_slots=MOST, max_rows=256)
    found = {}
    for load, (streams, length, answer) in LOADS.items():
        context.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        newest = []
        for slot, prompt in enumerate(prompts(streams, length)):
            logits = context.compute(prompt, range(length), [slot] * length, [length - 1])
            newest.append(int(logits[0].argmax()))
        for position in range(length, length + answer - 1):
            rows = range(streams)
            logits = context.compute(newest, [position] * streams, rows, rows)
            newest = logits.argmax(axis=-1).tolist()
        count = tokens_of(streams, length, answer)
        found[load] = count / (time.perf_counter() - wall), count / (time.process_time() - cpu)
    return found


def measure(kind: str) -> dict[str, list[float]]:
    """Run one variant in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, kind], capture_output=True, text=True, check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"{kind} failed:\n{done.stderr}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from measuring import print_machine

    print_machine()
    rounds = [{kind: measure(kind) for kind in KINDS} for _ in range(ROUNDS)]
    for load in LOADS:
        for kind in KINDS:
            wall, cpu = (statistics.median(r[kind][load][at] for r in rounds) for at in (0, 1))
            print(f"{load}, {kind}: {cpu:.1f} tok/s of processor time, {wall:.1f} wall")
        for other in KINDS[1:]:
            ratios = sorted(r[other][load][1] / r["mlx"][load][1] for r in rounds)
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            median = statistics.median(ratios)
            print(f"{load}, {other} / mlx, processor time: {median:.2f} ({spread})")


def find_llama_cpp() -> None:
    """Add the environment of MODELPACK_LLAMA_CPP_PYTHON to the path; limit to one thread."""
    named = os.environ.get("MODELPACK_LLAMA_CPP_PYTHON")
    if named:
        command = [named, "-c", "import json, site; print(json.dumps(site.getsitepackages()))"]
        sys.path.extend(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    if hasattr(os, "sched_setaffinity"):  # half of two processors is one thread
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        find_llama_cpp()
        blas.prepare()  # before MLX
        print(json.dumps(raw() if sys.argv[1] == "raw" else ours(sys.argv[1])))
