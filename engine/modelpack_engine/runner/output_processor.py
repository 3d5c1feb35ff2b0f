"""OutputProcessor: turn the tokens of running sequences into the events that an engine emits.

`Engine` and `LlamaCppEngine` each own one. It holds a `SequenceOutput` for every unfinished
sequence, with the sequence's detokenizer, mask and times.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from modelpack_engine.core.detokenizer import Detokenizer, ending_token_ids
from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.outputs import FinishReason, RequestEvent, Timing, TokenLogprob, Usage
from modelpack_engine.request import EngineRequest, LogitsMask
from modelpack_engine.runner.step import NextToken


def make_outputs(
    request_id: str,
    request: EngineRequest,
    tokenizer: Tokenizer,
    vocab_size: int,
    adapter: object | None = None,
) -> list[SequenceOutput]:
    """Return the outputs of the `n` new sequences of a request; raise `RequestError` if invalid."""
    request.check(vocab_size)
    first = Sequence(
        request_id,
        list(request.prompt_token_ids),
        request.params,
        eos_token_ids=tokenizer.eos_token_ids,
        cache_salt=request.cache_salt,
        owner=request.owner,
        background=request.background,
        adapter=adapter,
        media=request.media,
    )
    sequences = [first, *(first.fork(index) for index in range(1, request.n))]
    return [SequenceOutput(sequence, tokenizer, request.continues_text) for sequence in sequences]


class SequenceOutput:
    """Turns a sequence's tokens into events."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, continues_text: bool) -> None:
        self.sequence = sequence
        #: Log-probabilities of the prompt so far; the first token has none.
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        #: The mask of the sequence; it has accepted all tokens that the host has read.
        self.mask = sequence.params.mask() if sequence.params.mask is not None else None
        self._detokenizer = Detokenizer(tokenizer, sequence.params, continues_text=continues_text)
        self._ending_ids = ending_token_ids(sequence.params, sequence.eos_token_ids)
        self._has_emitted = False
        self._arrived = time.monotonic()
        self.scheduled: float | None = None
        self._first_token: float | None = None

    def take(self, token_id: int, logprob: TokenLogprob | None) -> tuple[RequestEvent, str | None]:
        """Return the event of a new token, and the stop string that it completes, if any."""
        if self._first_token is None:
            self._first_token = time.monotonic()
        if self.mask is not None:
            self.mask.accept(token_id)
        token_ids, reason = (token_id,), self.sequence.finish_reason
        ends_text = reason is FinishReason.STOP and token_id in self._ending_ids
        text, stopped_by = self._detokenizer.push(() if ends_text else token_ids)
        if stopped_by is not None and reason is FinishReason.LENGTH:
            self.sequence.finish_reason = FinishReason.STOP
            self.sequence.stop_reason = stopped_by
        event = self._event(token_ids, text, logprob)
        return event if reason is None else self.ended(event), stopped_by

    def ended(self, event: RequestEvent) -> RequestEvent:
        """Return `event` as the sequence's last one, with the rest of its text and why it ended."""
        return replace(
            event,
            text=event.text + self._detokenizer.finish(),
            finish_reason=self.sequence.finish_reason,
            stop_reason=self.sequence.stop_reason,
            usage=self._usage(),
            timing=self._timing(),
        )

    def aborted(self) -> RequestEvent:
        """Return the last event of a sequence that was aborted."""
        return self.ended(self._event((), "", None))

    def failed(self, message: str, param: str | None = None) -> RequestEvent:
        """Return the last event of a sequence that failed; `param` names the invalid field."""
        return replace(
            self._event((), "", None),
            finish_reason=FinishReason.ERROR,
            error=message,
            error_param=param,
            usage=self._usage(),
            timing=self._timing(),
        )

    def _event(
        self, token_ids: tuple[int, ...], text: str, logprob: TokenLogprob | None
    ) -> RequestEvent:
        sequence = self.sequence
        logprobs = None if logprob is None else (logprob,)
        event = RequestEvent(sequence.request_id, sequence.index, token_ids, text, logprobs)
        if not self._has_emitted:
            self._has_emitted = True
            event.cached_tokens = sequence.num_cached_tokens
            if sequence.params.prompt_logprobs is not None:
                event.prompt_logprobs = tuple(self.prompt_logprobs)
        return event

    def _usage(self) -> Usage:
        sequence = self.sequence
        return Usage(
            len(sequence.prompt_token_ids),
            len(sequence.output_token_ids),
            sequence.num_cached_tokens,
            sequence.num_accepted_tokens,
            sequence.num_proposed_tokens - sequence.num_accepted_tokens,
        )

    def _timing(self) -> Timing:
        return Timing(self._arrived, self.scheduled, self._first_token, time.monotonic())


