"""EngineConfig: how the engine runs, as opposed to what a model is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelpack_engine.kv_types import KVCacheDtype

#: Tokens a KV block holds.
BLOCK_SIZE = 16

Device = Literal["auto", "gpu", "cpu"]
Backend = Literal["auto", "mlx", "llama.cpp"]
SpeculativeMethod = Literal["ngram", "draft"]
SchedulingPolicy = Literal["shortest-first", "fcfs"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. None stands for a default that depends on device and model.

    `backend` "auto" is llama.cpp for GGUF models on a CPU where it is installed, else MLX.

    `max_num_batched_tokens` bounds the rows of one step (default 2048 on a GPU, 256 on a CPU),
    `max_prefill_chunk` how many of them one prompt may take, so that a long prompt cannot hold up
    running streams. Of prompts that wait, the shortest is first (`scheduling_policy`); how long
    others may overtake one is bounded by its length. "fcfs" is first come, first served.
    `default_model_len` is what a model's packager wants `max_model_len` to be: it holds where that
    is None, as far as the model's context and the memory go. Memory for the KV cache is
    `kv_cache_bytes`, or what `gpu_memory_utilization` of the device's memory leaves beside the
    weights. `kv_cache_dtype` is the type of what it holds.

    Speculation proposes tokens, `num_speculative_tokens` at a time, and verifies them in one step:
    by lookup in the text so far ("ngram"), or with a smaller model, `draft_model`, which is a name
    or the path of its files ("draft", the default if there is one). It stops while more than
    `speculative_disable_by_batch_size` sequences decode. A draft model proposes nothing that it
    gives less than a probability of `speculative_min_acceptance`.

    Blocks that the prefix cache evicts are kept in `kv_offload_memory` bytes of host memory, and in
    files of `kv_offload_dir`, `kv_offload_disk` bytes of them. Without a directory and without
    memory, they are gone; with a directory, the defaults are 1 and 16 GiB.

    A field of config.json that changes the output and that the model's class does not read is an
    error, unless `ignore_config_fields` names it.
    """

    device: Device = "auto"
    backend: Backend = "auto"
    block_size: int = BLOCK_SIZE
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_prefill_chunk: int | None = None
    max_model_len: int | None = None
    default_model_len: int | None = None
    max_waiting: int = 1024
    scheduling_policy: SchedulingPolicy = "shortest-first"
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    enable_prefix_caching: bool = True
    speculative_method: SpeculativeMethod | None = None
    draft_model: str | Path | None = None
    num_speculative_tokens: int | None = None
    speculative_min_acceptance: float = 0.0
    speculative_disable_by_batch_size: int | None = None
    kv_offload_dir: str | None = None
    kv_offload_memory: int | None = None
    kv_offload_disk: int | None = None
    ignore_config_fields: tuple[str, ...] = ()
    warm_up: bool = True
    self_test: bool = True

    @property
    def speculation(self) -> SpeculativeMethod | None:
        """How tokens are proposed, None if they are not."""
        return self.speculative_method or ("draft" if self.draft_model else None)
