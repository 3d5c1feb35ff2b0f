"""Choose between the GPU and the CPU."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError


def choose_device(config: EngineConfig) -> Literal["cpu", "gpu"]:
    """Return "gpu" or "cpu" and make it MLX's default device.

    Raises `EngineError` if `config` asks for a GPU and MLX finds none.
    """
    has_gpu = mx.metal.is_available() or mx.cuda.is_available()
    if config.device == "gpu" and not has_gpu:
        raise EngineError("there is no GPU that MLX can use", hint="use the CPU: device cpu")
    use_gpu = has_gpu and config.device != "cpu"
    mx.set_default_device(mx.gpu if use_gpu else mx.cpu)
    return "gpu" if use_gpu else "cpu"
