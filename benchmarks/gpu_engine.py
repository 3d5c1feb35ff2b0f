"""Compare the engine with mlx-lm on a GPU, with random weights of a published model's shape.

    python benchmarks/gpu_engine.py [--shape llama-8b] [--bits 4] [--workloads load-m-32 ...]

Prints one JSON object for each measurement, and finally the ratios of medians of three runs after a
warm-up. mlx-lm runs first, in a separate process with MLX's default limits of command buffers: with
the limits that the engine sets on import, mlx-lm is up to a fifth faster. Loads are closed loops: a
fixed number of concurrent requests, each replaced when it ends. In a burst, all requests are sent
at the same time, and times to the first token count from then, for both systems.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any, get_args

import mlx.core as mx
from measuring import host_ms
from mlx.nn import quantize
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import llama, qwen3, qwen3_moe

from modelpack_engine.config import EngineConfig, SchedulingPolicy
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.platform import device
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server.bench.engine_load import run_workload
from modelpack_server.bench.workloads import WORKLOADS, Workload

VOCABULARY, CONTEXT = 128256, 34816
ROUNDS, KV_BYTES = 3, 16 << 30
DEFAULT = ["load-m-32", "load-m-128"]
#: MLX's own limits on an H200 (mlx/backend/cuda/device.cpp).
LIMITS = {"MLX_MAX_OPS_PER_BUFFER": "100", "MLX_MAX_MB_PER_BUFFER": "1000"}


COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5}
_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
#: Shapes by name: the module of mlx-lm, and what differs from COMMON.
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama-1b": (llama, _LLAMA | {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64,
        "tie_word_embeddings": True,
    }),
    "llama-8b": (llama, _LLAMA | {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "tie_word_embeddings": False,
    }),
    "qwen3-8b": (qwen3, _QWEN | {
        "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "intermediate_size": 12288, "tie_word_embeddings": False,
    }),
    # 16 of its 64 layers
    "qwen3-32b": (qwen3, _QWEN | {
        "model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 16,
        "intermediate_size": 25600, "num_attention_heads": 64, "tie_word_embeddings": False,
    }),
    # 16 of its 48 layers
    "qwen3-30b-a3b": (qwen3_moe, _QWEN | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 16,
        "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "num_key_value_heads": 4, "tie_word_embeddings": False, "norm_topk_prob": True,
    }),
}  # fmt: skip


class Silent:
    """A tokenizer without text, for random weights."""

    eos_token_ids: frozenset[int] = frozenset()
    special_token_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"


def make_model(shape: str, bits: int, group_size: int = 64, seed: int = 0) -> Any:
    """Return the model, in bfloat16 or quantised."""
    module, more = SHAPES[shape]
    arguments = module.ModelArgs(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **(COMMON | more)
    )
    mx.random.seed(seed)
    model = module.Model(arguments)
    model.update(tree_map(lambda x: x.astype(mx.bfloat16), model.parameters()))
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one at a time: float32 weights do not pile up
    if bits < 16:
        quantize(model, group_size=group_size, bits=bits)
        mx.eval(model.parameters())
    mx.clear_cache()
    return model


def make_engine(
    model: Any,
    seqs: int,
    policy: SchedulingPolicy,
    kv_bytes: int = KV_BYTES,
    context: int = CONTEXT,
) -> Engine:
    loaded = LoadedModel(model, {"vocab_size": VOCABULARY}, Silent(), "llama", CONTEXT, (), 0)
    config = EngineConfig(
        max_num_seqs=seqs,
        kv_cache_bytes=kv_bytes,
        max_model_len=context,
        scheduling_policy=policy,
    )
    return Engine(loaded, config)


def rest(engine: Engine) -> None:
    """Use idle time, as a server does between bursts, until no shape waits to be recorded."""
    while engine.use_idle_time():
        pass


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 30000) for _ in range(length)]


def one_stream(engine: Engine, tokens: int = 512) -> float:
    """Return tokens per second of one stream, after the first token."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    engine.add_request(f"one-{time.time()}", EngineRequest(prompt(128, 1), params))
    first, count = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            count += len(event.token_ids)
            first = first or time.perf_counter()
    return (count - 1) / (time.perf_counter() - first)


