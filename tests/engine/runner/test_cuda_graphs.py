"""The first model of a process decides whether MLX uses CUDA graphs."""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn
import pytest

from modelpack_engine.platform import cuda_graphs
from modelpack_engine.runner.model_runner import make_runner
from tests.engine.runner.models import tiny_llama
from tests.engine.runner.test_step import tiny_mamba


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_graphs, "_decided", False)
    monkeypatch.setenv(cuda_graphs.GRAPHS, "1")
    monkeypatch.delenv(cuda_graphs.GRAPHS)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("models", "value", "notes"),
    [
        (["llama"], None, [None]),
        (["mamba"], "0", [None]),
        (["llama", "mamba"], None, [None, "several times slower"]),
        (["mamba", "llama", "mamba"], "0", [None, "single requests are slower", None]),
    ],
)
def test_the_first_model_decides(
    models: list[str], value: str | None, notes: list[str | None]
) -> None:
    made = {"llama": tiny_llama, "mamba": tiny_mamba}
    for name, expected in zip(models, notes, strict=True):
        note = cuda_graphs.choose(made[name]())
        assert (note is None) == (expected is None)
        assert (expected or "") in (note or "")
        assert os.environ.get(cuda_graphs.GRAPHS) == value


@pytest.mark.usefixtures("on_cuda")
def test_what_the_environment_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_graphs.GRAPHS, "1")
    note = cuda_graphs.choose(tiny_mamba())
    assert note is not None
    assert "several times slower" in note
    assert os.environ[cuda_graphs.GRAPHS] == "1"


def test_nothing_changes_without_cuda() -> None:
    before = os.environ.get(cuda_graphs.GRAPHS)
    assert cuda_graphs.choose(tiny_mamba()) is None
    assert os.environ.get(cuda_graphs.GRAPHS) == before


def test_what_has_no_caches_is_not_recurrent() -> None:
    assert not cuda_graphs.recurrent_layers(nn.Linear(2, 2))


@pytest.mark.usefixtures("on_cuda")
def test_layers_that_compiled_steps_compute_keep_the_graphs() -> None:
    model = tiny_mamba()
    layers = cuda_graphs.recurrent_layers(model)
    assert layers > 0
    assert cuda_graphs.choose(model, layers) is None
    assert cuda_graphs.GRAPHS not in os.environ
    for number in (0, layers - 1):
        assert "several times slower" in (cuda_graphs.choose(model, number) or "")


@pytest.mark.usefixtures("on_cuda")
def test_steps_that_are_not_compiled_are_slow_with_graphs() -> None:
    notes = []
    for value in ("1", "0"):
        os.environ[cuda_graphs.GRAPHS] = value
        runner = make_runner(tiny_mamba(), num_blocks=16, exact=False, compiled=False)
        notes.append(cuda_graphs.SLOW in runner.notes)
        runner.undo()
    assert notes == [True, False]
