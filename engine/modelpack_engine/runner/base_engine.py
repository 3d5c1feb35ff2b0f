"""BaseEngine: what all engines share, and the interface that `AsyncEngine` and the server use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as Tokens

from modelpack.formats.adapter import Adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import StepClock
from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import RequestError
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.outputs import EngineStats, RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.output_processor import OutputProcessor, make_outputs
from modelpack_engine.sampling.sampler import Sampler
from modelpack_engine.vision.encoder import Vision
from modelpack_engine.vision.processor import MediaProcessor


class BaseEngine(ABC):
    """Serves one loaded model: requests in, events out. `AsyncEngine` runs it in its own thread.

    `Engine` runs models with MLX, and `LlamaCppEngine` with llama.cpp. Not thread-safe. `notes` say
    how the model is run, and how it differs from its files.
    """

    config: EngineConfig
    tokenizer: Tokenizer
    #: The type of the model, as its configuration or its GGUF file names it.
    model_type: str = ""
    #: What reads pictures with MLX.
    vision: Vision | None = None
    #: Why the engine reads no pictures, where the model's files should.
    no_vision: str = ""
    vocab_size: int
    max_model_len: int
    memory_bytes: int
    weight_bytes: int
    kv_cache_bytes: int
    notes: tuple[str, ...]
    _scheduler: Scheduler
    _sampler: Sampler
    _outputs: OutputProcessor
    _clock: StepClock

    @abstractmethod
    def step(self) -> list[RequestEvent]:
        """Run one step; return the new events."""

    @abstractmethod
    def fail_all(self, message: str) -> list[RequestEvent]:
        """End every request with an error, after a step that raised; return the last events.

        Events of that step that were not emitted come first. New requests can be added afterwards.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds; it cannot be used afterwards."""

    def add_request(self, request_id: str, request: EngineRequest) -> None:
        """Queue a request; its events carry `request_id`.

        Raises `RequestError`, `ContextLengthError`, `QueueFullError`, or `NotFoundError` for an
        unknown adapter; nothing is queued then.
        """
        if request.adapter is not None:
            raise RequestError("this engine runs no LoRA adapters", param="model")
        if request.media and self.picture_processor is None:
            raise RequestError("this model reads no pictures", param="messages")
        self._add(request_id, request)

    def check_queue(self) -> None:
        """Raise `QueueFullError` if a request would find the queue full now; any thread may ask."""
        self._scheduler.check_queue()

    @property
    def picture_processor(self) -> MediaProcessor | None:
        """What places pictures in prompts, for any thread; None if the engine reads text only."""
        return None if self.vision is None else self.vision.processor

    @property
    def runs_adapters(self) -> bool:
        """Whether adapters can be added."""
        return False

    def add_adapter(self, name: str, adapter: Adapter, identity: str) -> None:
        """Make an adapter available to requests by name; `identity` stands for its content.

        It replaces an adapter of this name, which unfinished requests keep. Raises `AdapterError`
        if it does not fit the model, and `RequestError` if the engine runs no adapters.
        """
        raise RequestError("this engine runs no LoRA adapters", param="model")

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter; unfinished requests keep it, and its memory is freed after the last.

        Raises `NotFoundError` for an unknown name, and `RequestError` if the engine runs none.
        """
        raise RequestError("this engine runs no LoRA adapters", param="model")

    def _add(self, request_id: str, request: EngineRequest, adapter: object | None = None) -> None:
        outputs = make_outputs(request_id, request, self.tokenizer, self.vocab_size, adapter)
        self._outputs.add(outputs)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    def use_idle_time(self) -> bool:
        """Do a piece of the work that waits for idle time; return whether there is more.

        Call it while there is no work. The first call does nothing: from then on, work waits that
        steps would do otherwise. A piece takes up to a second, or longer if a kernel is compiled.
        """
        return False

    def abort(self, request_id: str, index: int | None = None) -> list[RequestEvent]:
        """End a request, or its choice `index`; return the last events of its sequences.

        Their blocks are free at once. A request that is unknown or has ended returns no events.
        """
        return self._outputs.abort(request_id, index)

    def is_known(self, request_id: str) -> bool:
        """Return whether a sequence of the request is unfinished."""
        return self._outputs.is_known(request_id)

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        return self._clock.counted(self._scheduler.stats())

    def generate(
        self, prompts: Iterable[str | Tokens[int]], params: SamplingParams
    ) -> list[list[RequestEvent]]:
        """Run prompts to their end; return each one's events, in the order of the prompts.

        Raises `RequestError` for an invalid prompt, and while there are other requests.
        """
        if len(self._outputs):
            raise RequestError("the engine has other requests, whose events would be lost")
        events: dict[str, list[RequestEvent]] = {}
        try:
            for i, prompt in enumerate(prompts):
                token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                self.add_request(f"generate-{i}", EngineRequest(token_ids, params))
                events[f"generate-{i}"] = []
        except BaseException:
            for request_id in events:
                self.abort(request_id)
            raise
        while self.has_work:
            for event in self.step():
                events[event.request_id].append(event)
        return list(events.values())

    def _register(self, sequence: Sequence) -> None:
        """Add a sequence that starts to the sampler."""
        if sequence.seq_id not in self._sampler:
            self._sampler.add(
                sequence.seq_id,
                sequence.prompt_token_ids,
                sequence.params,
                output_token_ids=sequence.output_token_ids,
                index=sequence.index,
            )
            self._outputs.started(sequence)

    def _forget(self, seq_ids: Tokens[int]) -> None:
        """Remove sequences that ended or were preempted from the sampler."""
        for seq_id in seq_ids:
            if seq_id in self._sampler:
                self._sampler.remove(seq_id)
