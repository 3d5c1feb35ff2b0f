"""AsyncEmbedder: an embedding model in its own thread, which makes every call to MLX.

Each batch has the input that has waited longest and the inputs nearest to it in length, of any
request. `AsyncEmbedder` has the interface that the model pool expects of an engine, but generates
no text.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelpack_engine.async_engine import EngineState, ModelThread, settle
from modelpack_engine.core.metrics import Meter
from modelpack_engine.embedding.request import (
    Embeddings,
    EmbedOptions,
    Input,
    Pair,
    Prepared,
    Scores,
    Vector,
    next_batch,
    sigmoid,
)
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.outputs import EngineStats
from modelpack_engine.worker.threads import prepare

if TYPE_CHECKING:
    from modelpack_engine.async_engine import RequestStream
    from modelpack_engine.embedding.embedder import CrossEncoder, Embedder
    from modelpack_engine.models.tokenizer import Tokenizer
    from modelpack_engine.request import EngineRequest

_log = logging.getLogger(__name__)

#: The most waiting inputs that are considered for a batch.
_LOOK_AHEAD = 4096


@dataclass(eq=False, slots=True)
class _Request:
    prepared: Sequence[Prepared]
    done: asyncio.Future[list[Any]]
    results: list[Any]
    missing: int
    dropped: bool = False  # its caller no longer waits


@dataclass(frozen=True, slots=True)
class _Item:
    request: _Request
    place: int

    @property
    def prepared(self) -> Prepared:
        return self.request.prepared[self.place]


class AsyncEmbedder(ModelThread["Embedder | CrossEncoder", _Request]):
    """Starts a thread that makes the model with `make_model` and then serves requests."""

    #: It reads text only.
    picture_processor = None
    no_vision = ""

    def __init__(
        self, make_model: Callable[[], Embedder | CrossEncoder], meter: Meter | None = None
    ) -> None:
        self._running = 0
        self._finished = 0
        self._prompt_tokens = 0
        self._waiting: list[_Item] = []
        super().__init__("modelpack-embedder", make_model, meter)

    @property
    def model(self) -> Embedder | CrossEncoder:
        """The loaded model: its `config`, `tokenizer` and `notes` are for any thread."""
        if self._model is None:
            raise EngineError(f"the model is {self.state}", hint="wait until it is ready")
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which any thread may use."""
        return self.model.tokenizer

    @property
    def max_model_len(self) -> int:
        """The longest input, in tokens."""
        return self.model.config.max_length

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.model.vocab_size

    @property
    def memory_bytes(self) -> int:
        """The bytes of the weights; batches hold memory only while they run."""
        return 0 if self._model is None else self._model.weight_bytes

    def stats(self) -> EngineStats:
        """Return the counters of requests and prompt tokens; the others are 0."""
        return EngineStats(
            num_running=self._running,
            num_finished=self._finished,
            prompt_tokens=self._prompt_tokens,
        )

    def check_queue(self) -> None:
        """Do nothing: prompts that would wait are refused by `submit`."""

    async def submit(self, request: EngineRequest) -> RequestStream:
        """Raise `RequestError`: the model does not generate text."""
        raise RequestError(
            f"this model ({self.model.config.architecture}) does not generate text",
            param="model",
            hint="use it for embeddings or ranking",
        )

    @property
    def ranks_pairs(self) -> bool:
        """Whether the model is a cross-encoder, which has scores but no vectors."""
        from modelpack_engine.embedding.embedder import CrossEncoder

        return isinstance(self.model, CrossEncoder)

    async def embed(
        self, inputs: Sequence[Input], options: EmbedOptions | None = None
    ) -> Embeddings:
        """Return the vectors of the inputs, as `Embedder.embed` does.

        Raises the errors of `Embedder.embed`, and `RequestError` if the model is a cross-encoder.
        """
        from modelpack_engine.embedding.embedder import CrossEncoder

        model = self.model
        if isinstance(model, CrossEncoder):
            raise RequestError(
                f"this model ({model.config.architecture}) ranks documents; it has no vectors",
                param="model",
            )
        options = options or EmbedOptions()
        prepared = await prepare(sum(map(len, inputs)), lambda: model.read(inputs, options))
        vectors = await self._results(prepared)
        return model.finish(vectors, prepared, options)

    async def score(self, pairs: Sequence[Pair], *, truncate: bool = False) -> Scores:
        """Return the logits of (query, document), as `CrossEncoder.score` does.

        Raises the errors of `CrossEncoder.score`, and `RequestError` if the model is not a
        cross-encoder.
        """
        from modelpack_engine.embedding.embedder import Embedder

        model = self.model
        if isinstance(model, Embedder):
            raise RequestError("this model is not a cross-encoder", param="model")
        prepared = await prepare(
            sum(len(text) for pair in pairs for text in pair),
            lambda: model.read(pairs, truncate=truncate),
        )
        return model.finish(await self._results(prepared), prepared)

    def close(self) -> None:
        """Stop the thread; requests that have not ended fail."""
        self._calls.put(None)
        self._thread.join()

    async def _results(self, prepared: Sequence[Prepared]) -> list[Any]:
        if not prepared:
            return []
        tokens, count = sum(map(len, prepared)), len(prepared)
        began, reason = time.monotonic(), "error"
        done = asyncio.get_running_loop().create_future()
        request = _Request(prepared, done, [None] * count, count)
        if not self._call(request):
            raise EngineError(f"the model is {self.state}")
        self._running += 1
        try:
            results = await request.done
            reason = "stop"
            self._prompt_tokens += tokens
            return results
        except asyncio.CancelledError:
            reason = "abort"
            raise
        finally:
            request.dropped = True
            self._running -= 1
            self._finished += 1
            self.meter.answered(reason, tokens, time.monotonic() - began)

    # The model's thread

    def _serve(self, model: Embedder | CrossEncoder) -> None:
        try:
            while self._take_requests():
                if self._waiting:
                    self._run_batch(model)
        finally:
            self._end(EngineState.STOPPED)
            self._fail_all()

    def _take_requests(self) -> bool:
        """Queue new requests; wait for one if none is queued. Return False to stop."""
        while True:
            try:
                request = self._calls.get(block=not self._waiting)
            except queue.Empty:
                self._waiting = [item for item in self._waiting if not item.request.dropped]
                return True
            if request is None:
                return False
            self._waiting += [_Item(request, place) for place in range(len(request.prepared))]

    def _run_batch(self, model: Embedder | CrossEncoder) -> None:
        """Run one batch, and return the results of the requests that are complete."""
        lengths = [len(item.prepared) for item in self._waiting[:_LOOK_AHEAD]]
        places = next_batch(lengths, model.limits)
        batch = [self._waiting[place] for place in places]
        taken = set(places)
        self._waiting = [item for at, item in enumerate(self._waiting) if at not in taken]
        try:
            results: Sequence[Any] = model.run([item.prepared for item in batch])
        except BaseException as error:  # noqa: BLE001 - the requests fail, the model goes on
            _log.exception("a batch failed")
            for request in {item.request for item in batch}:
                request.dropped = True
                settle(request.done, EngineError(f"the model failed: {error}"))
            return
        for item, result in zip(batch, results, strict=True):
            item.request.results[item.place] = result
            item.request.missing -= 1
            if not item.request.missing:
                settle(item.request.done, item.request.results)

    def _fail_all(self) -> None:
        requests = {item.request for item in self._waiting}
        while True:
            try:
                request = self._calls.get_nowait()
            except queue.Empty:
                break
            if request is not None:
                requests.add(request)
        self._waiting.clear()
        for request in requests:
            settle(request.done, EngineError("the model was stopped"))


