"""Compare steps that the driver launches as graphs with steps that MLX launches, on an NVIDIA GPU.

    python benchmarks/replays.py [--shape llama-1b ...] [--bits 4] [--streams 1 8 32 64]
    python benchmarks/replays.py --gguf FILE
    python benchmarks/replays.py --streams --loads load-m-32 load-m-128

Both run in one engine, in turn; the order changes every round. Prints a JSON object for each
number of streams: tokens per second and the host's milliseconds per step of both, the ratio
(medians of rounds), and whether all tokens are equal. Prompts are short, so that nearly all steps
decode. Loads have prompts of up to 1,024 tokens that enter while others decode.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_engine
import mlx.core as mx
from gpu_engine import prompt, show
from measuring import host_ms

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.replay import Replays
from modelpack_server.bench.engine_load import run_workload
from modelpack_server.bench.workloads import WORKLOADS


def run(
    engine: Engine, streams: int, tokens: int, round_: int, temperature: float
) -> dict[str, Any]:
    """Run requests at once; return the rate of decoding, the host's times, and the tokens."""
    for index in range(streams):
        params = SamplingParams(
            max_tokens=tokens, temperature=temperature, seed=index, ignore_eos=True
        )
        engine.add_request(
            f"{time.time()} {index}", EngineRequest(prompt(32, 1000 * round_ + index), params)
        )
    found: dict[str, list[int]] = {}
    while len(found) < streams:
        _take(engine, found)
    for _ in range(8):  # shapes that are recorded
        _take(engine, found)
    before, had, start = engine.stats(), sum(map(len, found.values())), time.perf_counter()
    while all(len(each) < tokens for each in found.values()):
        _take(engine, found)
    seconds, after = time.perf_counter() - start, engine.stats()
    count, steps = sum(map(len, found.values())) - had, after.num_steps - before.num_steps
    while engine.has_work:
        _take(engine, found)
    return {
        "tokens_per_s": count / seconds,
        "step_ms": 1e3 * seconds / steps,
        **{f"{part}_ms": ms for part, ms in host_ms(before, after).items()},
        "tokens": [found[name] for name in sorted(found, key=lambda name: int(name.split()[1]))],
    }


def _take(engine: Engine, found: dict[str, list[int]]) -> None:
    for event in engine.step():
        found.setdefault(event.request_id, []).extend(event.token_ids)


def compare(engine: Engine, replays: Replays, streams: int, args: argparse.Namespace) -> None:
    """Measure both ways in turn, and print the medians."""
    runs: dict[str, list[dict[str, Any]]] = {"mlx": [], "graphs": []}
    same = 0
    for round_ in range(1 + args.rounds):
        ways = list(runs) if round_ % 2 else list(runs)[::-1]
        found = {}
        for way in ways:
            engine._replays, replays.follow_mlx = replays if way == "graphs" else None, True
            found[way] = run(engine, streams, args.tokens, round_, args.temperature)
            engine._blocks.forget_content()
        tokens = [found[way].pop("tokens") for way in runs]
        same += sum(one == other for one, other in zip(*tokens, strict=True))
        for way, each in found.items():
            if round_:
                runs[way].append(each)
    medians = {
        way: {key: round(statistics.median(each[key] for each in all_), 3) for key in all_[0]}
        for way, all_ in runs.items()
    }
    ratios = [
        one["tokens_per_s"] / other["tokens_per_s"]
        for one, other in zip(runs["graphs"], runs["mlx"], strict=True)
    ]
    show(
        f"{streams} streams",
        {
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(each, 3) for each in ratios],
            "equal": f"{same} of {streams * (1 + args.rounds)}",
            **medians,
        },
    )


def compare_load(engine: Engine, replays: Replays, name: str, args: argparse.Namespace) -> None:
    """Run a load both ways in turn, in other words each time, and print the medians."""
    runs: dict[str, list[float]] = {"mlx": [], "graphs": []}
    steps = dict.fromkeys(runs, 0)
    for round_ in range(1 + args.rounds):
        for way in list(runs) if round_ % 2 else list(runs)[::-1]:
            engine._replays, replays.follow_mlx = replays if way == "graphs" else None, True
            workload = WORKLOADS[name]().in_other_words(10 * round_ + (way == "graphs"))
            before = engine.stats().num_steps
            found = run_workload(engine, workload).to_json()
            steps[way] = engine.stats().num_steps - before
            if round_:
                runs[way].append(found["output_tokens_per_s"])
    ratios = [one / other for one, other in zip(runs["graphs"], runs["mlx"], strict=True)]
    show(name, {"ratio": round(statistics.median(ratios), 3), "steps": steps, **runs})


def engine_of_file(path: Path, seqs: int) -> Engine:
    """Return an engine with the model of a GGUF file's directory."""
    loaded = load(ModelFiles.from_directory(path.parent), device="gpu")
    return Engine(
        loaded,
        EngineConfig(
            device="gpu", max_num_seqs=seqs, max_model_len=2048, kv_cache_bytes=1 << 31,
            backend="mlx",
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", default=["llama-1b"], choices=gpu_engine.SHAPES)
    parser.add_argument("--gguf", type=Path, help="in place of random weights of a shape")
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16))
    parser.add_argument("--group-size", type=int, default=64, help="of quantised weights")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--loads", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("modelpack_engine.runner.replay").setLevel(logging.INFO)
    seqs = max(args.streams, default=128)
    show(
        "machine", {**vars(args), "gguf": str(args.gguf), "mlx": version("mlx"), **mx.device_info()}
    )
    for name in ["file"] if args.gguf else args.shape:
        if args.gguf:
            engine = engine_of_file(args.gguf, seqs)
        else:
            model = gpu_engine.make_model(name, args.bits, args.group_size)
            engine = gpu_engine.make_engine(model, seqs, "shortest-first", 16 << 30, 4096)
            del model
        replays = engine._replays
        show("engine", {"model": name, "notes": engine.notes, "graphs": replays is not None})
        if replays is not None:
            for streams in args.streams:
                compare(engine, replays, streams, args)
            for load in args.loads:
                compare_load(engine, replays, load, args)
        engine._replays = replays
        engine.close()
        del engine, replays
        gc.collect()
        mx.clear_cache()


if __name__ == "__main__":
    main()
