"""StepBatch: the inputs of a step's forward pass: rows, slots and block tables, padded to buckets.

Every token is a row. Decode rows come first, padded to a bucket, then the chunks of prompts, each
padded to a bucket at its end. The tokens of a proposal are decode rows of one sequence. Without
padding, they are a chunk instead, before the chunks of prompts: its keys are read once. A padding
row has token 0 at position 0 and writes to slot 0, in the null block, whose content is never used.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from modelpack_engine.core.block_pool import NULL_BLOCK
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.scheduler import PrefillChunk, Proposal, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import Media


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [row, row + length) hold the last `length` of a sequence's `kv_length` tokens so far.

    The rows after them, up to row + padded_length, are padding. `block_table` is padded with the
    null block to a bucket that holds kv_length + padded_length - length tokens.

    Tokens at the positions [first, stop) of each of `spans` attend to each other, in both
    directions; with `in_windows`, in layers with a window.

    For recurrent layers, `snapshot` is the state that the chunk starts from, if it is not the state
    of its sequence. If `snapshot_hash` is set, a snapshot of the state after the chunk's first
    `snapshot_after` rows is kept by it.
    """

    row: int
    length: int
    padded_length: int
    kv_length: int
    block_table: tuple[int, ...]
    seq_id: int
    snapshot: object | None = None
    snapshot_after: int = 0
    snapshot_hash: bytes | None = None
    spans: tuple[tuple[int, int], ...] = ()
    in_windows: bool = False


@dataclass(frozen=True, slots=True)
class MediaRows:
    """Rows [row, row + length) are the tokens of a piece of media from its token `first` on.

    `owner` is that of its request. With `Media.until`, rows after its tokens are among them.
    """

    row: int
    length: int
    media: Media
    first: int
    owner: bytes


@dataclass(frozen=True, slots=True)
class WindowTables:
    """The slots and block tables of a step in one of the block manager's window pools.

    They are as in `StepBatch`; `chunk_tables` has the table of each chunk.
    """

    slots: list[int]
    decode_tables: list[list[int]]
    chunk_tables: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The inputs of one step, as plain integers.

    `token_ids`, `positions` and `slots` (block * block_size + offset) have one entry for each row.
    `from_previous` has pairs (row, index into the tokens that the previous step samples): the ids
    of these rows stay on the device, and `token_ids` has 0 for them.

    Rows [0, num_decode) are decode rows; those after the first `len(decode_seq_ids)` are padding.
    `decode_tables` and `decode_lengths` have an entry for each of them. A length includes the row's
    own token, and is 1 for padding. A table ends with the row's own block or later. On the device,
    null blocks pad all tables to `table_width`, or to the longest table if that is longer.

    `sample_rows` are the rows whose next token is sampled, in ascending order, and `sample_seqs`
    are their sequences; all rows of a proposal are sampled. `prompt_logprob_rows` are the rows for
    log-probabilities of the prompt token after them, and `prompt_logprob_seqs` their sequences.
    `released` are the ids of sequences whose state is dropped before this step. `decode_snapshots`
    has pairs (decode row, index of the block that it completes): the state after it is kept.
    `adapter_slots` has the adapter's slot for each row, -1 for padding; it is empty if no row has
    an adapter. `media_rows` are the rows of pictures: embeddings replace those of their tokens.
    `windows` has the tables of layers whose blocks are in a window pool, for each pool.
    `rope_positions` has three positions for each row, of time, height and width (M-RoPE). It is
    empty if `positions` are all three.
    """

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    from_previous: tuple[tuple[int, int], ...]
    num_decode: int
    decode_tables: list[list[int]]
    decode_lengths: list[int]
    decode_seq_ids: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    sample_rows: tuple[int, ...]
    sample_seqs: tuple[Sequence, ...]
    prompt_logprob_rows: tuple[int, ...] = ()
    prompt_logprob_seqs: tuple[Sequence, ...] = ()
    released: tuple[int, ...] = ()
    decode_snapshots: tuple[tuple[int, int], ...] = ()
    table_width: int = 0
    adapter_slots: list[int] = field(default_factory=list)
    media_rows: tuple[MediaRows, ...] = ()
    windows: tuple[WindowTables, ...] = ()
    rope_positions: tuple[list[int], ...] = ()

    @property
    def rotations(self) -> list[int] | None:
        """The one rotary position of each row; None if rows of pictures have three."""
        if not self.rope_positions:
            return self.positions
        time, height, width = self.rope_positions
        return time if time == height == width else None

    @property
    def has_proposals(self) -> bool:
        """Whether decode rows are of one sequence, and attend to each other's tokens."""
        return len(set(self.decode_seq_ids)) < len(self.decode_seq_ids)

    @property
    def crosses(self) -> bool:
        """Whether rows attend to pictures outside of the KV cache."""
        return any(part.media.until for part in self.media_rows)

    def of_group(self, group: int) -> StepBatch:
        """Return the batch with the slots and tables of window pool `group` - 1; 0 is itself.

        Without tables for windows, as in steps of padding, all groups have the same.
        """
        if not group or not self.windows:
            return self
        own = self.windows[group - 1]
        pairs = zip(self.chunks, own.chunk_tables, strict=True)
        chunks = tuple(replace(chunk, block_table=table) for chunk, table in pairs)
        return replace(
            self, slots=own.slots, decode_tables=own.decode_tables, chunks=chunks, windows=()
        )

    @property
    def num_rows(self) -> int:
        """The number of rows, padding included."""
        return len(self.token_ids)

    @property
    def decode_width(self) -> int:
        """The number of columns of the decode rows' block tables; 0 without decode rows."""
        return max(self.table_width, *map(len, self.decode_tables)) if self.decode_tables else 0

    def padded_tables(self) -> list[list[int]]:
        """Return the decode rows' block tables, padded to `decode_width` columns."""
        width = self.decode_width
        return [table + [NULL_BLOCK] * (width - len(table)) for table in self.decode_tables]


