"""The files with which a model reads pictures are checked when it is packaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelpack.builder.request import PackageRequest
from modelpack.errors import PackagingError
from tests.packaging.trees import PAIR, package, write

VLM: dict[str, Any] = {
    "vision_config": {"patch_size": 4}, "text_config": {"vocab_size": 300}, "image_token_id": 299,
}  # fmt: skip
SETTINGS = {"preprocessor_config.json": '{"do_resize": true}'}
NO_SETTINGS = "there is no preprocessor_config.json"


def notes(root: Path, config: Any, files: dict[str, str]) -> tuple[str, ...]:
    texts = {name: text.encode() for name, text in files.items()}
    write(root, {"model.safetensors": PAIR, "config.json": json.dumps(config).encode(), **texts})
    return package(PackageRequest(safetensors_dir=root)).notes


#: config.json, further files, and parts of the notes in their order.
CASES: list[tuple[Any, dict[str, str], list[str]]] = [
    ({}, {}, []),
    ([], {}, ["does not parse"]),
    ({"model_type": "llama", "vocab_size": 10}, {}, []),
    (VLM, SETTINGS, []),
    (VLM, {"processor_config.json": '{"image_processor": {}}'}, []),
    (VLM, {}, [NO_SETTINGS]),
    (VLM, {"sub/preprocessor_config.json": '{"do_resize": true}'}, [NO_SETTINGS]),
    (VLM, {"preprocessor_config.json": "{}"}, [NO_SETTINGS]),
    (VLM, {"processor_config.json": '{"image_seq_len": 64}'}, [NO_SETTINGS]),
    (VLM, {**SETTINGS, "processor_config.json": '{"image_seq_len": 64}'}, []),
    ({"audio_config": {}}, {"processor_config.json": '{"feature_extractor": {}}'}, []),
    ({"audio_config": {}}, {}, ["has audio_config, but " + NO_SETTINGS]),
    ({"audio_config": {}, "vision_config": {}}, {}, ["has vision_config and audio_config"]),
    ({"vision_config": None}, {}, []),
    (VLM, {"preprocessor_config.json": "{"}, ["preprocessor_config.json is not usable"]),
    (VLM, {"preprocessor_config.json": "[]"}, ["not a JSON object"]),
    (VLM, {**SETTINGS, "video_preprocessor_config.json": "1"}, ["video_preprocessor_config.json"]),
    (VLM, {"video_preprocessor_config.json": "1"}, ["video_preprocessor_config", NO_SETTINGS]),
    ({**VLM, "image_token_id": 300}, SETTINGS, ["image_token_id 300 is outside the vocabulary of"]),
    ({**VLM, "image_token_index": -200}, SETTINGS, ["image_token_index -200 is outside"]),
    ({**VLM, "image_token_id": 299, "vocab_size": 5}, SETTINGS, []),
    ({"vocab_size": 5, "video_token_id": 5}, {}, ["reads no video"]),
    ({**VLM, "image_token_id": "299"}, SETTINGS, ["image_token_id is not a whole number"]),
    ({**VLM, "image_token_id": True}, SETTINGS, ["image_token_id is not a whole number"]),
    ({"image_token_id": 7}, {}, []),  # of a vocabulary whose size is not known
    (  # Llama 3.2 Vision has embeddings for tokens after its vocabulary
        {**VLM, "image_token_id": 300},
        {**SETTINGS, "tokenizer_config.json": '{"added_tokens_decoder": {"300": {}}}'},
        [],
    ),
    ({**VLM, "image_token_id": 300}, {}, [NO_SETTINGS, "outside the vocabulary"]),
]


@pytest.mark.parametrize(("config", "files", "expected"), CASES)
def test_notes(config: Any, files: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    found = notes(tmp_path, config, files)
    assert len(found) == len(expected), found
    for note, part in zip(found, expected, strict=True):
        assert part in note


@pytest.mark.parametrize("name", ["vision_config", "audio_config", "text_config"])
@pytest.mark.parametrize("value", ["clip", 5, [{}]])
def test_models_that_cannot_be_loaded_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match=rf"config\.json: {name} is not an object") as caught:
        notes(tmp_path, {name: value}, {})
    assert caught.value.hint is not None
