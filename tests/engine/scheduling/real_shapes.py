"""Real shapes of models without their weights: MLX builds arrays at first use, and none is used.

Sources: config.json of Qwen/Qwen3-Next-80B-A3B-Instruct, nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B,
google/gemma-3-27b-it and openai/gpt-oss-20b.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx

from modelpack_engine.core.batch import build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import Scheduler, SchedulerOutput
from modelpack_engine.runner.model_layout import ModelLayout, find_layout

#: Arguments of mlx-lm's classes, by the name of the class's module.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 5120, "head_dim": 256,
        "num_attention_heads": 16, "num_key_value_heads": 2, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "full_attention_interval": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "partial_rotary_factor": 0.25, "rope_theta": 1e7, "vocab_size": 151936,
        "norm_topk_prob": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "nemotron_h": {
        "hidden_size": 2688, "num_hidden_layers": 52, "mamba_num_heads": 64, "mamba_head_dim": 64,
        "hybrid_override_pattern": [*"MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"],
        "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 1856,
        "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "attention_bias": False, "mamba_proj_bias": False, "use_bias": False,
        "use_conv_bias": True, "mlp_bias": False, "time_step_limit": [0.0, float("inf")],
        "layer_norm_epsilon": 1e-5, "vocab_size": 131072, "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "hidden_size": 5376, "num_hidden_layers": 62, "intermediate_size": 21504, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 16, "sliding_window": 1024,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": 168, "vocab_size": 262208,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "rope_theta": 1e6,
    },
    "gpt_oss": {
        "hidden_size": 2880, "num_hidden_layers": 24, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        "rms_norm_eps": 1e-5, "rope_theta": 150000,
    },
}  # fmt: skip


@cache
def real_layout(name: str) -> ModelLayout:
    """Return the layout of a real model's caches, in bfloat16."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SHAPES[name]}))
    model.set_dtype(mx.bfloat16)
    return find_layout(model)


def steps(scheduler: Scheduler, blocks: BlockManager) -> Iterator[SchedulerOutput]:
    """Run all requests without a device: yield each step, whose samples are always token 7.

    The states that a runner would keep are kept, as numbers.
    """
    while scheduler.has_work:
        output = scheduler.schedule()
        assert output is not None
        interval, config = blocks.snapshot_interval, scheduler.config
        batch = build_batch(output, None, config.buckets, blocks.block_size, interval)
        if blocks.snapshots is not None:
            for row, index in batch.decode_snapshots:
                blocks.snapshots.put_unnamed(batch.decode_seq_ids[row], index, index)
            for chunk in batch.chunks:
                if chunk.snapshot_hash is not None:
                    blocks.snapshots.put(chunk.snapshot_hash, chunk.kv_length)
        scheduler.submitted(output)
        scheduler.collect(output, [7] * len(output.sampled))
        yield output
