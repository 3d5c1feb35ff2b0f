"""The routes below /v1/files, with OpenAI's own client, and the files on disk."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.exceptions import HTTPException

from modelpack.errors import LockedError
from modelpack_engine.errors import QueueFullError, RequestError
from modelpack_server.api.openai import files, stored_files
from modelpack_server.api.openai.stored_files import StoredFile, StoredFiles
from tests.engine.families.batches.served import Desk, desk


def test_a_file_is_stored_read_and_deleted(api: Desk) -> None:
    content = bytes(range(256)) * 10_000
    made = api.upload(content, "user_data")
    assert (made.bytes, made.filename, made.purpose) == (len(content), "in.jsonl", "user_data")
    assert made.object == "file"
    assert made.expires_at == made.created_at + 30 * 86400
    assert api.client.files.retrieve(made.id) == made
    assert api.client.files.content(made.id).read() == content
    assert api.client.files.delete(made.id).deleted
    for call in (api.client.files.retrieve, api.client.files.content, api.client.files.delete):
        with pytest.raises(openai.NotFoundError, match="no such file"):
            call(made.id)
    assert list(api.client.files.list()) == []


def test_lists_have_pages(api: Desk) -> None:
    made = [api.upload(b"%d" % i, "batch" if i % 2 else "evals").id for i in range(5)]
    assert [each.id for each in api.client.files.list()] == made[::-1]
    assert [each.id for each in api.client.files.list(order="asc", limit=2)] == made
    assert [each.id for each in api.client.files.list(purpose="batch")] == [made[3], made[1]]
    first = api.client.files.list(limit=2, after=made[4])
    assert [each.id for each in first.data] == [made[3], made[2]]
    assert first.has_more
    with pytest.raises(openai.BadRequestError, match="no such object"):
        api.client.files.list(after="file-none")


def test_the_docker_paths_have_the_same_files(api: Desk) -> None:
    made = api.upload(b"x", "batch")
    for prefix in ("/engines/v1", "/engines/llama.cpp/v1"):
        assert httpx.get(f"{api.url}{prefix}/files/{made.id}").json()["id"] == made.id


def test_a_name_is_no_path(api: Desk) -> None:
    made = api.client.files.create(file=("../../a\\b\x01.jsonl", b"x"), purpose="batch")
    assert "/" not in made.filename
    assert "\\" not in made.filename
    reply = httpx.get(f"{api.url}/v1/files/{made.id}/content")
    assert reply.headers["content-disposition"].startswith("attachment")
    assert reply.headers["content-type"] == "application/octet-stream"


def test_a_file_may_expire_early(api: Desk) -> None:
    made = api.upload(b"x", expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600


FILE = {"file": ("a", b"x")}
HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n'


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"files": FILE}, "purpose", "purpose is missing"),
        ({"files": FILE, "data": {"purpose": "other"}}, "purpose", "purpose is 'other'"),
        ({"files": {"a": (None, "x")}, "data": {"purpose": "batch"}}, "file", "file is required"),
        ({"files": {"other": ("a", b"x")}}, "file", "expected one file"),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, "file", "expected one file"),
        ({"json": {"purpose": "batch"}}, "file", "multipart/form-data"),
        ({"files": FILE, "data": {"purpose": "x" * 5000}}, "purpose", "too long"),
        ({"files": FILE, "data": {str(i): "x" for i in range(20)}}, None, "more than 16 fields"),
        (
            {"files": FILE, "data": {"purpose": "batch", "expires_after[seconds]": "3600"}},
            "expires_after.anchor", "expected created_at",
        ),
        *(
            (
                {"files": FILE, "data": {"purpose": "batch", "expires_after[anchor]": "created_at",
                                         "expires_after[seconds]": seconds}},
                "expires_after.seconds", "expected 3600 to 2592000",
            )
            for seconds in ("3599", "2592001", "-1", "x", "٣٦٠٠", "9" * 50)
        ),
        ({"content": HEAD, "headers": {"content-type": "multipart/form-data; boundary=b"}},
         "file", "not complete"),
        ({"content": b"--c\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
         "file", "not valid"),
        ({"content": HEAD, "headers": {"content-type": "multipart/form-data"}},
         "file", "multipart/form-data"),
    ],
)  # fmt: skip
def test_what_is_refused(
    api: Desk, tmp_path: Path, given: dict[str, Any], param: str | None, message: str
) -> None:
    reply = httpx.post(f"{api.url}/v1/files", **given)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert list((tmp_path / "state" / "files").iterdir()) == [], "something is left"


def test_a_file_that_is_too_large(
    api: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    assert api.upload(b"x" * 1000).bytes == 1000
    with pytest.raises(openai.APIStatusError, match="the file exceeds 1000 bytes") as caught:
        api.upload(b"x" * 1001)
    assert caught.value.status_code == 413
    assert len(list((tmp_path / "state" / "files").iterdir())) == 2


def test_an_upload_that_stalls_is_given_up(
    api: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SLOW_START", 0.2)
    host, _, port = api.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as stalled:
        stalled.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + HEAD
        )
        assert stalled.recv(1000).startswith(b"HTTP/1.1 408")
    assert list((tmp_path / "state" / "files").iterdir()) == []


def test_few_uploads_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stalled upload holds memory: those of one owner leave room for others."""
    monkeypatch.setattr(stored_files, "MAX_OWNER_UPLOADS", 2)
    monkeypatch.setattr(stored_files, "MAX_UPLOADS", 3)
    store = StoredFiles(tmp_path)
    first, _ = store.upload("alice"), store.upload("alice")
    with pytest.raises(QueueFullError):
        store.upload("alice")
    store.upload("bob")
    with pytest.raises(QueueFullError):
        store.upload("carol")
    first.close()
    store.upload("carol")


