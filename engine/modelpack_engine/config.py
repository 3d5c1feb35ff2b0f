"""EngineConfig: the settings of one engine, and the names of its KV cache types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from modelpack.errors import UsageError

#: "auto" is the type of the model's own keys; q8 and q4 are 8 and 4 bits with scales.
KVCacheDtype = Literal["auto", "bf16", "fp16", "q8", "q4"]

#: The accepted names: vLLM's for float types, llama.cpp's for quantised types.
_SPELLINGS = {
    "auto": "auto", "bf16": "bf16", "bfloat16": "bf16", "q8": "q8", "q8_0": "q8", "q4": "q4",
    "q4_0": "q4", **dict.fromkeys(("fp16", "f16", "float16", "half"), "fp16"),
}  # fmt: skip


def parse_kv_cache_dtype(text: str) -> KVCacheDtype:
    """Return the type that `text` names, in any case; raises `UsageError` for other names."""
    found = _SPELLINGS.get(text.strip().lower())
    if found is None:
        fp8 = text.strip().lower().startswith("fp8")
        raise UsageError(
            f"no such KV cache type: {text[:100]!r}" + (": MLX has no 8-bit floats" if fp8 else ""),
            hint="use q8, which has the same size" if fp8 else "use auto, bf16, fp16, q8 or q4",
        )
    return cast("KVCacheDtype", found)


#: Tokens in a KV block.
BLOCK_SIZE = 16
#: The default number of requests that may wait in an engine's queue.
DEFAULT_MAX_WAITING = 1024
#: The default rows of a step, which include those of prompts. On a GPU, fewer if memory is scarce.
GPU_BATCHED_TOKENS = 2048
CPU_BATCHED_TOKENS = 256
#: Those of the library for CPUs; `SchedulerConfig.whole_steps` says what prompts have of them.
PACKED_BATCHED_TOKENS = 512
#: The default number of sequences of a step; a large one is a CUDA device with enough memory.
NUM_SEQS, LARGE_GPU_NUM_SEQS = 64, 256

Device = Literal["auto", "gpu", "cpu"]
Backend = Literal["auto", "mlx", "llama.cpp"]
SpeculativeMethod = Literal["ngram", "draft", "eagle3", "mtp", "none"]
SchedulingPolicy = Literal["shortest-first", "fcfs"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of one engine. None stands for a default that depends on device and model.

    `backend` "auto" is, on a CPU, the library `modelpack_engine.cpu` for the architectures that it
    knows, else llama.cpp for GGUF if it is installed; otherwise MLX.

    `max_num_seqs` limits the sequences that run at the same time (default 256 on a CUDA device with
    32 GiB or more, else 64).

    `max_num_batched_tokens` limits the rows of one step (default 2048 on a GPU, 512 with the
    library for CPUs, else 256 on a CPU), and `max_prefill_chunk` those of one prompt, so that a
    long prompt does not delay running streams. With the library for CPUs, a single prompt may fill
    a step, and one of several half of it. While other sequences decode, one prompt has at most a
    quarter of a step, and all prompts at most half.
    `scheduling_policy` "shortest-first" admits the shortest waiting prompt first, but bounds how
    long others overtake a prompt by its length; "fcfs" is first come, first served.

    `default_model_len` is the packager's value for `max_model_len` if that is None, limited by the
    model's context and the memory. The KV cache has `kv_cache_bytes`, or the share
    `gpu_memory_utilization` of the device's memory, less the weights. `kv_cache_dtype` is the type
    of its keys and values.

    Speculation proposes `num_speculative_tokens` tokens and verifies them in one step. The method
    "ngram" looks them up in the sequence; "draft", the default with a `draft_model` (a name or a
    path), samples them from that smaller model, or drafts them if it is Gemma 4's drafter or an
    EAGLE-3 head, which "eagle3" requires; "mtp" drafts them with the model's own layer for
    multi-token prediction; "none" is no speculation even if the store has a drafter. There are no
    proposals while more than `speculative_disable_by_batch_size` sequences decode. A proposal of a
    draft model or a drafter ends before a token with a probability below
    `speculative_min_acceptance`.

    Blocks that the prefix cache evicts are kept in `kv_offload_memory` bytes of host memory, and in
    `kv_offload_disk` bytes of files in `kv_offload_dir`. If neither memory nor a directory is set,
    they are dropped; with a directory, the defaults are 1 GiB and 16 GiB.

    `max_loras` is the most LoRA adapters in memory; 0 means that requests cannot name adapters.

    A field of config.json that changes the output and that the model's class does not read is an
    error, unless `ignore_config_fields` names it.
    """

    device: Device = "auto"
    backend: Backend = "auto"
    block_size: int = BLOCK_SIZE
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_prefill_chunk: int | None = None
    max_model_len: int | None = None
    default_model_len: int | None = None
    max_waiting: int = DEFAULT_MAX_WAITING
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
    max_loras: int = 0
    warm_up: bool = True
    self_test: bool = True

    @property
    def speculation(self) -> SpeculativeMethod | None:
        """The method that proposes tokens; None without speculation."""
        if self.speculative_method == "none":
            return None
        return self.speculative_method or ("draft" if self.draft_model else None)

    @property
    def uses_draft_model(self) -> bool:
        """Whether `draft_model` is to be loaded."""
        return self.speculation in ("draft", "eagle3") and self.draft_model is not None