async def rank_pairs(
    model: AsyncEmbedder,
    pairs: Sequence[Pair],
    *,
    truncate: bool = False,
    nouns: tuple[str, str] = ("query", "documents"),
) -> tuple[list[float], int]:
    """Return a score for each (query, document), the higher the better, and the tokens read.

    A cross-encoder's score is the sigmoid of its logit, between 0 and 1; an embedding model's is
    the cosine of the two vectors, between -1 and 1. Errors call the texts by
    `nouns`. Raises the errors of `AsyncEmbedder.embed` and `AsyncEmbedder.score`.
    """
    if model.ranks_pairs:
        scores = await model.score(pairs, truncate=truncate)
        return [sigmoid(logit) for logit in scores.values], scores.num_tokens
    # Each text is embedded once, however many pairs it is part of.
    first, second = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
    left, right = await asyncio.gather(
        *(
            model.embed(texts, EmbedOptions(truncate=truncate, noun=noun))
            for texts, noun in zip((first, second), nouns, strict=True)
        )
    )
    queries = dict(zip(first, left.vectors, strict=True))
    documents = dict(zip(second, right.vectors, strict=True))
    values = [_cosine(queries[query], documents[document]) for query, document in pairs]
    return values, left.num_tokens + right.num_tokens


def _cosine(left: Vector, right: Vector) -> float:
    lengths = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    return float(np.dot(left, right)) / lengths if lengths else 0.0
