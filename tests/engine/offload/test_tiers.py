"""Both tiers and their thread: callers never wait for files, and memory is bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack_engine.offload import tiers as module
from modelpack_engine.offload.directory import HEADER_SIZE, BlockDirectory
from modelpack_engine.offload.tiers import BlockMemory, Load, OffloadTiers
from tests.engine.offload.test_directory import IDENTITY, LENGTH, block, name

SECONDS = 30.0


class Gated(BlockDirectory):
    """A directory whose reads and writes wait for the test's permission."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, IDENTITY, lengths=(LENGTH,), limit=1000 * (LENGTH + HEADER_SIZE))
        self.gate = threading.Event()
        self.gate.set()

    def read(self, hash_: bytes) -> bytes | None:
        assert self.gate.wait(SECONDS)
        return super().read(hash_)

    def write(self, hash_: bytes, content: bytes) -> bool:
        assert self.gate.wait(SECONDS)
        return super().write(hash_, content)


@pytest.fixture
def directory(tmp_path: Path) -> Gated:
    return Gated(tmp_path)


@pytest.fixture
def tiers(directory: Gated) -> Iterator[OffloadTiers]:
    tiers = OffloadTiers(BlockMemory(2 * LENGTH), directory)
    yield tiers
    directory.gate.set()
    tiers.close(SECONDS)


def names(*numbers: int) -> list[bytes]:
    return [name(number) for number in numbers]


def loaded(tiers: OffloadTiers, *numbers: int) -> list[int]:
    """Load blocks; check their contents, and return those that were found."""
    load = tiers.load(names(*numbers))
    tiers.wait(load, SECONDS)
    assert load.done
    assert all(content == block(hash_[-1]) for hash_, content in load.contents.items())
    found = [number for number in numbers if name(number) in load.contents]
    tiers.finish(load)
    return found


def fill(tiers: OffloadTiers, count: int) -> None:
    for number in range(count):
        tiers.save(name(number), block(number))


def test_what_is_saved_is_found_at_once_and_in_the_end_on_disk(
    tiers: OffloadTiers, directory: Gated
) -> None:
    directory.gate.clear()
    fill(tiers, 5)
    assert all(name(number) in tiers for number in range(5))
    load = tiers.load(names(0, 1, 2, 3, 4))
    assert load.done, "nothing has to be read: it waits to be written"
    directory.gate.set()
    assert tiers.flush(SECONDS)
    assert tiers.memory.num_bytes == 2 * LENGTH
    assert directory.num_bytes == 5 * (LENGTH + HEADER_SIZE)
    assert loaded(tiers, 0, 1, 2, 3, 4) == [0, 1, 2, 3, 4]


def test_nothing_waits_for_a_file(tiers: OffloadTiers, directory: Gated) -> None:
    fill(tiers, 4)
    tiers.flush(SECONDS)
    directory.gate.clear()
    load = tiers.load(names(0, 1))
    tiers.save(name(9), block(9))
    assert not load.done
    assert tiers.load(names(9)).done, "memory has it, whatever the files do"
    directory.gate.set()
    tiers.wait(load, SECONDS)
    assert load.contents == {name(0): block(0), name(1): block(1)}
    assert load.num_read == 2


def test_a_load_ends_before_what_is_gone(
    tiers: OffloadTiers, directory: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tiers, 6)
    tiers.flush(SECONDS)
    path = directory.root / IDENTITY.hex() / f"{name(1).hex()}.kv"
    path.write_bytes(path.read_bytes()[:-1])
    assert loaded(tiers, 0, 1, 2) == [0]
    assert name(1) not in tiers
    assert directory.num_dropped == len(caplog.records) == 1
    assert loaded(tiers, 2, 3) == [2, 3]


def test_what_is_read_ahead_is_bounded(
    tiers: OffloadTiers, directory: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_STAGED", 2 * LENGTH)
    fill(tiers, 8)
    tiers.flush(SECONDS)
    loads = [tiers.load(names(number)) for number in range(4)]
    for load in loads[:2]:
        tiers.wait(load, SECONDS)
    tiers.save(name(99), block(99))
    assert tiers.flush(SECONDS), "the thread continues with writes"
    assert [load.done for load in loads] == [True, True, False, False]
    tiers.finish(loads[0])
    tiers.wait(loads[2], SECONDS)
    tiers.finish(loads[3])  # abandoned, and never read
    tiers.finish(loads[1])
    tiers.finish(loads[2])
    assert tiers._staged == 0
    assert loaded(tiers, 3) == [3]


def test_what_waits_to_be_written_is_bounded(
    tiers: OffloadTiers, directory: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_QUEUE", 3 * LENGTH)
    directory.gate.clear()
    fill(tiers, 9)
    assert len(tiers._writes) == 3
    directory.gate.set()
    assert tiers.flush(SECONDS)
    assert [number for number in range(9) if name(number) in directory] == [0, 1, 2]


def test_what_is_discarded_is_nowhere(tiers: OffloadTiers, directory: Gated) -> None:
    fill(tiers, 4)
    tiers.flush(SECONDS)
    tiers.discard(names(0, 3))
    assert [number for number in range(4) if name(number) in tiers] == [1, 2]
    assert loaded(tiers, 1) == [1]  # the thread has done the removals
    assert sorted(path.stem for path in directory.root.rglob("*.kv")) == [
        name(1).hex(), name(2).hex()
    ]  # fmt: skip


def test_what_another_server_writes_is_found(
    tiers: OffloadTiers, directory: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gated(directory.root).write(name(7), block(7))
    assert name(7) not in tiers
    tiers._next_scan = 0.0
    looked = threading.Event()
    real = directory.refresh
    monkeypatch.setattr(directory, "refresh", lambda: (real(), looked.set()))
    tiers.scan()
    assert looked.wait(SECONDS)
    assert loaded(tiers, 7) == [7]


def test_closing_writes_what_waits_and_ends_loads(directory: Gated) -> None:
    tiers = OffloadTiers(BlockMemory(0), directory)
    directory.gate.clear()
    fill(tiers, 5)
    load: Load = tiers.load(names(77))
    directory.gate.set()
    tiers.close(SECONDS)
    assert load.done
    assert tiers._thread is not None
    assert not tiers._thread.is_alive()
    assert len(list(directory.root.rglob("*.kv"))) == 5
