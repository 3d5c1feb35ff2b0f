"""Which backend runs a model."""

from __future__ import annotations

from typing import Literal

from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError
from modelpack_engine.kv_types import parse_kv_cache_dtype
from modelpack_engine.llama_cpp.library import is_installed
from modelpack_engine.loaders.files import ModelFiles


def choose_backend(
    files: ModelFiles, config: EngineConfig, device: Literal["cpu", "gpu"]
) -> Literal["mlx", "llama.cpp"]:
    """Return what computes; raises `EngineError` where llama.cpp was asked for and cannot.

    Left to itself it is llama.cpp for GGUF on a CPU, where it is installed: how much faster that is
    is in benchmarks/results/cpu.md. On a GPU, and for safetensors, it is MLX.
    """
    if config.backend == "mlx":
        return "mlx"
    lacking = _lacking(config)
    if config.backend == "auto":
        return "mlx" if lacking is not None else automatic_backend(files.format, device)
    if files.format != "gguf":
        raise EngineError(
            f"the backend llama.cpp runs GGUF files, and this model is {files.format}",
            hint="use --backend mlx",
        )
    if device == "gpu":
        raise EngineError(
            "the backend llama.cpp is for CPUs here, and there is a GPU that MLX can use",
            hint="use --device cpu, or --backend mlx",
        )
    if lacking is not None:
        raise EngineError(f"the backend llama.cpp has no {lacking} here", hint="use --backend mlx")
    return "llama.cpp"


def automatic_backend(format: str, device: Literal["cpu", "gpu"]) -> Literal["mlx", "llama.cpp"]:
    """Return what computes a model of a format where nothing is asked for that only MLX does."""
    return "llama.cpp" if format == "gguf" and device == "cpu" and is_installed() else "mlx"


def _lacking(config: EngineConfig) -> str | None:
    """Return what is asked for that only MLX does."""
    if parse_kv_cache_dtype(config.kv_cache_dtype) not in ("auto", "fp16"):
        return f"KV cache of type {config.kv_cache_dtype}"
    if config.kv_offload_dir is not None or config.kv_offload_memory:
        return "KV offload"
    return "speculative decoding" if config.speculation is not None else None
