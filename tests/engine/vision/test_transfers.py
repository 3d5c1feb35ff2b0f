"""Transfers of arrays by page-locked memory, on an emulated GPU, and what is left to MLX."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from modelpack_engine.kernels import launch
from modelpack_engine.platform.driver import DriverError
from modelpack_engine.vision import transfers
from modelpack_engine.vision.encoder import HostCache
from modelpack_engine.vision.tower_call import TowerCall
from modelpack_engine.vision.transfers import LEAST_BYTES, MOST_BYTES, NUM_PLACES, Transfers
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.vision import tiny


class Memory:
    """The host's own memory in place of CUDA's page-locked memory: bytes by address."""

    def __init__(self) -> None:
        self.used: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.limit: float = float("inf")

    def allocate_host(self, num_bytes: int) -> int:
        if len(self.used) >= self.limit:
            raise DriverError("cuMemHostAlloc failed: CUDA error 2")
        made = ctypes.create_string_buffer(num_bytes)
        self.used[ctypes.addressof(made)] = made
        return ctypes.addressof(made)

    def free_host(self, address: int) -> None:
        del self.used[address]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    found = Memory()
    monkeypatch.setattr(transfers, "find_driver", lambda: found)
    yield found
    gc.collect()  # while transfers still find it


@pytest.fixture
def gpu(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, transfers.verdict) as host:
        monkeypatch.setattr(launch, "backend", lambda: "cuda")
        yield host


def last(host: Host) -> str:
    """Return the kernel that ran last."""
    return host.calls[-1][0]


def numbers(seed: int, *shape: int) -> NDArray[np.float32]:
    made: NDArray[np.float32] = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return made


@pytest.mark.parametrize("shape", [(200, 100), (1, 16385), (3, 7, 1001), (65536,)])
@pytest.mark.parametrize("count", [1, 3])
def test_arrays_arrive_after_each_other(gpu: Host, shape: tuple[int, ...], count: int) -> None:
    parts = [numbers(seed, *shape) for seed in range(count)]
    found = Transfers().send(parts)
    assert found.dtype == mx.float32
    assert np.array_equal(np.array(found), np.concatenate(parts))
    assert last(gpu) == "fetch"


def test_rows_that_are_not_contiguous_arrive(gpu: Host) -> None:
    part = numbers(1, 300, 200).T[::2]
    assert np.array_equal(np.array(Transfers().send([part])), part)
    assert last(gpu) == "fetch"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_host_gets_every_bit(gpu: Host, dtype: mx.Dtype) -> None:
    """NaNs too, and those of a part of an array."""
    bits = np.random.default_rng(0).integers(0, 256, 400_000, np.uint8)
    made = mx.array(bits).view(dtype).reshape(100, -1)[:, ::2]
    moving = Transfers()
    found = moving.take(made).read()
    assert last(gpu) == "deliver"
    assert np.array_equal(found, np.array(made.flatten().view(mx.uint8)))
    assert np.array_equal(np.array(moving.send([found])), found)
    assert last(gpu) == "fetch"


@pytest.mark.parametrize(
    "part",
    [
        np.zeros(LEAST_BYTES // 4 - 1, np.float32),
        np.zeros((0, 5), np.float32),
        np.zeros(LEAST_BYTES, np.int64),
        np.broadcast_to(np.float32(1), MOST_BYTES // 4 + 1),
    ],
    ids=["small", "empty", "of another type", "large"],
)
def test_other_arrays_are_left_to_mlx(gpu: Host, memory: Memory, part: NDArray[Any]) -> None:
    moving = Transfers()
    found = moving.send([part])
    gpu.calls.clear()
    assert (found.shape, not memory.used) == (part.shape, True)
    assert mx.array_equal(found, mx.array(part))
    assert moving.take(mx.zeros((LEAST_BYTES + 1,), mx.uint8)).read().sum() == 0
    assert not gpu.calls


class Queue:
    """Runs the kernels of transfers as a GPU does: once they are launched, and not at once."""

    def __init__(self, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
        self._built: list[Callable[[], None]] = []
        self._launched: list[Callable[[], None]] = []
        self._ends: list[mx.array] = []  # what is computed behind a kernel
        self.waits = 0
        run, launch_all, wait, free = Host._run, mx.async_eval, mx.eval, memory.free_host
        fetch, deliver = transfers._fetch, transfers.deliver

        def build(host: Host, made: Any, views: dict[str, Any], *rest: Any) -> None:
            if made.body not in ("fetch", "deliver"):
                run(host, made, views, *rest)
                return
            for name in {"numbers", "address", "source"} & views.keys():
                views[name] = views[name].copy()  # the emulator keeps no array of the GPU
            self._built.append(lambda: run(host, made, views, *rest))

        def fetched(*given: Any) -> tuple[mx.array, mx.array]:
            found, done = fetch(*given)
            self._ends.append(done)
            return found, done

        def delivered(*given: Any) -> mx.array:
            self._ends.append(deliver(*given))
            return self._ends[-1]

        def launch_some(*arrays: Any) -> None:
            launch_all(*arrays)
            self._launched += self._built
            self._built.clear()

        def finish(*arrays: Any) -> None:
            wait(*arrays)
            if any(array is end for array in arrays for end in self._ends):
                self.waits += bool(self._launched)
                launch_some()
                self.run()

        def free_host(address: int) -> None:
            assert not self._launched, "a kernel uses it"
            free(address)

        monkeypatch.setattr(Host, "_run", build)
        monkeypatch.setattr(transfers, "_fetch", fetched)
        monkeypatch.setattr(transfers, "deliver", delivered)
        monkeypatch.setattr(mx, "async_eval", launch_some)
        monkeypatch.setattr(mx, "eval", finish)
        monkeypatch.setattr(memory, "free_host", free_host)

    @property
    def num_launched(self) -> int:
        """The kernels that are launched, and have not run."""
        return len(self._launched)

    def run(self) -> None:
        """Run what is launched."""
        for each in self._launched:
            each()
        self._launched.clear()


@pytest.fixture
def queue(gpu: Host, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> Queue:
    assert transfers.verdict() is None
    return Queue(memory, monkeypatch)


def test_no_place_is_overwritten_before_the_gpu_has_read_it(queue: Queue, memory: Memory) -> None:
    """Nor is one freed that is too small."""
    moving = Transfers()
    sent = [moving.send([numbers(seed, 50 * seed, 512)]) for seed in range(1, 9)]
    assert queue.waits == 8 - NUM_PLACES
    assert len(memory.used) == NUM_PLACES
    assert {len(each) for each in memory.used.values()} == {1 << 20}
    queue.run()
    for seed, found in enumerate(sent, 1):
        assert np.array_equal(np.array(found), numbers(seed, 50 * seed, 512))
    moving.send([numbers(1, 128, 128)])
    del moving
    gc.collect()
    assert not memory.used
    assert queue.waits == 8 - NUM_PLACES + 1


def test_what_is_on_its_way_to_the_host_is_not_waited_for(
    queue: Queue, gpu: Host, memory: Memory
) -> None:
    """MLX copies an array if no place is free: bytes keep theirs until they are read or dropped."""
    moving = Transfers()
    gpu.calls.clear()
    taken = [moving.take(mx.array(numbers(seed, 128, 128))) for seed in range(5)]
    assert [body for body, _ in gpu.calls] == ["deliver"] * NUM_PLACES
    assert (queue.waits, queue.num_launched, len(memory.used)) == (0, NUM_PLACES, NUM_PLACES)
    for seed, arrival in enumerate(taken):
        assert np.array_equal(arrival.read().view(np.float32), numbers(seed, 128 * 128))
        assert arrival.read() is arrival.read()
    for seed in range(NUM_PLACES):
        taken[seed] = moving.take(mx.array(numbers(seed, 128, 128)))
        assert last(gpu) == "deliver"
    del taken
    gpu.calls.clear()
    found = moving.take(mx.array(numbers(7, 128, 128)))
    assert last(gpu) == "deliver"
    assert np.array_equal(found.read().view(np.float32), numbers(7, 128 * 128))


def test_a_transfer_that_fails_spoils_no_other(gpu: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    moving = Transfers()

    def fail(*arrays: mx.array) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(mx, "async_eval", fail)
        for _ in range(NUM_PLACES + 1):
            with pytest.raises(RuntimeError, match="memory"):
                moving.send([numbers(1, 128, 128)])
    for seed in range(2 * NUM_PLACES):
        found = moving.send([numbers(seed, 128, 128)])
        assert np.array_equal(np.array(found), numbers(seed, 128, 128))


def test_memory_that_is_refused_later(
    gpu: Host, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    moving = Transfers()
    moving.send([numbers(0, 128, 128)])
    memory.limit = 1
    for seed in (1, 2):
        assert np.array_equal(
            np.array(moving.send([numbers(seed, 128, 128)])), numbers(seed, 128, 128)
        )
        assert moving.take(mx.ones((128, 128))).read().view(np.float32).sum() == 128 * 128
    assert caplog.messages == ["arrays are copied by MLX: cuMemHostAlloc failed: CUDA error 2"]
    caplog.clear()  # the error of the record refers to `moving`


def test_a_driver_without_such_memory_is_a_reason(gpu: Host, memory: Memory) -> None:
    memory.limit = 0
    transfers.verdict.cache_clear()
    assert transfers.verdict() == "cuMemHostAlloc failed: CUDA error 2"
    assert np.array_equal(np.array(Transfers().send([numbers(1, 128, 128)])), numbers(1, 128, 128))


def test_memory_that_is_not_freed(
    gpu: Host, memory: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moving = Transfers()
    for seed in range(NUM_PLACES):
        moving.send([numbers(seed, 128, 128)])

    def refuse(address: int) -> None:
        raise DriverError("cuMemFreeHost failed: CUDA error 1")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(memory, "free_host", refuse)
        del moving
        gc.collect()
    message = "page-locked memory is not freed: cuMemFreeHost failed: CUDA error 1"
    assert caplog.messages == [message] * NUM_PLACES


@pytest.mark.parametrize(("body", "side"), [("fetch", "the GPU"), ("deliver", "the host")])
def test_a_wrong_kernel_is_not_used(
    gpu: Host, memory: Memory, body: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Host._run
    monkeypatch.setattr(
        Host, "_run", lambda self, made, *rest: made.body == body or run(self, made, *rest)
    )
    assert str(transfers.verdict()).startswith(f"{side} reads other numbers")
    assert not memory.used


def test_without_cuda_mlx_copies() -> None:
    assert transfers.verdict() is not None
    moving = Transfers()
    assert np.array_equal(np.array(moving.send([numbers(1, 128, 128)])), numbers(1, 128, 128))
    assert np.array_equal(
        moving.take(mx.array(numbers(2, 99, 999))).read().view(np.float32), numbers(2, 99 * 999)
    )


def test_a_tower_gets_its_inputs_and_the_host_its_embeddings(gpu: Host) -> None:
    vision = tiny.tiny_loaded("qwen2_vl").vision
    assert vision is not None
    place, token_id = vision.processor.place, vision.processor.image_token_id
    media = [place([token_id], [tiny.picture(seed, 256, 192)])[1][0] for seed in (1, 2)]
    moving = Transfers()
    expected = TowerCall(vision.encoder._model, media).finish()
    found, other = TowerCall(vision.encoder._model, media, send=moving.send).finish()
    assert last(gpu) == "fetch"
    assert mx.array_equal(mx.stack([found, other]), mx.stack(expected))
    host = HostCache(1 << 24, moving)
    made = mx.repeat(found, 40, axis=0)
    host.save((b"", b"one"), made)
    again = host.load((b"", b"one"))
    assert again is not None
    assert mx.array_equal(again, made)
    assert [body for body, _ in gpu.calls][-2:] == ["deliver", "fetch"]
