"""Delivery of tokens to the host's memory, with a stand-in for CUDA's page-locked memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.kernels import launch
from modelpack_engine.sampling import delivery
from modelpack_engine.sampling.delivery import Delivery, Outbox
from modelpack_engine.sampling.sampler import Sampled


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Memory and kernels of the host; the sizes that were allocated."""
    kept: list[ctypes.Array[ctypes.c_char]] = []
    sizes: list[int] = []

    def allocate(num_bytes: int) -> int:
        sizes.append(num_bytes)
        kept.append(ctypes.create_string_buffer(num_bytes))
        return ctypes.addressof(kept[-1])

    def deliver(token_ids: mx.array, address: mx.array) -> mx.array:
        low, high = map(int, np.array(address.view(mx.uint32))[:2])
        to = (ctypes.c_int32 * token_ids.size).from_address(high << 32 | low)
        np.ctypeslib.as_array(to)[:] = np.array(token_ids)
        return mx.zeros((1,), mx.int32)

    monkeypatch.setattr(delivery, "_allocate", allocate)
    monkeypatch.setattr(delivery, "deliver", deliver)
    monkeypatch.setattr(delivery, "_unused", [])
    monkeypatch.setattr(delivery, "verdict", lambda: None)
    yield sizes
    gc.collect()


def ids(*token_ids: int) -> mx.array:
    return mx.array(token_ids, mx.int32)


def test_the_host_reads_the_tokens_of_two_steps_in_flight(allocated: list[int]) -> None:
    outbox = Outbox()
    sent = [outbox.send(ids(step, step + 1, -1)) for step in range(9)]
    assert None not in sent[-2:]
    assert [each.read() for each in sent[-2:] if each] == [[7, 8, -1], [8, 9, -1]]
    assert len(allocated) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("count", [1, 2, 4097])
def test_what_mlx_reads_as_fast_or_does_not_fit_is_not_sent(
    allocated: list[int], count: int
) -> None:
    assert Outbox().send(mx.zeros((count,), mx.int32)) is None
    assert allocated == []


def test_nothing_is_sent_without_cuda() -> None:
    assert Outbox().send(ids(1, 2, 3)) is None


def test_the_places_of_samplers_that_are_gone_are_used_again(allocated: list[int]) -> None:
    outbox, other = Outbox(), Outbox()
    outbox.send(ids(1, 2, 3))
    other.send(ids(1, 2, 3))
    assert len(allocated) == 2
    del outbox
    gc.collect()
    again = Outbox().send(ids(4, 5, 6))
    assert again is not None
    assert again.read() == [4, 5, 6]
    assert len(allocated) == 2


def test_delivered_tokens_are_read_and_evaluated_with_the_step() -> None:
    done = mx.zeros((1,), mx.int32)
    sent = Delivery(done, np.array([5, 6, 7], np.int32))
    sampled = Sampled(ids(1, 2, 3), ids(1, 2, 3), None, sent)
    assert any(array is done for array in sampled.arrays())
    assert sampled.read() == [5, 6, 7]
    assert Sampled(ids(1, 2, 3), ids(1, 2, 3), None).read() == [1, 2, 3]


def test_missing_memory_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> int:
        raise RuntimeError("CUDA refuses page-locked memory: error 2")

    monkeypatch.setattr(delivery, "_allocate", refuse)
    monkeypatch.setattr(delivery, "_unused", [])
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    delivery.verdict.cache_clear()
    try:
        assert "error 2" in str(delivery.verdict())
        assert Outbox().send(ids(1, 2, 3)) is None
    finally:
        delivery.verdict.cache_clear()
