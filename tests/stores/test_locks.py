"""Locks: one holder at a time, also when the file is deleted and created again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from modelpack.errors import InterruptedTransferError, LockedError, StoreError
from modelpack.progress import Stop
from modelpack.store import filesystem as locks
from modelpack.store.filesystem import FileLock


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    lock, inside, most = FileLock(tmp_path / "lock"), 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            with lock.held(remove=True):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)
    assert not lock.path.exists()


def test_a_file_that_its_holder_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, real, calls = FileLock(tmp_path / "lock"), locks.try_lock, []

    def lose_the_first(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            lock.path.unlink()  # as the holder does at the end, after the test opened it
        return real(descriptor)

    monkeypatch.setattr(locks, "try_lock", lose_the_first)
    with lock.held():
        assert lock.path.exists()
        assert not lock.is_free()


def test_waiting_ends_at_the_time_limit_or_by_request(tmp_path: Path) -> None:
    lock, told, stop = FileLock(tmp_path / "lock"), [], Stop()
    stop.request()
    with lock.held():
        with pytest.raises(LockedError) as caught, lock.held(patience=0, waiting=told.append):
            pass
        with pytest.raises(InterruptedTransferError), lock.held(stop=stop, waiting=told.append):
            pass
    assert caught.value.exit_code == 7
    assert len(told) == 1
    assert "process" in told[0]


def test_a_lock_in_no_directory_is_an_error_of_the_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError), FileLock(tmp_path / "absent" / "lock").held():
        pass


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    with pytest.raises(ZeroDivisionError), lock.held():
        raise ZeroDivisionError
    assert lock.is_free()
