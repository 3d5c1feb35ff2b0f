"""The serving engine of Modelpack: paged attention and continuous batching on MLX.

    from modelpack_engine import SamplingParams
    from modelpack_server import open_model

    engine = open_model("ai/smollm2:135m").engine()
    [events] = engine.generate(["The capital of France is"], SamplingParams(max_tokens=8))
    print("".join(event.text for event in events))

Read `engine.py` first: a step fits on one screen. Names are imported at their first use, after a
BLAS for MLX's CPU backend is chosen (`platform/blas.py`), which must happen before MLX is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modelpack_engine.platform.environment import set_limits

if TYPE_CHECKING:
    from modelpack_engine.async_engine import AsyncEngine as AsyncEngine
    from modelpack_engine.config import EngineConfig as EngineConfig
    from modelpack_engine.engine import Engine as Engine
    from modelpack_engine.outputs import RequestEvent as RequestEvent
    from modelpack_engine.request import SamplingParams as SamplingParams

_EXPORTS = {
    "AsyncEngine": "modelpack_engine.async_engine",
    "Engine": "modelpack_engine.engine",
    "EngineConfig": "modelpack_engine.config",
    "RequestEvent": "modelpack_engine.outputs",
    "SamplingParams": "modelpack_engine.request",
}
_WITHOUT_MLX = {"EngineConfig", "RequestEvent", "SamplingParams"}

__all__ = list(_EXPORTS)

set_limits()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'modelpack_engine' has no attribute {name!r}")
    if name not in _WITHOUT_MLX:
        from modelpack_engine.platform import blas

        blas.prepare()
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
