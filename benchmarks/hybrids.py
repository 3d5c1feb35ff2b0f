"""Compare hybrid models on a GPU with Llama's shape, BatchGenerator and generate_step.

    python benchmarks/hybrids.py [--no-peers] [NAME ...]

The models have random bfloat16 weights and real widths, but fewer layers. Llama's shape has as many
layers as make a token read as many bytes of weights as in the hybrid model named after it. Of
experts, all that 64 rows may choose count.

BatchGenerator of mlx-lm gets the same 128 requests, and computes eight prompts at once. For gated
delta nets, whose prompts it computes token by token on CUDA, it runs out of memory with these: it
gets the first 32 requests, and computes one prompt at a time.

Loads: 128 requests of load M's lengths (prompts of 64-1024 tokens, responses of 32-256), 64 at a
time, after rounds whose shapes of steps are recorded as graphs between them; one stream of 256
tokens; and first tokens of 64 prompts of 4,096 tokens that arrive at once, new ones and then some
that share 90 % with one that was computed before, several times. Prints a JSON object for each
model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import time
from typing import Any

import mlx.core as mx
from gpu_architectures import AT_ONCE, Silent, cast, ours, requests, theirs
from gpu_architectures import SHAPES as SMALL
from gpu_engine import rest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.patches import recurrent
from modelpack_engine.platform import cuda_graphs
from modelpack_engine.request import EngineRequest, SamplingParams

VOCABULARY, CONTEXT, PROMPT = 32768, 8192, 4096
WARM_ROUNDS, BURSTS = 10, 5
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "hidden_size": 2048,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}
LLAMA = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}
DELTA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "num_hidden_layers": 16,
}
SHAPES: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        **SMALL["nemotron_h"],
        "hidden_size": COMMON["hidden_size"],
        "num_hidden_layers": 32,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "mamba_num_heads": 64,
        "hybrid_override_pattern": ["M", "-", "M", "-", "M", "-", "*", "-"] * 4,
    },
    "qwen3_next": {
        **DELTA,
        "intermediate_size": 4096,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 512,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
    },
    "qwen3_5": {**DELTA, "intermediate_size": 6144},
}


def make_model(name: str, layers: int = 0) -> Any:
    """Return a model of random weights in bfloat16; `layers` are those of Llama's shape."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    config = {"model_type": name, **COMMON, **(SHAPES[name] if not layers else LLAMA)}
    if layers:
        config["num_hidden_layers"] = layers
    if name == "qwen3_5":
        config = {"model_type": name, "text_config": config}
    model = module.Model(module.ModelArgs.from_dict(config))
    cuda_graphs.choose(model, recurrent.count(model))
    model.update(cast(model.parameters(), mx.bfloat16))
    mx.eval(model.parameters())
    return model


def active_bytes(model: Any) -> int:
    """Return the bytes of weights that a step of many rows reads, the head once."""
    return sum(leaf.nbytes for _, leaf in tree_flatten(model.parameters()))


def make_engine(model: Any, name: str) -> Engine:
    loaded = LoadedModel(model, {"vocab_size": VOCABULARY}, Silent(), name, CONTEXT, (), 0)
    config = EngineConfig(max_num_seqs=AT_ONCE, kv_cache_bytes=20 << 30, max_model_len=CONTEXT)
    engine = Engine(loaded, config)
    rest(engine)  # from now on, recording waits for idle time, as in a server
    return engine


def one_stream(engine: Engine) -> float:
    """Return output tokens per second of one request."""
    params = SamplingParams(max_tokens=256, temperature=0, ignore_eos=True)
    engine.add_request(f"one-{time.perf_counter()}", EngineRequest(list(range(100, 228)), params))
    first, count = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            first = first or time.perf_counter()
            count += len(event.token_ids)
    return (count - 1) / (time.perf_counter() - first)


def one_stream_of_mlx_lm(model: Any) -> float:
    """Return tokens per second of `generate_step`."""
    first, count = 0.0, 0
    for _ in generate_step(mx.array(list(range(100, 228))), model, max_tokens=256):
        first = first or time.perf_counter()
        count += 1
    return (count - 1) / (time.perf_counter() - first)