def one_stream_of_peer(model: Any, tokens: int = 512) -> float:
    """Return the same for mlx-lm's single-request path."""
    first = 0.0
    for token, _ in generate_step(mx.array(prompt(128, 1)), model, max_tokens=tokens):
        int(token)
        first = first or time.perf_counter()
    return (tokens - 1) / (time.perf_counter() - first)


def peer_workload(model: Any, workload: Workload) -> dict[str, Any]:
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
    del generator
    gc.collect()  # its caches are in reference cycles
    mx.clear_cache()
    return {"workload": workload.name, "output_tokens": count, **_summary(elapsed, count, firsts)}


def load(engine: Engine, workload: Workload, temperature: float) -> dict[str, Any]:
    """Run a workload; return its figures, with the host's milliseconds of a step."""
    before = engine.stats()
    found: dict[str, Any] = run_workload(engine, workload, temperature=temperature).to_json()
    after = engine.stats()
    found["steps"] = after.num_steps - before.num_steps
    found["host_ms"] = {part: round(ms, 3) for part, ms in host_ms(before, after).items()}
    return found


def burst(engine: Engine, prompts: list[list[int]], max_tokens: list[int]) -> dict[str, Any]:
    """Submit all requests at once; return throughput, times to first token, and the tokens."""
    start = time.perf_counter()
    for index, (token_ids, length) in enumerate(zip(prompts, max_tokens, strict=True)):
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        engine.add_request(f"burst-{start}-{index}", EngineRequest(token_ids, params))
    firsts: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            firsts.setdefault(event.request_id, time.perf_counter() - start)
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    elapsed = time.perf_counter() - start
    count = sum(map(len, tokens.values()))
    return {**_summary(elapsed, count, firsts), "tokens": list(tokens.values())}


