"""Batches go on after a stop, a kill or a fault, and send no request twice that has ended."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from modelpack_server.api.openai import batch_runner
from tests.engine.families.batches.served import Desk, client_of, desk, row
from tests.engine.families.served import TurnsEngine
from tests.scenarios.processes import wait_until

COUNT = 40


def half_done(api: Desk) -> str:
    """Begin a batch, and return its id when some of its requests have ended and others run."""
    batch = api.begin([row(f"r{i}") for i in range(COUNT)])
    wait_until(lambda: len(api.engine.requests) >= 20, "half of the requests")
    api.hold()
    wait_until(lambda: api.running() == batch_runner.MAX_IN_FLIGHT, "requests that are held")
    return batch.id


def test_a_server_that_is_started_again_goes_on(tmp_path: Path) -> None:
    with desk(tmp_path) as first:
        first.engine.pieces = ["a"] + ["b"] * 20
        name = half_done(first)
        before = first.prompts()
        start = time.monotonic()
    assert time.monotonic() - start < 20, "requests of a batch delay the end"
    lines = (tmp_path / "batches" / f"{name}.out").read_text().splitlines()
    ended = {json.loads(line)["custom_id"] for line in lines}
    assert 0 < len(ended) < COUNT
    assert ended <= set(before)
    with desk(tmp_path) as second:
        batch = second.ended(second.client.batches.retrieve(name))
        assert batch.status == "completed"
        assert second.rows(batch.output_file_id).keys() == {f"r{i}" for i in range(COUNT)}
        assert batch.request_counts is not None
        assert batch.request_counts.completed == COUNT
        rows = second.rows(batch.output_file_id).values()
        assert batch.usage is not None
        assert batch.usage.total_tokens == sum(
            each["response"]["body"]["usage"]["total_tokens"] for each in rows
        )
        again = second.prompts()
        assert len(again) == len(set(again))
        assert set(again) == {f"r{i}" for i in range(COUNT)} - ended, "ended requests are repeated"
    with desk(tmp_path) as third:
        assert third.client.batches.retrieve(name) == batch
        assert third.rows(batch.output_file_id).keys() == {f"r{i}" for i in range(COUNT)}
    assert {path.suffix for path in (tmp_path / "batches").iterdir()} == {".json"}


def test_a_half_written_line_did_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with desk(tmp_path) as first:
        name = half_done(first)
    path = tmp_path / "batches" / f"{name}.out"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    with caplog.at_level(logging.WARNING), desk(tmp_path) as second:
        batch = second.ended(second.client.batches.retrieve(name))
        assert second.rows(batch.output_file_id).keys() == {f"r{i}" for i in range(COUNT)}
        assert json.loads(lines[-1])["custom_id"] in second.prompts()
    assert "not complete" in caplog.text


def test_cancelling_goes_on_too(tmp_path: Path) -> None:
    with desk(tmp_path) as first:
        name = half_done(first)
    path = tmp_path / "batches" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "cancelling"}))
    with desk(tmp_path) as second:
        batch = second.ended(second.client.batches.retrieve(name))
        assert batch.status == "cancelled"
        assert second.prompts() == []
        rows = second.rows(batch.output_file_id) | second.rows(batch.error_file_id)
        assert len(rows) == COUNT


@pytest.mark.sample(1)
@pytest.mark.parametrize("text", ["{", "[]", '{"id": "batch_x"}'])
def test_a_batch_that_cannot_be_read_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    with desk(tmp_path) as first:
        good = first.ended(first.begin([row("a")]))
        bad = first.ended(first.begin([row("a")]))
    (tmp_path / "batches" / f"{bad.id}.json").write_text(text)
    (tmp_path / "batches" / "batch_x.in").touch()
    with caplog.at_level(logging.WARNING), desk(tmp_path) as second:
        assert list(second.client.batches.list()) == [good]
    assert bad.id in caplog.text
    assert [path.stem for path in (tmp_path / "batches").iterdir()] == [good.id]


def serve(directory: Path, sender: Connection) -> None:
    """Serve in a process of its own, slowly."""
    engine = TurnsEngine(["a"] + ["b"] * 200)
    engine.turns = []
    with desk(directory, engine=engine) as api:
        sender.send(api.url)
        signal.pause()


@pytest.mark.long
def test_a_killed_server_goes_on(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    name, count = "", 400

    def lines() -> int:
        out = tmp_path / "batches" / f"{name}.out"
        return out.read_bytes().count(b"\n") if out.exists() else 0

    for kill in range(6):
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=serve, args=(tmp_path, sender), daemon=True)
        process.start()
        try:
            assert receiver.poll(60)
            with client_of(receiver.recv()) as client:
                if not name:
                    api = Desk(client, str(client.base_url), TurnsEngine())
                    name = api.begin([row(f"r{i}") for i in range(count)]).id
            wait_until(lambda least=30 * kill + 10: lines() >= least, "more lines", 60)  # type: ignore[misc]
        finally:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    assert lines() < count, "it was killed when all had ended"
    with desk(tmp_path) as last:
        batch = last.ended(last.client.batches.retrieve(name))
        assert batch.status == "completed"
        assert last.rows(batch.output_file_id).keys() == {f"r{i}" for i in range(count)}
        assert len(last.prompts()) < count - 100
