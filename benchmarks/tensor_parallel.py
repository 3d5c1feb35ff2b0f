"""Compare one device with several tensor-parallel ones: prompts, and decoding of 64 streams.

    python benchmarks/tensor_parallel.py --ranks 2 [--bits 4] [--only N]
    python benchmarks/tensor_parallel.py --ranks 2 --shape tiny --device cpu   # to try the script

Uses random weights of Llama-3.1-8B's shape. The script starts its ranks (NCCL on GPUs, a ring on
CPUs) and kills them after --deadline seconds for each measurement. Prints JSON lines: for each
number of ranks, the time of one all-reduce, the memory of rank 0, and tokens per second of prompts
and of decoding; then the ratios. Each measurement runs twice, and the second run counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelpack_engine.platform import blas

blas.prepare()

import mlx.core as mx  # noqa: E402
from mlx.nn import quantize  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models import llama  # noqa: E402

from modelpack_engine.config import EngineConfig  # noqa: E402
from modelpack_engine.distributed.follower import Follower  # noqa: E402
from modelpack_engine.distributed.launch import join, launch  # noqa: E402
from modelpack_engine.engine import Engine  # noqa: E402
from modelpack_engine.errors import EngineError  # noqa: E402
from modelpack_engine.models import LoadedModel  # noqa: E402
from modelpack_engine.models.loader import Shard  # noqa: E402
from modelpack_engine.models.precision import evaluate  # noqa: E402
from modelpack_engine.request import EngineRequest, SamplingParams  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
        "vocab_size": 2048, "max_position_embeddings": 512,
    },
}  # fmt: skip
#: (prompts, tokens of each) to read; (streams, context tokens, new tokens of each) to decode.
LOADS = {"8b": ((16, 2048), (64, 512, 192)), "tiny": ((4, 128), (8, 32, 24))}


class Silent:
    """A tokenizer without text, for random weights."""

    eos_token_ids: frozenset[int] = frozenset()
    special_token_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"


def show(kind: str, **values: Any) -> None:
    print(json.dumps({"measured": kind, **values}), flush=True)


# The part that runs in each rank.


def load(shape: str, bits: int, shard: Shard | None) -> LoadedModel:
    """Return the model or this rank's part of it, from the same random weights on all ranks."""
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5, **SHAPES[shape]}
    config["tie_word_embeddings"] = False
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.update(tree_map(lambda x: x.astype(mx.bfloat16), model.parameters()))
    if bits < 16:
        quantize(model, group_size=64, bits=bits)
    if shard is not None:
        shard(model, config)
    weight_bytes = evaluate(model)
    mx.clear_cache()
    context = config["max_position_embeddings"]
    return LoadedModel(model, config, Silent(), "llama", context, (), weight_bytes)


def time_sums(shape: str, ranks: int, group: mx.distributed.Group | None) -> None:
    """Measure the all-reduce that a layer performs twice; all ranks must call this."""
    for rows in (64, 2048):
        x = mx.zeros((rows, SHAPES[shape]["hidden_size"]), mx.bfloat16)
        mx.eval(x)
        for _ in range(2):
            start, count = time.perf_counter(), 64
            total = x
            for _ in range(count):
                total = mx.distributed.all_sum(total, group=group)
            mx.eval(total)
            seconds = time.perf_counter() - start
        if group is not None and group.rank() == 0:
            show("all_sum", ranks=ranks, rows=rows, ms=round(1e3 * seconds / count, 4))


