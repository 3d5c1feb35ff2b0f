"""LlamaCppEngine: the scheduler and the sampler of `Engine`, with llama.cpp as the model runner.

`Slots` maps our sequences to slots: the sequences of llama.cpp's cache. It only counts blocks:
llama.cpp itself assigns cells to tokens, and slots may share cells. The tokens of a finished
request stay cached until their cells or slot are needed, so a prompt with the same prefix
continues from them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import replace

import mlx.core as mx
import numpy as np

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import MediaRows, StepBatch, build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import EXACT
from modelpack_engine.core.metrics import StepClock
from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError
from modelpack_engine.llama_cpp.model import Context, LlamaModel
from modelpack_engine.llama_cpp.mtmd import AlreadyEncoded, MtmdProcessor
from modelpack_engine.models import Tokenizer
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.runner.base_engine import BaseEngine
from modelpack_engine.runner.kv_cache_size import choose_sizes, max_num_seqs
from modelpack_engine.runner.output_processor import OutputProcessor
from modelpack_engine.runner.step import (
    LaunchedStep,
    StepResult,
    masked_rows,
    read_step,
    split_logits,
)
from modelpack_engine.sampling.sampler import NO_TOKEN, Sampler

# The shortest prefix, in tokens, that is worth a slot.
_SHORTEST = 8


class Slots(BlockManager):
    """Counts blocks, and assigns slots by their tokens. No method may be called during a step."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_slots: int,
        memory: Context,
        keep_prefixes: bool = True,
    ) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=False)
        self._memory = memory
        self._keeps = keep_prefixes
        self._empty = list(range(num_slots))
        self._running: dict[int, tuple[int, Sequence]] = {}  # by seq_id: the slot and the sequence
        # Tokens of finished requests by slot, oldest first.
        self._left: OrderedDict[int, list[int]] = OrderedDict()
        self._salts: dict[int, bytes] = {}  # by slot: only requests with the same salt share tokens
        self._spoilt: set[int] = set()  # sequences whose tokens must not be reused

    def slot(self, seq_id: int) -> int:
        """Return the slot of a sequence, which `share_prefix` assigned."""
        return self._running[seq_id][0]

    @property
    def num_cached(self) -> int:
        """The blocks of the tokens that finished requests left."""
        return sum(self.blocks_for(len(tokens)) for tokens in self._left.values())

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of a new sequence are in a slot already."""
        return self._find(sequence)[1]

    def share_prefix(self, sequence: Sequence) -> int:
        """Assign a slot to a new sequence; return how many of its tokens are in it already."""
        if sequence.seq_id in self._running:
            return 0
        slot, length = self._place(sequence)
        self._salts[slot] = sequence.cache_salt
        self._running[sequence.seq_id] = slot, sequence
        self.grow(sequence, length)  # the scheduler has checked that there is room
        sequence.num_computed_tokens = length
        return length

    def free(self, sequence: Sequence) -> None:
        """Release the slot of a sequence, and keep its tokens cached."""
        slot, _ = self._running.pop(sequence.seq_id)
        tokens = _content(sequence, sequence.num_computed_tokens)
        if self._keeps and sequence.seq_id not in self._spoilt and len(tokens) >= _SHORTEST:
            self._left[slot] = tokens
        else:
            self._drop(slot)
        self._spoilt.discard(sequence.seq_id)
        super().free(sequence)

    def withdraw(self, sequence: Sequence) -> list[list[int]]:
        """Prevent other sequences from reusing the tokens of a sequence."""
        self._spoilt.add(sequence.seq_id)
        return []

    def forget_content(self) -> None:
        """Remove all tokens from the slots; running sequences have to be ended or restarted."""
        self._empty += self._left
        self._left.clear()
        self._spoilt.update(self._running)
        self._memory.clear()

    def make_room(self, num_rows: int) -> None:
        """Drop tokens of finished requests, the oldest first, until `num_rows` more tokens fit."""
        used = num_rows + sum(s.num_computed_tokens for _, s in self._running.values())
        room = self.num_total * self.block_size - used
        kept = sum(map(len, self._left.values()))
        while kept > room and self._left:
            slot, tokens = self._left.popitem(last=False)
            kept -= len(tokens)
            self._drop(slot)

    def _place(self, sequence: Sequence) -> tuple[int, int]:
        """Return a slot for a sequence, and how many of the sequence's first tokens are in it."""
        source, length = self._find(sequence)
        if source is None:
            return self._take_empty(), 0
        if source in self._left:
            tokens = self._left.pop(source)
            if len(tokens) <= 2 * length or not (self._empty or self._left):
                self._memory.cut(source, length)  # most of it belongs to the sequence
                return source, length
            self._left[source] = tokens  # most recently used, so dropped last
        slot = self._take_empty(keep=source)
        self._memory.copy(source, slot, length)
        return slot, length

    def _find(self, sequence: Sequence) -> tuple[int | None, int]:
        """Return the slot from which a sequence can continue, and how many tokens it can reuse."""
        if sequence.wants_prompt_logprobs:
            return None, 0
        wanted = _content(sequence, sequence.num_prefill_tokens - 1)  # the last is computed
        source, length = self._longest(wanted, sequence.cache_salt)
        return (source, length) if length >= _SHORTEST else (None, 0)

    def _longest(self, wanted: Tokens[int], salt: bytes) -> tuple[int | None, int]:
        """Return the slot with the longest common prefix with `wanted`, and its length."""
        found: tuple[int | None, int] = (None, 0)
        if not self._keeps:
            return found
        running = (
            (slot, _content(other, other.num_computed_tokens))
            for seq_id, (slot, other) in self._running.items()
            if seq_id not in self._spoilt
        )
        for slot, tokens in (*self._left.items(), *running):
            length = _common(tokens, wanted) if self._salts[slot] == salt else 0
            if length > found[1]:
                found = slot, length
        return found

    def _take_empty(self, keep: int | None = None) -> int:
        if not self._empty:
            oldest = next(slot for slot in self._left if slot != keep)
            del self._left[oldest]
            self._drop(oldest)
        return self._empty.pop()

    def _drop(self, slot: int) -> None:
        self._memory.cut(slot, 0)
        self._empty.append(slot)


