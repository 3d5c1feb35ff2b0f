"""The routes below /v1/batches, with OpenAI's own client and a scripted model."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from modelpack.errors import StorageFullError
from modelpack_engine.async_engine import RequestStream
from modelpack_engine.errors import QueueFullError
from modelpack_engine.request import EngineRequest
from modelpack_server.api.openai import batch_input, batch_runner, stored_files
from modelpack_server.api.openai.batch_input import LineError, validate
from modelpack_server.api.openai.stored_batches import Sender
from modelpack_server.api.openai.stored_files import StoredFiles
from tests.engine.families.batches.served import CHAT, Desk, chat, desk, jsonl, row
from tests.engine.families.served import PLAIN, TurnsEngine
from tests.scenarios.processes import wait_until


def test_a_batch_from_upload_to_output(api: Desk) -> None:
    rows = [row(f"r{i}") for i in range(30)]
    rows[7]["body"]["model"] = "none"
    rows[8]["body"]["temperature"] = 99
    batch = api.begin(rows, metadata={"team": "a"})
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", CHAT, {"team": "a"})
    assert batch.expires_at == batch.created_at + 24 * 3600
    batch = api.ended(batch)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (30, 28, 2)
    assert batch.completed_at is not None
    assert batch.errors is None
    output, errors = api.rows(batch.output_file_id), api.rows(batch.error_file_id)
    assert output.keys() == {f"r{i}" for i in range(30)} - errors.keys()
    reply = output["r0"]["response"]
    assert (reply["status_code"], output["r0"]["error"]) == (200, None)
    assert reply["request_id"].startswith("req_")
    direct = httpx.post(f"{api.url}{CHAT}", json=chat("r0")).json()
    tokens = [each["response"]["body"]["usage"] for each in output.values()]
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in tokens)
    assert batch.usage.output_tokens == sum(each["completion_tokens"] for each in tokens)
    assert batch.usage.total_tokens == sum(each["total_tokens"] for each in tokens) > 0
    assert batch.usage.input_tokens_details.cached_tokens == 28
    kept = ("object", "model", "choices", "usage")
    assert {k: reply["body"][k] for k in kept} == {k: direct[k] for k in kept}
    assert {name: each["response"]["status_code"] for name, each in errors.items()} == {
        "r7": 404, "r8": 400
    }  # fmt: skip
    assert errors["r8"]["response"]["body"]["error"]["param"] == "temperature"
    assert batch.output_file_id is not None
    assert api.client.files.retrieve(batch.output_file_id).purpose == "batch_output"


@pytest.mark.parametrize(
    ("endpoint", "body", "status"),
    [
        ("/v1/completions", {"prompt": "hi", "n": 2}, 200),
        ("/v1/responses", {"input": "hi"}, 200),
        ("/v1/embeddings", {"input": "hi"}, 400),
    ],
)
def test_each_endpoint_replies_as_its_route(
    api: Desk, endpoint: str, body: dict[str, Any], status: int
) -> None:
    body = {"model": PLAIN} | body
    batch = api.ended(api.begin([row("a", body, url=endpoint)], endpoint))
    assert batch.status == "completed"
    assert batch.model == PLAIN
    rows = api.rows(batch.output_file_id) | api.rows(batch.error_file_id)
    reply = rows["a"]["response"]
    direct = httpx.post(api.url + endpoint, json=body)
    assert reply["status_code"] == direct.status_code == status
    assert reply["body"].keys() == direct.json().keys()


GOOD = json.dumps(row("good")).encode()
BAD: list[tuple[bytes, str, str | None]] = [
    (b"{", "invalid_json_line", None),
    (b"[" * 100_000, "invalid_json_line", None),
    (b"[]", "invalid_json_line", None),
    (b"\xff", "invalid_json_line", None),
    (GOOD, "duplicate_custom_id", "custom_id"),
    (json.dumps(row("a") | {"custom_id": None}).encode(), "invalid_request", "custom_id"),
    (json.dumps(row("")).encode(), "invalid_request", "custom_id"),
    (json.dumps(row("x" * 513)).encode(), "invalid_request", "custom_id"),
    (json.dumps(row("a", method="GET")).encode(), "invalid_request", "method"),
    (json.dumps(row("a", url="/v1/completions")).encode(), "url_mismatch", "url"),
    (json.dumps(row("a", url=None)).encode(), "url_mismatch", "url"),
    (json.dumps(row("a", "text")).encode(), "invalid_request", "body"),
    (json.dumps(row("a", {"messages": []})).encode(), "invalid_request", "body.model"),
    (json.dumps(row("a", chat("a", stream=True))).encode(), "invalid_request", "body.stream"),
    (
        json.dumps(row("a", chat("a", background=True))).encode(),
        "invalid_request",
        "body.background",
    ),
    (json.dumps(row("a", chat("x" * 5 * 2**20))).encode(), "invalid_request", None),
]


def test_lines_are_validated(api: Desk) -> None:
    """No request is sent if one line is not valid; the errors name all such lines."""
    batch = api.ended(api.begin(b"\n".join([GOOD, *(bad for bad, _, _ in BAD), b"", b" "])))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    found = [(e.line, e.code, e.param) for e in batch.errors.data or ()]
    assert found == [(i + 2, code, param) for i, (_, code, param) in enumerate(BAD)]
    assert all(e.message for e in batch.errors.data or ())
    assert api.engine.requests == []
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_files_without_requests_and_with_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\n  \n")
    assert [e.code for e in validate(path, CHAT).errors] == ["empty_batch"]
    path.write_bytes(jsonl([row(str(i)) for i in range(4)]))
    assert validate(path, CHAT, max_lines=4).errors == ()
    assert [e.code for e in validate(path, CHAT, max_lines=3).errors] == ["too_many_tasks"]
    path.write_bytes(b"{\n" * 1000)
    assert len(validate(path, CHAT).errors) == batch_input.MAX_ERRORS
    path.write_bytes(b"x" * (batch_input.MAX_LINE_BYTES * 3) + b"\n" + GOOD)
    first, second = batch_input.read_lines(path, CHAT)
    assert isinstance(first, LineError)
    assert second.number == 2 if not isinstance(second, LineError) else False


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"endpoint": "/v1/images/generations"}, 400, "endpoint"),
        ({"endpoint": None}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-none"}, 404, None),
        ({"input_file_id": 1}, 400, "input_file_id"),
        ({"input_file_id": "OTHER"}, 400, "input_file_id"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, 400,
         "output_expires_after.anchor"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400,
         "output_expires_after.seconds"),
    ],
)  # fmt: skip
def test_what_is_no_batch(
    api: Desk, change: dict[str, Any], status: int, param: str | None
) -> None:
    body = {"input_file_id": api.upload(GOOD).id, "endpoint": CHAT, "completion_window": "24h"}
    if change.get("input_file_id") == "OTHER":
        change = {"input_file_id": api.upload(GOOD, "user_data").id}
    reply = httpx.post(f"{api.url}/v1/batches", json=body | change)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
    assert list(api.client.batches.list()) == []


def test_lists_have_pages(api: Desk) -> None:
    made = [api.ended(api.begin([row("a")])).id for _ in range(5)]
    assert [each.id for each in api.client.batches.list(limit=2)] == made[::-1]
    page = api.client.batches.list(limit=2, after=made[3])
    assert [each.id for each in page.data] == [made[2], made[1]]
    for call in (api.client.batches.retrieve, api.client.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="no such batch"):
            call("batch_none")
    with pytest.raises(openai.ConflictError, match="status completed"):
        api.client.batches.cancel(made[0])


def test_a_cancelled_batch_keeps_what_ended(api: Desk) -> None:
    api.hold()
    batch = api.begin([row(f"r{i}") for i in range(30)])
    wait_until(lambda: api.running() == batch_runner.MAX_IN_FLIGHT, "requests in flight")
    api.release()
    wait_until(lambda: len(api.engine.requests) > 8, "the next requests")
    api.hold()
    assert api.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = api.ended(batch)
    assert batch.status == "cancelled"
    assert batch.cancelling_at is not None
    output, errors = api.rows(batch.output_file_id), api.rows(batch.error_file_id)
    assert len(output) >= 8
    assert output.keys() | errors.keys() == {f"r{i}" for i in range(30)}
    assert not output.keys() & errors.keys()
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (30, len(output), 0)
    wait_until(lambda: api.running() == 0, "the aborted requests to end")


def test_a_batch_expires(api: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "WINDOW", 0.2)
    api.hold()
    batch = api.ended(api.begin([row(f"r{i}") for i in range(10)]))
    assert batch.status == "expired"
    assert batch.expired_at is not None
    errors = api.rows(batch.error_file_id)
    assert len(errors) == 10
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}
    wait_until(lambda: api.running() == 0, "the aborted requests to end")


def test_the_input_may_be_deleted(api: Desk) -> None:
    api.hold()
    batch = api.begin([row(f"r{i}") for i in range(40)])
    wait_until(lambda: api.running() > 0, "requests in flight")
    api.client.files.delete(batch.input_file_id)
    api.release()
    batch = api.ended(batch)
    assert batch.status == "completed"
    assert len(api.rows(batch.output_file_id)) == 40


def test_few_requests_run_at_a_time_and_in_the_background(api: Desk) -> None:
    api.hold()
    batches = [api.begin([row(f"r{i}") for i in range(20)]) for _ in range(3)]
    wait_until(lambda: api.running() == batch_runner.MAX_IN_FLIGHT, "requests in flight")
    # A reply of one piece is not held back.
    assert httpx.post(f"{api.url}{CHAT}", json=chat("now", max_tokens=1)).status_code == 200
    requests = api.engine.requests
    assert len(requests) == batch_runner.MAX_IN_FLIGHT + 1, "a client's request goes past them"
    assert [each.background for each in requests] == [True] * batch_runner.MAX_IN_FLIGHT + [False]
    for batch in batches:
        api.client.batches.cancel(batch.id)
        api.ended(batch)


def test_unfinished_batches_are_limited(api: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "MAX_UNFINISHED", 2)
    api.hold()
    batches = [api.begin([row("a")]) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="limit of 2 unfinished batches"):
        api.begin([row("a")])
    api.client.batches.cancel(batches[0].id)
    api.ended(batches[0])
    api.client.batches.cancel(api.begin([row("a")]).id)


def test_the_output_is_limited(api: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended before is kept."""
    monkeypatch.setattr(batch_runner, "MAX_OUTPUT_BYTES", 3000)
    batch = api.ended(api.begin([row(f"r{i}") for i in range(100)]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [e.code for e in batch.errors.data or ()] == ["output_too_large"]
    assert 0 < len(api.rows(batch.output_file_id)) < 100


def test_a_full_disk_ends_a_batch(api: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replies so far are whole, and there to be read."""
    write_all, calls = batch_runner.write_all, []

    def write(descriptor: int, view: memoryview) -> None:
        calls.append(view)
        if len(calls) > 5:
            write_all(descriptor, view[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, view)

    monkeypatch.setattr(batch_runner, "write_all", write)
    batch = api.ended(api.begin([row(f"r{i}") for i in range(50)]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [e.code for e in batch.errors.data or ()] == ["storage_full"]
    assert len(api.rows(batch.output_file_id)) == 5


def test_a_disk_that_is_full_at_the_beginning_keeps_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would count them, nor delete them before the next start."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def create(files: StoredFiles) -> None:
        runner = batch_runner.BatchRunner(files)
        upload = files.upload(None)
        upload.write(jsonl([row("a")]))
        with monkeypatch.context() as broken:
            broken.setattr(stored_files, "write_document", full)
            with pytest.raises(StorageFullError):
                upload.finish(purpose="batch", filename="a", seconds=60)
        upload.close()
        assert list((tmp_path / "files").iterdir()) == []
        upload = files.upload(None)
        upload.write(jsonl([row("a")]))
        stored = upload.finish(purpose="batch", filename="a", seconds=60)
        upload.close()
        monkeypatch.setattr(batch_runner, "write_document", full)
        sender = Sender(None, None, [], "127.0.0.1")
        with pytest.raises(StorageFullError):
            await runner.create(sender, stored, endpoint=CHAT)
        assert list((tmp_path / "batches").iterdir()) == []
        assert await runner.list(None) == []

    files = StoredFiles(tmp_path)
    try:
        asyncio.run(create(files))
    finally:
        files.close()


def test_a_reply_is_limited(api: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "MAX_REPLY_BYTES", 100)
    batch = api.ended(api.begin([row("a")]))
    assert api.rows(batch.error_file_id)["a"]["error"]["code"] == "invalid_reply"


class FullEngine(TurnsEngine):
    """An engine whose queue is full for the first two requests."""

    refused = 0

    async def submit(self, request: EngineRequest) -> RequestStream:
        if self.refused < 2:
            self.refused += 1
            raise QueueFullError("the queue is full", retry_after=0.01)
        return await super().submit(request)


def test_requests_are_sent_again_when_a_limit_is_reached(tmp_path: Path) -> None:
    engine = FullEngine()
    engine.turns = []
    with desk(tmp_path, engine=engine) as api:
        batch = api.ended(api.begin([row("a")]))
        assert api.rows(batch.output_file_id)["a"]["response"]["status_code"] == 200
    assert engine.refused == 2


def test_a_server_without_a_directory_keeps_nothing() -> None:
    with desk(None) as api:
        batch = api.ended(api.begin([row("a")]))
        assert batch.status == "completed"
    with desk(None) as api:
        assert list(api.client.batches.list()) == []


def test_cancelling_at_once(api: Desk) -> None:
    """Whatever the state of a batch is by then, it ends, and its lines are all accounted for."""
    for _ in range(5):
        batch = api.begin([row(f"r{i}") for i in range(5)])
        try:
            api.client.batches.cancel(batch.id)
        except openai.ConflictError:
            assert api.ended(batch).status == "completed"
            continue
        batch = api.ended(batch)
        assert batch.status == "cancelled"
        total = batch.request_counts.total if batch.request_counts is not None else 0
        rows = api.rows(batch.output_file_id) | api.rows(batch.error_file_id)
        assert len(rows) == total


def test_a_batch_that_comes_with_the_end_is_not_begun(tmp_path: Path) -> None:
    """Python 3.11's `wait_for` drops a cancellation where what it waits for has just happened."""

    async def stopped_as_it_wakes() -> bool:
        runner = batch_runner.BatchRunner(StoredFiles(tmp_path / "none"))
        await runner.start()
        main = runner._main
        assert main is not None
        for _ in range(3):
            await asyncio.sleep(0)
        runner._wake.set()
        runner.interrupt()
        done, _ = await asyncio.wait({main}, timeout=1)
        await runner.stop()
        return main in done

    assert asyncio.run(stopped_as_it_wakes())
