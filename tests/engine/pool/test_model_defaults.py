"""Model defaults in a package."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter

from modelpack_engine.models.files import ModelFiles
from modelpack_server.conversation.served_model import Preface
from modelpack_server.pool.model_defaults import (
    ANNOTATION,
    ModelDefaults,
    as_options,
    sampling_of_files,
)

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "own"}


def test_it_is_read_as_it_was_written() -> None:
    made = ModelDefaults({"temperature": 0.5, "stop": ["a"]}, "be brief", (USER,))
    assert ModelDefaults.of(made.annotation()) == made
    assert made.sampling() == {"temperature": 0.5, "stop": ("a",)}
    assert ModelDefaults().annotation() == {}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"parameters": [], "system": 1, "messages": {}}',
        '{"messages": [1, {}, {"role": "user"}, {"role": 1, "content": "x"}]}',
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_ignored(text: str) -> None:
    assert ModelDefaults.of({ANNOTATION: text}) == ModelDefaults()


def gguf_files(path: Path, generation: str | None = None, **sampling: float) -> ModelFiles:
    writer = GGUFWriter(path, "llama")
    for key, value in sampling.items():
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    archived = {} if generation is None else {"generation_config.json": generation.encode()}
    return ModelFiles((path,), "gguf", archived=archived)


def test_sampling_defaults_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert sampling_of_files(gguf_files(path)) == {"temperature": 0.7}
    given = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1}
    found = sampling_of_files(gguf_files(path, **given))
    assert found == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    }  # fmt: skip
    assert as_options(found)["repeat_penalty"] == 1.1
    both = sampling_of_files(gguf_files(path, '{"temperature": 0.3}', **given))
    assert (both["temperature"], both["top_k"]) == (0.3, 20)


def test_sampling_defaults_of_safetensors() -> None:
    def found(generation: bytes) -> dict[str, object]:
        archived = {"generation_config.json": generation}
        return sampling_of_files(ModelFiles((), "safetensors", archived=archived))

    assert sampling_of_files(ModelFiles((), "safetensors")) == {"temperature": 0.7}
    assert found(b'{"top_k": 5}') == {"temperature": 0.7, "top_k": 5}
    assert found(b'{"temperature": 1.2}') == {"temperature": 1.2}
    assert found(b'{"do_sample": false}') == {"temperature": 0.0}


def test_parameters_that_make_no_sense_are_ignored() -> None:
    assert ModelDefaults({"temperature": "hot"}).sampling() == {}


def test_what_comes_before_a_conversation() -> None:
    preface = Preface("theirs", (USER, USER))
    system = {"role": "system", "content": "theirs"}
    assert preface.before([USER]) == [system, USER, USER, USER]
    assert preface.before([SYSTEM, USER]) == [SYSTEM, USER, USER, USER]
    assert Preface().before([USER]) == [USER]