def stored(store: StoredFiles, owner: str | None, content: bytes = b"x" * 10) -> StoredFile:
    upload = store.upload(owner)
    try:
        upload.write(content)
        return upload.finish(purpose="batch", filename="a", seconds=3600)
    finally:
        upload.close()


LIMITS: list[tuple[str, int, str]] = [
    ("MAX_OWNER_FILES", 2, "the limit of 2 stored files"),
    ("MAX_OWNER_BYTES", 25, "would exceed 25 bytes"),
]


@pytest.mark.parametrize(("limit", "value", "message"), LIMITS)
def test_an_owner_does_not_fill_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    monkeypatch.setattr(stored_files, limit, value)
    store = StoredFiles(tmp_path)
    first = stored(store, "alice")
    stored(store, "alice")
    for _ in range(3):
        with pytest.raises(RequestError, match=message):
            stored(store, "alice")
    stored(store, "bob")
    store.remove("alice", first.id)
    stored(store, "alice")
    assert len(list(store.folder.iterdir())) == 6


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_FILES", 2), ("MAX_BYTES", 25)]
)  # fmt: skip
def test_all_owners_together_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(stored_files, limit, value)
    store = StoredFiles(tmp_path)
    stored(store, "alice")
    stored(store, "bob")
    with pytest.raises(RequestError):
        stored(store, "carol")


def test_files_expire(tmp_path: Path) -> None:
    now = [1000.0]
    store = StoredFiles(tmp_path, clock=lambda: now[0])
    file = stored(store, None)
    now[0] += 3599
    assert store.find(None, file.id) == file
    now[0] += 1
    with pytest.raises(HTTPException):
        store.find(None, file.id)
    assert store.list(None) == []
    assert list(store.folder.iterdir()) == []


def test_files_survive_a_restart(tmp_path: Path) -> None:
    with desk(tmp_path) as first:
        made = first.upload(b"kept")
    with desk(tmp_path) as second:
        assert second.client.files.retrieve(made.id) == made
        assert second.client.files.content(made.id).read() == b"kept"


@pytest.mark.parametrize(
    "damage",
    [
        lambda base: base.with_suffix(".data").write_bytes(b"short"),
        lambda base: base.with_suffix(".data").unlink(),
        lambda base: base.with_suffix(".json").write_text('{"id": "file-'),
        lambda base: base.with_suffix(".json").write_text("[]"),
        lambda base: base.with_suffix(".json").write_text('{"id": "other"}'),
        lambda base: base.with_suffix(".json").write_text(
            json.dumps(json.loads(base.with_suffix(".json").read_text()) | {"id": "file-2"})
        ),
    ],
)
def test_incomplete_files_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    store = StoredFiles(tmp_path)
    file, other = stored(store, None), stored(store, None)
    store.close()
    damage(store.folder / file.id)
    (store.folder / "upload").touch()
    with caplog.at_level(logging.WARNING):
        assert StoredFiles(tmp_path).list(None) == [other]
    assert file.id in caplog.text
    assert "deleting the incomplete file" in caplog.text
    assert len(list(store.folder.iterdir())) == 2


def test_a_directory_belongs_to_one_server(tmp_path: Path) -> None:
    with desk(tmp_path) as first:
        made = first.upload(b"x")
        with desk(tmp_path) as second:
            with pytest.raises(openai.ConflictError, match="held by process"):
                second.upload(b"x")
            with pytest.raises(LockedError):
                StoredFiles(tmp_path).open()
    with desk(tmp_path) as third:
        assert third.client.files.retrieve(made.id) == made
