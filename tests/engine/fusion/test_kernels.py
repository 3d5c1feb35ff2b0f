"""The fused layers' kernels on an emulated GPU: alone, and as a model runs by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.attention.kernels import launch, probes, support
from modelpack_engine.fusion import kernels
from modelpack_engine.model_runner import ModelRunner
from tests.engine.kernels.onhost import Host
from tests.engine.runner.models import tiny_llama


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any]]:
    return tmp_path_factory.mktemp("fused"), {}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, compiled: tuple[Path, dict[Any, Any]]) -> Iterator[Host]:
    found = Host(*compiled)
    monkeypatch.setattr(support, "_verdicts", {})
    monkeypatch.setattr(launch, "_kernel", found.kernel)
    monkeypatch.setattr(launch, "backend", lambda: "metal")
    monkeypatch.setattr(probes, "_WIDTH", 4)
    monkeypatch.setattr(probes, "_SLOTS", 256)
    kernels.verdict.cache_clear()
    yield found
    kernels.verdict.cache_clear()


def test_the_texts_compute_what_mlx_does(host: Host) -> None:
    assert kernels.verdict(mx.float32) is None
    assert {body for body, _ in host.calls} == {
        "add_norm",
        "swiglu",
        "dequantise",
        "rotate",
        "rows",
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "wrong", "found"),
    [
        ("add_norm", ("squares / D", "squares / (D + 9)"), "norm"),
        ("swiglu", ("1.44269504f", "1.5f"), "SwiGLU"),
        ("dequantise", ("+ bias", "- bias"), "4 bits"),
        ("rotate", ("y * c", "y * s"), "queries"),
        ("rotate", ("head - HQ - HK", "0"), "values"),
        ("rotate", ("s = inverse[at + 1]", "s = inverse[at]"), "queries by a table"),
        ("rows", ("index[row]", "row"), "rows"),
    ],
)
def test_a_wrong_text_is_found(host: Host, body: str, wrong: tuple[str, str], found: str) -> None:
    host.break_by(lambda name, text: text.replace(*wrong) if name == body else text)
    verdict = kernels.verdict(mx.float32)
    assert verdict is not None
    assert verdict.startswith(found)


@pytest.mark.long
def test_a_model_runs_by_them(host: Host) -> None:
    model = tiny_llama(head_dim=32)
    runner = ModelRunner(model, num_blocks=8, exact=False, compiled=False)
    assert runner.notes == ()
    assert runner._adapted is not None
    assert set(runner._adapted.fused) == {"attention", "block", "MLP"}
    assert {"rotate", "add_norm", "swiglu", "decode", "rows"} <= {body for body, _ in host.calls}
