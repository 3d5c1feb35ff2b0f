"""The routes below /engines: status, loaded models, unloading and settings of models.

`ConfigureRequest` turns `_configure` bodies, with runtime flags of llama.cpp and vLLM, into model
settings. Compose files pass flags that have no effect here, such as numbers of threads: those are
ignored with a warning. Flags that change a reply are never ignored.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import ConfigDict, Field, StrictBool, StrictStr

import modelpack
from modelpack.errors import ModelpackError, NotFoundError
from modelpack.store.filesystem import bytes_used
from modelpack_engine.errors import BusyError, RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.api.model_runner.answers import TextRoute, documented, read_body
from modelpack_server.api.model_runner.names import find_stored, name_shown
from modelpack_server.api.paths import check_backend
from modelpack_server.pool.entry import ModelState, RunningModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import Mode, ModelSettings, parse_keep_alive, show_keep_alive

# Flags for logging, hardware and web pages, which have no effect here.
_ALONE = frozenset(
    ("--verbose", "-v", "--log-verbose", "--log-disable", "--log-prefix", "--log-timestamps",
     "--jinja", "--metrics", "--no-webui", "--slots", "--no-slots", "--mlock", "--no-mmap",
     "--cont-batching", "-cb", "--no-warmup", "--enforce-eager", "--disable-log-requests")
)  # fmt: skip
_WITH_VALUE = frozenset(
    ("--verbosity", "--log-verbosity", "-lv", "--log-file", "--log-colors", "--threads", "-t",
     "--threads-batch", "-tb", "--n-gpu-layers", "--gpu-layers", "-ngl", "--flash-attn", "-fa",
     "--ubatch-size", "-ub", "--tensor-parallel-size", "-tp")
)  # fmt: skip


def without_effect(flags: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the flags with an effect and the flags without, each with its value."""
    kept: list[str] = []
    dropped: list[str] = []
    takes_value = False
    for word in flags:
        if takes_value and not word.startswith("-"):
            dropped.append(word)
            takes_value = False
            continue
        name, equals, _ = word.partition("=")
        takes_value = name in _WITH_VALUE and not equals
        (dropped if name in _ALONE | _WITH_VALUE else kept).append(word)
    return kept, dropped


_log = logging.getLogger(__name__)

_UTILIZATION = "gpu_memory_utilization"
# Fields of EngineConfig, by Docker Model Runner's names for them.
_SPECULATIVE = {
    "draft_model": "draft_model",
    "num_speculative_tokens": "num_tokens",
    "speculative_min_acceptance": "min_acceptance_rate",
}
# llama.cpp's flags for the kind of a model; Compose has no other field for it.
_EMBEDDING_FLAGS = frozenset({"--embedding", "--embeddings"})
_RERANKING_FLAGS = frozenset({"--rerank", "--reranking"})


class _Part(Body):
    model_config = ConfigDict(populate_by_name=True, extra="allow")


class VllmPart(_Part):
    """The options for vLLM."""

    hf_overrides: dict[str, Any] | None = Field(None, alias="hf-overrides")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, alias="gpu-memory-utilization"
    )


class LlamaCppPart(_Part):
    """The options for llama.cpp."""

    reasoning_budget: int | None = Field(None, alias="reasoning-budget")


class SpeculativePart(_Part):
    """Speculative decoding with a draft model from the store."""

    draft_model: StrictStr = ""
    num_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_acceptance_rate: Annotated[float, Field(ge=0, le=1)] = 0.0

    def engine(self) -> dict[str, Any]:
        """Return the fields of EngineConfig that are set; 0 and "" count as not set."""
        return {name: value for name, key in _SPECULATIVE.items() if (value := getattr(self, key))}


