"""Compare restoring an offloaded prefix with computing it again, with SmolLM2-135M on a CPU.

    python benchmarks/kv_offload.py [--tokens 2048] [--rounds 3]

Each request generates one token after a prompt of `--tokens` and 16 more tokens. The KV cache of
the engine has room for one such prompt, and another prompt between two requests evicts it. For the
first request, nothing is cached. The others restore their prefix from host memory, from files in
the page cache, and, in a newly started engine, from files on disk. The time is from the request to
its token, and the token must be the same.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from measuring import print_machine

from modelpack_engine.platform import blas

TAIL = 16


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 40000) for _ in range(length)]


def forget(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in directory.rglob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Bench:
    """Runs engines with the same weights and the same directory, one after the other."""

    def __init__(self, tokens: int, directory: Path) -> None:
        from modelpack.testing.weights import smollm2_gguf
        from modelpack_engine.models import ModelFiles, load
        from modelpack_engine.runner.model_layout import find_layout

        self.directory = directory
        self.prompt = prompt(tokens + TAIL, 1)
        self.loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
        self.per_token = find_layout(self.loaded.model).bytes_per_token
        self.room = (tokens + 8 * TAIL) * self.per_token

    def engine(self, *, memory: int = 0, disk: bool = True):  # type: ignore[no-untyped-def]
        from modelpack_engine.config import EngineConfig
        from modelpack_engine.engine import Engine

        config = EngineConfig(
            device="cpu",
            kv_cache_bytes=self.room,
            kv_offload_memory=memory,
            kv_offload_dir=str(self.directory) if disk else None,
            self_test=False,
        )
        return Engine(self.loaded, config, model_id="smollm2-135m")

    def ask(self, engine, token_ids: list[int]) -> tuple[float, int, int]:  # type: ignore[no-untyped-def]
        """Return the seconds to the first token, the token, and the number of cached tokens."""
        from modelpack_engine.request import SamplingParams

        begin = time.perf_counter()
        events = engine.generate([token_ids], SamplingParams(max_tokens=1, temperature=0))[0]
        seconds = time.perf_counter() - begin
        return seconds, events[0].token_ids[0], events[-1].usage.cached_tokens

    def round(self) -> dict[str, float]:
        """Return the seconds for each source of the prefix."""
        tokens = len(self.prompt) - TAIL
        other = prompt(len(self.prompt), 2)
        times: dict[str, float] = {}
        engine = self.engine(memory=4 * self.room)
        times["computed"], expected, cached = self.ask(engine, self.prompt)
        assert cached == 0
        self.ask(engine, other)

        def restored(name: str) -> None:
            times[name], token, cached = self.ask(engine, self.prompt)
            assert (token, cached) == (expected, tokens), (name, token, cached)

        restored("from memory")
        engine.close()
        engine = self.engine()
        restored("from files in the page cache, after a restart")
        engine.close()
        forget(self.directory)
        engine = self.engine()
        restored("from files on disk, after a restart")
        engine.close()
        for path in self.directory.rglob("*.kv"):
            path.unlink()
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    blas.prepare()
    print_machine()
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(arguments.tokens, Path(directory))
        size = arguments.tokens * bench.per_token / 1e6
        print(f"{arguments.tokens} tokens are {size:.1f} MB of keys and values\n")
        rounds = [bench.round() for _ in range(arguments.rounds)]
    print("| the prefix is | seconds, median (min … max) | faster than computed |\n|---|---|---|")
    for name in rounds[0]:
        seconds = sorted(each[name] for each in rounds)
        ratio = statistics.median(each["computed"] / each[name] for each in rounds)
        middle = statistics.median(seconds)
        print(f"| {name} | {middle:.3f} ({seconds[0]:.3f} … {seconds[-1]:.3f}) | {ratio:.1f}x |")


if __name__ == "__main__":
    main()