def _content(sequence: Sequence, length: int) -> list[int]:
    """Return what the first cells of a sequence hold: its tokens, and numbers for pictures.

    The numbers are below 0, and depend on the picture and the place in it.
    """
    content = sequence.token_ids(0, length)
    for media in sequence.media:
        number = int.from_bytes(media.digest[:16])
        for place in range(media.start, min(media.stop, length)):
            content[place] = -1 - (number + place - media.start)
    return content


def _common(first: Tokens[int], second: Tokens[int]) -> int:
    """Return the length of the common prefix."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(at for at in range(length) if first[at] != second[at])


# llama.cpp's limit of slots, and the slots for tokens of finished requests.
_MOST_SLOTS, _SPARE_SLOTS = 256, 32


class LlamaCppEngine(BaseEngine):
    """Serves one GGUF model with llama.cpp."""

    def __init__(
        self,
        model: LlamaModel,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        notes: tuple[str, ...] = (),
        no_vision: str = "",
        pictures: MtmdProcessor | None = None,
    ) -> None:
        """Allocate the KV cache; `pictures` are read by a processor for this model, if any.

        Raises `EngineError`; `OutOfMemoryError` if the cache would not hold a single prompt.
        """
        self.config = config = config or EngineConfig()
        num_seqs = max_num_seqs(config)
        if num_seqs >= _MOST_SLOTS:
            raise EngineError(
                f"max_num_seqs is {num_seqs}, but llama.cpp allows {_MOST_SLOTS - 1}",
                hint="lower it, or use --backend mlx",
            )
        self.tokenizer, self.no_vision = tokenizer, no_vision
        self.model_type = model.architecture
        self.vocab_size = model.vocab_size
        self._pictures = pictures
        span = 0 if pictures is None else pictures.largest_span
        sizes = choose_sizes(model, model.context_length, config, span=span)
        self.max_model_len = sizes.max_model_len
        self.kv_cache_bytes = sizes.num_blocks * config.block_size * model.bytes_per_token
        self.weight_bytes = model.weight_bytes + (0 if pictures is None else pictures.weight_bytes)
        #: Bytes of the weights and the KV cache.
        self.memory_bytes = self.weight_bytes + self.kv_cache_bytes
        self.notes = (*notes, "llama.cpp runs the model; use --backend mlx to run it with MLX")
        num_slots = min(_MOST_SLOTS, num_seqs + _SPARE_SLOTS)
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
            replace(sizes.scheduler_config(config), buckets=EXACT),
            self._slots,
            None if pictures is None else AlreadyEncoded(),
        )
        self._sampler = Sampler(self.vocab_size, num_seqs, self.tokenizer.eos_token_ids)
        self._outputs = OutputProcessor(self._scheduler)
        self._clock = StepClock()  # "launch" is sampling, "wait" is computing

    @property
    def picture_processor(self) -> MtmdProcessor | None:
        return self._pictures

    def step(self) -> list[RequestEvent]:
        clock = self._clock
        clock.start()
        output = self._scheduler.schedule()
        if output is None:
            self._forget(self._scheduler.take_released())
            return []
        self._forget(output.released)
        for chunk in output.prefill:
            self._register(chunk.sequence)
        batch = build_batch(output, None, EXACT, self.config.block_size)
        clock.ended("build")
        logits, prompt_logprobs = split_logits(batch, self._compute(batch))
        clock.ended("wait")
        sampled = None
        if batch.sample_seqs:
            rows, failures = masked_rows(output, self._outputs.mask_of)
            self._outputs.fail_masks(failures)
            sampled = self._sampler.sample(logits, rows)
        result = read_step(LaunchedStep(output, batch, sampled, prompt_logprobs))
        self._outputs.take_prompt_logprobs(result.prompt_logprobs)
        self._scheduler.submitted(output)  # nothing raises from here on
        self._fail_rows(result)
        self._emit(result)
        clock.ended("launch")
        return self._outputs.take_events()

    def fail_all(self, message: str) -> list[RequestEvent]:
        self._slots.forget_content()
        self._outputs.fail_all(message)
        return self._outputs.take_events()

    def close(self) -> None:
        """Free the KV cache; the engine cannot be used afterwards."""
        if self._pictures is not None:
            self._pictures.close()
        self._context.close()

    # The parts of a step

    def _compute(self, batch: StepBatch) -> mx.array:
        """Return the logits of the rows to sample, then those for log-probabilities of prompts."""
        seq_ids = list(batch.decode_seq_ids)
        for chunk in batch.chunks:
            seq_ids += [chunk.seq_id] * chunk.length
        self._slots.make_room(len(seq_ids))
        slots = [self._slots.slot(seq_id) for seq_id in seq_ids]
        wanted = np.array((*batch.sample_rows, *batch.prompt_logprob_rows), np.int32)
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        for start, stop, part in _runs(batch):
            rows, causal = None, True
            if part is not None:
                rows = part.media.inputs["rows"][part.first : part.first + part.length]
                causal = not part.media.bidirectional
            here = (start <= wanted) & (wanted < stop)
            logits[here] = self._context.compute(
                batch.token_ids[start:stop], batch.positions[start:stop], slots[start:stop],
                (wanted[here] - start).tolist(), rows, causal=causal,
            )  # fmt: skip
        return mx.array(logits)

    def _fail_rows(self, result: StepResult) -> None:
        """End the sequences without a token (NaN logits); no other continues from their cells."""
        for sequence, [token] in zip(result.output.sampled, result.tokens, strict=True):
            if token.token_id == NO_TOKEN and not sequence.is_finished:
                self._slots.withdraw(sequence)
                self._outputs.fail_undecided(sequence)

    def _emit(self, result: StepResult) -> None:
        """Append the tokens of a step to its sequences, and emit them as events."""
        tokens = [token for [token] in result.tokens]
        token_ids = (token.token_id for token in tokens)
        for index, sequence in self._scheduler.collect(result.output, token_ids):
            self._outputs.emit(sequence, tokens[index])


def _runs(batch: StepBatch) -> Iterator[tuple[int, int, MediaRows | None]]:
    """Yield ranges of rows that llama.cpp can compute at once: of tokens, or of one picture.

    Rows of a sequence are in the order of their positions, as llama.cpp needs them.
    """
    start, stop = 0, len(batch.token_ids)
    for part in batch.media_rows:
        if start < part.row:
            yield start, part.row, None
        start = part.row + part.length
        yield part.row, start, part
    if start < stop:
        yield start, stop, None
