"""Compare the engine with llama.cpp and vLLM on a CPU.

    MODELPACK_LLAMA_CPP_PYTHON=… MODELPACK_VLLM_PYTHON=… python benchmarks/cpu.py \\
        [CASE …] [--rounds 3] [--models DIR]

A case is a model and a file type (`smollm2-q4_1`, `llama-1b-bf16`; all are the default). bf16 is
safetensors and compared with vLLM; the others are GGUF and compared with llama.cpp. The variables
name the Pythons that have llama-cpp-python (built for this processor) and vLLM for CPUs; a peer
without one is left out, but llama.cpp also writes the GGUF files. The models are made in DIR, by
default a temporary directory; the 1B model needs 8 GB there.

Each measurement is a process of its own (cpu_engines.py); in each round all engines run in turn,
and ratios are taken within a round. Prompts are random tokens, the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import modelpack_engine.models  # noqa: F401  before MLX, which cpu_models imports

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import cpu_models  # noqa: E402
from measuring import print_machine, warm  # noqa: E402

ENGINES_SCRIPT = Path(__file__).with_name("cpu_engines.py")
CASES = [
    *(("smollm2", file_type) for file_type in cpu_models.FORMATS),
    *(("llama-1b", file_type) for file_type in ("bf16", "q4_k_m", "q8_0")),
]
MODEL_LEN, STREAMS = 576, 8
LOAD = {
    "prompt": 94,
    "answer": 64,
    "streams": STREAMS,
    "long_prompt": 512,
    "model_len": MODEL_LEN,
    "kv_tokens": MODEL_LEN * STREAMS,
}
PEERS = {
    "vllm": ("MODELPACK_VLLM_PYTHON", "import vllm; print(vllm.__version__)"),
    "llama.cpp": (
        "MODELPACK_LLAMA_CPP_PYTHON",
        "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__)",
    ),
}
#: How a figure is shown, and whether more is better.
UNITS = {
    "one stream": ("one stream, tok/s", 1.0, True),
    "streams": (f"{STREAMS} streams, tok/s", 1.0, True),
    "first token": ("first token of 512, s", 1.0, False),
    "load": ("load to first token, s", 1.0, False),
    "peak": ("peak memory, MB", 1e-6, False),
}
#: The most seconds from the start of loading, and bytes beside the file and the KV cache.
MOST_LOAD, MOST_MEMORY = 1.5, 150_000_000

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """A model in one file type."""

    model: str
    file_type: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.file_type}"

    @property
    def peer(self) -> str:
        return "vllm" if self.file_type == "bf16" else "llama.cpp"

    @property
    def kv_bytes(self) -> int:
        return cpu_models.kv_bytes_per_token(self.model) * LOAD["kv_tokens"]

    def goal(self, figure: str) -> float | None:
        """Return the least ratio to the peer, our speed by its."""
        if figure == "one stream":
            return 1.0 if self.peer == "vllm" else 0.9
        return {"streams": 1.2, "first token": 1.0}.get(figure)


def python_of(engine: str) -> str | None:
    """Return the Python that has `engine`, or None."""
    return sys.executable if engine == "modelpack" else os.environ.get(PEERS[engine][0])


def run(engine: str, case: Case, path: Path, eager: bool) -> Figures:
    """Measure one engine in a process of its own."""
    python = python_of(engine)
    assert python is not None
    job = {
        **LOAD,
        "kv_bytes": case.kv_bytes,
        "repeats": 3 if case.model == "smollm2" else 1,
        "kv_unified": False,
        "eager": eager,
    }
    # -P: a module of this directory has the name of a package that vLLM looks for.
    command = [python, "-P", str(ENGINES_SCRIPT), engine, str(path), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{engine} failed with {case.name}: exit code {done.returncode}\n{done.stderr}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(case: Case, path: Path, rounds: int, eager: bool) -> None:
    """Print the medians of all engines, the ratios and the goals."""
    engines = ["modelpack"]
    if python_of(case.peer):
        engines.append(case.peer)
    warm(path / "model.safetensors" if path.is_dir() else path)
    measured = [{e: run(e, case, path, eager) for e in engines} for _ in range(rounds)]
    size = cpu_models.size_of(path)
    print(f"{case.name}: file {size / 1e6:.0f} MB, KV cache {case.kv_bytes / 1e6:.0f} MB")
    for figure, (label, scale, more) in UNITS.items():
        medians = {e: statistics.median(r[e][figure] for r in measured) for e in engines}
        parts = [f"{e} {value * scale:.4g}" for e, value in medians.items()]
        if len(engines) == 2:
            ours, theirs = ([r[e][figure] for r in measured] for e in engines)
            pairs = zip(ours, theirs, strict=True)
            ratios = sorted(o / t if more else t / o for o, t in pairs)
            ratio = statistics.median(ratios)
            parts.append(f"ratio {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            goal = case.goal(figure)
            if goal is not None:
                parts.append(f"goal {goal}: {'met' if ratio >= goal else 'MISSED'}")
        most = {"load": MOST_LOAD, "peak": size + case.kv_bytes + MOST_MEMORY}.get(figure)
        if most is not None:
            met = "met" if medians["modelpack"] <= most else "MISSED"
            parts.append(f"goal {most * scale:.4g}: {met}")
        print(f"  {label}: " + "; ".join(parts), flush=True)


def print_peers() -> None:
    """Print the version of each peer, or that it is left out."""
    for name, (variable, program) in PEERS.items():
        python = os.environ.get(variable)
        if python is None:
            print(f"{name}: left out, because {variable} is not set")
            continue
        done = subprocess.run([python, "-P", "-c", program], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{variable}: {python} cannot import it:\n{done.stderr}")
        print(f"{name}: {done.stdout.splitlines()[-1]}")


def main() -> None:
    cases = {case.name: case for case in (Case(*names) for names in CASES)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(cases), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="directory of the models, to keep them")
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile")
    given = parser.parse_args()
    unknown = set(given.cases) - set(cases)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; use {', '.join(cases)}")
    print_machine()
    print_peers()
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.models or Path(temporary)
        for case in map(cases.__getitem__, given.cases):
            llama_cpp = python_of("llama.cpp")
            if case.file_type not in ("bf16", "q4_1") and llama_cpp is None:
                print(f"{case.name}: left out, because llama.cpp writes the file")
                continue
            path = cpu_models.prepare(case.model, case.file_type, directory, llama_cpp)
            compare(case, path, given.rounds, given.eager)


if __name__ == "__main__":
    main()