def build_batch(
    output: SchedulerOutput,
    previous: StepBatch | None,
    buckets: Buckets,
    block_size: int,
    snapshot_interval: int = 0,
    *,
    proposals_as_rows: bool = False,
) -> StepBatch:
    """Return the batch of a step that was scheduled and is not submitted yet.

    `previous` is the batch of the step in flight; None if all tokens have been read. Every
    `snapshot_interval` tokens, a snapshot of the recurrent state of decode rows is taken. With
    `proposals_as_rows`, the tokens of proposals are never a chunk: recurrent models need it.
    """
    rows = _Rows(buckets, block_size)
    chunks = []
    if buckets.exact and not proposals_as_rows:
        rows.add_decode(output.decode, previous)
        sample_rows = list(range(len(output.decode)))
        for proposal in output.proposals:
            chunks.append(chunk := rows.add_proposal(proposal))
            sample_rows += range(chunk.row, chunk.row + chunk.length)
    else:
        rows.add_decode(output.decode, previous, output.proposals)
        sample_rows = list(range(len(rows.decode_seq_ids)))
    prompt_rows: list[tuple[int, Sequence]] = []
    sample_seqs = list(output.decode)
    for proposal in output.proposals:
        sample_seqs += [proposal.sequence] * (1 + len(proposal.token_ids))
    for part in output.prefill:
        chunks.append(chunk := rows.add_chunk(part))
        if part.is_last:
            sample_rows.append(chunk.row + chunk.length - 1)
            sample_seqs.append(part.sequence)
        prompt_rows += _prompt_logprob_rows(part, chunk.row)
    return StepBatch(
        token_ids=rows.token_ids,
        positions=rows.positions,
        slots=rows.slots,
        from_previous=rows.from_previous,
        num_decode=rows.num_decode,
        decode_tables=rows.decode_tables,
        table_width=rows.table_width,
        decode_lengths=rows.decode_lengths,
        decode_seq_ids=tuple(rows.decode_seq_ids),
        chunks=tuple(chunks),
        sample_rows=tuple(sample_rows),
        sample_seqs=tuple(sample_seqs),
        prompt_logprob_rows=tuple(row for row, _ in prompt_rows),
        prompt_logprob_seqs=tuple(sequence for _, sequence in prompt_rows),
        released=output.released,
        decode_snapshots=_decode_snapshots(output, snapshot_interval, block_size),
        adapter_slots=rows.adapter_slots if max(rows.adapter_slots, default=0) > 0 else [],
        media_rows=tuple(rows.media_rows),
        windows=tuple(rows.windows),
        rope_positions=rows.rope_positions(),
    )