def prompts(count: int, length: int, seed: int, vocabulary: int) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def run(engine: Engine, asked: list[list[int]], max_tokens: int) -> tuple[float, float, int]:
    """Return the seconds until all first tokens, the seconds after that, and the later tokens."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    for number, token_ids in enumerate(asked):
        engine.add_request(f"request-{number}", EngineRequest(token_ids, params))
    begun: set[str] = set()
    start, late = time.perf_counter(), 0
    first = start
    while engine.has_work:
        started = len(begun) == len(asked)
        for event in engine.step():
            if event.token_ids:
                begun.add(event.request_id)
                late += len(event.token_ids) if started else 0
        if not started:
            first = time.perf_counter()
    return first - start, time.perf_counter() - first, late


def measure(engine: Engine, shape: str, ranks: int) -> dict[str, float]:
    (count, length), (streams, before, after) = LOADS[shape]
    vocabulary = SHAPES[shape]["vocab_size"]
    for again in range(2):
        seconds, _, _ = run(engine, prompts(count, length, 10 + again, vocabulary), 1)
    prefill = count * length / seconds
    show("prefill", ranks=ranks, tokens=count * length, tokens_per_s=round(prefill, 1))
    for again in range(2):
        asked = prompts(streams, before, 20 + again, vocabulary)
        _, seconds, tokens = run(engine, asked, after)
    decode = tokens / seconds
    show(
        "decode", ranks=ranks, streams=streams, context=before, tokens=tokens,
        tokens_per_s=round(decode, 1), ms_per_token=round(1e3 * streams / decode, 3),
    )  # fmt: skip
    return {"prefill": prefill, "decode": decode}


def end(error: EngineError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def be_rank(args: argparse.Namespace) -> None:
    """Measure as one of `args.ranks` ranks; rank 0 writes the result to `args.out`."""
    mx.set_default_device(mx.cpu if args.device == "cpu" else mx.gpu)
    context = SHAPES[args.shape]["max_position_embeddings"]
    config = EngineConfig(
        device=args.device,
        max_num_seqs=LOADS[args.shape][1][0],
        max_model_len=context,
        kv_cache_bytes=(16 << 30 if args.shape == "8b" else 64 << 20) // args.ranks,
    )

    def part(shard: Shard | None) -> LoadedModel:
        return load(args.shape, args.bits, shard)

    start = time.perf_counter()
    ranks = None
    make: Callable[[], Engine] = lambda: Engine(part(None), config)  # noqa: E731
    if args.ranks > 1:
        joined = join(args.ranks, end)
        time_sums(args.shape, args.ranks, joined.group.mlx)
        if isinstance(joined, Follower):
            joined.follow(lambda _key, shard: part(shard))
            return
        ranks = joined
        make = lambda: joined.engine("random", part, lambda _: config)[0]  # noqa: E731
    engine = make()
    show(
        "loaded", ranks=args.ranks, start_s=round(time.perf_counter() - start, 1),
        weights_and_kv_bytes=engine.memory_bytes, active_bytes=mx.get_active_memory(),
        peak_bytes=mx.get_peak_memory(), tier=engine._runner.tier, notes=engine.notes,
    )  # fmt: skip
    found = measure(engine, args.shape, args.ranks)
    show("memory", ranks=args.ranks, peak_bytes=mx.get_peak_memory())
    Path(args.out).write_text(json.dumps(found))
    engine.close()
    if ranks is not None:
        ranks.close()


# The part that starts the ranks.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="N", help="measure N ranks and nothing else")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=16)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--deadline", type=float, default=280, metavar="S")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None:
        be_rank(args)
        return 0
    import mlx_lm

    versions = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}  # type: ignore[attr-defined]
    show("command", argv=sys.argv[1:], shape=args.shape, bits=args.bits, **versions)
    found: dict[int, dict[str, float]] = {}
    for ranks in [args.only] if args.only else [1, args.ranks]:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "out.json")
            command = [sys.executable, __file__, "--ranks", str(ranks), "--out", str(out)]
            command += ["--shape", args.shape, "--bits", str(args.bits), "--device", args.device]
            backend: Any = "ring" if args.device == "cpu" else "nccl"
            outcome = launch(command, ranks, backend=backend, deadline=args.deadline)
            if outcome.code or not out.exists():
                show("failure", ranks=ranks, code=outcome.code, why=outcome.failure)
                return outcome.code or 1
            found[ranks] = json.loads(out.read_text())
    if len(found) == 2:
        one, several = found[1], found[args.ranks]
        ratios = {f"{name}_ratio": round(several[name] / one[name], 3) for name in one}
        show("ratios", ranks=args.ranks, **ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
