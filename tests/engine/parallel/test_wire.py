"""Messages and steps on the wire: only complete ones within limits are accepted."""

from __future__ import annotations

import socket
import struct
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.distributed.channel import (
    LEFT_OUT,
    LEFT_OUT_OF_CHUNKS,
    Kind,
    WireError,
    encode,
    pack_integers,
    pack_step,
    receive,
    unpack_step,
)
from modelpack_engine.distributed.channel import fields as read_fields

numbers = st.integers(-(2**31), 2**31 - 1)


@st.composite
def batches(draw: st.DrawFn) -> StepBatch:
    def column(count: int) -> list[int]:
        return draw(st.lists(numbers, min_size=count, max_size=count))

    decode, width = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    chunks, row = [], decode
    for _ in range(draw(st.integers(0, 2))):
        length, padding = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        table = tuple(column(draw(st.integers(0, 3))))
        chunks.append(Chunk(row, length, length + padding, draw(st.integers(0, 99)), table, 7))
        row += length + padding
    sampled = draw(st.lists(st.integers(0, row - 1), unique=True)) if row else []
    pairs = draw(st.lists(st.tuples(numbers, numbers), max_size=3))
    return StepBatch(
        token_ids=column(row),
        positions=column(row),
        slots=column(row),
        from_previous=tuple(pairs),
        num_decode=decode,
        decode_tables=[column(width) for _ in range(decode)],
        decode_lengths=column(decode),
        decode_seq_ids=tuple(column(draw(st.integers(0, decode)))),
        chunks=tuple(chunks),
        sample_rows=tuple(sorted(sampled)),
        sample_seqs=(),
        released=tuple(column(draw(st.integers(0, 2)))),
        adapter_slots=column(row) if draw(st.booleans()) else [],
    )


@given(batches(), st.data())
def test_a_step_arrives_as_it_was(batch: StepBatch, data: st.DataObject) -> None:
    num_sampled = data.draw(st.integers(0, len(batch.sample_rows)))
    unpacked, sampled = unpack_step(pack_step(batch, num_sampled))
    assert unpacked == batch
    assert sampled == num_sampled


def test_tables_are_sent_as_wide_as_the_device_gets_them() -> None:
    rows = {name: [0, 0, 0] for name in ("token_ids", "positions", "slots")}
    batch = replace(
        STEP,
        **rows,
        num_decode=3,
        decode_tables=[[4], [5, 6], []],
        decode_lengths=[1, 17, 1],
        table_width=4,
        chunks=(),
    )
    sent = unpack_step(pack_step(batch, 1))[0]
    assert sent.decode_tables == [[4, 0, 0, 0], [5, 6, 0, 0], [0, 0, 0, 0]]
    assert sent.decode_width == batch.decode_width == 4


STEP = StepBatch(
    token_ids=[1, 2, 3],
    positions=[0, 1, 2],
    slots=[16, 17, 18],
    from_previous=(),
    num_decode=0,
    decode_tables=[],
    decode_lengths=[],
    decode_seq_ids=(),
    chunks=(Chunk(0, 3, 3, 3, (1,), 5),),
    sample_rows=(2,),
    sample_seqs=(),
)


@given(st.data())
def test_a_step_that_was_cut_or_changed_raises_no_other_error(data: st.DataObject) -> None:
    body = bytearray(pack_step(STEP, 1))
    del body[data.draw(st.integers(0, len(body))) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        batch, _ = unpack_step(bytes(body))
    except WireError:
        return
    assert len(batch.token_ids) == len(batch.slots)


@pytest.mark.parametrize(
    ("batch", "num_sampled", "text"),
    [
        (STEP, 2, "samples 2"),
        (replace(STEP, sample_rows=(3,)), 1, "samples rows beyond them"),
        (replace(STEP, sample_rows=(-1,)), 1, "samples rows beyond them"),
        (replace(STEP, num_decode=4), 1, "3 rows has 4 decode rows"),
        (replace(STEP, adapter_slots=[1, 2]), 1, "3 rows has adapters for 2"),
        (replace(STEP, chunks=(Chunk(1, 3, 3, 3, (1,), 5),)), 1, "rows 1 to 4"),
        (replace(STEP, chunks=(Chunk(0, 4, 3, 3, (1,), 5),)), 1, "a chunk of rows"),
    ],
)
def test_a_step_that_makes_no_sense(batch: StepBatch, num_sampled: int, text: str) -> None:
    with pytest.raises(WireError, match=text):
        unpack_step(pack_step(batch, num_sampled))


@pytest.mark.parametrize("body", [b"abc", pack_integers([-1] * 10), pack_step(STEP, 1) + b"1234"])
def test_bytes_that_are_no_step(body: bytes) -> None:
    with pytest.raises(WireError):
        unpack_step(body)


def test_every_field_of_a_batch_is_sent_or_known_to_stay() -> None:
    """Every new field of a batch has to be packed or left out on purpose."""
    filled = {f.name for f in fields(StepBatch)} - LEFT_OUT
    assert filled == {
        "token_ids", "positions", "slots", "from_previous", "num_decode", "decode_tables",
        "decode_lengths", "decode_seq_ids", "chunks", "sample_rows", "released", "adapter_slots",
    }  # fmt: skip
    chunk = {f.name for f in fields(Chunk)} - LEFT_OUT_OF_CHUNKS
    assert chunk == {"row", "length", "padded_length", "kv_length", "block_table", "seq_id"}


def received(data: bytes) -> tuple[Kind, bytes] | None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        return receive(ours)


def test_messages_arrive() -> None:
    assert received(encode(Kind.LOAD, {"key": "a"})) == (Kind.LOAD, b'{"key": "a"}')
    assert received(encode(Kind.BYE)) == (Kind.BYE, b"")
    assert received(b"") is None
    assert received(encode(Kind.STEP, b"12345")[:-1]) is None  # truncated


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (struct.pack("<BI", 99, 0), "unknown kind 99"),
        (struct.pack("<BI", Kind.STEP, 2**31), "2147483648 bytes"),
    ],
)
def test_bytes_that_are_no_message(data: bytes, text: str) -> None:
    with pytest.raises(WireError, match=text):
        received(data)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"\x80\x04K\x01.", "a message is not JSON"),  # a pickle
        (b"[1]", "of list"),
        (b"{}", "number is 'None', expected int"),
        (b'{"number": true}', "number is 'True'"),
        (b'{"number": "1"}', "number is '1'"),
    ],
)
def test_bodies_are_checked(body: bytes, text: str) -> None:
    with pytest.raises(WireError, match=text):
        read_fields(body, number=int)
