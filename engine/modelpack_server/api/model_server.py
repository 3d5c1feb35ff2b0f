"""ModelServer: a pool of models behind its APIs, on a socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp

from modelpack.listening import GRACE, AppServer
from modelpack_server.api.app import create_app
from modelpack_server.api.bodies import MAX_BODY_BYTES
from modelpack_server.pool.pool import ModelPool


class ModelServer(AppServer):
    """Serves a pool.

    The socket answers while models are loaded: /health says 503 until those that are pinned are.
    `wrap` puts an application before this one; bodies larger than `max_body_bytes` are refused.
    `request_templates` lets admins send chat templates with their requests.
    `share_prefix_cache`: prompts of all API keys share prefixes in the KV cache.
    """

    def __init__(
        self,
        make_pool: Callable[[], ModelPool],
        *,
        address: str = "127.0.0.1:12434",
        allow_remote: bool = False,
        grace: int = GRACE,
        max_body_bytes: int = MAX_BODY_BYTES,
        request_templates: bool = False,
        share_prefix_cache: bool = False,
        wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """Raises `UsageError` for an address that is none, or not loopback unless allowed."""
        super().__init__(
            lambda: wrap(
                create_app(
                    make_pool(),
                    max_body_bytes=max_body_bytes,
                    request_templates=request_templates,
                    share_prefix_cache=share_prefix_cache,
                )
            ),
            address,
            name="model server",
            allow_remote=allow_remote,
            grace=grace,
            lifespan=True,
            tls=tls,
        )
