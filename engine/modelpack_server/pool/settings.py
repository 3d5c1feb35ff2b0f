"""ModelSettings: how one model is to run, from presets, flags and requests to set it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from modelpack_engine.config import EngineConfig
from modelpack_server.pool.presets import preset_named
from modelpack_server.pool.runtime_flags import parse_flags

Mode = Literal["completion", "embedding", "reranking"]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """None and empty mean: as the model, the preset or the server has it.

    `runtime_flags` are in the spelling of llama.cpp and vLLM. `sampling` are fields of
    SamplingParams, `keep_alive` is in seconds (`math.inf` for ever). `engine` overrides fields of
    EngineConfig. `reasoning_budget` is the most tokens of reasoning where a request says nothing of
    it: 0 is none, below 0 as many as it likes. Each wins over what stands before it: preset, flags,
    context_size, sampling.
    """

    context_size: int | None = None
    runtime_flags: tuple[str, ...] = ()
    preset: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    keep_alive: float | None = None
    mode: Mode = "completion"
    reasoning_budget: int | None = None
    engine: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def check(self) -> None:
        """Raise `UsageError` for flags and presets that do not exist."""
        parse_flags(self.runtime_flags)
        if self.preset is not None:
            preset_named(self.preset)

    def over(self, base: ModelSettings) -> ModelSettings:
        """Return these settings, and those of `base` where these say nothing."""
        return replace(
            base,
            context_size=self.context_size or base.context_size,
            runtime_flags=(*base.runtime_flags, *self.runtime_flags),
            preset=self.preset or base.preset,
            sampling={**base.sampling, **self.sampling},
            keep_alive=base.keep_alive if self.keep_alive is None else self.keep_alive,
            mode=self.mode if self.mode != "completion" else base.mode,
            reasoning_budget=(
                base.reasoning_budget if self.reasoning_budget is None else self.reasoning_budget
            ),
            engine={**base.engine, **self.engine},
        )

    def sampling_defaults(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults of requests; `own` are the model's, which all others win over."""
        chosen = preset_named(self.preset).sampling if self.preset else {}
        return {**own, **chosen, **parse_flags(self.runtime_flags).sampling, **self.sampling}

    def engine_fields(self) -> dict[str, Any]:
        """Return the fields of EngineConfig that flags and `engine` set."""
        return {**parse_flags(self.runtime_flags).engine, **self.engine}

    def engine_config(self, base: EngineConfig) -> EngineConfig:
        """Return the configuration of the engine; `base` is the server's.

        The context size of a preset is cut to what the model and the memory hold; one that was
        asked for and does not fit is an error of the engine's.
        """
        given = self.engine_fields()
        if self.context_size:
            given["max_model_len"] = self.context_size
        if self.preset is not None:
            given.setdefault("default_model_len", preset_named(self.preset).context_size)
        return replace(base, **given)
