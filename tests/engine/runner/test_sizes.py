"""The length limit of requests, and settings from the environment and from packages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError, OutOfMemoryError
from modelpack_engine.models import ModelFiles
from modelpack_engine.platform.environment import memory_fraction, uses_paged_attention
from modelpack_server import stored_models
from tests.engine.serving.tiny import CONTEXT, tiny_engine, tiny_loaded

FRACTION, PAGED = "VLLM_METAL_MEMORY_FRACTION", "VLLM_METAL_USE_PAGED_ATTENTION"


@pytest.mark.parametrize(
    ("packaged", "asked", "expected"),
    [
        (None, None, CONTEXT),
        (100, None, 100),
        (100, 50, 50),
        (100, 200, 200),  # the user's value overrides the package's
        (CONTEXT * 4, None, CONTEXT),  # limited by the model's context
        (0, None, CONTEXT),
        (-1, None, CONTEXT),
    ],
)
def test_the_packaged_context_size_is_the_default(
    packaged: int | None, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_models, "load", lambda *_, **__: tiny_loaded())
    model: Any = SimpleNamespace(digest="sha256:0", config=SimpleNamespace(context_size=packaged))
    opened = stored_models.Opened(model, ModelFiles((), "gguf"))
    engine = opened.engine(EngineConfig(max_model_len=asked, max_num_seqs=2, device="cpu"))
    assert engine.max_model_len == expected


def test_a_packaged_size_beyond_the_memory_is_no_error() -> None:
    """Only a length that the user has configured must fit."""
    small: dict[str, Any] = {"kv_cache_bytes": 5 * 16 * 512, "max_num_seqs": 2}
    assert tiny_engine(default_model_len=200, **small).max_model_len < 200
    with pytest.raises(OutOfMemoryError, match="fewer than max_model_len 200"):
        tiny_engine(max_model_len=200, **small)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", None), ("AUTO", None), ("", None), ("0.5", 0.5), (" 1 ", 1.0), ("1e-1", 0.1)],
)
def test_memory_fraction(
    text: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FRACTION, text)
    assert memory_fraction() == expected


@pytest.mark.parametrize("text", ["0", "-0.5", "1.01", "90", "nan", "inf", "half", "0,5"])
def test_a_wrong_memory_fraction_stops_the_start(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU as well, and on a GPU with or without a configured KV cache size."""
    monkeypatch.setenv(FRACTION, text)
    with pytest.raises(EngineError, match=FRACTION):
        tiny_engine()


@pytest.mark.parametrize(
    ("text", "expected"),
    [(text, True) for text in ("", "1", "true", "ON", "yes")]
    + [(text, False) for text in ("0", "false", "Off", "no")],
)
def test_paged_attention(text: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PAGED, text)
    assert uses_paged_attention() is expected
    if text in ("0", "1"):
        assert (tiny_engine()._runner.tier != "fallback") is expected


@pytest.mark.parametrize("text", ["2", "-1", "paged", "auto"])
def test_a_wrong_switch_stops_the_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PAGED, text)
    with pytest.raises(EngineError, match=PAGED):
        tiny_engine()


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_wrong_share_stops_the_start(share: float) -> None:
    with pytest.raises(EngineError, match="gpu_memory_utilization"):
        tiny_engine(gpu_memory_utilization=share)
