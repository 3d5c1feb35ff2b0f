"""The progress of a load: bytes read of all bytes, then warming up."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.models import ModelFiles, load, load_progress, precision
from modelpack_engine.models.load_progress import LoadProgress

pytestmark = pytest.mark.weights


@pytest.mark.long
def test_bytes_read_grow_to_all_bytes() -> None:
    path = smollm2_gguf()
    size = path.stat().st_size
    found: list[LoadProgress] = []
    load(ModelFiles.from_directory(path), device="cpu", progress=found.append)
    assert found[0] == LoadProgress(0, size)
    assert found[-1] == LoadProgress(size, size)
    completed = [each.completed for each in found]
    assert completed == sorted(set(completed))
    assert len(completed) > 10
    assert {each.total for each in found} == {size}
    load_progress.read(0.5)  # without a callback, as in any other load
    load_progress.warm_up()


def test_arrays_that_are_read_on_evaluation_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlx.nn as nn

    monkeypatch.setattr(precision, "_MEBIBYTE", 1)  # batches of 256 bytes
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(1000))
    found: list[LoadProgress] = []
    with load_progress.watched(found.append):
        load_progress.begin([weights])
        precision.evaluate(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))))
        load_progress.warm_up()
        load_progress.read(1)
    assert [each.completed for each in found] == [0, 500, 1000, 1000]
    assert [each.warming_up for each in found] == [False, False, False, True]
    with load_progress.watched(found.append):
        load_progress.begin([tmp_path / "missing"])  # the loader says so
    assert len(found) == 4
