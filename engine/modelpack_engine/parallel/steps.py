"""A step's batch as bytes: what a follower's model needs of it, which is integers only.

All numbers are little-endian int32: counts first, then the columns, then each chunk.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from modelpack_engine.batch import Chunk, StepBatch
from modelpack_engine.parallel.wire import WireError

#: Fields of a batch that stay at rank 0: they are for sampling and for the host.
LEFT_OUT = frozenset({"sample_seqs", "prompt_logprob_rows", "prompt_logprob_seqs", "table_width"})
#: Fields of a chunk that do, too: a divided model shares no prefixes that need snapshots.
LEFT_OUT_OF_CHUNKS = frozenset({"snapshot", "block_hash"})

_ITEM = 4


@dataclass(frozen=True, slots=True)
class RemoteStep:
    """A batch without its sequences; the first `num_sampled` of its sample rows get a token."""

    batch: StepBatch
    num_sampled: int


def pack_integers(numbers: Iterable[int]) -> bytes:
    """Return numbers as bytes."""
    packed = array("i", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_integers(body: bytes) -> array[int]:
    """Return the numbers of a body; raises `WireError`."""
    if len(body) % _ITEM:
        raise WireError(f"{len(body)} bytes are no integers")
    numbers: array[int] = array("i")
    numbers.frombytes(body)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pack_step(batch: StepBatch, num_sampled: int) -> bytes:
    """Return a step as bytes. Its tables are as wide as on the device."""
    counts = (
        num_sampled,
        len(batch.token_ids),
        len(batch.from_previous),
        batch.num_decode,
        batch.decode_width,
        len(batch.decode_seq_ids),
        len(batch.sample_rows),
        len(batch.released),
        len(batch.chunks),
    )
    chunks = (
        (c.row, c.length, c.padded_length, c.kv_length, c.seq_id, len(table), *table)
        for c in batch.chunks
        for table in (c.block_table,)
    )
    return pack_integers(
        chain(
            counts,
            batch.token_ids,
            batch.positions,
            batch.slots,
            chain.from_iterable(batch.from_previous),
            chain.from_iterable(batch.padded_tables()),
            batch.decode_lengths,
            batch.decode_seq_ids,
            batch.sample_rows,
            batch.released,
            chain.from_iterable(chunks),
        )
    )


def unpack_step(body: bytes) -> RemoteStep:
    """Return the step that `pack_step` packed; raises `WireError` for anything else."""
    reader = _Reader(body)
    sampled, rows, from_previous, decode, width, decode_seqs, sample, released, chunks = (
        reader.counts(9)
    )
    if sampled > sample or decode > rows or decode_seqs > decode:
        raise WireError(f"a step of {rows} rows, {decode} of them decoding, samples {sampled}")
    token_ids, positions, slots = (reader.take(rows) for _ in range(3))
    pairs = reader.take(2 * from_previous)
    tables = reader.take(decode * width)
    batch = StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        from_previous=tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        num_decode=decode,
        decode_tables=[tables[i * width : (i + 1) * width] for i in range(decode)],
        decode_lengths=reader.take(decode),
        decode_seq_ids=tuple(reader.take(decode_seqs)),
        sample_rows=tuple(reader.take(sample)),
        sample_seqs=(),
        released=tuple(reader.take(released)),
        chunks=tuple(reader.chunk(rows) for _ in range(chunks)),
    )
    reader.end()
    if any(not 0 <= row < rows for row in batch.sample_rows):
        raise WireError(f"a step of {rows} rows samples others")
    return RemoteStep(batch, sampled)


class _Reader:
    """Takes numbers off a body, one after the other."""

    def __init__(self, body: bytes) -> None:
        self._numbers = unpack_integers(body)
        self._at = 0

    def take(self, count: int) -> list[int]:
        stop = self._at + count
        if stop > len(self._numbers):
            raise WireError(f"a step of {len(self._numbers)} numbers, expected {stop} or more")
        taken = self._numbers[self._at : stop].tolist()
        self._at = stop
        return taken

    def counts(self, count: int) -> list[int]:
        counts = self.take(count)
        if min(counts) < 0:
            raise WireError(f"a step with a count of {min(counts)}")
        return counts

    def chunk(self, rows: int) -> Chunk:
        row, length, padded, kv_length, seq_id, width = self.counts(6)
        if row + padded > rows or length > padded:
            raise WireError(f"a chunk of rows {row} to {row + padded}, in a step of {rows}")
        return Chunk(row, length, padded, kv_length, tuple(self.take(width)), seq_id)

    def end(self) -> None:
        if self._at != len(self._numbers):
            raise WireError(f"a step has {len(self._numbers) - self._at} numbers too many")