class ConfigureRequest(_Part):
    """The body of POST /engines/_configure."""

    model: StrictStr = ""
    mode: Literal["completion", "embedding", "reranking", "image-generation"] | None = None
    raw_runtime_flags: StrictStr = Field("", alias="raw-runtime-flags")
    context_size: Annotated[int, Field(lt=2**31)] | None = Field(None, alias="context-size")
    runtime_flags: list[StrictStr] | None = Field(None, alias="runtime-flags")
    speculative: SpeculativePart | None = None
    keep_alive: StrictStr | None = None
    vllm: VllmPart | None = None
    llamacpp: LlamaCppPart | None = None

    def settings(self) -> ModelSettings:
        """Return the settings; raises `UsageError`, `RequestError` for unsupported ones."""
        if not self.model:
            raise RequestError("model is required", param="model")
        if self.mode == "image-generation":
            raise RequestError("image generation is not supported", param="mode")
        if self.vllm is not None and self.vllm.hf_overrides:
            raise RequestError("a model's config cannot be overridden", param="vllm.hf-overrides")
        if unknown := sorted(self.model_extra or ()):
            _log.warning("_configure for %s: ignored %s", self.model, ", ".join(unknown))
        flags, dropped = without_effect(self._flags())
        if dropped:
            _log.warning("_configure for %s: no effect: %s", self.model, " ".join(dropped))
        budget = self.llamacpp.reasoning_budget if self.llamacpp is not None else None
        share = self.vllm.gpu_memory_utilization if self.vllm is not None else None
        engine: dict[str, Any] = {} if share is None else {_UTILIZATION: share}
        if self.speculative is not None:
            engine |= self.speculative.engine()
        settings = ModelSettings(
            context_size=self.context_size if (self.context_size or 0) > 0 else None,
            runtime_flags=tuple(f for f in flags if f not in _EMBEDDING_FLAGS | _RERANKING_FLAGS),
            keep_alive=None if self.keep_alive is None else parse_keep_alive(self.keep_alive),
            mode=_mode(self.mode, flags),
            reasoning_budget=budget,
            engine=engine,
        )
        settings.check()
        return settings

    def _flags(self) -> list[str]:
        if self.runtime_flags:
            return self.runtime_flags
        try:
            return shlex.split(self.raw_runtime_flags)
        except ValueError as error:
            raise RequestError(
                f"invalid runtime flags: {error}", param="raw-runtime-flags"
            ) from None


def _mode(asked: str | None, flags: Iterable[str]) -> Mode:
    if asked == "embedding" or (asked is None and not _EMBEDDING_FLAGS.isdisjoint(flags)):
        return "embedding"
    if asked == "reranking" or (asked is None and not _RERANKING_FLAGS.isdisjoint(flags)):
        return "reranking"
    return "completion"


def config_shown(settings: ModelSettings) -> dict[str, Any]:
    """Return settings as the configuration of a backend, without those that are not set."""
    kept, engine, budget = settings.keep_alive, settings.engine, settings.reasoning_budget
    share = engine.get(_UTILIZATION)
    shown = {
        "context-size": settings.context_size,
        "runtime-flags": list(settings.runtime_flags) or None,
        "keep_alive": None if kept is None else show_keep_alive(kept),
        "vllm": None if share is None else {"gpu-memory-utilization": share},
        "speculative": {k: engine[name] for name, k in _SPECULATIVE.items() if name in engine}
        or None,
        "llamacpp": None if budget is None else {"reasoning-budget": budget},
    }
    return {key: value for key, value in shown.items() if value is not None}


#: The name of our engine as a backend.
BACKEND = "modelpack"
_NEVER = "0001-01-01T00:00:00Z"


class UnloadRequest(Body):
    """The body of POST /engines/unload; without `backend`, any backend."""

    all: StrictBool = False
    backend: StrictStr = ""
    models: list[StrictStr] | None = None


