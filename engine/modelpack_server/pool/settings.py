"""Settings of a served model: keep-alive, presets, engine options and runtime flags."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from modelpack.errors import UsageError
from modelpack_engine.config import (
    EngineConfig,
    SchedulingPolicy,
    SpeculativeMethod,
    parse_kv_cache_dtype,
)

#: How long a model stays loaded after its last use; an argument of `parse_keep_alive`.
DEFAULT_KEEP_ALIVE = "5m"
FOREVER = math.inf
# The longest finite keep-alive in seconds, about the maximum of a Go duration; dates remain valid.
_LONGEST = 250 * 365 * 86400

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PIECE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def parse_keep_alive(value: str | float) -> float:
    """Parse a keep-alive: a number of seconds, also as a string, or a Go duration ("5m", "1h30m").

    A negative one, or hundreds of years, means without end (`math.inf`). Raises `UsageError`.
    """
    if isinstance(value, (int, float)):
        if isinstance(value, float) and math.isnan(value):
            raise UsageError("keep_alive is not a number")
        return FOREVER if value < 0 or value > _LONGEST else float(value)
    text = value.strip()
    try:
        return parse_keep_alive(float(text))
    except ValueError:
        pass
    sign, rest = ("-", text[1:]) if text.startswith("-") else ("", text.removeprefix("+"))
    pieces = _PIECE.findall(rest)
    if not pieces or "".join(number + unit for number, unit in pieces) != rest:
        raise UsageError(f"keep_alive is {value!r}, expected seconds or a duration like 5m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in pieces)
    return parse_keep_alive(-1 if sign else seconds)


def show_keep_alive(seconds: float) -> str:
    """Return seconds as a Go duration; "-1" means without end."""
    if seconds == FOREVER:
        return "-1"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    shown = f"{rest:g}s"
    if hours:
        return f"{hours}h{minutes}m{shown}"
    return f"{minutes}m{shown}" if minutes else shown


@dataclass(frozen=True, slots=True)
class Preset:
    """A named preset: fields of SamplingParams, and the largest context in tokens."""

    sampling: Mapping[str, Any] = field(hash=False)
    context_size: int


#: The sampling temperature of requests that set none, for models whose files set none.
DEFAULT_TEMPERATURE = 0.7

#: More tokens than any model's context, so it means the whole context.
WHOLE_CONTEXT = 1 << 30

PRESETS: Mapping[str, Preset] = {
    # Code needs little randomness and no penalty for repeated names.
    "code": Preset({"temperature": 0.2, "top_p": 0.95, "top_k": 40}, 32768),
    "chat": Preset({"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}, 8192),
    "creative": Preset(
        {"temperature": 1.0, "top_p": 0.98, "min_p": 0.02, "presence_penalty": 0.3}, 8192
    ),
    # The whole context, with little randomness.
    "long-context": Preset({"temperature": 0.3, "top_p": 0.9}, WHOLE_CONTEXT),
}


def preset_named(name: str) -> Preset:
    """Return a preset; raise `UsageError` with the known names for an unknown name."""
    if name not in PRESETS:
        raise UsageError(
            f"no such preset: {name!r}", hint=f"use one of {', '.join(sorted(PRESETS))}"
        )
    return PRESETS[name]


@dataclass(frozen=True, slots=True)
class ParsedFlags:
    """Parsed runtime flags: fields of SamplingParams and of EngineConfig."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Flag:
    names: tuple[str, ...]
    kind: str
    field: str
    read: Callable[[str], Any] | None
    value: Any = None  # for a flag without a value
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # `low` itself is invalid

    def allows(self, number: float) -> bool:
        """Return whether a number is in the range; NaN is not."""
        return self.low <= number <= self.high and not (self.above and number == self.low)

    @property
    def range(self) -> str:
        """The range in words."""
        least = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return least
        return f"{least} and at most {self.high:g}"


def _size(text: str) -> int | None:
    """Parse a number of tokens, with vLLM's suffixes k (1000) and K (1024)."""
    factor = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(text[-1:], 0)
    number = int(text[:-1]) * factor if factor else int(text)
    return number or None  # llama.cpp: 0 means the model's context


def _count(text: str) -> int | None:
    number = int(text)
    return number if number >= 0 else None  # llama.cpp: -1 means no limit, or a random seed


