"""A fake device that computes on integers; the contents of the KV blocks decide the next token.

Each slot of the pool has the position of its token, and a digest of this and all earlier tokens. A
block that is wrong, stale, shared by mistake or overwritten too early changes what attention reads,
and with it the tokens. These are compared with the tokens of a sequence that is computed without a
device (`alone`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.core.block_manager import PrefixSnapshots
from modelpack_engine.core.sequence import Sequence

VOCAB_SIZE = 7
EOS = 0


def root(salt: bytes) -> int:
    return hash((sum(salt), len(salt), 17))


def written(before: int, position: int, token_id: int) -> int:
    """Return the entry of a token after a prefix with the last entry `before`."""
    return hash((before, position, token_id))


def sampled(entries: list[int], seed: int) -> int:
    """Return the next token for the entries that attention reads."""
    return hash((*entries, seed)) % VOCAB_SIZE


def alone(
    prompt: list[int], salt: bytes, seed: int, count: int, window: int | None = None
) -> list[int]:
    """Return the `count` tokens that follow a prompt, computed without a device.

    Each token sees `window` tokens (2 or more; None: all), itself included.
    """
    entries: list[int] = []
    tokens: list[int] = []
    while len(tokens) < count:
        all_tokens = prompt + tokens
        for position in range(len(entries), len(all_tokens)):
            before = entries[-1] if entries else root(salt)
            entries.append(written(before, position, all_tokens[position]))
        tokens.append(sampled(entries if window is None else entries[-window:], seed))
    return tokens


@dataclass(slots=True)
class FakeDevice:
    """Runs batches in the order of submission; `recurrent` models also have states."""

    num_blocks: int
    block_size: int
    recurrent: bool = False
    snapshots: PrefixSnapshots | None = None
    window: int | None = None
    memory: list[tuple[int, int] | None] = field(init=False)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    states: dict[int, int] = field(default_factory=dict)
    #: What the rows of the last step attend to.
    read: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = [None] * (self.num_blocks * self.block_size)

    def run(self, batch: StepBatch, previous_tokens: list[int]) -> list[int]:
        """Return the tokens sampled by a step; `previous_tokens` are still on the device."""
        for seq_id in batch.released:
            self.states.pop(seq_id, None)
        token_ids = list(batch.token_ids)
        for row, index in batch.from_previous:
            token_ids[row] = previous_tokens[index]
        self._check_shapes(batch)
        self._write_padding(batch)
        entries: dict[int, list[int]] = {}
        for row, seq_id in enumerate(batch.decode_seq_ids):
            table, length = batch.decode_tables[row], batch.decode_lengths[row]
            entries[row] = self._write(batch, token_ids, row, table, length, seq_id)
            assert length == batch.positions[row] + 1
        for chunk in batch.chunks:
            if self.recurrent and chunk.kv_length == chunk.length:
                assert chunk.seq_id not in self.states, "a sequence starts on an old state"
                assert chunk.snapshot is None, "a sequence starts at its beginning and elsewhere"
            if self.recurrent and isinstance(chunk.snapshot, int):
                self.states[chunk.seq_id] = chunk.snapshot
            for row in range(chunk.row, chunk.row + chunk.length):
                length = batch.positions[row] + 1
                table = chunk.block_table
                entries[row] = self._write(batch, token_ids, row, table, length, chunk.seq_id)
                if row + 1 == chunk.row + chunk.snapshot_after:
                    self._keep(chunk, length)
            assert length == chunk.kv_length
        self.read = entries
        for row, index in batch.decode_snapshots:
            assert self.snapshots is not None
            seq_id = batch.decode_seq_ids[row]
            assert batch.decode_lengths[row] == (index + 1) * self.block_size
            self.snapshots.put_unnamed(seq_id, index, self.states[seq_id])
        return [
            sampled(entries[row], sequence.index)
            for row, sequence in zip(batch.sample_rows, batch.sample_seqs, strict=True)
        ]

    def _keep(self, chunk: Chunk, length: int) -> None:
        """Keep the state of a chunk's sequence after `length` tokens."""
        if self.snapshots is None:  # the layers of a window pool
            return
        assert chunk.snapshot_hash is not None
        assert length % self.block_size == 0
        assert self.snapshots.within_chunks or length == chunk.kv_length
        self.snapshots.put(chunk.snapshot_hash, self.states[chunk.seq_id])

    def _write(
        self,
        batch: StepBatch,
        token_ids: list[int],
        row: int,
        table: list[int] | tuple[int, ...],
        length: int,
        seq_id: int,
    ) -> list[int]:
        """Write the entry of a row, and return the entries that it attends to."""
        size, position = self.block_size, length - 1
        assert batch.positions[row] == position
        first = 0 if self.window is None else max(0, length - self.window)
        slots = [table[p // size] * size + p % size for p in range(first, length)]
        assert batch.slots[row] == slots[-1]
        assert slots[-1] >= size, "a row without padding writes to the null block"
        read = [self.memory[slot] for slot in slots[:-1]]
        assert [entry and entry[0] for entry in read] == list(range(first, position)), (
            f"{self.sequences[seq_id]} reads KV that is not its own: {read}"
        )
        entries = [entry[1] for entry in read if entry]
        before = entries[-1] if entries else root(self.sequences[seq_id].cache_salt)
        if self.recurrent and position > 0:
            assert self.states.get(seq_id) == before, "a recurrent state is lost or stale"
        entries.append(written(before, position, token_ids[row]))
        self.memory[slots[-1]] = (position, entries[-1])
        self.states[seq_id] = entries[-1]
        return entries

    def _write_padding(self, batch: StepBatch) -> None:
        padding = set(range(len(batch.decode_seq_ids), batch.num_decode))
        for chunk in batch.chunks:
            padding |= set(range(chunk.row + chunk.length, chunk.row + chunk.padded_length))
        for row in padding:
            assert (batch.token_ids[row], batch.positions[row], batch.slots[row]) == (0, 0, 0)
            self.memory[0] = (0, -1)

    def _check_shapes(self, batch: StepBatch) -> None:
        rows = batch.num_decode + sum(chunk.padded_length for chunk in batch.chunks)
        assert rows == len(batch.token_ids) == len(batch.positions) == len(batch.slots)
        assert rows == batch.num_rows
        assert len(batch.decode_tables) == len(batch.decode_lengths) == batch.num_decode
        assert {len(table) for table in batch.padded_tables()} <= {batch.table_width}
        assert all(n >= 1 for n in batch.decode_lengths[len(batch.decode_seq_ids) :])
        starts = [batch.num_decode]
        for chunk in batch.chunks:
            starts.append(starts[-1] + chunk.padded_length)
            assert self._num_keys(chunk) <= len(chunk.block_table) * self.block_size
        assert [chunk.row for chunk in batch.chunks] == starts[:-1]
        assert list(batch.sample_rows) == sorted(set(batch.sample_rows))

    @staticmethod
    def _num_keys(chunk: Chunk) -> int:
        return chunk.kv_length + chunk.padded_length - chunk.length
