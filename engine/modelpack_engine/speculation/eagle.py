"""EagleProposer: propose tokens with an EAGLE-3 head or a model's own layer for multi-token
prediction, from the hidden states of the model's steps.

The head's input for a position is the model's hidden state there and the token after it. The engine
hands over the states of each step with `record`; the rows of rejected tokens are dropped with the
next proposal or step. All tokens of a proposal are drafted in one compiled graph: the rows that the
head has not computed, then one row per further token. The head drafts the most likely tokens, also
for sampled requests.

On a GPU, a draft is launched right behind the step whose rows it reads, with the tokens that are
still on the device: the graph itself counts those that are accepted. While it runs, the host reads
the step's tokens. The host drafts again only for rows that it had kept, such as those of prompts.

Each sequence has a cache of the head's keys and values. A prefix from the prefix cache has no
hidden states, so the head does not see it; its positions count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.buckets import round_up
from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.layers.kernels import take
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.models.mtp import MtpHead
from modelpack_engine.runner.hidden_states import HiddenRows, recorded_rows
from modelpack_engine.sampling.delivery import Outbox

# The rows that the head computes at a time while it reads a prompt.
_CHUNKS = (16, 64, 256)
# The sizes of caches: doubled as needed.
_FEWEST_KEYS = 256


#: Stands for no proposed token: no token is drawn that equals it.
_NONE = -2


class _Drafted(NamedTuple):
    """The tokens that a head drafted for a sequence, and their probabilities if they are wanted."""

    token_ids: list[int]
    probabilities: list[float]


class _Launched:
    """A draft on the device: `found` int32 [sequences, 1 + tokens] and `probabilities`.

    The first column counts the rows of each sequence that the draft has read.
    """

    def __init__(
        self, found: mx.array, probabilities: mx.array | None, outbox: Outbox | None = None
    ) -> None:
        self._found, self._probabilities = found, probabilities
        self._delivery = None if outbox is None else outbox.send(found.reshape(-1))
        self._rows: list[list[int]] | None = None
        arrays = [found] if self._delivery is None else [self._delivery.done]
        self.arrays = arrays if probabilities is None else [*arrays, probabilities]

    def read(self, index: int) -> tuple[int, _Drafted]:
        """Wait for the draft; return the number of rows that it read and what it drafted."""
        if self._rows is None:
            if self._delivery is None:
                self._rows = self._found.tolist()  # type: ignore[assignment]
            else:
                flat = self._delivery.read()
                width = self._found.shape[1]
                self._rows = [flat[at : at + width] for at in range(0, len(flat), width)]
        assert self._rows is not None, "just read"
        count, *token_ids = self._rows[index]
        probabilities: Any = []
        if self._probabilities is not None:
            probabilities = self._probabilities[index].tolist()
        return count, _Drafted(token_ids, probabilities)


@dataclass(slots=True, eq=False)
class _Draft:
    """The head's state for one sequence: keys and values of `length` rows, and states to read.

    `pending` has pairs of the position of the first row and the states [rows, hidden]. `ahead` is a
    draft that was launched behind a step: the position of the step's first row, the sequence's
    index in the draft, and the draft. `length` does not count its rows yet.
    """

    length: int = 0
    pending: list[tuple[int, mx.array]] = field(default_factory=list)
    ahead: tuple[int, int, _Launched] | None = None
    keys: mx.array | None = None
    values: mx.array | None = None

    def settle(self, position: int) -> tuple[int, int, _Launched] | None:
        """Count the rows that were accepted of a draft ahead: those before `position`.

        Return their number, the sequence's index in the draft, and the draft; None without one.
        """
        if self.ahead is None:
            return None
        (start, index, launched), self.ahead = self.ahead, None
        count = max(position - start, 0)
        self.length += count
        return count, index, launched

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


class _Rows(NamedTuple):
    """The rows of a sequence that a draft reads first: positions, and states [rows, hidden].

    `proposed` are the tokens that were proposed after the rows but the last. `first` is the index
    of the first row among the sampled rows of the step.
    """

    draft: _Draft
    positions: list[int]
    states: mx.array
    proposed: tuple[int, ...]
    first: int = 0


class EagleProposer:
    """Proposes the `num_tokens` tokens that `head` drafts, for up to `max_sequences` sequences.

    `embed` are the model's embeddings, for heads without their own. A proposal ends before the
    first token whose probability is below `min_probability`. Steps have up to `most_proposed`
    proposed tokens of a sequence. With `ahead`, drafts may be launched behind steps.
    """

    def __init__(
        self,
        head: EagleHead | MtpHead,
        embed: Callable[[mx.array], mx.array],
        *,
        num_tokens: int,
        max_sequences: int,
        min_probability: float = 0.0,
        most_proposed: int = 0,
        ahead: bool = False,
    ) -> None:
        self._head = head
        self._embed = head.embed_tokens if "embed_tokens" in head else embed
        self._num_tokens, self._max_sequences = num_tokens, max_sequences
        self._least = min_probability
        self._ahead, self._outbox = ahead, Outbox()
        # The rows of a sequence that a draft reads at first; few, as each has graphs of its own.
        self._sizes = sorted({1, num_tokens + 1, max(num_tokens, most_proposed) + 1})
        self._next: tuple[list[_Rows], mx.array] | None = None
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
            draft.settle(batch.positions[row])
            draft.add(batch.positions[row], hidden.cut(row, count))

    def draft_behind(self, output: SchedulerOutput, sampled: mx.array) -> None:
        """Draft from the rows of a step that is recorded and not launched, if all can be.

        `sampled` int32 are the tokens of its sampled rows, without those of prompts. `launch` is to
        be called once the step is launched.
        """
        self._next = None
        if not self._ahead:
            return
        proposed = {each.sequence: each.token_ids for each in output.proposals}
        rows, first = list[_Rows](), 0
        for sequence in output.decoding:
            token_ids = proposed.get(sequence, ())
            draft, count = self._drafts.get(sequence.seq_id), 1 + len(token_ids)
            if draft is None or [len(states) for _, states in draft.pending] != [count]:
                return  # the head does not follow this sequence, or has to catch up first
            [(start, states)] = draft.pending
            rows.append(_Rows(draft, list(range(start, start + count)), states, token_ids, first))
            first += count
        if rows and max(len(each.positions) for each in rows) <= self._sizes[-1]:
            self._next = rows, sampled

    def launch(self) -> None:
        """Launch the draft of `draft_behind`, behind the step that was launched."""
        if self._next is None:
            return
        (rows, sampled), self._next = self._next, None
        size = next(n for n in self._sizes if n >= max(len(each.positions) for each in rows))
        if len(rows) == 1 and len(rows[0].positions) == size:
            ids = sampled[:size][None]
        else:
            at = [_padded([*range(r.first, r.first + len(r.positions))], size) for r in rows]
            ids = take(sampled, mx.array(at, mx.int32).reshape(-1)).reshape(len(rows), size)
        launched = self._draft(rows, ids, self._outbox)
        for index, each in enumerate(rows):
            each.draft.pending = []
            each.draft.ahead = each.positions[0], index, launched

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the tokens that the head drafts after each sequence."""
        found: dict[Sequence, _Drafted] = {}
        going: dict[Sequence, _Rows] = {}
        for sequence in lengths:
            draft = self._drafts.get(sequence.seq_id)
            if draft is None:
                continue
            settled = draft.settle(sequence.num_known_tokens - 1)
            if settled is not None:
                count, index, launched = settled
                read, drafted = launched.read(index)
                if read == count:  # not after logits that are NaN
                    found[sequence] = drafted
            elif (taken := draft.take(sequence.num_known_tokens)) is not None:
                going[sequence] = self._catch_up(sequence, draft, *taken)
        if going:
            rows, size = list(going.values()), self._rows
            ids = [_padded(_next_tokens(s, r.positions), size) for s, r in going.items()]
            launched = self._draft(rows, mx.array(ids, mx.int32))
            for index, (sequence, each) in enumerate(going.items()):
                each.draft.length += len(each.positions)
                found[sequence] = launched.read(index)[1]
        proposals = {}
        for sequence, (token_ids, probabilities) in found.items():
            count = lengths[sequence]
            unsure = (p < self._least for p in probabilities)
            count = min(count, next((n for n, below in enumerate(unsure) if below), count))
            if count:
                proposals[sequence] = token_ids[:count]
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
    ) -> _Rows:
        """Compute all rows but the last few, and return these."""
        while len(positions) > self._rows:
            count = min(len(positions) - self._rows, _CHUNKS[-1])
            padded = round_up(count, _CHUNKS)
            self._grow(draft, draft.length + padded)
            ids = _next_tokens(sequence, positions[:count])
            graph = self._graph(padded, 1, _size(draft), drafts=False)
            keys, values = graph(
                mx.array([_padded(ids, padded)], mx.int32),
                _numbers([_padded(positions[:count], padded)], [[0] * padded], [draft.length]),
                _pad_rows(states[:count], padded)[None],
                [draft.keys],
                [draft.values],
            )
            draft.keys, draft.values = keys[0], values[0]
            mx.async_eval(draft.keys, draft.values)
            draft.length += count
            positions, states = positions[count:], states[count:]
        return _Rows(draft, positions, states, tuple(_next_tokens(sequence, positions)[:-1]))

    def _draft(self, rows: list[_Rows], ids: mx.array, outbox: Outbox | None = None) -> _Launched:
        """Launch the draft behind rows of sequences; `ids` int32 [sequences, size] follow them.

        The rows' `proposed` are the tokens with which `ids` begin, if all rows are to be read.
        """
        count, size = ids.shape
        room = max(each.draft.length for each in rows) + size + self._num_tokens
        for each in rows:
            self._grow(each.draft, room)
        graph = self._graph(size, count, _size(rows[0].draft), drafts=True)
        numbers = _numbers(
            [_padded(each.positions, size) for each in rows],
            [[*each.proposed, *[_NONE] * (size - len(each.proposed))] for each in rows],
            [each.draft.length for each in rows],
        )
        states = [_pad_rows(each.states, size) for each in rows]
        found, probabilities, keys, values = graph(
            ids, numbers, states[0][None] if count == 1 else mx.stack(states),
            [each.draft.keys for each in rows], [each.draft.values for each in rows],
        )  # fmt: skip
        for each, key, value in zip(rows, keys, values, strict=True):
            each.draft.keys, each.draft.values = key, value
        launched = _Launched(found, probabilities if self._least else None, outbox)
        mx.async_eval(*launched.arrays, keys, values)
        return launched

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
        numbers: mx.array,
        states: mx.array,
        keys: list[mx.array],
        values: list[mx.array],
    ) -> Any:
        """Return the rows read and the tokens [sequences, 1 + tokens], probabilities, and caches.

        `ids` int32 [sequences, rows] and `states` [sequences, rows, hidden] are read up to the
        first token that was not proposed. `numbers` are those of `_numbers`. The caches have the
        shape [1, heads, size, dim].
        """
        count, rows = ids.shape
        keys, values = list(keys), list(values)
        positions, proposed = numbers[: 2 * count * rows].reshape(2, count, rows)
        lengths = numbers[2 * count * rows :]
        hidden = self._layer(
            states.reshape(count * rows, -1), ids.reshape(-1), positions.reshape(-1), lengths,
            keys, values,
        )  # fmt: skip
        if not self._num_tokens:
            return keys, values
        # The first row after which another token was drawn is the last to read.
        missed = mx.where(ids != proposed, rows - mx.arange(rows), 0)
        counts = mx.argmax(missed, axis=1).astype(mx.int32) + 1
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
        found = mx.stack([counts, *tokens], axis=1)
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


def _numbers(positions: list[list[int]], proposed: list[list[int]], lengths: list[int]) -> mx.array:
    """Return positions and proposed tokens, each [sequences, rows], and lengths in one array.

    One array moves fewer pages of CUDA's managed memory than three.
    """
    parts = [np.ravel(part) for part in (positions, proposed, lengths)]
    return mx.array(np.concatenate(parts).astype(np.int32))


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
