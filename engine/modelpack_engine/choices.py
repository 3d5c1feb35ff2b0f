"""Choices: those of an engine's requests that have not ended, and what is still to be told of them.

An event that was made stays here until somebody is told: a step that raises loses none.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelpack_engine.choice import Choice
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.outputs import FinishReason, RequestEvent, TokenLogprob
from modelpack_engine.sampling_params import LogitsMask
from modelpack_engine.scheduler import Scheduler
from modelpack_engine.sequence import Sequence
from modelpack_engine.step import NextToken


class Choices:
    """A choice for each sequence of `scheduler` that has not ended."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._choices: dict[int, Choice] = {}  # by seq_id
        self._events: list[RequestEvent] = []

    def add(self, choices: Iterable[Choice]) -> None:
        """Queue the choices of one request; raises what `Scheduler.add` does."""
        added = {choice.sequence.seq_id: choice for choice in choices}
        self._scheduler.add(*(choice.sequence for choice in added.values()))
        self._choices |= added

    def __len__(self) -> int:
        return len(self._choices)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._choices

    def is_known(self, request_id: str) -> bool:
        """Whether a choice of the request has not ended yet."""
        return any(choice.sequence.request_id == request_id for choice in self._choices.values())

    def mask_of(self, sequence: Sequence) -> LogitsMask | None:
        """Return a sequence's mask, None if it has none or has ended."""
        choice = self._choices.get(sequence.seq_id)
        return None if choice is None else choice.mask

    def started(self, sequence: Sequence) -> None:
        """Take note that a sequence's first step is being built."""
        self._choices[sequence.seq_id].started()

    def take_prompt_logprobs(self, entries: Iterable[tuple[Sequence, TokenLogprob | None]]) -> None:
        """Keep log-probabilities of prompts for the first events of their choices."""
        for sequence, entry in entries:
            if sequence in self:
                self._choices[sequence.seq_id].prompt_logprobs.append(entry)

    def tell(self, sequence: Sequence, token: NextToken) -> None:
        """Tell what a token that its sequence has taken means for its request."""
        choice = self._choices[sequence.seq_id]
        event, stopped_by = choice.take(token.token_id, token.logprob)
        if stopped_by is not None and not sequence.is_finished:
            self._scheduler.finish(sequence, FinishReason.STOP, stopped_by)
            event = choice.ended(event)
        if sequence.is_finished:
            del self._choices[sequence.seq_id]
        self._events.append(event)

    def abort(self, request_id: str, index: int | None = None) -> list[RequestEvent]:
        """End a request, or one of its choices; return the last events of what was unfinished."""
        sequences = self._scheduler.abort(request_id, index)
        return [self._choices.pop(sequence.seq_id).aborted() for sequence in sequences]

    def fail(self, sequence: Sequence, message: str, param: str | None = None) -> None:
        """End one choice with an error; `param` is the field of its request that is at fault."""
        self._scheduler.finish(sequence, FinishReason.ERROR)
        self._events.append(self._choices.pop(sequence.seq_id).failed(message, param))

    def fail_masks(self, failures: Iterable[tuple[Sequence, EngineError]]) -> None:
        """End the choices whose masks failed."""
        for sequence, error in failures:
            param = error.param if isinstance(error, RequestError) else None
            self.fail(sequence, str(error), param)

    def fail_undecided(self, sequence: Sequence) -> None:
        """End one whose token could not be chosen."""
        self.fail(sequence, "the model's logits are not numbers: no token can be chosen")

    def fail_all(self, message: str) -> None:
        """End all of them with an error."""
        for choice in list(self._choices.values()):
            self.fail(choice.sequence, message)

    def told(self) -> list[RequestEvent]:
        """Return what is new, once."""
        events, self._events = self._events, []
        return events
