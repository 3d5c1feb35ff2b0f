"""Errors name options as they are typed, and suggest similar commands and models."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.errors import ModelpackError
from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("pul", "'pull'"), ("pusch", "'push'"), ("isnpect", "'inspect'"), ("serv", "'serve'"),
     ("unpak", "'unpack'")],
)  # fmt: skip
def test_commands(typed: str, meant: str) -> None:
    failed = modelpack(typed)
    assert failed.code == 2
    assert f"No such command {typed!r}. Did you mean {meant}" in failed.err


def test_nothing_is_like_it() -> None:
    assert "Did you mean" not in modelpack("xyzzy").err


@pytest.mark.parametrize("command", ["inspect", "resolve", "rm", "push"])
def test_models(command: str, tmp_path: Path) -> None:
    succeed("package", "--gguf", tiny_gguf(tmp_path), "assistant")
    succeed("tag", "assistant", "registry.example/team/translator:v1")
    failed = modelpack(command, "asistant")
    assert failed.code == 3
    assert "did you mean docker.io/ai/assistant:latest?" in failed.err
    other = modelpack(command, "translater:v1")
    assert "did you mean registry.example/team/translator:v1?" in other.err
    assert "did you mean docker.io/ai/assistant:latest?" in modelpack(command, "assistant:v9").err
    assert "modelpack list" in modelpack(command, "weather").err


def test_the_path_comes_before_the_name(tmp_path: Path) -> None:
    weights = tiny_gguf(tmp_path, "a b.gguf")
    failed = modelpack("package", "team/model:v1", str(weights))
    assert failed.code == 3
    assert f"modelpack package '{weights}' team/model:v1" in failed.err
    assert f"modelpack package '{weights}' NAME" in modelpack("package", str(weights)).err


def test_options_are_named_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelpackError(
            "context_size is 9, but x/context_size and max_context_size are files",
            hint="lower context_size (chat_template) or max_model_len",
        )

    monkeypatch.setattr("modelpack.cli.package.package_model", fail)
    words = ["package", "--gguf", "x.gguf", "x:v1"]
    for result in (modelpack(*words), modelpack(*words, "--json")):
        assert "--context-size is 9, but x/context_size and max_context_size are" in result.err
        assert "lower --context-size (--chat-template) or --context-size" in result.err
