"""A directory of blocks: bounded, private, shared by servers, and verified."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelpack_engine.errors import EngineError
from modelpack_engine.offload import directory as module
from modelpack_engine.offload.directory import HEADER_SIZE, BlockDirectory

IDENTITY, OTHER = bytes(16), bytes(range(16))
LENGTH = 1000
SIZE = HEADER_SIZE + LENGTH


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def block(number: int) -> bytes:
    return bytes([number % 256]) * LENGTH


def opened(root: Path, *, blocks: int = 10, identity: bytes = IDENTITY) -> BlockDirectory:
    return BlockDirectory(root, identity, lengths=(LENGTH,), limit=blocks * SIZE)


def fill(directory: BlockDirectory, numbers: range) -> None:
    """Write blocks, each used a second after the one before."""
    for number in numbers:
        assert directory.write(name(number), block(number))
        path = directory.root / IDENTITY.hex() / f"{name(number).hex()}.kv"
        os.utime(path, (number, number))


def test_a_restart_finds_its_own_blocks_only(tmp_path: Path) -> None:
    fill(opened(tmp_path / "kv"), range(3))
    again = opened(tmp_path / "kv")
    assert [again.read(name(i)) for i in range(4)] == [block(0), block(1), block(2), None]
    other = opened(tmp_path / "kv", identity=OTHER)
    assert name(0) not in other
    assert other.read(name(0)) is None
    assert other.num_bytes == 3 * SIZE


def test_only_the_user_may_look(tmp_path: Path) -> None:
    root = tmp_path / "some" / "kv"
    directory = opened(root)
    directory.write(name(1), block(1))
    modes = {path.name: path.stat().st_mode & 0o777 for path in root.rglob("*")}
    assert modes == {IDENTITY.hex(): 0o700, f"{name(1).hex()}.kv": 0o600}
    assert root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["others may read", "a link", "a file", "root is a file"])
def test_what_is_not_the_users_own_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "kv"
    path = root / IDENTITY.hex()
    if kind == "root is a file":
        root.write_text("")
    else:
        root.mkdir()
    if kind == "others may read":
        path.mkdir()
        path.chmod(0o755)
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "a file":
        path.write_text("")
    with pytest.raises(EngineError) as caught:
        opened(root)
    assert str(root) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_no_block(tmp_path: Path, make: Callable[[Path], None]) -> None:
    directory = opened(tmp_path)
    fill(directory, range(1))
    make(tmp_path / IDENTITY.hex() / f"{name(1).hex()}.kv")
    directory.refresh()
    assert name(0) in directory
    assert name(1) not in directory
    assert directory.num_bytes == SIZE
    assert directory.read(name(1)) is None, "nor is one that was planted since"


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    directory = opened(tmp_path, blocks=4)
    fill(directory, range(4))
    assert directory.read(name(0)) == block(0)  # which is a use
    assert directory.write(name(9), block(9))
    left = [number for number in (0, 1, 2, 3, 9) if directory.read(name(number))]
    assert left == [0, 2, 3, 9] or left == [0, 3, 9]
    assert 1 not in left
    assert directory.num_bytes == len(left) * SIZE


def test_all_models_share_the_bound_and_nothing_else_is_touched(tmp_path: Path) -> None:
    fill(opened(tmp_path, blocks=8), range(4))
    foreign = [
        tmp_path / "notes.txt",
        tmp_path / IDENTITY.hex() / "README",
        tmp_path / "a" / "b.kv",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10 * SIZE)
        os.utime(path, (0, 0))
    other = opened(tmp_path, blocks=8, identity=OTHER)
    for number in range(100, 130):
        assert other.write(name(number), block(number))
        files = [p for p in tmp_path.rglob("*.kv") if len(p.stem) == 32]
        assert sum(p.stat().st_size for p in files) <= 8 * SIZE
    assert other.read(name(129)) == block(129)
    assert all(path.exists() for path in foreign)
    assert opened(tmp_path).read(name(0)) is None


def test_one_block_above_the_limit_is_not_kept(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path, IDENTITY, lengths=(LENGTH,), limit=SIZE - 1)
    assert not directory.write(name(1), block(1))
    assert not list(tmp_path.rglob("*.kv"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "longer", "another block"])
def test_a_damaged_file_is_dropped_with_one_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = opened(tmp_path)
    fill(directory, range(2))
    path = tmp_path / IDENTITY.hex() / f"{name(0).hex()}.kv"
    data = path.read_bytes()
    path.write_bytes({
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "truncated": data[:-1],
        "empty": b"",
        "longer": data + b"\0",
        "another block": path.with_name(f"{name(1).hex()}.kv").read_bytes(),
    }[damage])  # fmt: skip
    assert directory.read(name(0)) is None
    assert name(0) not in directory
    assert not path.exists()
    assert directory.read(name(0)) is None
    assert [(r.levelno, str(path) in r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, True)
    ]
    assert directory.num_dropped == 1
    assert directory.read(name(1)) == block(1)
    assert directory.write(name(0), block(0))
    assert directory.read(name(0)) == block(0)


def test_a_crashed_servers_rest_goes_and_a_running_ones_stays(tmp_path: Path) -> None:
    path = opened(tmp_path).root / IDENTITY.hex()
    old, new = (path / f".{name(n).hex()}.{n}.0.tmp" for n in (1, 2))
    for file in (old, new):
        file.write_bytes(b"half")
    long_ago = time.time() - 2 * module._ABANDONED_AFTER
    os.utime(old, (long_ago, long_ago))
    directory = opened(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
    assert directory.num_bytes == 4


def test_a_full_disk_is_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = opened(tmp_path)
    fill(directory, range(1))
    now, real = [1000.0], module.write_block

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    # Only this module's: servers of other tests may run in threads, and sleep by the real clock.
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(module, "write_block", full)
    assert not directory.write(name(1), block(1))
    now[0] += 1
    monkeypatch.setattr(module, "write_block", real)
    assert not directory.write(name(2), block(2)), "the disk is left alone for a while"
    now[0] += module._PAUSE
    monkeypatch.setattr(module, "write_block", full)
    assert not directory.write(name(3), block(3))
    assert directory.read(name(0)) == block(0)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    now[0] += module._PAUSE
    monkeypatch.setattr(module, "write_block", real)
    assert directory.write(name(4), block(4))


def test_a_directory_that_vanishes_is_tolerated(tmp_path: Path) -> None:
    directory = opened(tmp_path / "kv")
    fill(directory, range(2))
    for path in (tmp_path / "kv" / IDENTITY.hex()).iterdir():
        path.unlink()
    (tmp_path / "kv" / IDENTITY.hex()).rmdir()
    assert directory.read(name(0)) is None
    assert not directory.write(name(5), block(5))
    directory.refresh()
    assert name(1) not in directory


WORKER = """
import random, sys
from pathlib import Path
from tests.engine.offload.test_directory import block, name, opened
mine, rng = opened(Path(sys.argv[1]), blocks=20), random.Random(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(300):
    number = rng.randrange(40)
    if rng.random() < 0.5:
        mine.write(name(number), block(number))
    else:
        assert mine.read(name(number)) in (None, block(number))
    if turn % 10 == 0:
        mine.refresh()
assert mine.num_dropped == 0, "a file was seen half written"
"""


def test_servers_share_a_directory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(seed)], text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        for seed in range(2)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.communicate("go\n", timeout=60)
        assert worker.returncode == 0
    found = opened(tmp_path, blocks=20)
    # Each server applies the limit to the files it knows: the other's last writes may exceed it.
    assert 10 * SIZE < found.num_bytes <= 30 * SIZE
    assert found.write(name(99), block(99))
    assert found.num_bytes <= 20 * SIZE
    assert not list(tmp_path.rglob("*.tmp"))
    numbers = random.Random(0).sample(range(40), 40)
    assert all(found.read(name(n)) in (None, block(n)) for n in numbers)
