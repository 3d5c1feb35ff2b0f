"""Choice: what the host keeps of a running sequence to tell its caller about it."""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens
from dataclasses import replace

from modelpack_engine.detokenizer import Detokenizer
from modelpack_engine.loaders.tokenizer import Tokenizer
from modelpack_engine.outputs import FinishReason, RequestEvent, Timing, TokenLogprob, Usage
from modelpack_engine.sampling_params import SamplingParams, check_request
from modelpack_engine.sequence import Sequence
from modelpack_engine.stopping import ending_token_ids


def make_choices(
    request_id: str,
    prompt_token_ids: Tokens[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    n: int,
    continues_text: bool,
    cache_salt: bytes,
) -> list[Choice]:
    """Return the `n` choices of a request, whose sequences wait; raises `RequestError`."""
    check_request(prompt_token_ids, params, n, vocab_size)
    first = Sequence(
        request_id,
        list(prompt_token_ids),
        params,
        eos_token_ids=tokenizer.eos_token_ids,
        cache_salt=cache_salt,
    )
    sequences = [first, *(first.fork(index) for index in range(1, n))]
    return [Choice(sequence, tokenizer, continues_text) for sequence in sequences]


class Choice:
    """Turns a sequence's tokens into events."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, continues_text: bool) -> None:
        self.sequence = sequence
        #: Log-probabilities of the prompt so far; nothing precedes its first token.
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        #: What its tokens have to keep to; it has accepted all that the host has read.
        self.mask = sequence.params.mask() if sequence.params.mask is not None else None
        self._detokenizer = Detokenizer(tokenizer, sequence.params, continues_text=continues_text)
        self._ending_ids = ending_token_ids(sequence.params, sequence.eos_token_ids)
        self._has_told = False
        self._arrived = time.monotonic()
        self._scheduled: float | None = None
        self._first_token: float | None = None

    def started(self) -> None:
        """Take note that the sequence's first step is being built."""
        if self._scheduled is None:
            self._scheduled = time.monotonic()

    def take(self, token_id: int, logprob: TokenLogprob | None) -> tuple[RequestEvent, str | None]:
        """Return the event of a token, and the stop string that it completes."""
        sequence = self.sequence
        if self._first_token is None:
            self._first_token = time.monotonic()
        if self.mask is not None:
            self.mask.accept(token_id)
        told, reason = (token_id,), sequence.finish_reason
        ends_text = token_id in self._ending_ids and reason is FinishReason.STOP
        delta = self._detokenizer.push(() if ends_text else told)
        event = self._event(told, delta.text, logprob)
        if reason is not None:
            event = self.ended(event)
        return event, delta.stopped_by

    def ended(self, event: RequestEvent) -> RequestEvent:
        """Return the event as the sequence's last: with the rest of its text, and why it ended."""
        return replace(
            event,
            text=event.text + self._detokenizer.finish(),
            finish_reason=self.sequence.finish_reason,
            stop_reason=self.sequence.stop_reason,
            usage=self._usage(),
            timing=self._timing(),
        )

    def aborted(self) -> RequestEvent:
        """Return the event of an abort: nobody waits for its text."""
        return self.ended(self._event((), "", None))

    def failed(self, message: str, param: str | None = None) -> RequestEvent:
        """Return the event of a failure, for which a field of the request may be at fault."""
        event = self._event((), "", None)
        return replace(
            event,
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
        prompt_logprobs = None
        if not self._has_told:
            self._has_told = True
            if sequence.params.prompt_logprobs is not None:
                prompt_logprobs = tuple(self.prompt_logprobs)
        logprobs = None if logprob is None else (logprob,)
        return RequestEvent(
            sequence.request_id, sequence.index, token_ids, text, logprobs, prompt_logprobs
        )

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
        return Timing(self._arrived, self._scheduled, self._first_token, time.monotonic())