def _one_of(name: str, known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise UsageError(
                f"runtime flag {name} is {text!r}", hint=f"use one of {', '.join(known)}"
            )
        return text

    return read


def _name(text: str) -> str:
    # A model in the store, never a file: flags also come over HTTP.
    if not text:
        raise UsageError("the runtime flag for a draft model has no name")
    return text


_FLAGS = (
    _Flag(("--temp", "--temperature"), "sampling", "temperature", float,
          low=0, high=2),
    _Flag(("--top-p",), "sampling", "top_p", float, low=0, high=1, above=True),
    _Flag(("--top-k",), "sampling", "top_k", int, low=-1),
    _Flag(("--min-p",), "sampling", "min_p", float, low=0, high=1),
    _Flag(("--repeat-penalty", "--repetition-penalty"), "sampling", "repetition_penalty",
          float, low=0, above=True),
    _Flag(("--presence-penalty",), "sampling", "presence_penalty", float, low=-2, high=2),
    _Flag(("--frequency-penalty",), "sampling", "frequency_penalty", float, low=-2, high=2),
    _Flag(("--seed", "-s"), "sampling", "seed", _count),
    _Flag(("--n-predict", "--predict", "-n"), "sampling", "max_tokens", _count),
    _Flag(("--ignore-eos",), "sampling", "ignore_eos", None, True),
    _Flag(("--ctx-size", "-c", "--max-model-len"), "engine", "max_model_len", _size,
          low=2),
    _Flag(("--max-num-seqs", "--parallel", "-np"), "engine", "max_num_seqs", _count, low=1),
    _Flag(("--max-num-batched-tokens", "--batch-size", "-b"), "engine",
          "max_num_batched_tokens", int, low=1),
    _Flag(("--gpu-memory-utilization",), "engine", "gpu_memory_utilization", float,
          low=0, high=1, above=True),
    _Flag(("--kv-cache-memory-bytes", "--kv-cache-bytes"), "engine", "kv_cache_bytes", int,
          low=1),
    _Flag(("--kv-cache-dtype",), "engine", "kv_cache_dtype", parse_kv_cache_dtype),
    _Flag(("--scheduling-policy",), "engine", "scheduling_policy",
          _one_of("--scheduling-policy", get_args(SchedulingPolicy))),
    _Flag(("--speculative-method",), "engine", "speculative_method",
          _one_of("--speculative-method", get_args(SpeculativeMethod))),
    _Flag(("--draft-model", "--model-draft", "-md"), "engine", "draft_model", _name),
    _Flag(("--num-speculative-tokens", "--draft-max", "--draft-n", "--draft"), "engine",
          "num_speculative_tokens", _count, low=1),
    _Flag(("--speculative-min-acceptance", "--draft-p-min"), "engine",
          "speculative_min_acceptance", float, low=0, high=1),
    _Flag(("--speculative-disable-by-batch-size",), "engine",
          "speculative_disable_by_batch_size", int, low=0),
    _Flag(("--block-size",), "engine", "block_size", int, low=1),
    _Flag(("--enable-prefix-caching",), "engine", "enable_prefix_caching", None, True),
    _Flag(("--no-enable-prefix-caching", "--no-prefix-caching"), "engine",
          "enable_prefix_caching", None, False),
)  # fmt: skip
_BY_NAME = {name: flag for flag in _FLAGS for name in flag.names}


def parse_flags(flags: Iterable[str]) -> ParsedFlags:
    """Parse flags such as `--temp 0.7` or `--temp=0.7`; the last of equal flags counts.

    Raises `UsageError` for an unknown flag, with the known ones, for a value that is missing, not
    a number or out of range, and for flags that contradict each other.
    """
    found: dict[str, dict[str, Any]] = {"sampling": {}, "engine": {}}
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        flag = _BY_NAME.get(name)
        if flag is None:
            known = ", ".join(sorted(_BY_NAME, key=lambda name: name.lstrip("-")))
            raise UsageError(f"unknown runtime flag {name!r}", hint=f"use one of {known}")
        if flag.read is None:
            if equals:
                raise UsageError(f"runtime flag {name} takes no value")
            found[flag.kind][flag.field] = flag.value
            continue
        if not equals:
            value = next(words, "")
        try:
            read = flag.read(value)
        except ValueError:
            raise UsageError(f"runtime flag {name} is {value!r}, expected a number") from None
        if isinstance(read, int | float) and not flag.allows(read):
            raise UsageError(f"runtime flag {name} is {value}, expected {flag.range}")
        if read is None:
            found[flag.kind].pop(flag.field, None)
        else:
            found[flag.kind][flag.field] = read
    method = found["engine"].get("speculative_method")
    if method in ("ngram", "mtp") and found["engine"].get("draft_model"):
        raise UsageError(f"runtime flag --speculative-method {method} does not use --draft-model")
    return ParsedFlags(found["sampling"], found["engine"])


Mode = Literal["completion", "embedding", "reranking"]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Settings of a model; None or an empty value means the default of model, preset or server.

    `runtime_flags` are flags of llama.cpp and vLLM. `sampling` has fields of SamplingParams,
    `keep_alive` is in seconds (`math.inf`: without end). `engine` overrides fields of EngineConfig.
    `reasoning_budget` is the default limit of reasoning tokens: 0 switches reasoning off, a
    negative number means no limit. Increasing priority: preset, flags, context_size, sampling.
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
        """Raise `UsageError` for unknown flags and presets."""
        parse_flags(self.runtime_flags)
        if self.preset is not None:
            preset_named(self.preset)

    def over(self, base: ModelSettings) -> ModelSettings:
        """Return these settings, completed by those of `base`."""
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
        """Return the sampling defaults for requests; the model's `own` have the lowest priority."""
        chosen = preset_named(self.preset).sampling if self.preset else {}
        return {**own, **chosen, **parse_flags(self.runtime_flags).sampling, **self.sampling}

    def engine_fields(self) -> dict[str, Any]:
        """Return the fields of EngineConfig that flags and `engine` set."""
        return {**parse_flags(self.runtime_flags).engine, **self.engine}

    def engine_config(self, base: EngineConfig) -> EngineConfig:
        """Return the configuration of the engine; `base` is the server's.

        A preset's context size is reduced to fit the model and the memory. For an explicit context
        size that does not fit, the engine raises an error.
        """
        given = self.engine_fields()
        if self.context_size:
            given["max_model_len"] = self.context_size
        if self.preset is not None:
            given.setdefault("default_model_len", preset_named(self.preset).context_size)
        return replace(base, **given)
