"""EagleProposer: propose tokens with an EAGLE-3 head or a model's own layer for multi-token
prediction, from the hidden states of the model's steps.

The head's input for a position is the model's hidden state there and the token after it. The engine
hands over the states of each step with `record`; the rows of rejected tokens are dropped with the
next proposal or step. All tokens of a proposal are drafted in one compiled graph: the rows that the
head has not computed, then one row per further token. The head drafts the most likely tokens, also
for sampled requests.

Each sequence has a cache of the head's keys and values. A prefix from the prefix cache has no
hidden states, so the head does not see it; its positions count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.buckets import round_up
from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.models.mtp import MtpHead
from modelpack_engine.runner.hidden_states import HiddenRows, recorded_rows

# The rows that the head computes at a time while it reads a prompt.
_CHUNKS = (16, 64, 256)
# The sizes of caches: doubled as needed.
_FEWEST_KEYS = 256


@dataclass(slots=True, eq=False)
class _Draft:
    """The head's state for one sequence: keys and values of `length` rows, and states to read.

    `pending` has pairs of the position of the first row and the states [rows, hidden].
    """

    length: int = 0
    pending: list[tuple[int, mx.array]] = field(default_factory=list)
    keys: mx.array | None = None
    values: mx.array | None = None

    def add(self, start: int, rows: mx.array) -> None:
        """Keep the states of rows from position `start` on, in place of rejected rows there."""
        while self.pending and self.pending[-1][0] >= start:
            self.pending.pop()
        if self.pending:
            first, before = self.pending[-1]
            if first + len(before) > start:
                self.pending[-1] = first, before[: start - first]
        self.pending.append((start, rows))

    def take(self, known: int) -> tuple[list[int], mx.array] | None:
        """Return positions and states of the rows whose next token is known; forget all rows."""
        positions: list[int] = []
        states: list[mx.array] = []
        for start, rows in self.pending:
            count = min(len(rows), known - 1 - start)
            if count > 0:
                positions += range(start, start + count)
                states.append(rows[:count])
        self.pending = []
        if not states:
            return None
        return positions, states[0] if len(states) == 1 else mx.concatenate(states)


class EagleProposer:
    """Proposes the `num_tokens` tokens that `head` drafts, for up to `max_sequences` sequences.

    `embed` are the model's embeddings, for heads without their own. A proposal ends before the
    first token whose probability is below `min_probability`.
    """

    def __init__(
        self,
        head: EagleHead | MtpHead,
        embed: Callable[[mx.array], mx.array],
        *,
        num_tokens: int,
        max_sequences: int,
        min_probability: float = 0.0,
    ) -> None:
        self._head = head
        self._embed = head.embed_tokens if "embed_tokens" in head else embed
        self._num_tokens, self._max_sequences = num_tokens, max_sequences
        self._least = min_probability
        self._drafts: dict[int, _Draft] = {}  # by seq_id
        self._graphs: dict[tuple[int, ...], Callable[..., Any]] = {}

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether the head has read any of these sequences."""
        return any(sequence.seq_id in self._drafts for sequence in sequences)

    def record(self, output: SchedulerOutput, batch: StepBatch, hidden: HiddenRows) -> None:
        """Keep the hidden states of a step's rows; proposals may be rejected later."""
        parts = recorded_rows(output, batch)
        if len(output.decoding) > self._max_sequences:
            parts = parts[len(output.decoding) :]
        for sequence, row, count in parts:
            draft = self._drafts.get(sequence.seq_id)
            if draft is None:
                if len(self._drafts) == self._max_sequences:
                    continue
                draft = self._drafts[sequence.seq_id] = _Draft()
            draft.add(batch.positions[row], hidden.cut(row, count))

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the tokens that the head drafts after each sequence."""
        going: list[tuple[Sequence, _Draft, list[int], mx.array]] = []
        for sequence in lengths:
            draft = self._drafts.get(sequence.seq_id)
            found = None if draft is None else draft.take(sequence.num_known_tokens)
            if draft is not None and found is not None:
                going.append((sequence, draft, *self._catch_up(sequence, draft, *found)))
        if not going:
            return {}
        room = max(draft.length for _, draft, _, _ in going) + self._rows + self._num_tokens
        for _, draft, _, _ in going:
            self._grow(draft, room)
        drafted, probabilities = self._draft(going)
        proposals = {}
        for index, (sequence, _, _, _) in enumerate(going):
            count = lengths[sequence]
            if self._least:
                unsure = (p < self._least for p in probabilities[index])
                count = min(count, next((n for n, found in enumerate(unsure) if found), count))
            if count:
                proposals[sequence] = drafted[index][:count]
        return proposals

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the caches of sequences that ended or were preempted."""
        for seq_id in seq_ids:
            self._drafts.pop(seq_id, None)

    # The head's graphs

    @property
    def _rows(self) -> int:
        """The rows that the first part of a draft has: those after a proposal that is accepted."""
        return self._num_tokens + 1

    def _catch_up(
        self, sequence: Sequence, draft: _Draft, positions: list[int], states: mx.array
    ) -> tuple[list[int], mx.array]:
        """Compute all rows but the last few, and return these."""
        while len(positions) > self._rows:
            count = min(len(positions) - self._rows, _CHUNKS[-1])
            padded = round_up(count, _CHUNKS)
            self._grow(draft, draft.length + padded)
            ids = _next_tokens(sequence, positions[:count])
            graph = self._graph(padded, 1, _size(draft), drafts=False)
            keys, values = graph(
                mx.array([_padded(ids, padded)], mx.int32),
                _pad_rows(states[:count], padded)[None],
                mx.array([_padded(positions[:count], padded)], mx.int32),
                mx.array([draft.length], mx.int32),
                mx.array([count], mx.int32),
                [draft.keys],
                [draft.values],
            )
            draft.keys, draft.values = keys[0], values[0]
            mx.async_eval(draft.keys, draft.values)
            draft.length += count
            positions, states = positions[count:], states[count:]
        return positions, states

    def _draft(
        self, going: list[tuple[Sequence, _Draft, list[int], mx.array]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return the drafted tokens of each sequence, and their probabilities."""
        rows = self._rows
        ids = [_padded(_next_tokens(seq, at), rows) for seq, _, at, _ in going]
        graph = self._graph(rows, len(going), _size(going[0][1]), drafts=True)
        tokens, probabilities, keys, values = graph(
            mx.array(ids, mx.int32),
            mx.stack([_pad_rows(states, rows) for _, _, _, states in going]),
            mx.array([_padded(at, rows) for _, _, at, _ in going], mx.int32),
            mx.array([draft.length for _, draft, _, _ in going], mx.int32),
            mx.array([len(at) for _, _, at, _ in going], mx.int32),
            [draft.keys for _, draft, _, _ in going],
            [draft.values for _, draft, _, _ in going],
        )
        for (_, draft, at, _), key, value in zip(going, keys, values, strict=True):
            draft.keys, draft.values = key, value
            draft.length += len(at)
        mx.eval(tokens, probabilities, keys, values)
        return tokens.tolist(), probabilities.tolist() if self._least else []

    def _grow(self, draft: _Draft, rows: int) -> None:
        """Give the caches of a sequence at least this many rows."""
        have = 0 if draft.keys is None else draft.keys.shape[2]
        if rows <= have:
            return
        size = max(_FEWEST_KEYS, 1 << (rows - 1).bit_length())
        head = self._head
        keys, values = (
            mx.zeros((1, head.num_kv_heads, size - have, dim), head.dtype)
            for dim in (head.key_dim, head.value_dim)
        )
        if draft.keys is not None and draft.values is not None:
            keys = mx.concatenate([draft.keys, keys], axis=2)
            values = mx.concatenate([draft.values, values], axis=2)
        draft.keys, draft.values = keys, values

    def _graph(self, rows: int, count: int, size: int, *, drafts: bool) -> Callable[..., Any]:
        key = (rows, count, size, drafts)
        if key not in self._graphs:
            run = _Chain(self._head, self._embed, self._num_tokens if drafts else 0, self._least)
            self._graphs[key] = mx.compile(run)
        return self._graphs[key]


class _Chain:
    """The graph of one draft: the rows that are left, then a row for each further token."""

    def __init__(
        self,
        head: EagleHead | MtpHead,
        embed: Callable[[mx.array], mx.array],
        num_tokens: int,
        least: float,
    ) -> None:
        self._head, self._embed, self._num_tokens = head, embed, num_tokens
        self._wants_probabilities = least > 0

    def __call__(
        self,
        ids: mx.array,
        states: mx.array,
        positions: mx.array,
        lengths: mx.array,
        counts: mx.array,
        keys: list[mx.array],
        values: list[mx.array],
    ) -> Any:
        """Return tokens and probabilities [sequences, tokens], and the caches after the rows.

        `ids` and `positions` int32 [sequences, rows] and `states` [sequences, rows, hidden] are
        padded after `counts` rows. `lengths` count the rows in the caches [1, heads, size, dim].
        """
        count, rows = ids.shape
        keys, values = list(keys), list(values)
        hidden = self._layer(
            states.reshape(count * rows, -1), ids.reshape(-1), positions.reshape(-1), lengths,
            keys, values,
        )  # fmt: skip
        if not self._num_tokens:
            return keys, values
        last = mx.arange(count) * rows + counts - 1
        hidden, at = hidden[last], positions.reshape(-1)[last]
        tokens: list[mx.array] = []
        probabilities: list[mx.array] = []
        for step in range(self._num_tokens):
            if step:
                hidden = self._layer(
                    hidden, tokens[-1], at + step, lengths + counts + (step - 1), keys, values
                )
            logits = self._head.logits(hidden)
            best = mx.argmax(logits, axis=-1)
            tokens.append(self._head.token_ids(best))
            if self._wants_probabilities:
                top = mx.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
                probabilities.append(mx.exp(top - mx.logsumexp(logits, axis=-1)))
        found = mx.stack(tokens, axis=1)
        return found, mx.stack(probabilities, axis=1) if probabilities else found, keys, values

    def _layer(
        self,
        hidden: mx.array,
        ids: mx.array,
        positions: mx.array,
        lengths: mx.array,
        keys: list[mx.array],
        values: list[mx.array],
    ) -> mx.array:
        """Run the head's layer on rows of all sequences, and write to their caches."""
        head, rows = self._head, len(ids) // len(keys)
        carried, queries, new_keys, new_values = head.project(hidden, self._embed(ids), positions)
        outputs = []
        for index in range(len(keys)):
            own = slice(index * rows, (index + 1) * rows)
            start = lengths[index : index + 1]
            keys[index] = mx.slice_update(
                keys[index], new_keys[own].transpose(1, 0, 2)[None], start, axes=[2]
            )
            values[index] = mx.slice_update(
                values[index], new_values[own].transpose(1, 0, 2)[None], start, axes=[2]
            )
            seen = start + mx.arange(rows)
            mask = mx.arange(keys[index].shape[2])[None] <= seen[:, None]
            attended = mx.fast.scaled_dot_product_attention(
                queries[own].transpose(1, 0, 2)[None],
                keys[index],
                values[index],
                scale=head.scale,
                mask=mask,
            )
            outputs.append(attended[0].transpose(1, 0, 2).reshape(rows, -1))
        return head.finish(carried, outputs[0] if len(outputs) == 1 else mx.concatenate(outputs))


def _next_tokens(sequence: Sequence, positions: list[int]) -> list[int]:
    """Return the token after each position; positions ascend."""
    first = positions[0] + 1
    tokens = sequence.token_ids(first, positions[-1] + 2)
    return [tokens[position + 1 - first] for position in positions]


def _padded(numbers: list[int], count: int) -> list[int]:
    return numbers + [0] * (count - len(numbers))


def _pad_rows(states: mx.array, count: int) -> mx.array:
    missing = count - len(states)
    return mx.pad(states, [(0, missing), (0, 0)]) if missing else states


def _size(draft: _Draft) -> int:
    assert draft.keys is not None
    return draft.keys.shape[2]
