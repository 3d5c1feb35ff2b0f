"""Scenarios that need whole processes: killed, interrupted, measured."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.store.downloads import SAVE
from tests.models import tiny_gguf
from tests.registry.faulty import Exchange, FaultyRegistry, Reply
from tests.scenarios.processes import (
    finish,
    run,
    run_measured,
    staged_bytes,
    start,
    wait_until,
)
from tests.weights import sparse_safetensors, write_safetensors

pytestmark = pytest.mark.long

MIB = 1024 * 1024


def publish(registry: FaultyRegistry, files: Path, tmp_path: Path) -> tuple[str, Manifest]:
    """Put a packaged directory into the registry; return its reference and manifest."""
    reference = f"{registry.host}/team/model:v1"
    store = modelpack.Store(tmp_path / "origin")
    request = modelpack.PackageRequest(safetensors_dir=files)
    made = modelpack.package(reference, request, push=True, store=store)
    registry.requests.clear()
    return reference, made.manifest


def asked_bytes(value: str, size: int) -> int:
    """Return how many bytes of `size` a Range header asks for."""
    first, last = value.removeprefix("bytes=").split("-")
    return (int(last) + 1 if last else size) - int(first)


@pytest.mark.scenario(1)
def test_a_killed_pull_resumes(tmp_path: Path) -> None:
    """kill -9 at 60 % of a pull: the next one fetches the rest only."""
    size = 40 * MIB
    files = tmp_path / "model"
    write_safetensors(files / "model.safetensors", os.urandom(size))
    store = tmp_path / "store"
    with FaultyRegistry() as registry:
        reference, manifest = publish(registry, files, tmp_path)
        [blob] = [layer for layer in manifest.layers if layer.size > MIB]

        def stall_at_60_percent(exchange: Exchange) -> None:
            reply = exchange.reply()
            body, headers = reply.body, {"Content-Length": str(len(reply.body))}
            exchange.send(Reply(reply.status, reply.headers | headers, body[: size * 6 // 10]))
            exchange.keep_silent()

        path = f"/blobs/{blob.digest}"
        registry.faults.add("GET", path, stall_at_60_percent)
        process = start("--store", store, "pull", reference)
        wait_until(lambda: staged_bytes(store) > size * 55 // 100, "60 % of the blob")
        process.kill()
        assert finish(process).code == -signal.SIGKILL
        kept = staged_bytes(store)
        assert not list(store.glob(f"blobs/sha256/{blob.digest.encoded}"))
        assert run("--store", store, "list", "-q").out == ""

        before = registry.seen("GET", path)
        assert "range" not in before[0].headers
        again = run("--store", store, "pull", reference)
        assert again.code == 0, again.err
        rest = registry.seen("GET", path)[len(before) :]
        asked = [asked_bytes(exchange.headers["range"], blob.size) for exchange in rest]
        # Where one connection is slow there are several, and a journal of what each has brought.
        assert 0 < sum(asked) < blob.size - kept + SAVE + MIB
    stored = store / "blobs" / "sha256" / blob.digest.encoded
    assert Digest.of(stored.read_bytes()) == blob.digest
    assert staged_bytes(store) == 0


@pytest.mark.scenario(35)
def test_an_interrupted_push_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C during an upload: it is cancelled by DELETE, exit code 130, the tag is unchanged."""
    files = tmp_path / "model"
    write_safetensors(files / "model.safetensors", os.urandom(8 * MIB))
    with FaultyRegistry() as registry:
        reference, before = publish(registry, files, tmp_path)
        other = tmp_path / "other"
        write_safetensors(other / "model.safetensors", os.urandom(8 * MIB))
        store = tmp_path / "store"
        packaged = run("--store", store, "package", "--safetensors-dir", other, reference)
        assert packaged.code == 0, packaged.err

        uploading = threading.Event()

        def stall(exchange: Exchange) -> None:
            exchange.receive(MIB)
            uploading.set()
            exchange.keep_silent()

        registry.faults.add("PUT", "/blobs/uploads/.*digest=", stall, times=None)
        process = start("--store", store, "push", reference)
        assert uploading.wait(30)
        process.send_signal(signal.SIGINT)
        ended = finish(process)
        assert ended.code == 130
        assert "Traceback" not in ended.err
        assert registry.count("DELETE", "/blobs/uploads/") >= 1
        assert registry.count("PUT", "/manifests/") == 0
        registry.faults.clear()
        now = modelpack.inspect(reference, from_registry=True)
        assert now.digest == before.digest


@pytest.mark.parametrize(
    "size", [10**9, pytest.param(8 * 10**9, marks=pytest.mark.long)], ids=["1GB", "8GB"]
)
@pytest.mark.scenario(28)
def test_gigabytes_in_constant_memory(tmp_path: Path, size: int) -> None:
    """A sparse blob: one PUT, under 100 MB of memory, and nothing sent the second time."""
    files = tmp_path / "model"
    sparse_safetensors(files / "model.safetensors", size)
    store = tmp_path / "store"
    received: dict[str, int] = {}

    def swallow(exchange: Exchange) -> None:
        digest = exchange.query["digest"][0]
        while exchange._unread:
            exchange.receive(min(exchange._unread, 4 * MIB))
            exchange.body = b""
        received[digest] = exchange.length
        exchange.send(Reply(201, {"Location": f"/v2/team/model/blobs/{digest}"}))

    def known(exchange: Exchange) -> None:
        digest = exchange.path.rpartition("/")[2]
        there = digest in received
        length = {"Content-Length": str(received.get(digest, 0))}
        exchange.send(Reply(200 if there else 404, length if there else {}))

    with FaultyRegistry() as registry:
        reference = f"{registry.host}/team/model:v1"
        figures = tmp_path / "figures"
        made = run_measured(
            figures, "--store", store, "package", "--link", "--safetensors-dir", files, reference
        )
        assert made.code == 0, made.err
        registry.faults.add("PUT", "/blobs/uploads/.*digest=", swallow, times=None)
        registry.faults.add("HEAD", "/blobs/", known, times=None)
        registry.faults.add("PUT", "/manifests/", lambda e: e.send(accepted(e)), times=None)
        pushed = run_measured(figures, "--store", store, "push", reference)
        assert pushed.code == 0, pushed.err
        assert pushed.peak < 100 * 10**6
        assert made.peak < 80 * 10**6
        big = [r for r in registry.seen("PUT", "/blobs/uploads/") if r.body_size > size]
        assert len(big) == 1
        assert registry.count("PATCH") == 0

        registry.requests.clear()
        again = run("--store", store, "push", reference)
        assert again.code == 0, again.err
        assert registry.count("POST") == registry.count("PUT", "/blobs/") == 0


def accepted(exchange: Exchange) -> Reply:
    """A registry that takes any manifest."""
    exchange.receive()
    return Reply(201, {"Docker-Content-Digest": str(Digest.of(exchange.body))})


@pytest.mark.scenario(30)
def test_a_file_that_changes_is_not_packaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that grows after its header was read is refused, and no model appears."""
    from modelpack.operations import package

    gguf = tiny_gguf(tmp_path)
    store = modelpack.Store(tmp_path / "store")
    planned = package.plan

    def plan_then_change(request: modelpack.PackageRequest) -> object:
        made = planned(request)
        gguf.write_bytes(gguf.read_bytes() + b"\0" * 32)
        return made

    monkeypatch.setattr(package, "plan", plan_then_change)
    with pytest.raises(modelpack.errors.SourceChangedError, match=r"tiny\.gguf"):
        modelpack.package("team/tiny:v1", modelpack.PackageRequest(gguf=gguf), store=store)
    assert store.models() == ()
