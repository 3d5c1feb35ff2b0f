"""The launcher: all ranks end when one ends for any reason, and it reports the first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelpack_engine.distributed import launch as launching
from modelpack_engine.distributed.launch import LIFELINE, Outcome, launch, visible_gpus
from modelpack_engine.errors import EngineError
from tests.engine.parallel.ranks import ENVIRONMENT

RANK = "import os, sys, time, pathlib; rank = os.environ['MLX_RANK']; "


def run(code: str, size: int = 2, deadline: float = 30) -> Outcome:
    return launch([sys.executable, "-c", RANK + code], size, backend="ring", deadline=deadline)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("", Outcome(0)),
        ("sys.exit(4 if rank == '0' else 0)", Outcome(4)),
        (
            "sys.exit(7) if rank == '1' else time.sleep(60)",
            Outcome(1, "rank 1 of 2 ended with the exit code 7"),
        ),
        (
            "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)",
            Outcome(1, "rank 1 of 2 was ended by SIGKILL"),
        ),
        (
            "os.kill(os.getpid(), 9) if rank == '0' else time.sleep(60)",
            Outcome(137, "rank 0 of 2 was ended by SIGKILL"),
        ),
    ],
)
def test_ends(code: str, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "PATIENCE", 0.3)
    assert run(code) == outcome


def test_a_deadline_ends_all(tmp_path: Path) -> None:
    write = f"pathlib.Path(r'{tmp_path}', rank).write_text(str(os.getpid())); time.sleep(60)"
    outcome = run(write, deadline=1.5)
    assert outcome.code == 124
    assert "after 2 s" in outcome.failure
    for name in ("0", "1"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


def test_what_ranks_are_told(tmp_path: Path) -> None:
    names = ["MLX_RANK", "MLX_HOSTFILE", LIFELINE]
    code = (
        f"hosts = open(os.environ['MLX_HOSTFILE']).read(); "
        f"values = [os.environ[n] for n in {names}]; "
        f"pathlib.Path(r'{tmp_path}', rank).write_text('|'.join([hosts, *values]))"
    )
    assert run(code, 3) == Outcome(0)
    told = [(tmp_path / str(rank)).read_text().split("|") for rank in range(3)]
    assert [parts[1] for parts in told] == ["0", "1", "2"]
    hosts = {parts[0] for parts in told}
    assert len(hosts) == 1
    assert len({host for [host] in json.loads(hosts.pop())}) == 3


@pytest.mark.long
def test_signals_go_to_rank_0_alone(tmp_path: Path) -> None:
    """SIGINT goes to rank 0 only, as with Ctrl-C; remaining ranks are killed afterwards."""
    ready = tmp_path / "ready"
    rank = (
        RANK + "import signal; said = lambda *_: (print('rank', rank, flush=True), sys.exit(5)); "
        f"signal.signal(signal.SIGINT, said); pathlib.Path(r'{ready}' + rank).touch(); "
        "time.sleep(60)"
    )
    code = (
        "import sys; from modelpack_engine.distributed.launch import launch; "
        f"sys.exit(launch([sys.executable, '-c', {rank!r}], 2, backend='ring').code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    with process:
        wait_for(Path(f"{ready}0"))
        wait_for(Path(f"{ready}1"))
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert out == "rank 0\n"
    assert process.returncode == 5


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("listed", "size", "devices"),
    [("0,1", 2, ["0", "1"]), ("5, 3,GPU-1", 2, ["5", "3"]), ("0,1,2,3", 4, ["0", "1", "2", "3"])],
)
def test_every_rank_has_a_gpu(listed: str, size: int, devices: list[str]) -> None:
    assert visible_gpus(size, {"CUDA_VISIBLE_DEVICES": listed}) == devices


@pytest.mark.parametrize("listed", ["", "0", "0,"])
def test_too_few_gpus(listed: str) -> None:
    with pytest.raises(EngineError, match="2 ranks need 2 GPUs"):
        visible_gpus(2, {"CUDA_VISIBLE_DEVICES": listed})


def test_nccl_is_told_where_rank_0_is(tmp_path: Path) -> None:
    code = (
        f"names = ['NCCL_HOST_IP', 'MLX_WORLD_SIZE', 'CUDA_VISIBLE_DEVICES', 'NCCL_PORT']; "
        f"pathlib.Path(r'{tmp_path}', rank).write_text(' '.join(os.environ[n] for n in names))"
    )
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "6,7"}
    outcome = launch([sys.executable, "-c", RANK + code], 2, backend="nccl", environ=environ)
    assert outcome == Outcome(0)
    told = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert [parts[:3] for parts in told] == [["127.0.0.1", "2", "6"], ["127.0.0.1", "2", "7"]]
    assert told[0][3] == told[1][3]
