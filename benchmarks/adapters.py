"""Compare an engine of LoRA adapters with the same without, on a GPU, with random weights.

    python benchmarks/adapters.py [--adapters 32] [--rank 16] [--workload load-m-64]

The adapters change all linear layers. Each request of the load names one of them, in turn. Prints
one JSON object for each round, and the ratios of medians: of mlx-lm with one adapter for all
requests, in a process with MLX's default limits; of an engine that runs no adapters; and of one
that has them: no request has one, all have the same one, and each has another. Its rounds take
turns, since the speed of a shared machine's processor changes within seconds. The rounds before, in
which most shapes of steps are recorded as graphs, do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gpu_engine import (
    CONTEXT,
    KV_BYTES,
    LIMITS,
    SHAPES,
    VOCABULARY,
    Silent,
    make_model,
    peer_workload,
    rest,
    show,
)
from mlx.nn import Linear
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import save_file

from modelpack.formats.adapter import Adapter, read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_server.bench.engine_load import run_workload
from modelpack_server.bench.workloads import WORKLOADS

PEER = "mlx-lm, one adapter"


def write_adapter(directory: Path, model: Any, rank: int, seed: int) -> Adapter:
    """Write an adapter of all linear layers as PEFT does, with random matrices."""
    directory.mkdir()
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        outputs, inputs = module.weight.shape
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = random.standard_normal(shape, np.float32) * 0.02
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = values.astype(np.float16)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
              "base_model_name_or_path": "random/base"}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(directory)


def adapter_engine(model: Any, config: dict[str, Any], seqs: int, adapters: int, kv: int) -> Engine:
    loaded = LoadedModel(model, config, Silent(), "llama", CONTEXT, (), 0)
    return Engine(
        loaded,
        EngineConfig(
            max_num_seqs=seqs, kv_cache_bytes=kv, max_model_len=CONTEXT, max_loras=adapters
        ),
    )


def measure(
    engine: Engine, kinds: dict[str, Sequence[str]], workload: str, rounds: int, warm: int
) -> dict[str, float]:
    """Return the medians of tokens per second, after `warm` rounds of each kind."""
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for again in range(warm + rounds):
        for number, (kind, names) in enumerate(kinds.items()):
            # The prefix cache must not contain the prompts of earlier rounds.
            load = WORKLOADS[workload]().in_other_words(20 * number + again)
            report = run_workload(engine, load, adapters=names).to_json()
            show(kind, {"round": again, **report})
            found[kind].append(report["output_tokens_per_s"])
            rest(engine)
    return {kind: statistics.median(rates[warm:]) for kind, rates in found.items()}


def measure_peer(shape: str, rank: int, workload: str, rounds: int) -> None:
    """Print mlx-lm's rounds of a load whose requests all have the same adapter."""
    model = make_model(shape, 16)
    keys = {name for name, module in model.layers[0].named_modules() if isinstance(module, Linear)}
    settings = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), settings)
    model.set_dtype(mx.bfloat16)
    model.eval()
    mx.eval(model.parameters())
    for again in range(1 + rounds):
        show(PEER, {"round": again, **peer_workload(model, WORKLOADS[workload]())})


def peer_in_a_process(args: argparse.Namespace) -> float:
    """Measure mlx-lm in a process with MLX's default limits, and return its median."""
    command = [sys.executable, __file__, "--peer", "--shape", args.shape, "--rank", str(args.rank)]
    command += ["--workload", args.workload, "--rounds", str(args.rounds)]
    done = subprocess.run(
        command, env={**os.environ, **LIMITS}, check=True, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    rounds = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return statistics.median(one["output_tokens_per_s"] for one in rounds if one["round"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--workload", default="load-m-64", metavar="NAME")
    parser.add_argument("--seqs", type=int, default=64, help="requests that run at a time")
    parser.add_argument("--kv-gib", type=float, default=KV_BYTES / 2**30, help="of the KV cache")
    parser.add_argument("--rounds", type=int, default=3, help="whose median counts")
    parser.add_argument("--warm", type=int, default=6, help="our rounds before, of each kind")
    parser.add_argument("--no-peer", action="store_true", help="without mlx-lm")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        measure_peer(args.shape, args.rank, args.workload, args.rounds)
        return
    about = {key: value for key, value in mx.device_info().items() if isinstance(value, str | int)}
    show("machine", {"mlx": mx.__version__, **vars(args), **about})  # type: ignore[attr-defined]
    found = {} if args.no_peer else {PEER: peer_in_a_process(args)}
    model = make_model(args.shape, 16)
    config = {"vocab_size": VOCABULARY, **SHAPES[args.shape][1]}
    kv = int(args.kv_gib * 2**30)
    engine = adapter_engine(model, config, args.seqs, 0, kv)
    found |= measure(engine, {"base": ()}, args.workload, args.rounds, args.warm)
    engine.close()
    del engine
    gc.collect()
    mx.clear_cache()
    engine = adapter_engine(model, config, args.seqs, args.adapters, kv)
    names = [f"adapter-{number}" for number in range(args.adapters)]
    with tempfile.TemporaryDirectory() as directory:
        for number, name in enumerate(names):
            adapter = write_adapter(Path(directory, name), model, args.rank, number)
            engine.add_adapter(name, adapter, name)
    kinds = {"no adapter": (), "one adapter": names[:1], "all adapters": names}
    found |= measure(engine, kinds, args.workload, args.rounds, args.warm)
    for kind, rate in found.items():
        print(f"{kind}: {rate:.0f} tok/s, {rate / found['base']:.3f} of the base", flush=True)


if __name__ == "__main__":
    main()
