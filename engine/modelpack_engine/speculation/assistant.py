"""AssistantProposer: propose tokens with Gemma 4's drafter, from the model's state and KV cache.

The drafter has no cache: its queries stand at the position of the newest computed token, and attend
to the blocks of the sequence. So it needs one state for each sequence, the last that the model
computed for an accepted token, and sees prefixes from the prefix cache as well. It drafts the most
likely tokens, also for sampled requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from modelpack_engine.attention.paged import KVReader
from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.models.assistant import AssistantHead, AssistantTarget
from modelpack_engine.runner.hidden_states import HiddenRows, recorded_rows


class AssistantProposer:
    """Proposes the `num_tokens` tokens that `head` drafts, for up to `max_sequences` sequences.

    `readers` read the keys and values of the model for each type of layer. A proposal ends before
    the first token whose probability is below `min_probability`. With `compiled`, a draft is one
    compiled graph for each number of sequences and width of block tables, which `buckets` pad.
    """

    def __init__(
        self,
        head: AssistantHead,
        target: AssistantTarget,
        readers: Mapping[str, KVReader],
        *,
        num_tokens: int,
        max_sequences: int,
        min_probability: float,
        buckets: Buckets,
        compiled: bool,
    ) -> None:
        self._head, self._target, self._readers = head, target, readers
        self._num_tokens, self._max_sequences = num_tokens, max_sequences
        self._least = min_probability
        self._buckets, self._compiled = buckets, compiled
        self._states: dict[int, tuple[int, mx.array]] = {}  # by seq_id: first position, rows
        self._graphs: dict[tuple[int, int], Callable[..., Any]] = {}

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether any of these sequences has a state."""
        return any(sequence.seq_id in self._states for sequence in sequences)

    def record(self, output: SchedulerOutput, batch: StepBatch, hidden: HiddenRows) -> None:
        """Keep the states of a step's rows, in place of those of earlier steps."""
        if len(output.decoding) > self._max_sequences:
            self._states.clear()
            return
        for sequence, row, count in recorded_rows(output, batch):
            self._states[sequence.seq_id] = batch.positions[row], hidden.cut(row, count)

    def draft_behind(self, output: SchedulerOutput, sampled: mx.array) -> None:
        """Do nothing: the drafter drafts when a proposal is wanted."""

    def launch(self) -> None:
        """Do nothing."""

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the tokens that the drafter drafts after each sequence."""
        going: list[tuple[Sequence, mx.array]] = []
        for sequence in lengths:
            start, rows = self._states.get(sequence.seq_id, (0, None))
            at = sequence.num_computed_tokens - 1 - start
            if rows is not None and 0 <= at < len(rows):
                going.append((sequence, rows[at]))
        if not going:
            return {}
        drafted, probabilities = self._draft(going)
        proposals = {}
        for index, (sequence, _) in enumerate(going):
            count = lengths[sequence]
            if self._least:
                unsure = (p < self._least for p in probabilities[index])
                count = min(count, next((n for n, found in enumerate(unsure) if found), count))
            if count:
                proposals[sequence] = drafted[index][:count]
        return proposals

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the states of sequences that ended or were preempted."""
        for seq_id in seq_ids:
            self._states.pop(seq_id, None)

    def _draft(
        self, going: list[tuple[Sequence, mx.array]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return the drafted tokens of each sequence, and their probabilities."""
        sequences = [sequence for sequence, _ in going]
        known = [sequence.num_computed_tokens for sequence in sequences]
        ids = [s.token_ids(n, n + 1)[0] for s, n in zip(sequences, known, strict=True)]
        given = (
            mx.array(ids, mx.int32),
            mx.stack([state for _, state in going]),
            mx.array([count - 1 for count in known], mx.int32),
        )
        tables = [sequence.block_table for sequence in sequences]
        if self._compiled:
            found = self._draft_compiled(given, tables, known)
        else:
            for reader in self._readers.values():
                reader.begin(tables, known)
            found = self._chain(*given)
        mx.eval(found)
        tokens: Any = found[0].tolist()
        probabilities: Any = found[1].tolist() if self._least else []
        return tokens, probabilities

    def _draft_compiled(
        self, given: tuple[mx.array, ...], tables: list[list[int]], known: list[int]
    ) -> tuple[mx.array, mx.array]:
        size = next(iter(self._readers.values())).kv.step.block_size
        counts = [-(-count // size) for count in known]
        width = self._buckets.pad_table_width(max(counts))
        padded = np.zeros((len(tables), width), np.int32)
        for row, (table, count) in enumerate(zip(tables, counts, strict=True)):
            padded[row, :count] = table[:count]
        key = len(tables), width
        if key not in self._graphs:
            self._graphs[key] = mx.compile(self._traced)
        pools = [reader.kv.pools for reader in self._readers.values()]
        found: tuple[mx.array, mx.array] = self._graphs[key](
            *given, mx.array(padded), mx.array(known, mx.int32),
            [(pool.keys, pool.values) for pool in pools],
        )  # fmt: skip
        return found

    def _traced(
        self,
        ids: mx.array,
        states: mx.array,
        positions: mx.array,
        tables: mx.array,
        lengths: mx.array,
        pools: list[tuple[mx.array, mx.array]],
    ) -> tuple[mx.array, mx.array]:
        """Build the graph of a draft from placeholders, also of the pools."""
        readers = list(self._readers.values())
        kept = [(reader.kv.pools.keys, reader.kv.pools.values) for reader in readers]
        try:
            for reader, (keys, values) in zip(readers, pools, strict=True):
                reader.kv.pools.keys, reader.kv.pools.values = keys, values
                reader.begin_rows(tables, lengths)
            return self._chain(ids, states, positions)
        finally:
            for reader, (keys, values) in zip(readers, kept, strict=True):
                reader.kv.pools.keys, reader.kv.pools.values = keys, values

    def _chain(
        self, ids: mx.array, states: mx.array, positions: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return tokens and probabilities [sequences, tokens]."""
        shared = {
            kind: reader.handles(len(ids), states.dtype) for kind, reader in self._readers.items()
        }
        tokens, probabilities = [], []
        for _ in range(self._num_tokens):
            embedded = self._target.embed(ids).astype(states.dtype)
            hidden, states = self._head.forward(embedded, states, positions, shared.__getitem__)
            ids, probability = self._head.best(hidden)
            tokens.append(ids)
            probabilities.append(probability)
        return mx.stack(tokens, axis=1), mx.stack(probabilities, axis=1)
