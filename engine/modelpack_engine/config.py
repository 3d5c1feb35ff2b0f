"""EngineConfig: how the engine runs, as opposed to what a model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Tokens a KV block holds.
BLOCK_SIZE = 16

Device = Literal["auto", "gpu", "cpu"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. None stands for a default that depends on device and model.

    `max_num_batched_tokens` bounds the rows of one step (default 2048 on a GPU, 256 on a CPU),
    `max_prefill_chunk` how many of them one prompt may take, so that a long prompt cannot hold up
    running streams. `default_model_len` is what a model's packager wants `max_model_len` to be: it
    holds where that is None, as far as the model's context and the memory go. Memory for the KV
    cache is `kv_cache_bytes`, or what `gpu_memory_utilization` of the device's memory leaves beside
    the weights.
    """

    device: Device = "auto"
    block_size: int = BLOCK_SIZE
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_prefill_chunk: int | None = None
    max_model_len: int | None = None
    default_model_len: int | None = None
    max_waiting: int = 1024
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    warm_up: bool = True
    self_test: bool = True
