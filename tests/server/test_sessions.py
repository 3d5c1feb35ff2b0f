"""Upload sessions without HTTP: order, disk errors, and the state after a restart."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.digest import ALGORITHMS, Digest
from modelpack.errors import DigestMismatchError, NotFoundError, StorageFullError
from modelpack.registry_server.uploads import (
    OutOfOrder,
    Superseded,
    UploadSession,
    UploadSessions,
)

NAME = "docker.io/a/b"


def publisher(published: dict[Digest, bytes]) -> Callable[[Path, Digest], None]:
    def publish(path: Path, digest: Digest) -> None:
        published[digest] = path.read_bytes()
        path.unlink()

    return publish


def append(session: UploadSession, content: bytes, start: int | None = None) -> None:
    writer = session.writer(start)
    try:
        writer.append(content)
    finally:
        writer.close()


def finish(session: UploadSession, digest: Digest) -> dict[Digest, bytes]:
    published: dict[Digest, bytes] = {}
    writer = session.writer(None, digest.algorithm)
    try:
        writer.finish(digest, publisher(published))
    finally:
        writer.close()
    return published


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.just("restart"), st.just("stale"))),
    st.sampled_from(ALGORITHMS),
    st.sampled_from(ALGORITHMS),
)
def test_any_history_gives_the_bytes_that_were_sent(
    history: list[bytes | str], announced: str, final: str
) -> None:
    with TemporaryDirectory() as directory:
        sessions = UploadSessions(Path(directory))
        name = sessions.create(NAME, announced).id
        sent = b""
        for event in history:
            session = sessions.get(NAME, name)
            if event == "restart":
                sessions = UploadSessions(Path(directory))
            elif event == "stale":
                with pytest.raises(OutOfOrder):
                    session.writer(len(sent) + 1)
            else:
                assert isinstance(event, bytes)
                append(session, event, len(sent))
                sent += event
                assert session.size == len(sent)
        digest = Digest.of(sent, final)
        assert finish(sessions.get(NAME, name), digest) == {digest: sent}
        assert os.listdir(directory) == []
        with pytest.raises(NotFoundError):
            sessions.get(NAME, name)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = UploadSessions(tmp_path).create(NAME, "sha256")
    append(session, b"abc")
    real = os.pwrite

    def full(descriptor: int, view: bytes, offset: int) -> int:
        real(descriptor, view[:1], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFullError):
        append(session, b"defg")
    monkeypatch.setattr(os, "pwrite", real)
    assert (tmp_path / session.id / "data").read_bytes() == b"abc"
    append(session, b"xyz", 3)
    digest = Digest.of(b"abcxyz")
    assert finish(session, digest) == {digest: b"abcxyz"}


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = UploadSessions(tmp_path).create(NAME, "sha256")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: real(fd, view[:2], offset))
    append(session, b"abcdefg")
    digest = Digest.of(b"abcdefg")
    assert finish(session, digest) == {digest: b"abcdefg"}


def test_bytes_that_changed_on_the_disk_are_noticed(tmp_path: Path) -> None:
    """Another server on the same store continued the session meanwhile."""
    sessions = UploadSessions(tmp_path)
    session = sessions.create(NAME, "sha256")
    append(session, b"abc")
    append(UploadSessions(tmp_path).get(NAME, session.id), b"def", 3)
    digest = Digest.of(b"abcdef")
    assert finish(session, digest) == {digest: b"abcdef"}


def test_only_the_last_writer_writes(tmp_path: Path) -> None:
    session = UploadSessions(tmp_path).create(NAME, "sha256")
    old, new = session.writer(None), session.writer(None)
    try:
        with pytest.raises(Superseded):
            old.append(b"old")
        with pytest.raises(Superseded):
            old.finish(Digest.of(b""), publisher({}))
        new.append(b"new")
        session.cancel()
        with pytest.raises(NotFoundError):
            new.append(b"more")
    finally:
        old.close()
        new.close()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_digest_ends_the_session(tmp_path: Path) -> None:
    session = UploadSessions(tmp_path).create(NAME, "sha256")
    append(session, b"abc")
    with pytest.raises(DigestMismatchError):
        finish(session, Digest.of(b"other"))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_keeps_the_session(tmp_path: Path) -> None:
    session = UploadSessions(tmp_path).create(NAME, "sha256")
    append(session, b"abc")
    writer = session.writer(None)

    def fail(_: Path, __: Digest) -> None:
        raise StorageFullError("no room for the name")

    with pytest.raises(StorageFullError):
        writer.finish(Digest.of(b"abc"), fail)
    writer.close()
    assert list(finish(session, Digest.of(b"abc")).values()) == [b"abc"]


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"repository":"docker.io/a/b"}', "\x00"])
def test_what_a_crash_left_half_made_is_no_session(tmp_path: Path, state: str) -> None:
    name = "12345678-1234-4234-8234-123456789abc"
    (tmp_path / name).mkdir()
    (tmp_path / name / "session.json").write_text(state)
    (tmp_path / name / "data").touch()
    with pytest.raises(NotFoundError):
        UploadSessions(tmp_path).get(NAME, name)


def test_names_of_sessions_are_paths_only_if_they_are_ids(tmp_path: Path) -> None:
    secret = {"repository": NAME, "algorithm": "sha256"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "session.json").write_text(json.dumps(secret))
    (tmp_path / "other" / "data").touch()
    sessions = UploadSessions(tmp_path / "uploads")
    for name in ("../other", "", ".", "12345678123442348234123456789abc", "{" + "0" * 32 + "}"):
        with pytest.raises(NotFoundError):
            sessions.get(NAME, name)