class BackendRequest(Body):
    """The body of POST /engines/install-backend and uninstall-backend."""

    backend: StrictStr = ""
    version: StrictStr = ""


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(prefix="/engines", tags=["Docker Model Runner"], route_class=TextRoute)
    preloads: set[asyncio.Task[None]] = set()

    @routes.get("/status")
    async def status() -> dict[str, str]:
        """Return the state of each backend."""
        return {BACKEND: f"Running: modelpack {modelpack.__version__}"}

    @routes.get("/ps")
    async def running() -> list[dict[str, Any]]:
        """List the models that are loaded or being loaded."""
        now = pool.clock()
        return [_shown(m, now) for m in pool.running() if m.state is not ModelState.UNLOADING]

    @routes.get("/df")
    async def disk_usage() -> dict[str, int]:
        """Return the size of the store in bytes; the engine itself keeps no files."""
        size = await asyncio.to_thread(bytes_used, pool.catalogue.store.root)
        return {"models_disk_usage": size, "default_backend_disk_usage": 0}

    @routes.post("/unload", openapi_extra=documented(UnloadRequest))
    async def unload(request: Request) -> dict[str, int]:
        """Unload idle models; an unknown name counts as a model that is not loaded."""
        body = await read_body(request, UnloadRequest)
        if body.backend:
            check_backend(body.backend)
        if body.all:
            return {"unloaded_runners": len(await pool.unload(idle_only=True))}
        keys = [key for name in body.models or () if (key := await _key(pool, name))]
        return {"unloaded_runners": len(await pool.unload(set(keys), idle_only=True))}

    async def configure(request: Request) -> Response:
        """Configure a model and start loading it; 409 while it is in use with other settings."""
        body = await read_body(request, ConfigureRequest)
        settings = body.settings()
        key = await _key(pool, body.model)
        if key is None:
            raise NotFoundError(f"no such model: {body.model!r}")
        try:
            await _configure(pool, key, settings)
        except BusyError as error:
            raise BusyError(f"runner already active: {error}") from error
        task = asyncio.create_task(_preload(pool, key))
        preloads.add(task)
        task.add_done_callback(preloads.discard)
        return Response(status_code=202)

    how: dict[str, Any] = {
        "methods": ["POST"], "response_model": None, "status_code": 202,
        "openapi_extra": documented(ConfigureRequest),
    }  # fmt: skip
    routes.add_api_route("/_configure", configure, **how)
    routes.add_api_route(
        "/{backend}/_configure", configure, **how,
        include_in_schema=False, dependencies=[Depends(check_backend)],
    )  # fmt: skip

    @routes.get("/_configure")
    async def configured(model: Annotated[str, Query()] = "") -> list[dict[str, Any]]:
        """Return the settings of `model`, or of all configured models."""
        key = await _key(pool, model) if model else None
        stored = {found.key: found for found in await pool.stored()}
        return [
            {
                "Backend": BACKEND,
                "Model": name_shown(stored[own].names[0]) if stored[own].names else "",
                "ModelID": own,
                "Mode": settings.mode,
                "Config": config_shown(settings),
            }
            for own, settings in pool.configured().items()
            if own in stored and (not model or own == key)
        ]

    @routes.post("/install-backend", response_model=None,
                 openapi_extra=documented(BackendRequest))  # fmt: skip
    async def install(request: Request) -> Response:
        """Do nothing, since the engine is part of this program. 404 for another backend."""
        await _named_backend(request)
        return Response()

    @routes.post("/uninstall-backend", response_model=None,
                 openapi_extra=documented(BackendRequest))  # fmt: skip
    async def uninstall(request: Request) -> Response:
        """Unload idle models; the engine itself is part of this program."""
        await _named_backend(request)
        await pool.unload(idle_only=True)
        return Response()

    return routes


async def _named_backend(request: Request) -> None:
    body = await read_body(request, BackendRequest)
    if not body.backend:
        raise RequestError("invalid request: backend is required", param="backend")
    check_backend(body.backend)


async def _key(pool: ModelPool, name: str) -> str | None:
    """Return the id of the model that a client calls `name`, or None."""
    with suppress(NotFoundError):
        return (await pool.find(name)).key
    with suppress(NotFoundError):
        _, found = await asyncio.to_thread(find_stored, pool.catalogue.store, name)
        return str(found.digest)
    return None


async def _configure(pool: ModelPool, key: str, settings: ModelSettings) -> None:
    """Configure a model; if it is in use only because it is loading, wait for that."""
    try:
        await pool.configure(key, settings)
    except BusyError:
        loading = {m.stored.key for m in pool.running() if m.state is ModelState.LOADING}
        if key not in loading:
            raise
        with suppress(ModelpackError):
            await pool.preload(key)
        await pool.configure(key, settings)


async def _preload(pool: ModelPool, key: str) -> None:
    try:
        await pool.preload(key)
    except Exception as error:  # noqa: BLE001 - nobody waits for it; whoever asks next is told
        _log.warning("cannot preload the model %s: %s", key, error)


def _shown(model: RunningModel, clock: float) -> dict[str, Any]:
    used = model.last_used
    shown: dict[str, Any] = {
        "backend_name": BACKEND,
        "model_name": name_shown(model.name),
        "mode": model.settings.mode,
        "last_used": _NEVER if used is None else _time(used - clock),
    }
    if model.users:
        shown["in_use"] = True
    if model.state is ModelState.LOADING:
        shown["loading"] = True
    return shown | {"keep_alive": show_keep_alive(model.keep_alive)}


def _time(seconds: float) -> str:
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")
