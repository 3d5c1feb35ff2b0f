"""Engine: requests in, events out, one step at a time.

A step is built ahead: its graph is made while the device still works on the step before, whose
tokens never make a detour over the host. So `step` schedules and builds step N + 1, reads the
tokens of step N, and only then launches N + 1: what step N read is free by then, and the KV pools
are written in place. While the device works on N + 1, the host tells what the tokens of N mean.
Where a kernel writes the pools, N + 1 is launched before N is read: the device never waits.

Masks have to see the tokens of N before they allow those of N + 1. A step with a mask in it is
launched without its sampling, which is built last: masks are computed during the forward pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.adaptation.layout import ModelLayout, UnknownCacheError, find_layout
from modelpack_engine.adaptation.warm_up import step_shapes
from modelpack_engine.batch import StepBatch, build_batch
from modelpack_engine.block_manager import BlockManager
from modelpack_engine.choice import Choice
from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.loaders import LoadedModel
from modelpack_engine.model_runner import ModelRunner
from modelpack_engine.outputs import EngineStats, FinishReason, RequestEvent
from modelpack_engine.sampler import NO_TOKEN, Sampler, SampleRow
from modelpack_engine.sampling_params import SamplingParams
from modelpack_engine.scheduler import Scheduler
from modelpack_engine.sequence import Sequence
from modelpack_engine.sizing import Sizes, choose_sizes, on_gpu
from modelpack_engine.step import (
    Step,
    StepTokens,
    gather_prompt_logprobs,
    next_prompt_tokens,
    read_tokens,
    sample_row,
    with_prompt_rows,
)

_log = logging.getLogger(__name__)


class Engine:
    """Serves one loaded model. Not thread-safe: `AsyncEngine` gives it a thread of its own."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig | None = None, *, model_id: str = ""
    ) -> None:
        """Allocate the KV cache, test the model and warm it up.

        `model_id` names the weights in the prefix cache. Raises `OutOfMemoryError` if the cache
        would not hold a single prompt, saying what would fit.
        """
        self.config = config or EngineConfig()
        self.tokenizer = loaded.tokenizer
        layout = layout_of(loaded.model)
        self.vocab_size = layout.vocab_size if layout else int(loaded.config["vocab_size"])
        self._sizes: Sizes = choose_sizes(layout, loaded.context_length, self.config)
        self.max_model_len = self._sizes.max_model_len
        per_token = layout.bytes_per_token if layout else 0
        #: Bytes of the weights and the KV cache.
        self.memory_bytes = (
            loaded.weight_bytes + self._sizes.num_blocks * self.config.block_size * per_token
        )
        self._runner = ModelRunner(
            loaded.model,
            num_blocks=self._sizes.num_blocks,
            block_size=self.config.block_size,
            buckets=self._sizes.buckets,
            self_test=self.config.self_test,
        )
        self.notes = (*loaded.notes, *self._runner.notes)
        caching = self.config.enable_prefix_caching and self._runner.supports_prefix_cache
        self._blocks = BlockManager(
            self._sizes.num_blocks,
            self.config.block_size,
            model_id=model_id,
            enable_prefix_caching=caching,
        )
        self._scheduler = Scheduler(self._sizes.scheduler_config(self.config), self._blocks)
        self._sampler = Sampler(
            self.vocab_size, self.config.max_num_seqs, self.tokenizer.eos_token_ids
        )
        self._choices: dict[int, Choice] = {}  # by seq_id, until they end
        self._sampling: set[int] = set()  # seq_ids that the sampler knows
        self._pending: Step | None = None
        self._seconds = (0.0, 0.0, 0.0)  # of the host: building, launching, waiting
        if self.config.warm_up and on_gpu():
            self._warm_up()

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Tokens[int],
        params: SamplingParams,
        *,
        n: int = 1,
        continues_text: bool = False,
    ) -> None:
        """Queue a request with `n` choices; `continues_text` for completions, whose text goes on
        after the prompt.

        Raises `RequestError`, `ContextLengthError` or `QueueFullError`; nothing is queued then.
        """
        params.check(self.vocab_size)
        if n < 1:
            raise RequestError(f"n is {n}, expected 1 or more", param="n")
        for token_id in prompt_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"the prompt holds the token {token_id}; the vocabulary has {self.vocab_size}",
                    param="prompt",
                )
        first = Sequence(
            request_id,
            list(prompt_token_ids),
            params,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )
        sequences = [first, *(first.fork(index) for index in range(1, n))]
        choices = [Choice(sequence, self.tokenizer, continues_text) for sequence in sequences]
        self._scheduler.add(*sequences)
        self._choices |= {choice.sequence.seq_id: choice for choice in choices}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work or self._pending is not None

    def step(self) -> list[RequestEvent]:
        """Do one step; return what is new."""
        clock = time.perf_counter
        times = [clock()]
        step = self._build()
        times.append(clock())
        early = self._runner.writes_in_place
        if early:
            self._launch(step)
        times.append(clock())
        tokens = self._read()
        times.append(clock())
        events = self._fail_rows(tokens)
        if not early:
            self._launch(step)
        times.append(clock())
        events += self._take(tokens)
        events += self._submit(step)
        self._took(*(after - before for before, after in pairwise(times)))
        return events

    def abort(self, request_id: str, index: int | None = None) -> list[RequestEvent]:
        """End a request, or one of its choices; return the last events of what was unfinished.

        Its blocks are free at once. An unknown request has ended already.
        """
        events = []
        for sequence in self._scheduler.abort(request_id, index):
            events.append(self._choices[sequence.seq_id].aborted())
            self._end(sequence)
        return events

    def fail_all(self, message: str) -> list[RequestEvent]:
        """End every request with an error, after a step that raised; the engine can go on."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._scheduler.fail(pending.output)
        events = []
        for choice in list(self._choices.values()):
            self._scheduler.finish(choice.sequence, FinishReason.ERROR)
            events.append(choice.failed(message))
            self._end(choice.sequence)
        return events

    def is_known(self, request_id: str) -> bool:
        """Whether a choice of the request has not ended yet."""
        return any(choice.sequence.request_id == request_id for choice in self._choices.values())

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        build, launch, wait = self._seconds
        return replace(
            self._scheduler.stats(),
            build_seconds=build, launch_seconds=launch, wait_seconds=wait,
        )  # fmt: skip

    def generate(
        self, prompts: Iterable[str | Tokens[int]], params: SamplingParams
    ) -> list[list[RequestEvent]]:
        """Run prompts to their end; return each one's events, in the order of the prompts."""
        events: dict[str, list[RequestEvent]] = {}
        for i, prompt in enumerate(prompts):
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            self.add_request(f"generate-{i}", token_ids, params)
            events[f"generate-{i}"] = []
        while self.has_work:
            for event in self.step():
                events[event.request_id].append(event)
        return list(events.values())

    def _warm_up(self) -> None:
        config = self._sizes.scheduler_config(self.config)
        self._runner.warm_up(
            step_shapes(
                self._sizes.buckets,
                max_num_seqs=config.max_num_seqs,
                max_chunk=config.chunk_rows,
                max_model_len=config.max_model_len,
                block_size=self.config.block_size,
            )
        )

    # A step's parts

    def _build(self) -> Step | None:
        """Schedule the next step and build its graph."""
        output = self._scheduler.schedule()
        if output is None:
            self._forget(self._scheduler.take_released())
            return None
        self._forget(output.released)
        for chunk in output.prefill:
            self._introduce(chunk.sequence)
        previous = self._pending.batch if self._pending else None
        batch = build_batch(output, previous, self._sizes.buckets, self.config.block_size)
        logits = self._runner.forward(with_prompt_rows(batch), self._token_ids(batch))
        num_sampled = len(batch.sample_rows)
        prompt_logprobs = None
        if batch.prompt_logprob_rows:
            stop = num_sampled + len(batch.prompt_logprob_rows)
            prompt_logprobs = gather_prompt_logprobs(batch, logits[num_sampled:stop])
            logits = logits[:num_sampled]
        step = Step(output, batch, None, None, prompt_logprobs)
        if not batch.sample_seqs:
            return step
        if any(sequence.params.mask is not None for sequence in batch.sample_seqs):
            return replace(step, logits=logits)
        rows = [sample_row(sequence) for sequence in batch.sample_seqs]
        return replace(step, sampled=self._sampler.sample(logits, rows))

    def _read(self) -> StepTokens | None:
        """Wait for the step in flight; return its tokens."""
        if self._pending is None:
            return None
        # A step that fails is noticed here: it stays pending then, for `fail_all` to account for.
        tokens = read_tokens(self._pending)
        self._take_prompt_logprobs(self._pending)
        self._pending = None
        return tokens

    def _fail_rows(self, tokens: StepTokens | None) -> list[RequestEvent]:
        """End the choices that have no token; return that. What they wrote is zeroed."""
        events: list[RequestEvent] = []
        if tokens is None:
            return events
        rows = zip(tokens.step.batch.sample_seqs, tokens.token_ids, strict=True)
        for sequence, token_id in rows:
            if token_id == NO_TOKEN and sequence.seq_id in self._choices:
                self._runner.scrub(self._blocks.withdraw(sequence))
                text = "the model's logits are not numbers: no token can be chosen"
                events.append(self._fail(sequence, text))
        return events

    def _launch(self, step: Step | None) -> None:
        """Have the device compute what is built of a step."""
        if step is not None:
            mx.async_eval(*step.arrays(), *self._runner.pools())

    def _take(self, tokens: StepTokens | None) -> list[RequestEvent]:
        """Give tokens to the sequences of their step; return what they mean for its requests."""
        events: list[RequestEvent] = []
        if tokens is None:
            return events
        step, token_ids, logprobs = tokens
        for index, sequence in self._scheduler.collect(step.output, token_ids):
            choice = self._choices[sequence.seq_id]
            event, stopped_by = choice.take(token_ids[index], logprobs[index])
            if stopped_by is not None and not sequence.is_finished:
                self._scheduler.finish(sequence, FinishReason.STOP, stopped_by)
                event = choice.ended(event)
            events.append(event)
            if sequence.is_finished:
                self._end(sequence)
        return events

    def _submit(self, step: Step | None) -> list[RequestEvent]:
        """Take note that the device has a step, after having sampled it if that waits for masks.

        Returns what ends here: choices whose masks fail.
        """
        events: list[RequestEvent] = []
        if step is None:
            return events
        if step.logits is not None:
            rows = [self._masked_row(seq, events) for seq in step.batch.sample_seqs]
            step = replace(step, logits=None, sampled=self._sampler.sample(step.logits, rows))
            mx.async_eval(*step.arrays())
        self._scheduler.submitted(step.output)
        self._pending = step
        return events

    # Details

    def _took(self, build: float, early: float, wait: float, late: float) -> None:
        """Add up the seconds of a step."""
        seconds = self._seconds
        self._seconds = (seconds[0] + build, seconds[1] + early + late, seconds[2] + wait)

    def _masked_row(self, sequence: Sequence, events: list[RequestEvent]) -> SampleRow:
        """Return a row with what its mask allows, now that all tokens before it are taken."""
        choice = self._choices.get(sequence.seq_id)
        allowed = None
        if choice is not None and choice.mask is not None:  # else it has ended
            try:
                allowed = choice.mask.allowed()
            except EngineError as error:
                events.append(self._fail(sequence, str(error)))
        return replace(sample_row(sequence), allowed=allowed)

    def _fail(self, sequence: Sequence, message: str) -> RequestEvent:
        """End one choice with an error."""
        self._scheduler.finish(sequence, FinishReason.ERROR)
        event = self._choices[sequence.seq_id].failed(message)
        self._end(sequence)
        return event

    def _token_ids(self, batch: StepBatch) -> mx.array:
        """Return the rows' ids, int32 [rows]; those of the step in flight stay on the device."""
        token_ids = mx.array(batch.token_ids, mx.int32)
        if batch.from_previous:
            assert self._pending is not None
            assert self._pending.sampled is not None
            rows, indices = zip(*batch.from_previous, strict=True)
            # A row that failed has no token; it runs on with any until its end is seen.
            sampled = mx.maximum(self._pending.sampled.token_ids, 0)
            token_ids[mx.array(rows)] = sampled[mx.array(indices)]
        return token_ids

    def _introduce(self, sequence: Sequence) -> None:
        if sequence.seq_id not in self._sampling:
            self._sampler.add(
                sequence.seq_id,
                sequence.prompt_token_ids,
                sequence.params,
                output_token_ids=sequence.output_token_ids,
                index=sequence.index,
            )
            self._choices[sequence.seq_id].started()
            self._sampling.add(sequence.seq_id)

    def _forget(self, seq_ids: Tokens[int]) -> None:
        """Drop what the device knows of sequences that ended or were preempted."""
        self._runner.release(seq_ids)
        for seq_id in seq_ids:
            if seq_id in self._sampling:
                self._sampling.discard(seq_id)
                self._sampler.remove(seq_id)

    def _end(self, sequence: Sequence) -> None:
        self._choices.pop(sequence.seq_id, None)

    def _take_prompt_logprobs(self, step: Step) -> None:
        if step.prompt_logprobs is None:
            return
        sequences = step.batch.prompt_logprob_seqs
        wanted = [sequence.params.prompt_logprobs for sequence in sequences]
        token_ids = next_prompt_tokens(step.batch)
        for sequence, entry in zip(
            sequences, step.prompt_logprobs.read(token_ids, wanted), strict=True
        ):
            choice = self._choices.get(sequence.seq_id)
            if choice is not None:
                choice.prompt_logprobs.append(entry)


def layout_of(model: Module) -> ModelLayout | None:
    """Return what the model caches, None if it is of a kind that cannot be paged."""
    try:
        return find_layout(model)
    except UnknownCacheError:
        return None
