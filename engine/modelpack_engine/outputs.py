"""Events and statistics that the engine emits: one `RequestEvent` for each step of a request."""

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
    """A token's log-probability (natural log), and those of the most likely ones.

    `data` are the bytes that the token adds to the text, if they were matched with the text.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; `cached_tokens` of the prompt came from the prefix cache.

    Of the tokens that speculation proposed, the completion contains the `accepted_tokens`, and none
    of the `rejected_tokens`.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """When a choice reached each phase, in seconds of `time.monotonic`; None: it never did."""

    arrived: float
    scheduled: float | None
    first_token: float | None
    finished: float


@dataclass(slots=True)  # not frozen: creation is four times faster, and each token has one
class RequestEvent:
    """The output of one choice of a request since its last event, and its end if it has ended.

    `index` is the choice (0 … n-1). `text` is final: a partial stop string or character is held
    back. Only the first event has `cached_tokens` (of the prompt) and `prompt_logprobs`, whose
    first entry is None, since no token precedes the first. Only the last event has `usage` and
    `timing`. `error` says why a request failed, and `error_param` names the invalid field of the
    request; None: the engine failed.
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
    cached_tokens: int | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the last event of its choice."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """Statistics of the KV offload: counters since the start; the last two are gauges.

    Hits count blocks, `restores` counts sequences with restored blocks, and `dropped_files` counts
    damaged files.
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
        """Return these statistics with the counters of `past` added; gauges stay as they are."""
        sums = {name: getattr(self, name) + getattr(past, name) for name in _OFFLOAD_COUNTERS}
        return replace(self, **sums)

    def counters(self) -> OffloadStats:
        """Return the counters with all gauges at 0."""
        return replace(self, memory_bytes=0, disk_bytes=0)


_OFFLOAD_COUNTERS = [
    each.name for each in fields(OffloadStats) if each.name not in {"memory_bytes", "disk_bytes"}
]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and gauges of the current state.

    If layers with smaller windows have blocks of their own, the gauges of blocks leave them out.
    """

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
    proposed_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # proposed tokens that were accepted
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    build_seconds: float = 0.0  # CPU time to schedule steps and build their graphs
    launch_seconds: float = 0.0  # CPU time to launch them
    wait_seconds: float = 0.0  # time to wait for their tokens
    offload: OffloadStats = field(default_factory=OffloadStats)
    live_tokens: int = 0  # in blocks of running sequences; shared tokens count once for each

    def after(self, past: EngineStats) -> EngineStats:
        """Return these statistics with the counters of `past` added; gauges stay as they are."""
        return replace(
            self, **{name: getattr(self, name) + getattr(past, name) for name in _COUNTERS}
        )

    def counters(self) -> EngineStats:
        """Return the counters alone, the gauges at 0."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return EngineStats(**counters | {"offload": self.offload.counters()})


_GAUGES = {
    "num_running", "num_waiting", "blocks_total", "blocks_used", "blocks_cached", "live_tokens",
}  # fmt: skip
_COUNTERS = [each.name for each in fields(EngineStats) if each.name not in _GAUGES]
