"""Serving on top of the engine: stored models, the HTTP APIs, the gateway, bench and chat.

    from modelpack_server import open_model

    engine = open_model("ai/smollm2:135m").engine()

`api` has the HTTP routes, `pool` loads and unloads models, `conversation` turns chat requests into
token deltas, `gateway` checks API keys and limits, `cli` registers the commands. This package may
import `modelpack` and `modelpack_engine`; neither imports it.

Names load on first use, after `modelpack_engine.platform.blas` chose a BLAS for MLX's CPU backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelpack_server.stored_models import open_cross_encoder as open_cross_encoder
    from modelpack_server.stored_models import open_embedder as open_embedder
    from modelpack_server.stored_models import open_model as open_model

_EXPORTS = {
    "open_cross_encoder": "modelpack_server.stored_models",
    "open_embedder": "modelpack_server.stored_models",
    "open_model": "modelpack_server.stored_models",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    from modelpack_engine.platform import blas

    return blas.load_export(__name__, _EXPORTS, name)
