"""What the engine tells about a request while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context is full
    ABORT = "abort"  # the caller aborted it
    ERROR = "error"  # it failed; see `error`


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability (natural log), and those of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; `cached_tokens` of the prompt came from the prefix cache.

    Of the tokens that speculation proposed, `accepted_tokens` were right and are in the completion;
    `rejected_tokens` were not, and are nowhere.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened to a choice: seconds of `time.monotonic`; None for what did not."""

    arrived: float
    scheduled: float | None
    first_token: float | None
    finished: float


@dataclass(slots=True)  # not frozen, which takes four times as long: there is one for each token
class RequestEvent:
    """News of one request: what was generated since its last event, and perhaps its end.

    `index` is the choice (0 … n-1). `text` is what became final: a stop string that may still
    complete, or half a character, is held back. `prompt_logprobs` comes once, with the first event;
    its first entry is None, since nothing precedes the first token. `usage` and `timing` come with
    the end. `error` says why a request failed, `error_param` which of its fields is at fault: None
    if the engine is.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    error: str | None = None
    error_param: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more comes for this choice."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """What became of offloaded blocks: counters since the start, and the gauges `…_bytes` at the
    end. Hits are blocks, `restores` sequences that got any; dropped files were damaged.
    """

    restores: int = 0
    restored_tokens: int = 0
    memory_hits: int = 0
    disk_hits: int = 0
    saved_bytes: int = 0
    restored_bytes: int = 0
    dropped_files: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def __add__(self, past: OffloadStats) -> OffloadStats:
        """Return these with the counters of `past` added; gauges stay."""
        sums = {name: getattr(self, name) + getattr(past, name) for name in _OFFLOAD_COUNTERS}
        return replace(self, **sums)

    def counters(self) -> OffloadStats:
        """Return the counters alone, the gauges at 0."""
        return replace(self, memory_bytes=0, disk_bytes=0)


_OFFLOAD_COUNTERS = [
    each.name for each in fields(OffloadStats) if each.name not in {"memory_bytes", "disk_bytes"}
]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and gauges of this moment."""

    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_mixed_steps: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    num_proposals: int = 0
    proposed_tokens: int = 0  # by speculation,
    accepted_tokens: int = 0  # and those of them that were right
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    build_seconds: float = 0.0  # the host's time: schedule a step and build its graph,
    launch_seconds: float = 0.0  # hand it to the device,
    wait_seconds: float = 0.0  # and wait for its tokens
    offload: OffloadStats = field(default_factory=OffloadStats)
    live_tokens: int = 0  # whose keys are in blocks of running sequences, shared ones counted twice

    def after(self, past: EngineStats) -> EngineStats:
        """Return these with the counters of `past` added; gauges stay those of this moment."""
        return replace(
            self, **{name: getattr(self, name) + getattr(past, name) for name in _COUNTERS}
        )

    def counters(self) -> EngineStats:
        """Return the counters alone, the gauges at 0."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return EngineStats(**counters | {"offload": self.offload.counters()})


_GAUGES = {
    "num_running",
    "num_waiting",
    "blocks_total",
    "blocks_used",
    "blocks_cached",
    "live_tokens",
}
_COUNTERS = [each.name for each in fields(EngineStats) if each.name not in _GAUGES]