def first_tokens(engine: Engine, prompts: list[list[int]], name: str) -> float:
    """Return the p50 of the seconds to the first token of prompts that arrive at once."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    rest(engine)
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{index}", EngineRequest(prompt, params))
    found: dict[str, float] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request_id, time.perf_counter() - start)
    return statistics.median(found.values())


def shared_prefix(engine: Engine) -> dict[str, list[float]]:
    """Return the p50 of first tokens without and with a common prefix, and their ratio, for bursts.

    At first, shapes of steps are new.
    """
    draw = random.Random(11)
    found: dict[str, list[float]] = {}

    def tokens(count: int) -> list[int]:
        return [draw.randrange(100, VOCABULARY) for _ in range(count)]

    for number in range(BURSTS):
        common = tokens(PROMPT * 9 // 10)
        new = [tokens(PROMPT) for _ in range(AT_ONCE)]
        cold = first_tokens(engine, new, f"cold-{number}")
        first_tokens(engine, [common], f"prefix-{number}")
        sharing = [common + tokens(PROMPT - len(common)) for _ in range(AT_ONCE)]
        warm = first_tokens(engine, sharing, f"warm-{number}")
        for name, value in (
            ("first_token_cold_s", cold),
            ("first_token_shared_s", warm),
            ("ratio_shared", warm / cold),
        ):
            found.setdefault(name, []).append(round(value, 3))
    return found


def measure(name: str, model: Any, *, peers: bool) -> dict[str, Any]:
    """Return all figures of a model."""
    found: dict[str, Any] = {"model": name, "GB": round(active_bytes(model) / 1e9, 2)}
    if peers:
        slow = name != "nemotron_h"
        work, prefill = (requests(7)[:32], 1) if slow else (requests(7), 8)
        theirs(model, requests(8, 2 if slow else AT_ONCE), prefill)
        found["BatchGenerator"] = round(theirs(model, work, prefill))
        one_stream_of_mlx_lm(model)
        found["generate_step"] = round(one_stream_of_mlx_lm(model), 1)
    start = time.perf_counter()
    engine = make_engine(model, name)
    found["start_s"] = round(time.perf_counter() - start, 1)
    try:
        for number in range(WARM_ROUNDS):
            ours(engine, requests(8 + 10 * number), f"warm-{number}")
            rest(engine)
        before = engine.stats()
        rates = []
        for number in range(3):
            rate, _ = ours(engine, requests(7 + 10 * number), f"counts-{number}")
            rates.append(round(rate))
            rest(engine)
        after = engine.stats()
        found["ours"] = statistics.median(rates)
        found["rounds"] = rates
        found["host_s"] = [
            round(b - a, 2)
            for a, b in (
                (before.build_seconds, after.build_seconds),
                (before.launch_seconds, after.launch_seconds),
                (before.wait_seconds, after.wait_seconds),
            )
        ]
        one_stream(engine)
        rest(engine)
        found["one_stream"] = round(one_stream(engine), 1)
        found |= shared_prefix(engine)
        found["notes"] = engine.notes
    finally:
        engine.close()
    if peers:
        found["ratio_batch"] = round(found["ours"] / found["BatchGenerator"], 2)
        found["ratio_one"] = round(found["one_stream"] / found["generate_step"], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SHAPES))
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        model = make_model(name)
        size = active_bytes(model)
        hybrid = measure(name, model, peers=not args.no_peers)
        print(json.dumps(hybrid), flush=True)
        del model
        mx.clear_cache()
        layer = active_bytes(make_model("llama", 2)) - active_bytes(make_model("llama", 1))
        rest = active_bytes(make_model("llama", 1)) - layer
        layers = round((size - rest) / layer)
        llama = measure(f"llama, {layers} layers", make_model("llama", layers), peers=False)
        llama["ratio_of_llama"] = round(hybrid["ours"] / llama["ours"], 2)
        print(json.dumps(llama), flush=True)


if __name__ == "__main__":
    main()
