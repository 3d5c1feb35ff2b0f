"""llama-cpp-python: find and load its bindings, route its log, and choose the backend."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
from typing import Any, Literal

from modelpack.errors import ModelpackError
from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.projector import projector_type
from modelpack_engine.config import EngineConfig, parse_kv_cache_dtype
from modelpack_engine.errors import EngineError
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.loader import may_read_pictures, runs_packed

_log = logging.getLogger(__name__)

#: The only supported version: its functions follow llama.cpp's, which change every week.
VERSION = "0.3.36"
#: Types of projectors that need a picture's position in its prompt, which mtmd does not get.
PLACED_TYPES = ("deepseek4v",)
_HINT = "run pip install 'modelpack[llama-cpp]'"
# llama.cpp's levels: 3 is a warning, 4 an error; 5 continues the previous line.
WARNING, ERROR = 3, 4


def is_installed() -> bool:
    """Return whether the supported version is installed, without loading it."""
    return importlib.util.find_spec("llama_cpp") is not None and _version() == VERSION


@functools.cache
def bindings() -> Any:
    """Load and return `llama_cpp`; raises `EngineError` if it is missing or of another version."""
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
    except (ImportError, OSError, RuntimeError) as error:  # it may be built for another processor
        raise EngineError(f"llama-cpp-python cannot be loaded: {error}", hint=_HINT) from error
    module.llama_log_set(_logger(module), ctypes.c_void_p(0))
    module.llama_backend_init()
    return module


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def _logger(module: Any) -> Any:
    """Return the log callback, which the cache keeps alive."""

    def write(level: int, text: bytes, _: object) -> None:
        message = text.decode("utf-8", "replace").strip()
        if level in (WARNING, ERROR) and message:
            _log.debug("llama.cpp: %s", message)  # failures raise errors as well

    return module.llama_log_callback(write)


def choose_backend(
    files: ModelFiles, config: EngineConfig, device: Literal["cpu", "gpu"]
) -> Literal["cpu kernels", "mlx", "llama.cpp"]:
    """Return the backend of a model; raises `EngineError` if llama.cpp is required but cannot run.

    The backend `auto` is the library for CPUs if it knows the architecture, or llama.cpp for GGUF
    on a CPU if it is installed (speeds are in benchmarks/results/cpu.md), and otherwise MLX. The
    pictures of GGUF models are read by MLX, or by llama.cpp on a CPU if MLX cannot.
    """
    if config.backend == "mlx" or (config.backend == "auto" and may_read_pictures(files)):
        return "mlx"
    if config.backend == "auto" and may_run_mtmd(files, config, device):
        return "llama.cpp"
    if runs_packed(files, config, device):
        return "cpu kernels"
    lacking = _lacking(config, files)
    if config.backend == "auto":
        return "mlx" if lacking is not None else automatic_backend(files.format, device)
    if files.format != "gguf":
        raise EngineError(
            f"llama.cpp runs GGUF files only, but this model is {files.format}",
            hint="use --backend mlx",
        )
    if device == "gpu":
        raise EngineError(
            "llama.cpp is supported on CPUs only, but this machine has a GPU that MLX can use",
            hint="use --device cpu, or --backend mlx",
        )
    if lacking is not None:
        raise EngineError(f"llama.cpp is not supported with {lacking}", hint="use --backend mlx")
    return "llama.cpp"


def may_run_mtmd(files: ModelFiles, config: EngineConfig, device: Literal["cpu", "gpu"]) -> bool:
    """Return whether llama.cpp's mtmd may read a model's pictures, by the projector's header."""
    if files.projector is None or config.backend == "mlx" or _lacking(config, files) is not None:
        return False
    if automatic_backend(files.format, device) != "llama.cpp":
        return False
    try:
        kind = projector_type(read_gguf_header(files.projector))
    except ModelpackError:
        return False
    return kind is not None and kind not in PLACED_TYPES


def automatic_backend(format: str, device: Literal["cpu", "gpu"]) -> Literal["mlx", "llama.cpp"]:
    """Return the backend for a format if no feature is requested that only MLX has."""
    return "llama.cpp" if format == "gguf" and device == "cpu" and is_installed() else "mlx"


def _lacking(config: EngineConfig, files: ModelFiles) -> str | None:
    """Return the requested feature that only MLX has, or None."""
    if parse_kv_cache_dtype(config.kv_cache_dtype) not in ("auto", "fp16"):
        return f"a KV cache of type {config.kv_cache_dtype}"
    if config.max_loras:
        return "LoRA adapters"
    if config.kv_offload_dir is not None or config.kv_offload_memory:
        return "KV offload"
    if config.speculation is not None:
        return "speculative decoding"
    return "a LoRA adapter" if files.adapter is not None else None
