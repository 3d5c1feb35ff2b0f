"""Compare our engine with BatchGenerator on a GPU, for architectures other than Llama's.

    python benchmarks/gpu_architectures.py [--peer-only] [NAME ...]

The engine decides for the first model whether MLX uses CUDA graphs (`cuda_graphs`), so run
recurrent models in separate processes. The decision also applies to BatchGenerator, unless
MLX_USE_CUDA_GRAPHS is set: set it to 1 to run BatchGenerator with MLX's default.

The models are small and have random bfloat16 weights. 128 requests have the lengths of load M
(prompts of 64-1024 tokens, responses of 32-256), 64 of them concurrently; one round warms up, and
the next one counts. Prints a JSON object for each model, and two intermediate ones.
`first_tokens_equal` is the share of 32 prompts after which the engine chooses the same token as a
plain forward pass: near 1, since some tokens are almost equally likely in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import time
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.patches import recurrent
from modelpack_engine.platform import cuda_graphs
from modelpack_engine.request import EngineRequest, SamplingParams

VOCABULARY, CONTEXT, AT_ONCE, REQUESTS = 32768, 2048, 64, 128
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 512,
        "n_shared_experts": 1,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "routed_scaling_factor": 1.0,
        "rope_theta": 1e4,
        "attention_bias": False,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_theta": 150000,
        "layer_types": ["sliding_attention", "full_attention"] * 6,
    },
    "nemotron_h": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "attention_bias": False,
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "mamba_proj_bias": False,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "n_groups": 8,
        "time_step_limit": [0.0, 1e9],
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "-", "M", "*"] * 4,
    },
    "qwen3_next": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_value_heads": 16,
        "linear_num_key_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 512,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "tie_word_embeddings": True,
        "norm_topk_prob": True,
    },
}


class Silent:
    """A tokenizer without text, for random weights."""

    eos_token_ids: frozenset[int] = frozenset()
    special_token_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"


def make_model(name: str) -> Any:
    """Return a model of random weights in bfloat16."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    arguments = module.ModelArgs.from_dict({"model_type": name, **COMMON, **SHAPES[name]})
    model = module.Model(arguments)
    cuda_graphs.choose(model, recurrent.count(model))
    model.update(cast(model.parameters(), mx.bfloat16))
    mx.eval(model.parameters())
    return model


def cast(parameters: Any, dtype: mx.Dtype) -> Any:
    """Return the parameters, with floating-point ones converted to `dtype`."""
    return tree_map(
        lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x, parameters
    )


def make_engine(model: Any, name: str) -> Engine:
    loaded = LoadedModel(model, {"vocab_size": VOCABULARY}, Silent(), name, CONTEXT, (), 0)
    config = EngineConfig(max_num_seqs=AT_ONCE, kv_cache_bytes=4 << 30, max_model_len=CONTEXT)
    return Engine(loaded, config)


def requests(seed: int, count: int = REQUESTS) -> list[tuple[list[int], int]]:
    """Return prompts and lengths of responses."""
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(100, VOCABULARY) for _ in range(draw.randint(64, 1024))],
            draw.randint(32, 256),
        )
        for _ in range(count)
    ]


def ours(
    engine: Engine, work: list[tuple[list[int], int]], name: str
) -> tuple[float, dict[int, int]]:
    """Return output tokens per second with AT_ONCE concurrent requests, and all first tokens."""
    start, count = time.perf_counter(), 0
    first: dict[int, int] = {}
    waiting = list(enumerate(work))
    running = 0
    while waiting or engine.has_work:
        while waiting and running < AT_ONCE:
            index, (token_ids, length) = waiting.pop(0)
            params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
            engine.add_request(f"{name}-{index}", EngineRequest(token_ids, params))
            running += 1
        for event in engine.step():
            count += len(event.token_ids)
            running -= event.finish_reason is not None
            if event.token_ids:
                first.setdefault(int(event.request_id.removeprefix(f"{name}-")), event.token_ids[0])
    return count / (time.perf_counter() - start), first


def theirs(model: Any, work: list[tuple[list[int], int]], prefill: int = 8) -> float:
    """Return output tokens per second of BatchGenerator, with `prefill` prompts at once."""
    generator = BatchGenerator(model, completion_batch_size=AT_ONCE, prefill_batch_size=prefill)
    start, count, done = time.perf_counter(), 0, 0
    for token_ids, length in work:
        generator.insert([token_ids], max_tokens=[length])
    while done < len(work):
        for response in generator.next_generated():
            count += 1
            done += response.finish_reason is not None
    elapsed = time.perf_counter() - start
    generator.close()
    return count / elapsed


def alone(model: Any, work: list[tuple[list[int], int]]) -> list[int]:
    """Return the token after each prompt, by a plain forward pass of the model."""
    return [int(mx.argmax(model(mx.array([token_ids]))[0, -1])) for token_ids, _ in work]


def measure(name: str, *, peer_only: bool) -> dict[str, Any]:
    """Return both rates for one architecture, and details of the run of our engine."""
    model = make_model(name)
    found: dict[str, Any] = {"architecture": name, "graphs": os.environ.get(cuda_graphs.GRAPHS)}
    peer = None
    try:
        theirs(model, requests(8, AT_ONCE))  # warm-up
        peer = theirs(model, requests(7))
        found["BatchGenerator"] = round(peer)
    except RuntimeError as error:
        found["BatchGenerator"] = f"fails: {error}"
    if peer_only:
        return found
    print(json.dumps(found), flush=True)
    wanted = alone(model, requests(7)[:32])
    start = time.perf_counter()
    engine = make_engine(model, name)
    up = time.perf_counter() - start
    print(json.dumps({"architecture": name, "start_s": round(up, 1)}), flush=True)
    ours(engine, requests(8), "warm")
    rate, first = ours(engine, requests(7), "counts")
    stats = engine.stats()
    return {
        **found,
        "ours": round(rate),
        "ratio": peer and round(rate / peer, 2),
        "first_tokens_equal": sum(first[i] == token for i, token in enumerate(wanted))
        / len(wanted),
        "start_s": round(up, 1),
        "notes": engine.notes,
        "host_s": [
            round(x, 2) for x in (stats.build_seconds, stats.launch_seconds, stats.wait_seconds)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SHAPES))
    parser.add_argument("--peer-only", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        try:
            found = measure(name, peer_only=args.peer_only)
        except Exception as error:  # measure the other architectures
            found = {"architecture": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
