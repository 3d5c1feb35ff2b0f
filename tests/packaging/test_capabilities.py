"""The capabilities in the config of a CNCF model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from modelpack.artifacts.config import ModelConfig
from modelpack.builder.request import PackageRequest
from tests.cli.running import succeed
from tests.packaging.test_repackage import changed
from tests.packaging.trees import DDUF, PROJECTOR, TINY, TINY_DIRECTORY, package, write

TEXT = {"inputTypes": ["text"], "outputTypes": ["text"]}
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages }}"
THINKS = "{% if enable_thinking %}<think>{% endif %}{{ messages }}"
#: config.json, further files, and what differs from the capabilities of plain text.
DIRECTORIES: list[tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = [
    ({}, {}, {}),
    ({"architectures": ["LlamaForCausalLM"]}, {}, {}),
    ({"architectures": ["GPT2LMHeadModel"]}, {}, {}),
    ({"vision_config": {}, "image_token_id": 5}, {}, {"inputTypes": ["text", "image"]}),
    ({"image_token_index": 5}, {}, {"inputTypes": ["text", "image"]}),
    ({"model_type": "molmo"}, {}, {"inputTypes": ["text", "image"]}),
    (
        {"model_type": "phi4mm", "audio_processor": {"name": "cascades"}},
        {},
        {"inputTypes": ["text", "image", "audio"]},
    ),
    (
        {"vision_config": {}, "video_token_id": 5, "audio_config": {}}, {},
        {"inputTypes": ["text", "image", "audio", "video"]},
    ),
    ({"vision_config": None}, {}, {}),
    (
        {"thinker_config": {"vision_config": {}, "audio_token_id": 5}, "talker_config": {}}, {},
        {"inputTypes": ["text", "image", "audio"]},
    ),
    ({"model_type": "bert"}, {}, {"outputTypes": ["embedding"]}),
    ({"model_type": "xlm_roberta"}, {}, {"outputTypes": ["embedding"]}),
    ({"architectures": ["BertForMaskedLM"]}, {}, {"outputTypes": ["embedding"]}),
    ({"architectures": ["BertForSequenceClassification"]}, {}, {"outputTypes": ["other"]}),
    ({"model_type": "whisper"}, {}, {"inputTypes": ["audio"]}),
    ({"model_type": "moonshine"}, {}, {"inputTypes": ["audio"]}),
    ({"n_mels": 80, "n_audio_ctx": 1500}, {}, {"inputTypes": ["audio"]}),
    (
        {"target": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE"}, {},
        {"inputTypes": ["audio"]},
    ),
    ({"target": "nemo.collections.nlp.models.GPT", "n_mels": 80}, {}, {}),
    ({"architectures": "none"}, {"modules.json": "[]"}, {"outputTypes": ["embedding"]}),
    ({}, {"chat_template.jinja": TOOLS}, {"reasoning": False, "toolUsage": True}),
    ({}, {"chat_template.jinja": THINKS}, {"reasoning": True, "toolUsage": False}),
    (
        {}, {"tokenizer_config.json": json.dumps({"chat_template": TOOLS})},
        {"reasoning": False, "toolUsage": True},
    ),
    (
        {},
        {"tokenizer_config.json": json.dumps({"chat_template": [
            {"name": "tool_use", "template": TOOLS}, {"name": "default", "template": THINKS},
        ]})},
        {"reasoning": True, "toolUsage": False},
    ),
    ({}, {"tokenizer_config.json": "[1]"}, {}),
    ({}, {"tokenizer_config.json": "not JSON"}, {}),
    (
        {"model_type": "bert"}, {"chat_template.jinja": TOOLS}, {"outputTypes": ["embedding"]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "files", "expected"), DIRECTORIES)
def test_directories(
    config: dict[str, Any], files: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    weights = {"model.safetensors": TINY_DIRECTORY["model.safetensors"]}
    others = {name: text.encode() for name, text in files.items()}
    write(tmp_path, {**weights, "config.json": json.dumps(config).encode(), **others})
    made = package(PackageRequest(safetensors_dir=tmp_path, format="cncf"))
    assert made.config.cncf_config["capabilities"] == TEXT | expected
    # The schema of the config accepts them, and a reader finds them again.
    read = ModelConfig.parse(made.config_bytes, made.config.media_type)
    assert read.cncf_config["capabilities"] == TEXT | expected


def made_gguf(path: Path, architecture: str, **metadata: object) -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, str(value))
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "metadata", "expected"),
    [
        ("llama", {}, {}),
        ("llama", {"tokenizer__chat_template": TOOLS}, {"reasoning": False, "toolUsage": True}),
        ("qwen3", {"qwen3__pooling_type": 3}, {"outputTypes": ["embedding"]}),
        ("qwen3", {"qwen3__pooling_type": 4}, {"outputTypes": ["other"]}),
        ("qwen3", {"qwen3__pooling_type": 0}, {}),
        ("bert", {}, {"outputTypes": ["embedding"]}),
    ],
)
def test_gguf(
    architecture: str, metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    path = made_gguf(tmp_path / "m.gguf", architecture, **metadata)
    made = package(PackageRequest(gguf=path, format="cncf"))
    assert made.config.cncf_config["capabilities"] == TEXT | expected


@pytest.mark.parametrize(
    ("metadata", "inputs"),
    [
        ({}, ["image"]),
        ({"clip__has_vision_encoder": True, "clip__has_audio_encoder": False}, ["image"]),
        ({"clip__has_audio_encoder": True}, ["audio"]),
        (
            {"clip__has_vision_encoder": True, "clip__has_audio_encoder": True},
            ["image", "audio"],
        ),
    ],
)
def test_projectors(metadata: dict[str, Any], inputs: list[str], tmp_path: Path) -> None:
    model = made_gguf(tmp_path / "m.gguf", "llama")
    projector = made_gguf(tmp_path / "p.gguf", "clip", **metadata)
    made = package(PackageRequest(gguf=model, mmproj=projector, format="cncf"))
    assert made.config.cncf_config["capabilities"]["inputTypes"] == ["text", *inputs]


def test_files_that_are_added_later(tmp_path: Path) -> None:
    write(tmp_path, {"m.gguf": TINY, "mmproj.gguf": PROJECTOR, "t.jinja": TOOLS.encode()})
    first = package(PackageRequest(gguf=tmp_path / "m.gguf", format="cncf"))
    assert first.config.cncf_config["capabilities"] == TEXT
    later = changed(first, PackageRequest(mmproj=tmp_path / "mmproj.gguf"))
    assert later.config.cncf_config["capabilities"] == TEXT | {"inputTypes": ["text", "image"]}
    later = changed(later, PackageRequest(chat_template=tmp_path / "t.jinja"))
    assert later.config.cncf_config["capabilities"] == {
        "inputTypes": ["text", "image"], "outputTypes": ["text"],
        "reasoning": False, "toolUsage": True,
    }  # fmt: skip


def test_dduf_and_docker(tmp_path: Path) -> None:
    write(tmp_path, {"x.dduf": DDUF, "m.gguf": TINY})
    made = package(PackageRequest(dduf=tmp_path / "x.dduf", format="cncf"))
    found = made.config.cncf_config["capabilities"]
    assert found == {"inputTypes": ["text"], "outputTypes": ["image"]}
    request = PackageRequest(gguf=tmp_path / "m.gguf")
    assert package(request).config.cncf_config == {}
    preserved = replace(request, format="cncf", preserve=True)
    assert package(preserved).config.cncf_config == {}


@pytest.mark.parametrize("format", ["docker", "cncf"])
def test_inspect_shows_them(format: str, tmp_path: Path) -> None:
    write(tmp_path / "d", {**TINY_DIRECTORY, "chat_template.jinja": (TOOLS + THINKS).encode()})
    (tmp_path / "d" / "config.json").write_text('{"image_token_id": 1}')
    store = ("--store", tmp_path / "store")
    succeed("package", "--safetensors-dir", tmp_path / "d", "--format", format, "team/tiny", *store)
    assert "Capabilities: text and image to text, tools, reasoning\n" in (
        succeed("inspect", "team/tiny", *store).out
    )
    value = succeed("inspect", "team/tiny", "--json", *store).json
    assert value["config"]["capabilities"] == {
        "inputTypes": ["text", "image"], "outputTypes": ["text"],
        "reasoning": True, "toolUsage": True,
    }  # fmt: skip
