"""SteppingEngine: the interface of every engine, which `AsyncEngine` and the server use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from modelpack_engine.config import EngineConfig
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.outputs import EngineStats, RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams


class SteppingEngine(Protocol):
    """The interface that `Engine`, which documents each member, and `LlamaCppEngine` implement.

    `notes` say how the model is run, and how it differs from its files.
    """

    config: EngineConfig
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    memory_bytes: int
    notes: tuple[str, ...]

    def add_request(self, request_id: str, request: EngineRequest) -> None: ...

    @property
    def has_work(self) -> bool: ...

    def step(self) -> list[RequestEvent]: ...

    def abort(self, request_id: str, index: int | None = None) -> list[RequestEvent]: ...

    def fail_all(self, message: str) -> list[RequestEvent]: ...

    def is_known(self, request_id: str) -> bool: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...

    def generate(
        self, prompts: Iterable[str | Sequence[int]], params: SamplingParams
    ) -> list[list[RequestEvent]]: ...


def run_to_end(
    engine: SteppingEngine, prompts: Iterable[str | Sequence[int]], params: SamplingParams
) -> list[list[RequestEvent]]:
    """Run prompts to their end; return the events of each prompt, in the order of the prompts."""
    events: dict[str, list[RequestEvent]] = {}
    for i, prompt in enumerate(prompts):
        token_ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        engine.add_request(f"generate-{i}", EngineRequest(token_ids, params))
        events[f"generate-{i}"] = []
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return list(events.values())