def _decode_snapshots(
    output: SchedulerOutput, interval: int, block_size: int
) -> tuple[tuple[int, int], ...]:
    """Return the rows after which snapshots are taken, with the indices of their blocks."""
    if not interval:
        return ()
    ends = (sequence.num_computed_tokens + 1 for sequence in output.decode)
    return tuple(
        (row, end // block_size - 1) for row, end in enumerate(ends) if end % interval == 0
    )


@lru_cache(maxsize=512)
def same_rows(count: int) -> tuple[tuple[int, int], ...]:
    """Return `from_previous` of rows that continue the same rows of the previous step."""
    return tuple((row, row) for row in range(count))


class _Rows:
    """The rows of a batch while they are added."""

    def __init__(self, buckets: Buckets, block_size: int) -> None:
        self._buckets = buckets
        self._block_size = block_size
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.from_previous: tuple[tuple[int, int], ...] = ()
        self.num_decode = 0
        self.decode_tables: list[list[int]] = []
        self.table_width = 0
        self.decode_lengths: list[int] = []
        self.decode_seq_ids: list[int] = []
        self.adapter_slots: list[int] = []
        self.windows: list[WindowTables] = []
        self.media_rows: list[MediaRows] = []
        self._rope: list[tuple[int, list[list[int]]]] = []  # first row, and the positions from it

    def rope_positions(self) -> tuple[list[int], ...]:
        """Return `StepBatch.rope_positions`."""
        if not self._rope:
            return ()
        found = tuple(list(self.positions) for _ in range(3))
        for row, parts in self._rope:
            for column, part in zip(found, parts, strict=True):
                column[row : row + len(part)] = part
        return found

    def _add_media(self, row: int, sequence: Sequence, start: int, stop: int) -> None:
        """Add the rows of pictures from `row` on, and rotary positions if pictures change them."""
        self.media_rows += _media_rows(sequence, row, start, stop)
        if all(media.grid is None for media in sequence.media):
            return
        end = sequence.media[-1].stop
        if start < end:
            self._rope.append((row, rope_positions(sequence.media, start, stop)))
            return
        if sequence.rope_shift is None:  # kept: a video has hundreds of parts
            [column, *_] = rope_positions(sequence.media, end, end + 1)
            sequence.rope_shift = column[0] - end
        column = list(range(start + sequence.rope_shift, stop + sequence.rope_shift))
        self._rope.append((row, [column] * 3))

    def add_decode(
        self,
        sequences: tuple[Sequence, ...],
        previous: StepBatch | None,
        proposals: tuple[Proposal, ...] = (),
    ) -> None:
        """Add a row for the newest token of each sequence, which may still be on the device.

        Then add rows for each proposal: the newest token of its sequence, and the proposed tokens.
        """
        members = list(sequences)
        positions = [sequence.num_computed_tokens for sequence in sequences]
        self._add_newest(sequences, positions, previous)
        for proposal in proposals:
            start, token_ids = _rows_of(proposal)
            members += [proposal.sequence] * len(token_ids)
            positions += range(start, start + len(token_ids))
            self.token_ids += token_ids
        if not members:
            return
        for row, (sequence, position) in enumerate(zip(members, positions, strict=True)):
            if sequence.media:
                self._add_media(row, sequence, position, position + 1)
        size, tables = self._block_size, [sequence.block_table for sequence in members]
        ends = [position // size for position in positions]  # index of each row's last block
        self.positions += positions
        self.slots += [
            table[end] * size + position % size
            for table, end, position in zip(tables, ends, positions, strict=True)
        ]
        self.num_decode = self._buckets.pad_rows(len(members))
        padding = self.num_decode - len(members)
        self._pad(padding)
        self.decode_lengths = [position + 1 for position in positions] + [1] * padding
        self.decode_seq_ids = [sequence.seq_id for sequence in members]
        slots = [sequence.adapter_slot for sequence in members]
        self.adapter_slots = slots + [-1] * padding
        self.table_width = self._buckets.pad_table_width(max(ends) + 1)
        self.decode_tables = [table[: end + 1] for table, end in zip(tables, ends, strict=True)]
        self.decode_tables += [[] for _ in range(padding)]
        self._add_decode_windows(members, positions, padding)

    def _add_decode_windows(
        self, members: list[Sequence], positions: list[int], padding: int
    ) -> None:
        """Add slots and tables of decode rows in window pools."""
        size = self._block_size
        for index, window in enumerate(self._windows_of(members[0])):
            for sequence, position in zip(members, positions, strict=True):
                table = sequence.window_tables[index][: position // size + 1]
                window.slots.append(table[-1] * size + position % size)
                window.decode_tables.append(table)
            window.slots.extend([0] * padding)
            window.decode_tables.extend([] for _ in range(padding))

    def _windows_of(self, sequence: Sequence) -> list[WindowTables]:
        """Return the tables in window pools, which all sequences of a batch have."""
        if len(self.windows) < len(sequence.window_tables):
            self.windows = [WindowTables([], [], []) for _ in sequence.window_tables]
        return self.windows

    def _add_newest(
        self,
        sequences: tuple[Sequence, ...],
        positions: list[int],
        previous: StepBatch | None,
    ) -> None:
        """Add the newest token of each sequence, or its index in the tokens of `previous`."""
        before = previous.sample_seqs if previous else ()
        if (
            sequences == before[: len(sequences)]  # the same objects, as in most steps
            and not self.token_ids
            and all(sequence.num_inflight == 1 for sequence in sequences)
        ):
            self.token_ids = [0] * len(sequences)
            self.from_previous = same_rows(len(sequences))
            return
        known: list[tuple[int, int]] = []
        places: dict[Sequence, int] | None = None
        for row, sequence in enumerate(sequences):
            if not sequence.num_inflight:
                self.token_ids += sequence.token_ids(positions[row], positions[row] + 1)
                continue
            assert sequence.num_inflight == 1, "at most one step is in flight"
            self.token_ids.append(0)
            if row < len(before) and before[row] is sequence:
                known.append((row, row))
                continue
            if places is None:
                places = {seq: index for index, seq in enumerate(before)}
            known.append((row, places[sequence]))
        self.from_previous = tuple(known)

    def add_proposal(self, proposal: Proposal) -> Chunk:
        """Add the rows of a proposal as a chunk."""
        start, token_ids = _rows_of(proposal)
        return self._add_chunk(proposal.sequence, start, token_ids)

    def add_chunk(self, part: PrefillChunk) -> Chunk:
        """Add the rows of a chunk, and its padding."""
        stop = part.start + part.length
        token_ids = part.sequence.token_ids(part.start, stop)
        chunk = self._add_chunk(part.sequence, part.start, token_ids, part.sequence.snapshot)
        return replace(chunk, snapshot_after=part.snapshot_after, snapshot_hash=part.snapshot_hash)

    def _add_chunk(
        self, sequence: Sequence, start: int, token_ids: list[int], snapshot: object | None = None
    ) -> Chunk:
        length = len(token_ids)
        stop = start + length
        row, size = len(self.token_ids), self._block_size
        padded_length = self._buckets.pad_chunk(length)
        self._add_media(row, sequence, start, stop)
        self.token_ids += token_ids
        self.positions += range(start, stop)
        num_keys = stop + padded_length - length
        width = self._buckets.pad_table_width(-(-num_keys // size))

        def add_slots(blocks: list[int], slots: list[int]) -> tuple[int, ...]:
            """Add the slots of the rows without padding; return the table padded to its bucket."""
            table = blocks[: -(-stop // size)]
            for index in range(start // size, len(table)):
                low, high = max(start - index * size, 0), min(stop - index * size, size)
                slots += range(table[index] * size + low, table[index] * size + high)
            return tuple(table + [NULL_BLOCK] * (width - len(table)))

        table = add_slots(sequence.block_table, self.slots)
        for window, blocks in zip(self._windows_of(sequence), sequence.window_tables, strict=True):
            window.chunk_tables.append(add_slots(blocks, window.slots))
            window.slots.extend([0] * (padded_length - length))
        self._pad(padded_length - length)
        self.adapter_slots += [sequence.adapter_slot] * length + [-1] * (padded_length - length)
        chunk = Chunk(row, length, padded_length, stop, table, sequence.seq_id, snapshot)
        spans = [
            span
            for media in sequence.media
            for span in media.spans
            if span[0] < stop and start < span[1]
        ]
        if not spans:
            return chunk
        return replace(chunk, spans=tuple(spans), in_windows=sequence.media[0].in_windows)

    def _pad(self, count: int) -> None:
        for column in (self.token_ids, self.positions, self.slots):
            column += [0] * count


def rope_positions(media: tuple[Media, ...], start: int, stop: int) -> list[list[int]]:
    """Return the M-RoPE positions [3][stop - start] of tokens `start` to `stop` of a sequence.

    Text has three equal positions. A picture's tokens count frames, rows and columns from the next
    position on; the text after it continues from the largest of them (Qwen2-VL, section 2.1). Parts
    of a video all count from where its first one does.
    """
    found: list[list[int]] = [[], [], []]
    at, shift, first = start, 0, 0

    def add_text(end: int) -> None:
        for column in found:
            column += range(at + shift, end + shift)

    for each in media:
        if each.grid is None:
            continue
        if each.start >= stop:
            break
        if at < each.start:
            add_text(each.start)
            at = each.start
        frames, height, width = each.grid
        if each.frame is None:
            first = each.start + shift
        before = each.frame or 0
        while at < min(each.stop, stop):  # rows of the picture
            frame, place = divmod(at - each.start, height * width)
            row, column = divmod(place, width)
            count = min(width - column, each.stop - at, stop - at)
            found[0] += [first + before + frame] * count
            found[1] += [first + row] * count
            found[2] += range(first + column, first + column + count)
            at += count
        shift = first + max(before + frames, height, width) - each.stop
    if at < stop:
        add_text(stop)
    return found


def _rows_of(proposal: Proposal) -> tuple[int, list[int]]:
    """Return the position of a proposal's first row, and the tokens of its rows."""
    start = proposal.sequence.num_computed_tokens
    return start, [*proposal.sequence.token_ids(start, start + 1), *proposal.token_ids]


def _prompt_logprob_rows(part: PrefillChunk, row: int) -> list[tuple[int, Sequence]]:
    """Return the prompt log-probability rows of a chunk that starts at `row`, if requested."""
    sequence = part.sequence
    if not sequence.wants_prompt_logprobs:
        return []
    start = max(part.start, sequence.num_prompt_logprobs)
    stop = min(part.start + part.length, len(sequence.prompt_token_ids) - 1)
    return [(row + position - part.start, sequence) for position in range(start, stop)]


def _media_rows(sequence: Sequence, row: int, first: int, end: int) -> list[MediaRows]:
    """Return the rows of pictures in tokens [first, end) of a sequence, which start at `row`."""
    found = []
    for media in sequence.media:
        start, stop = max(media.start, first), min(media.until or media.stop, end)
        if start < stop:
            at = row + start - first
            found.append(MediaRows(at, stop - start, media, start - media.start, sequence.owner))
    return found


#: The seq_id of padding, which no sequence has.
PADDING_SEQ_ID = -1


@dataclass(frozen=True, slots=True)
class StepShape:
    """The decode rows of a step, the columns of their block tables, and the tokens of its chunk."""

    decode_rows: int
    table_width: int
    chunk_length: int = 0


def padding_batch(shape: StepShape, block_size: int) -> StepBatch:
    """Return a batch of padding in `shape`, which writes to the null block only."""
    rows = shape.decode_rows + shape.chunk_length
    chunks: tuple[Chunk, ...] = ()
    if shape.chunk_length:
        table = (0,) * max(shape.table_width, -(-shape.chunk_length // block_size))
        length = shape.chunk_length
        chunks = (Chunk(shape.decode_rows, length, length, length, table, PADDING_SEQ_ID),)
    sampled = [*range(shape.decode_rows), *([rows - 1] if chunks else [])]
    return StepBatch(
        token_ids=[0] * rows,
        positions=[0] * rows,
        slots=[0] * rows,
        from_previous=(),
        num_decode=shape.decode_rows,
        decode_tables=[[0] * shape.table_width] * shape.decode_rows,
        decode_lengths=[1] * shape.decode_rows,
        decode_seq_ids=(),
        chunks=chunks,
        sample_rows=tuple(sampled),
        sample_seqs=(),
    )
