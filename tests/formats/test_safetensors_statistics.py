"""Statistics of safetensors files: exact ones, and Modelpack's improvements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelpack.errors import PackagingError
from modelpack.formats.statistics import safetensors_statistics
from tests.formats.builders import safetensors as build
from tests.formats.builders import safetensors_text
from tests.formats.vectors import CONFIG_JSON, MODEL_SAFETENSORS, VECTOR_D, as_config, put

BOTH = pytest.mark.parametrize("exact", [False, True])


def shard(tensors: dict[str, Any], metadata: dict[str, Any] | None = None) -> bytes:
    text, size = safetensors_text(tensors, metadata)
    return build(text, size)


FIRST = shard({"a": ("F16", [500], 1000)}, {"format": "pt", "tensor_count": "9"})
SECOND = shard({"b": ("F16", [1000], 2000)}, {"format": "mlx", "architecture": " gpt2 "})


class TestSafetensors:
    def test_all_files_count(self, tmp_path: Path) -> None:
        paths = [
            put(tmp_path, f"m-0000{at}-of-00002.safetensors", raw)
            for at, raw in ((1, FIRST), (2, SECOND))
        ]
        statistics = safetensors_statistics(paths)
        assert statistics.parameters == "1.50K"
        assert statistics.quantization == "F16"
        assert statistics.architecture == "gpt2"
        assert statistics.safetensors == {
            "architecture": " gpt2 ",
            "format": "pt",
            "tensor_count": "2",
        }
        assert statistics.size == f"{(len(FIRST) + len(SECOND)) / 1000:.2f}kB"
        exact = safetensors_statistics(paths, exact=True)
        assert (exact.parameters, exact.size) == ("500.00", statistics.size)
        assert exact.architecture == ""
        assert exact.safetensors == {"format": "pt", "tensor_count": "1"}
        with pytest.raises(PackagingError, match=r"missing m-00002-of-00002\.safetensors"):
            safetensors_statistics(paths[:1])

    @BOTH
    def test_quantization(self, tmp_path: Path, exact: bool) -> None:
        for tensors, expected in (
            ({}, "unknown"),
            ({"a": ("BF16", [1], 2)}, "BF16"),
            ({"a": ("BF16", [1], 2), "b": ("F32", [1], 4)}, "mixed"),
        ):
            path = put(tmp_path, "m.safetensors", shard(tensors))
            assert safetensors_statistics([path], exact=exact).quantization == expected

    def test_dtypes_of_all_files(self, tmp_path: Path) -> None:
        paths = [
            put(tmp_path, "a.safetensors", FIRST),
            put(tmp_path, "b.safetensors", shard({"b": ("F32", [1], 4)})),
        ]
        assert safetensors_statistics(paths).quantization == "mixed"
        assert safetensors_statistics(paths, exact=True).quantization == "F16"

    def test_the_same_weights_twice_count_once(self, tmp_path: Path) -> None:
        other = shard({"a": ("F32", [500], 2000), "c": ("F32", [10], 40)})
        paths = [
            put(tmp_path, "model.fp16.safetensors", FIRST),
            put(tmp_path, "model.safetensors", other),
            put(tmp_path, "vae/model.safetensors", FIRST),
        ]
        statistics = safetensors_statistics(paths)
        assert statistics.parameters == "1.01K"
        assert statistics.safetensors
        assert statistics.safetensors["tensor_count"] == "3"

    def test_an_index_says_which_files_count(self, tmp_path: Path) -> None:
        names = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
        paths = [put(tmp_path, "consolidated.safetensors", shard({"x": ("F16", [1500], 3000)}))]
        paths += [
            put(tmp_path, name, raw) for name, raw in zip(names, (FIRST, SECOND), strict=True)
        ]
        text = json.dumps({"weight_map": {"a": names[0], "b": names[1]}})
        put(tmp_path, "m.safetensors.index.json", text.encode())
        assert safetensors_statistics(paths).parameters == "1.50K"

    def test_long_metadata_is_left_out_and_said_so(self, tmp_path: Path) -> None:
        raw = shard({}, {"ss_tag_frequency": "x" * 70_000})
        path = put(tmp_path, "m.safetensors", raw)
        statistics = safetensors_statistics([path])
        assert statistics.safetensors == {"tensor_count": "0"}
        assert "ss_tag_frequency of 70000 characters" in statistics.notes[0]
        exact = safetensors_statistics([path], exact=True)
        assert exact.safetensors
        assert len(exact.safetensors["ss_tag_frequency"]) == 70_000

    @BOTH
    def test_metadata_that_is_no_text(self, tmp_path: Path, exact: bool) -> None:
        raw = shard({}, {"architecture": 1_000_000, "n": None})
        path = put(tmp_path, "m.safetensors", raw)
        statistics = safetensors_statistics([path], exact=exact)
        assert statistics.architecture == "1e+06"
        assert statistics.safetensors == {
            "architecture": "1e+06",
            "n": "<nil>",
            "tensor_count": "0",
        }


# config.json, exact context size, Modelpack's context size and architecture.
CONFIGS = [
    ("{}", None, None, ""),
    ('{"max_position_embeddings":512}', 512, 512, ""),
    ('{"n_positions":5,"n_ctx":4}', 4, 4, ""),
    ('{"max_position_embeddings":"512","model_max_length":9}', 9, 9, ""),
    ('{"max_position_embeddings":512.0}', None, None, ""),
    ('{"max_position_embeddings":true,"n_ctx":null,"n_positions":0}', None, None, ""),
    ('{"max_position_embeddings":2147483648,"max_length":2147483647}', 2**31 - 1, 2**31 - 1, ""),
    ('{"n_ctx":-1,"max_sequence_length":6}', 6, 6, ""),
    ('{"N_CTX":4}', None, None, ""),
    ('{"n_ctx":3,"n_ctx":4}', 4, 4, ""),
    ("[1]", None, None, ""),
    ('{"n_ctx":3', None, None, ""),
    ('{"n_ctx":3,"limit":Infinity}', None, 3, ""),
    ("[" * 100_000, None, None, ""),
    ('{"model_type":" qwen2 ","architectures":["Qwen2ForCausalLM"]}', None, None, "qwen2"),
    ('{"architectures":["MyModel","Other"]}', None, None, "MyModel"),
    ('{"architectures":[],"model_type":7}', None, None, ""),
    ('{"text_config":{"model_type":"llama","n_ctx":8}}', None, 8, "llama"),
    ('{"model_type":"gemma3","text_config":{"model_type":"gemma3_text"}}', None, None, "gemma3"),
    ('{"max_length":20,"text_config":{"max_position_embeddings":8192}}', 20, 8192, ""),
    ('{"n_ctx":5,"text_config":{"n_ctx":6}}', 5, 5, ""),
    ('{"llm_config":{"n_ctx":7},"text_config":[]}', None, 7, ""),
]


@pytest.mark.parametrize(("text", "exact", "ours", "architecture"), CONFIGS)
def test_config_json(
    tmp_path: Path, text: str, exact: int | None, ours: int | None, architecture: str
) -> None:
    path = put(tmp_path, "model.safetensors", FIRST)
    put(tmp_path, "config.json", text.encode())
    statistics = safetensors_statistics([path])
    assert (statistics.context_size, statistics.architecture) == (ours, architecture)
    strict = safetensors_statistics([path], exact=True)
    assert (strict.context_size, strict.architecture) == (exact, "")


def test_a_config_json_that_does_not_parse_is_noted(tmp_path: Path) -> None:
    path = put(tmp_path, "model.safetensors", FIRST)
    put(tmp_path, "config.json", b"version https://git-lfs.github.com/spec/v1\n")
    (note,) = safetensors_statistics([path]).notes
    assert note.startswith(f"{tmp_path / 'config.json'} does not parse (Expecting value")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    (note,) = safetensors_statistics([path]).notes
    assert "is a directory" in note
    assert safetensors_statistics([path], exact=True).context_size is None


def test_metadata_of_the_weights_wins_over_config_json(tmp_path: Path) -> None:
    path = put(tmp_path, "model.safetensors", SECOND)
    put(tmp_path, "config.json", b'{"model_type":"llama"}')
    assert safetensors_statistics([path]).architecture == "gpt2"


def test_which_config_json(tmp_path: Path) -> None:
    paths = [
        put(tmp_path, "2_Dense/model.safetensors", FIRST),
        put(tmp_path, "model.safetensors", SECOND),
    ]
    put(tmp_path, "2_Dense/config.json", b'{"n_ctx":1}')
    put(tmp_path, "config.json", b'{"n_ctx":2}')
    assert safetensors_statistics(paths).context_size == 2
    assert safetensors_statistics(paths, exact=True).context_size == 1
    given = put(tmp_path, "elsewhere.json", b'{"n_ctx":3}')
    assert safetensors_statistics(paths, config_json=given).context_size == 3
    (tmp_path / "2_Dense" / "config.json").unlink()
    assert safetensors_statistics(paths, exact=True).context_size == 2
    (tmp_path / "config.json").unlink()
    assert safetensors_statistics(paths).context_size is None
    assert safetensors_statistics(paths, exact=True).context_size is None


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "model.safetensors", MODEL_SAFETENSORS)
    put(tmp_path, "config.json", CONFIG_JSON)
    monkeypatch.chdir(tmp_path)
    assert as_config(safetensors_statistics(["model.safetensors"])) == VECTOR_D
