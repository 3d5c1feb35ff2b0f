"""A copy between two registries, where both lose their connections in the middle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.weights import write_safetensors

SIZE = 6_000_000


def test_a_copy_goes_on_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the target has is not sent again; what came since a checkpoint is read again."""
    monkeypatch.setattr("modelpack.registry.blob_upload.CHECKPOINT", 1024 * 1024)
    write_safetensors(tmp_path / "model" / "model.safetensors", os.urandom(SIZE))
    with FaultyRegistry() as origin, FaultyRegistry() as target:
        source, copied = f"{origin.host}/team/model:v1", f"{target.host}/other/model:v2"
        request = modelpack.PackageRequest(safetensors_dir=tmp_path / "model")
        store = modelpack.Store(tmp_path / "store")
        made = modelpack.package(source, request, push=True, store=store)
        [weights] = [layer for layer in made.manifest.layers if layer.size > SIZE // 2]
        origin.requests.clear()
        origin.faults.add("GET", f"/blobs/{weights.digest}", faults.cut_after(2_000_000))
        target.faults.add("PUT", str(weights.digest), faults.kept_upload(4_000_000))

        done = modelpack.copy(source, copied)
        assert done.digest == made.manifest.digest
        assert target.blob(weights.digest, "other/model") is not None
        assert Digest.of(target.blob(weights.digest, "other/model") or b"") == weights.digest
        sent = [
            request.body_size
            for request in target.seen("PUT", "/blobs/uploads/")
            if str(weights.digest) in request.query["digest"]
        ]
        assert sent == [4_000_000, weights.size - 4_000_000]
        starts = [
            int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            for request in origin.seen("GET", f"/blobs/{weights.digest}")
        ]
        assert starts == [0, 2_000_000, 3 * 1024 * 1024]
        assert target.open_uploads == []