class OutputProcessor:
    """The outputs of the unfinished sequences of `scheduler`, and the events to emit."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._outputs: dict[int, SequenceOutput] = {}  # by seq_id
        self._events: list[RequestEvent] = []
        #: Whether any sequence had a mask so far.
        self.has_masks = False

    def add(self, outputs: Iterable[SequenceOutput]) -> None:
        """Queue the sequences of one request; raise what `Scheduler.add` raises."""
        added = {output.sequence.seq_id: output for output in outputs}
        self._scheduler.add(*(output.sequence for output in added.values()))
        self._outputs |= added
        self.has_masks = self.has_masks or any(output.mask is not None for output in added.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._outputs

    def __len__(self) -> int:
        """Return the number of unfinished sequences."""
        return len(self._outputs)

    def is_known(self, request_id: str) -> bool:
        """Return whether a sequence of the request is unfinished."""
        return any(output.sequence.request_id == request_id for output in self._outputs.values())

    def mask_of(self, sequence: Sequence) -> LogitsMask | None:
        """Return the mask of a sequence; None if it has no mask or has ended."""
        output = self._outputs.get(sequence.seq_id)
        return None if output is None else output.mask

    def started(self, sequence: Sequence) -> None:
        """Record the time at which a sequence's first step is built."""
        output = self._outputs[sequence.seq_id]
        output.scheduled = output.scheduled or time.monotonic()

    def take_prompt_logprobs(self, entries: Iterable[tuple[Sequence, TokenLogprob | None]]) -> None:
        """Keep log-probabilities of prompts for the first events of their sequences."""
        for sequence, entry in entries:
            if sequence in self:
                self._outputs[sequence.seq_id].prompt_logprobs.append(entry)

    def emit(self, sequence: Sequence, token: NextToken) -> None:
        """Add the event of a token that was appended to `sequence`."""
        output = self._outputs[sequence.seq_id]
        event, stopped_by = output.take(token.token_id, token.logprob)
        if stopped_by is not None and not sequence.is_finished:
            self._scheduler.finish(sequence, FinishReason.STOP, stopped_by)
            event = output.ended(event)
        if sequence.is_finished:
            del self._outputs[sequence.seq_id]
        self._events.append(event)

    def abort(self, request_id: str, index: int | None = None) -> list[RequestEvent]:
        """End a request, or its choice `index`; return the last events of its sequences."""
        sequences = self._scheduler.abort(request_id, index)
        return [self._outputs.pop(sequence.seq_id).aborted() for sequence in sequences]

    def fail(self, sequence: Sequence, message: str, param: str | None = None) -> None:
        """End a sequence with an error; `param` names the invalid field of its request, if any."""
        self._scheduler.finish(sequence, FinishReason.ERROR)
        self._events.append(self._outputs.pop(sequence.seq_id).failed(message, param))

    def fail_masks(self, failures: Iterable[tuple[Sequence, EngineError]]) -> None:
        """End the sequences whose masks failed."""
        for sequence, error in failures:
            param = error.param if isinstance(error, RequestError) else None
            self.fail(sequence, str(error), param)

    def fail_undecided(self, sequence: Sequence) -> None:
        """End a sequence whose logits are NaN."""
        self.fail(sequence, "the model's logits are not numbers: no token can be chosen")

    def fail_all(self, message: str) -> None:
        """End all sequences with an error."""
        for output in list(self._outputs.values()):
            self.fail(output.sequence, message)

    def take_events(self) -> list[RequestEvent]:
        """Return the new events, each of them once."""
        events, self._events = self._events, []
        return events
