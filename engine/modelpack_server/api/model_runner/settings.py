"""Model settings from `_configure` bodies, and runtime flags of llama.cpp and vLLM.

Compose files pass flags that mean nothing here. They are ignored, because refusing them would
refuse models that run as well without; flags that change an answer are never ignored.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.pool.settings import Mode, ModelSettings, parse_keep_alive, show_keep_alive

# How they log, which processors and libraries they use, which pages of their own they serve.
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
    """Return the flags that mean something here, and those that do not; values go with theirs."""
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
# Fields of EngineConfig, and what Docker Model Runner calls them.
_SPECULATIVE = {
    "draft_model": "draft_model",
    "num_speculative_tokens": "num_tokens",
    "speculative_min_acceptance": "min_acceptance_rate",
}
# Of llama.cpp: what kind of model it is. Compose has no other word for it.
_EMBEDDING_FLAGS = frozenset({"--embedding", "--embeddings"})
_RERANKING_FLAGS = frozenset({"--rerank", "--reranking"})


class _Part(Body):
    model_config = ConfigDict(populate_by_name=True, extra="allow")


class VllmPart(_Part):
    """What vLLM alone would understand."""

    hf_overrides: dict[str, Any] | None = Field(None, alias="hf-overrides")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, alias="gpu-memory-utilization"
    )


class LlamaCppPart(_Part):
    """What llama.cpp alone would understand."""

    reasoning_budget: int | None = Field(None, alias="reasoning-budget")


class SpeculativePart(_Part):
    """Speculation with a draft model of the store."""

    draft_model: StrictStr = ""
    num_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_acceptance_rate: Annotated[float, Field(ge=0, le=1)] = 0.0

    def engine(self) -> dict[str, Any]:
        """Return the fields of EngineConfig that it sets; what is 0 or empty is not set."""
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
        """Return the settings; raises `UsageError`, `RequestError` for what cannot be had."""
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
    """Return settings as the configuration of a backend; what is not set is left out."""
    shown: dict[str, Any] = {}
    if settings.context_size is not None:
        shown["context-size"] = settings.context_size
    if settings.runtime_flags:
        shown["runtime-flags"] = list(settings.runtime_flags)
    if settings.keep_alive is not None:
        shown["keep_alive"] = show_keep_alive(settings.keep_alive)
    if _UTILIZATION in settings.engine:
        shown["vllm"] = {"gpu-memory-utilization": settings.engine[_UTILIZATION]}
    speculative = {
        key: settings.engine[name] for name, key in _SPECULATIVE.items() if name in settings.engine
    }
    if speculative:
        shown["speculative"] = speculative
    if settings.reasoning_budget is not None:
        shown["llamacpp"] = {"reasoning-budget": settings.reasoning_budget}
    return shown
