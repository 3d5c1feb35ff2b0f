"""Runtime flags in the spelling of llama.cpp and vLLM, as Docker Compose passes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from modelpack.errors import UsageError
from modelpack_engine.config import SchedulingPolicy, SpeculativeMethod
from modelpack_engine.kv_types import parse_kv_cache_dtype


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
