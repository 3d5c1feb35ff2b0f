"""The engine on a GPU against mlx-lm, on random weights of Llama-3.2-1B's shape.

    python benchmarks/gpu_engine.py [--bits 4] [--workloads load-m-32 load-m-128 ...] [--no-peers]

Prints one JSON object a measurement, and the ratios at the end. Each is done twice and the second
time counts: the first warms up what the load-time warm-up left.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import mlx.core as mx
from mlx.nn import quantize
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import llama

from modelpack_engine.benchmarking.driving import run_workload
from modelpack_engine.benchmarking.workloads import WORKLOADS, Workload
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.loaders import LoadedModel
from modelpack_engine.sampling_params import SamplingParams

VOCABULARY, CONTEXT = 128256, 8704
DEFAULT = ["load-m-32", "load-m-128", "shared-prefix", "multi-turn", "poisson-8k"]


class Silent:
    """A tokenizer for random weights, whose text nobody reads."""

    eos_token_ids: frozenset[int] = frozenset()
    special_token_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"


def make_model(bits: int) -> llama.Model:
    """Return the model, in bfloat16 or quantised in groups of 64."""
    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=2048, num_hidden_layers=16, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=VOCABULARY,
        rope_theta=5e5, max_position_embeddings=CONTEXT, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    mx.random.seed(0)
    model = llama.Model(arguments)
    model.update(tree_map(lambda x: x.astype(mx.bfloat16), model.parameters()))
    if bits < 16:
        quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


def make_engine(model: llama.Model, seqs: int) -> Engine:
    loaded = LoadedModel(model, {"vocab_size": VOCABULARY}, Silent(), "llama", CONTEXT, (), 0)
    config = EngineConfig(max_num_seqs=seqs, kv_cache_bytes=16 << 30, max_model_len=CONTEXT)
    return Engine(loaded, config)


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 30000) for _ in range(length)]


def one_stream(engine: Engine, tokens: int = 512) -> float:
    """Tokens a second of one stream, after the first token."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    engine.add_request(f"one-{time.time()}", prompt(128, 1), params)
    first, count = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            count += len(event.token_ids)
            first = first or time.perf_counter()
    return (count - 1) / (time.perf_counter() - first)


def one_stream_of_peer(model: llama.Model, tokens: int = 512) -> float:
    """The same by mlx-lm's single-request path."""
    first = 0.0
    for token, _ in generate_step(mx.array(prompt(128, 1)), model, max_tokens=tokens):
        int(token)
        first = first or time.perf_counter()
    return (tokens - 1) / (time.perf_counter() - first)


def peer_workload(model: llama.Model, workload: Workload) -> dict[str, Any]:
    """Run a workload of single turns through BatchGenerator."""
    sessions = list(workload.sessions)
    size = workload.concurrency
    generator = BatchGenerator(model, completion_batch_size=size, prefill_batch_size=8)
    start = time.perf_counter()
    waiting = {}
    for session in sessions:
        (turn,) = session.turns
        uids = generator.insert([list(turn.token_ids)], max_tokens=[turn.max_tokens])
        waiting[uids[0]] = 0.0
    done, count, firsts = 0, 0, dict.fromkeys(waiting, 0.0)
    while done < len(sessions):
        for response in generator.next_generated():
            count += 1
            firsts[response.uid] = firsts[response.uid] or time.perf_counter() - start
            done += response.finish_reason is not None
    elapsed = time.perf_counter() - start
    generator.close()
    return {
        "workload": workload.name, "output_tokens": count, "duration_s": round(elapsed, 3),
        "output_tokens_per_s": round(count / elapsed, 1),
        "ttft_from_start_s": {"p50": round(statistics.median(firsts.values()), 4)},
    }  # fmt: skip


def show(kind: str, values: Any) -> Any:
    print(json.dumps({"measured": kind, **values}), flush=True)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16))
    parser.add_argument("--workloads", nargs="*", default=DEFAULT, metavar="NAME")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    import mlx_lm

    about = {key: value for key, value in mx.device_info().items() if isinstance(value, str | int)}
    show(
        "machine", {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "bits": args.bits, **about}
    )
    model = make_model(args.bits)
    peers: dict[str, float] = {}
    if not args.no_peers:
        for _ in range(2):
            rate = one_stream_of_peer(model)
        peers["one-stream"] = show("generate_step", {"tokens_per_s": round(rate, 1)})[
            "tokens_per_s"
        ]
        for name in args.workloads:
            if name.startswith("load-m"):
                for _ in range(2):
                    found = peer_workload(model, WORKLOADS[name]())
                peers[name] = show("BatchGenerator", found)["output_tokens_per_s"]
    start = time.perf_counter()
    engine = make_engine(model, 128)
    show("engine", {"start_s": round(time.perf_counter() - start, 1), "notes": engine.notes})
    ours = {}
    for _ in range(2):
        rate = one_stream(engine)
    ours["one-stream"] = show("one stream", {"tokens_per_s": round(rate, 1)})["tokens_per_s"]
    for index, name in enumerate(args.workloads):
        for again in range(2):
            # Nothing that was said before may be in the prefix cache.
            workload = WORKLOADS[name]().in_other_words(2 * index + again)
            report = run_workload(engine, workload).to_json()
        ours[name] = show("ours", report)["output_tokens_per_s"]
    for name, theirs in peers.items():
        print(f"{name}: {ours[name] / theirs:.2f}x mlx-lm", flush=True)


if __name__ == "__main__":
    main()
