"""LlamaCppEngine: requests in, events out, one step at a time, computed by llama.cpp.

llama.cpp sums in an order that depends on what else is in its cache. So where two tokens are nearly
as likely, an answer may go on otherwise beside others than alone, even with a seed.

The same scheduler, sampler and detokenizer as in `Engine`; a step is not built ahead, since there
is no device to keep busy: it is scheduled, computed, sampled and told.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import replace

import mlx.core as mx

from modelpack_engine.batch import StepBatch, build_batch
from modelpack_engine.buckets import EXACT
from modelpack_engine.choice import make_choices
from modelpack_engine.choices import Choices
from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError
from modelpack_engine.llama_cpp.context import Context, LlamaModel
from modelpack_engine.llama_cpp.slots import Slots
from modelpack_engine.loaders import Tokenizer
from modelpack_engine.outputs import EngineStats, RequestEvent
from modelpack_engine.sampler import NO_TOKEN, Sampler
from modelpack_engine.sampling_params import SamplingParams
from modelpack_engine.scheduler import Scheduler
from modelpack_engine.sequence import Sequence
from modelpack_engine.sizing import choose_sizes
from modelpack_engine.speculation.masks import masked_rows
from modelpack_engine.step import (
    Step,
    StepTokens,
    part_logits,
    read_prompt_logprobs,
    read_tokens,
)
from modelpack_engine.step_clock import StepClock
from modelpack_engine.stepping import run_to_end

# What llama.cpp allows at once, and how many slots are for what finished requests left.
_MOST_SLOTS, _SPARE_SLOTS = 256, 32


class LlamaCppEngine:
    """Serves one GGUF model. Not thread-safe: `AsyncEngine` gives it a thread of its own."""

    def __init__(
        self,
        model: LlamaModel,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Allocate the KV cache.

        Raises `EngineError`; `OutOfMemoryError` if the cache would not hold a single prompt.
        """
        self.config = config = config or EngineConfig()
        if config.max_num_seqs >= _MOST_SLOTS:
            raise EngineError(
                f"max_num_seqs is {config.max_num_seqs}; llama.cpp takes {_MOST_SLOTS - 1}",
                hint="lower it, or use --backend mlx",
            )
        self.tokenizer = tokenizer
        self.vocab_size = model.vocab_size
        sizes = choose_sizes(model, model.context_length, config)
        self.max_model_len = sizes.max_model_len
        cache_bytes = sizes.num_blocks * config.block_size * model.bytes_per_token
        #: Bytes of the weights and the KV cache.
        self.memory_bytes = model.weight_bytes + cache_bytes
        self.notes = (*notes, "llama.cpp computes (--backend mlx: MLX does)")
        num_slots = min(_MOST_SLOTS, config.max_num_seqs + _SPARE_SLOTS)
        self._context = Context(
            model,
            num_cells=sizes.num_blocks * config.block_size,
            num_slots=num_slots,
            max_rows=sizes.max_num_batched_tokens,
        )
        self._slots = Slots(
            sizes.num_blocks,
            config.block_size,
            num_slots=num_slots,
            memory=self._context,
            keep_prefixes=config.enable_prefix_caching,
        )
        self._scheduler = Scheduler(
            replace(sizes.scheduler_config(config), buckets=EXACT), self._slots
        )
        self._sampler = Sampler(self.vocab_size, config.max_num_seqs, self.tokenizer.eos_token_ids)
        self._choices = Choices(self._scheduler)
        self._clock = StepClock()  # launching is sampling, waiting is computing

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Tokens[int],
        params: SamplingParams,
        *,
        n: int = 1,
        continues_text: bool = False,
        cache_salt: bytes = b"",
    ) -> None:
        """Queue a request, as `Engine.add_request` does."""
        choices = make_choices(
            request_id,
            prompt_token_ids,
            params,
            self.tokenizer,
            vocab_size=self.vocab_size,
            n=n,
            continues_text=continues_text,
            cache_salt=cache_salt,
        )
        self._choices.add(choices)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    def step(self) -> list[RequestEvent]:
        """Do one step; return what is new."""
        clock = self._clock
        clock.start()
        output = self._scheduler.schedule()
        if output is None:
            self._forget(self._scheduler.take_released())
            return []
        self._forget(output.released)
        for chunk in output.prefill:
            self._introduce(chunk.sequence)
        batch = build_batch(output, None, EXACT, self.config.block_size)
        clock.ended("build")
        logits, prompt_logprobs = part_logits(batch, self._compute(batch))
        clock.ended("wait")
        sampled = None
        if batch.sample_seqs:
            rows, failures = masked_rows(output, self._choices.mask_of)
            self._choices.fail_masks(failures)
            sampled = self._sampler.sample(logits, rows)
        step = Step(output, batch, None, sampled, prompt_logprobs)
        tokens = read_tokens(step)
        self._choices.take_prompt_logprobs(read_prompt_logprobs(step))
        self._scheduler.submitted(output)  # nothing raises from here on
        self._fail_rows(tokens)
        self._take(tokens)
        clock.ended("launch")
        return self._choices.told()

    def abort(self, request_id: str, index: int | None = None) -> list[RequestEvent]:
        """End a request, or one of its choices; return the last events of what was unfinished."""
        return self._choices.abort(request_id, index)

    def fail_all(self, message: str) -> list[RequestEvent]:
        """End every request with an error, after a step that raised; the engine can go on."""
        self._slots.forget_content()
        self._choices.fail_all(message)
        return self._choices.told()

    def is_known(self, request_id: str) -> bool:
        """Whether a choice of the request has not ended yet."""
        return self._choices.is_known(request_id)

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        return self._clock.counted(self._scheduler.stats())

    def close(self) -> None:
        """Free the KV cache; nothing is asked of it afterwards."""
        self._context.close()

    def generate(
        self, prompts: Iterable[str | Tokens[int]], params: SamplingParams
    ) -> list[list[RequestEvent]]:
        """Run prompts to their end; return each one's events, in the order of the prompts."""
        return run_to_end(self, prompts, params)

    # A step's parts

    def _compute(self, batch: StepBatch) -> mx.array:
        """Return the logits of what is sampled, then of what is wanted of prompts."""
        seq_ids = list(batch.decode_seq_ids)
        for chunk in batch.chunks:
            seq_ids += [chunk.seq_id] * chunk.length
        self._slots.make_room(len(seq_ids))
        slots = [self._slots.slot(seq_id) for seq_id in seq_ids]
        wanted = (*batch.sample_rows, *batch.prompt_logprob_rows)
        return mx.array(self._context.compute(batch.token_ids, batch.positions, slots, wanted))

    def _fail_rows(self, tokens: StepTokens) -> None:
        """End the choices that have no token. Nobody goes on from what they wrote."""
        for sequence, [token] in zip(tokens.step.output.sampled, tokens.tokens, strict=True):
            if token.token_id == NO_TOKEN and not sequence.is_finished:
                self._slots.withdraw(sequence)
                self._choices.fail_undecided(sequence)

    def _take(self, tokens: StepTokens) -> None:
        """Give tokens to the sequences of their step, and tell what they mean for its requests."""
        found = [token for [token] in tokens.tokens]
        ids = [token.token_id for token in found]
        for index, sequence in self._scheduler.collect(tokens.step.output, ids):
            self._choices.tell(sequence, found[index])

    # Details

    def _introduce(self, sequence: Sequence) -> None:
        if sequence.seq_id in self._sampler:
            return
        self._sampler.add(
            sequence.seq_id,
            sequence.prompt_token_ids,
            sequence.params,
            output_token_ids=sequence.output_token_ids,
            index=sequence.index,
        )
        self._choices.started(sequence)

    def _forget(self, seq_ids: Tokens[int]) -> None:
        """Have the sampler forget sequences that ended or were preempted."""
        for seq_id in seq_ids:
            if seq_id in self._sampler:
                self._sampler.remove(seq_id)
