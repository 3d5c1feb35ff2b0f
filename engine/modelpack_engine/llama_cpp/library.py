"""llama-cpp-python: find and load its bindings, route its log, and choose the backend."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
from typing import Any, Literal

from modelpack_engine.config import EngineConfig, parse_kv_cache_dtype
from modelpack_engine.errors import EngineError
from modelpack_engine.models.files import ModelFiles

_log = logging.getLogger(__name__)

#: Its functions follow llama.cpp's from week to week: what these are was read off this version.
VERSION = "0.3.36"
_HINT = "pip install 'modelpack[llama-cpp]'"
# llama.cpp's levels: 3 is a warning, 4 an error; 5 goes on with the line before.
_WARNING, _ERROR = 3, 4


def is_installed() -> bool:
    """Return whether the version that we know is there; loads nothing."""
    return importlib.util.find_spec("llama_cpp") is not None and _version() == VERSION


@functools.cache
def bindings() -> Any:
    """Return the module; raises `EngineError` if it is not there or of another version."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise EngineError("llama-cpp-python is not installed", hint=_HINT)
    if _version() != VERSION:
        raise EngineError(
            f"llama-cpp-python is {_version()}, expected {VERSION}: other versions have other "
            "functions",
            hint=_HINT,
        )
    try:
        module = importlib.import_module("llama_cpp")
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # its library may be for another processor
        raise EngineError(f"llama-cpp-python cannot be loaded: {error}", hint=_HINT) from error
    module.llama_log_set(_logger(module), ctypes.c_void_p(0))
    module.llama_backend_init()
    return module


def num_threads() -> int:
    """Return how many threads to compute with: half of the processors that this process may use.

    They are usually two to a core, which adds nothing; and llama.cpp's threads wait for each other
    in a loop, so that one that gets no processor holds up all.
    """
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on a Mac
        processors = os.cpu_count() or 1
    return max(1, processors // 2)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def _logger(module: Any) -> Any:
    """Return the callback, which has to stay alive."""

    def write(level: int, text: bytes, _: object) -> None:
        message = text.decode("utf-8", "replace").strip()
        if level in (_WARNING, _ERROR) and message:
            _log.debug("llama.cpp: %s", message)  # what fails is raised; the rest is its own talk

    return module.llama_log_callback(write)


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
