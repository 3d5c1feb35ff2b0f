"""The program that runs the zoo on a GPU, run on the CPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from modelpack_engine.attention.paged import PagedKV
from tests.engine.zoo import on_gpu, specimen


@pytest.mark.long
def test_what_is_right_is_said_to_be(capsys: pytest.CaptureFixture[str], uncompiled: None) -> None:
    assert on_gpu.main(["llama", "qwen3_moe"]) == 0
    out = capsys.readouterr().out
    assert "llama: equal" in out
    assert "2 of 2 architectures are right" in out


@pytest.mark.long
def test_what_is_wrong_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uncompiled: None
) -> None:
    positions = property(lambda self: mx.maximum(self.step.positions * 2, 0))
    monkeypatch.setattr(PagedKV, "offset", positions)
    monkeypatch.setattr(specimen, "make_runner", _untested)
    assert on_gpu.main(["llama"]) == 1
    assert "llama: WRONG; " in capsys.readouterr().out


def _untested(*args: object, **kwargs: object) -> object:
    from modelpack_engine.runner.model_runner import make_runner

    return make_runner(*args, **kwargs, self_test=False)  # type: ignore[arg-type]


def test_a_name_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main(["llama", "lama"]) == 2
    assert "not in the zoo: lama" in capsys.readouterr().err
