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
# Seconds, about what a Go duration can hold: as long as for ever, and a date can still be told.
_LONGEST = 250 * 365 * 86400

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PIECE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def parse_keep_alive(value: str | float) -> float:
    """Return seconds: of a number, of a text that is one, or of a Go duration ("5m", "1h30m").

    Negative, or hundreds of years, is for ever (`math.inf`), 0 not at all. Raises `UsageError`.
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
    """Return the seconds as a Go duration; "-1" for ever."""
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
    """`sampling` are fields of SamplingParams; `context_size`, in tokens, is at most that."""

    sampling: Mapping[str, Any] = field(hash=False)
    context_size: int


#: More than any model holds: all that it does.
WHOLE_CONTEXT = 1 << 30

PRESETS: Mapping[str, Preset] = {
    # Programs have to be right: little chance, and no penalty for saying a name again.
    "code": Preset({"temperature": 0.2, "top_p": 0.95, "top_k": 40}, 32768),
    "chat": Preset({"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}, 8192),
    "creative": Preset(
        {"temperature": 1.0, "top_p": 0.98, "min_p": 0.02, "presence_penalty": 0.3}, 8192
    ),
    # All that the model has: what is read counts, not what is made up.
    "long-context": Preset({"temperature": 0.3, "top_p": 0.9}, WHOLE_CONTEXT),
}


def preset_named(name: str) -> Preset:
    """Return the preset; raise `UsageError`, naming those there are, for another name."""
    if name not in PRESETS:
        raise UsageError(
            f"there is no preset {name!r}", hint=f"there are {', '.join(sorted(PRESETS))}"
        )
    return PRESETS[name]


@dataclass(frozen=True, slots=True)
class ParsedFlags:
    """`sampling` are fields of SamplingParams, `engine` of EngineConfig."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Flag:
    names: tuple[str, ...]
    kind: str
    field: str
    read: Callable[[str], Any] | None
    value: Any = None  # of a flag that takes none
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # `low` itself is too low

    def allows(self, number: float) -> bool:
        """Tell whether a number makes sense; what is none does not."""
        return self.low <= number <= self.high and not (self.above and number == self.low)

    @property
    def range(self) -> str:
        """The numbers that do, in words."""
        least = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return least
        return f"{least} and at most {self.high:g}"


def _size(text: str) -> int | None:
    """Return a number of tokens; vLLM takes 8k (thousands) and 8K (1024) too."""
    factor = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(text[-1:], 0)
    number = int(text[:-1]) * factor if factor else int(text)
    return number or None  # llama.cpp: 0 is what the model has


def _count(text: str) -> int | None:
    number = int(text)
    return number if number >= 0 else None  # llama.cpp: -1 is without end


def _seed(text: str) -> int | None:
    number = int(text)
    return number if number >= 0 else None


def _one_of(name: str, known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise UsageError(
                f"the runtime flag {name} is {text!r}", hint=f"known are {', '.join(known)}"
            )
        return text

    return read


def _name(text: str) -> str:
    # A model of the store: flags come over HTTP, too, and name no files.
    if not text:
        raise UsageError("a runtime flag that names a draft model has no name")
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
    _Flag(("--seed", "-s"), "sampling", "seed", _seed),
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
    """Return what flags (`--temp 0.7`, `--temp=0.7`) ask for; of several, the last counts.

    Raises `UsageError` for a flag that is not known, listing those that are, and for a value that
    is missing, no number or none that makes sense.
    """
    found: dict[str, dict[str, Any]] = {"sampling": {}, "engine": {}}
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        flag = _BY_NAME.get(name)
        if flag is None:
            known = ", ".join(sorted(_BY_NAME, key=lambda name: name.lstrip("-")))
            raise UsageError(f"unknown runtime flag {name!r}", hint=f"known are {known}")
        if flag.read is None:
            if equals:
                raise UsageError(f"the runtime flag {name} takes no value")
            found[flag.kind][flag.field] = flag.value
            continue
        if not equals:
            value = next(words, "")
        try:
            read = flag.read(value)
        except ValueError:
            raise UsageError(f"the runtime flag {name} needs a number, and got {value!r}") from None
        if isinstance(read, int | float) and not flag.allows(read):
            raise UsageError(f"the runtime flag {name} is {value}, expected {flag.range}")
        if read is None:
            found[flag.kind].pop(flag.field, None)
        else:
            found[flag.kind][flag.field] = read
    return ParsedFlags(found["sampling"], found["engine"])


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