def _summary(elapsed: float, count: int, firsts: dict[Any, float]) -> dict[str, Any]:
    times = sorted(firsts.values())
    return {
        "duration_s": round(elapsed, 3),
        "output_tokens_per_s": round(count / elapsed, 1),
        "ttft_from_start_s": {
            "p50": round(statistics.median(times), 4),
            "p99": round(times[-1 - len(times) // 100], 4),
        },
    }


def shared_prefix(engine: Engine, rounds: int) -> None:
    """Measure 64 concurrent requests with distinct prompts, and with 1,024 cached tokens each."""
    lengths = [16] * 64
    found = []
    for again in range(1 + rounds):
        cold = burst(engine, [prompt(1088, 5000 * again + i) for i in range(64)], lengths)
        prefix = prompt(1024, 777 + again)
        shared = [prefix + prompt(64, 9000 * (again + 1) + i) for i in range(64)]
        first = burst(engine, shared, lengths)
        cached = burst(engine, shared, lengths)
        same = first.pop("tokens") == cached.pop("tokens")
        cold.pop("tokens")
        ratio = cached["ttft_from_start_s"]["p50"] / cold["ttft_from_start_s"]["p50"]
        found.append({"ttft_p50_ratio": round(ratio, 3), "tokens_equal": same})
        found[-1] |= {"cold": cold, "cached": cached}
    show_median("64 prompts of 1,088 tokens at once", found[1:], "ttft_p50_ratio")


def entering_prompt(engine: Engine, rounds: int) -> None:
    """Measure the token latency of 32 streams while a prompt of 8,192 tokens enters."""
    found = []
    for again in range(1 + rounds):
        for i in range(32):
            params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
            engine.add_request(
                f"run-{again}-{i}", EngineRequest(prompt(256, 100 * again + i), params)
            )
        for _ in range(60):
            engine.step()
        before = [step_seconds(engine)[0] for _ in range(100)]
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        engine.add_request(f"long-{again}", EngineRequest(prompt(8192, 7 + again), params))
        meanwhile, entered = list[float](), False
        while not entered:
            seconds, told = step_seconds(engine)
            meanwhile.append(seconds)
            entered = f"long-{again}" in told
        while engine.has_work:
            engine.step()
        calm = statistics.median(before)
        slowest = sorted(meanwhile, reverse=True)
        p99 = slowest[len(slowest) // 100]
        found.append(
            {
                "ratio": round(p99 / calm, 2),
                "tpot_p50_ms": round(calm * 1e3, 2),
                "tpot_p99_while_ms": round(p99 * 1e3, 2),
                "tpot_p50_while_ms": round(statistics.median(meanwhile) * 1e3, 2),
                "slowest_ms": [round(seconds * 1e3, 2) for seconds in slowest[:5]],
                "steps": len(meanwhile),
            }
        )
    show_median("a prompt of 8,192 tokens enters among 32 streams", found[1:], "ratio")


def step_seconds(engine: Engine) -> tuple[float, set[str]]:
    """Return the duration of a step, and the requests for which it has events."""
    start = time.perf_counter()
    events = engine.step()
    return time.perf_counter() - start, {event.request_id for event in events}


def long_context(engine: Engine, model_bytes: int, token_bytes: int, tokens: int = 32768) -> None:
    """Compare a step of 8 streams of 32k tokens with reading its bytes at 4.3 TB/s."""
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    for i in range(8):
        engine.add_request(f"far-{i}", EngineRequest(prompt(tokens, 60 + i), params))
    start = time.perf_counter()
    firsts: set[str] = set()
    while len(firsts) < 8:
        firsts |= {event.request_id for event in engine.step()}
    prefill = time.perf_counter() - start
    for _ in range(20):
        engine.step()
    start = time.perf_counter()
    for _ in range(100):
        engine.step()
    step = (time.perf_counter() - start) / 100
    while engine.has_work:
        engine.step()
    read = 8 * (tokens + 100) * token_bytes + model_bytes
    show(
        "8 streams of 32k",
        {
            "prefill_tokens_per_s": round(8 * tokens / prefill),
            "tpot_ms": round(step * 1e3, 2),
            "bytes_at_4.3_TB_s_ms": round(read / 4.3e9, 2),
            "ratio": round(step / (read / 4.3e12), 2),
        },
    )


def show(kind: str, values: Any) -> Any:
    print(json.dumps({"measured": kind, **values}), flush=True)
    return values


def show_median(kind: str, found: list[dict[str, Any]], key: str) -> None:
    """Print every round, and the median of the main figure."""
    for one in found:
        show(kind, one)
    print(f"{kind}: {key} {statistics.median(one[key] for one in found)}", flush=True)


def measure_peer(model: Any, workloads: list[str], rounds: int) -> dict[str, float]:
    """Return the medians of mlx-lm: tokens per second, and seconds to the first token."""
    rates = [one_stream_of_peer(model) for _ in range(1 + rounds)][1:]
    found = {"one-stream": round(statistics.median(rates), 1)}
    show("generate_step", {"tokens_per_s": rates})
    for name in workloads:
        if name.startswith("load-m"):
            peer_workload(model, WORKLOADS[name]())
            loads = [peer_workload(model, WORKLOADS[name]()) for _ in range(rounds)]
            for one in loads:
                show("BatchGenerator", one)
            found[name] = statistics.median(one["output_tokens_per_s"] for one in loads)
            for key in ("p50", "p99"):
                times = [one["ttft_from_start_s"][key] for one in loads]
                found[f"{name} {key}"] = statistics.median(times)
    return found


def peer_in_a_process(args: argparse.Namespace) -> dict[str, float]:
    """Measure mlx-lm in a process with MLX's default limits, and print its output."""
    command = [sys.executable, __file__, "--peers-only", "--shape", args.shape]
    command += ["--bits", str(args.bits), "--group-size", str(args.group_size)]
    command += [
        "--seed",
        str(args.seed),
        "--rounds",
        str(args.rounds),
        "--workloads",
        *args.workloads,
    ]
    environment = {**os.environ, **LIMITS}
    lines: list[str] = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(process.returncode)
    found: dict[str, float] = json.loads(lines[-1])
    found.pop("measured")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES)
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16))
    parser.add_argument("--group-size", type=int, default=64, help="of quantised weights")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--seqs", type=int, default=128, help="requests that run at a time")
    parser.add_argument("--kv-gib", type=float, default=KV_BYTES / 2**30, help="of the KV cache")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a request at most")
    parser.add_argument("--workloads", nargs="*", default=DEFAULT, metavar="NAME")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peers-only", action="store_true", help="here, with the limits there are")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="whose median counts")
    parser.add_argument("--warm", type=int, default=2, help="rounds before, of each load")
    parser.add_argument("--no-bursts", action="store_true")
    parser.add_argument(
        "--scheduling-policy", default="shortest-first", choices=get_args(SchedulingPolicy)
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of loads; ours alone")
    parser.add_argument("--more", action="store_true", help="prefixes, long prompts and contexts")
    args = parser.parse_args()
    import mlx_lm

    about = {key: value for key, value in mx.device_info().items() if isinstance(value, str | int)}
    versions = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}  # type: ignore[attr-defined]
    show("machine", {**versions, **vars(args), **about})

    def made() -> Any:
        return make_model(args.shape, args.bits, args.group_size, args.seed)

    if args.peers_only:
        show("peer", measure_peer(made(), args.workloads, args.rounds))
        return
    peers = {} if args.no_peers else peer_in_a_process(args)
    model = made()
    model_bytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    start = time.perf_counter()
    mx.reset_peak_memory()
    kv_bytes = int(args.kv_gib * 2**30)
    engine = make_engine(model, args.seqs, args.scheduling_policy, kv_bytes, args.context)
    show("engine", {"start_s": round(time.perf_counter() - start, 1), "notes": engine.notes})
    ours = {}
    rates = [one_stream(engine) for _ in range(1 + args.rounds)][1:]
    ours["one-stream"] = round(statistics.median(rates), 1)
    show("one stream", {"tokens_per_s": rates})
    for index, name in enumerate(args.workloads):
        found = []
        for again in range(args.warm + args.rounds):
            # The prefix cache must not contain the prompts of earlier rounds.
            workload = WORKLOADS[name]().in_other_words(10 * index + again)
            found.append(load(engine, workload, args.temperature))
        for one in found[args.warm :]:
            show("ours", one)
        ours[name] = statistics.median(one["output_tokens_per_s"] for one in found[args.warm :])
        if name.startswith("load-m"):
            bursts = []
            for again in range(0 if args.no_bursts else args.rounds):
                sessions = WORKLOADS[name]().in_other_words(100 + 10 * index + again).sessions
                turns = [session.turns[0] for session in sessions]
                tokens = [list(turn.token_ids) for turn in turns]
                bursts.append(burst(engine, tokens, [turn.max_tokens for turn in turns]))
                bursts[-1].pop("tokens")
                show("burst", {"workload": name, **bursts[-1]})
            for key in ("p50", "p99"):
                if bursts and (peer := peers.get(f"{name} {key}")):
                    value = statistics.median(one["ttft_from_start_s"][key] for one in bursts)
                    print(f"{name}, a burst: TTFT {key} {value / peer:.3f}x mlx-lm", flush=True)
    if args.more:
        shared_prefix(engine, args.rounds)
        entering_prompt(engine, args.rounds)
        args_of = model.args
        token_bytes = 4 * args_of.num_hidden_layers * args_of.num_key_value_heads * args_of.head_dim
        long_context(engine, model_bytes, token_bytes)
    plan = model_bytes + engine.memory_bytes  # KV cache, and steps' arrays
    peak = device.peak_memory()
    show("memory", {"plan": plan, "peak": peak, "over": round(peak / plan - 1, 4)})
    for name, rate in ours.items():
        if name in peers:
            print(f"{name}: {rate / peers[name]:.2f}x mlx-lm", flush=True)


if __name__ == "__main__":
    main()
