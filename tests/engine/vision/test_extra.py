"""The extra `vision`: what it imports, and what happens without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.vision import models
from tests.engine.vision import tiny


@pytest.mark.long
def test_it_imports_model_and_processor_modules_only() -> None:
    """None of mlx-vlm's own dependencies but transformers and Pillow."""
    code = (
        "import sys; from tests.engine.vision import tiny; tiny.tiny_engine('idefics3');"
        "tiny.tiny_engine('llava');"
        "heavy = 'cv2 datasets miniaudio mlx_audio pandas pyarrow scipy torch'.split();"
        "print([n for n in heavy + ['mlx_vlm.generate', 'mlx_vlm.utils'] if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import modelpack_engine; {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_models_without_it_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "is_installed", lambda: False)
    with pytest.raises(ModelLoadError, match="'idefics3' needs the extra 'vision'") as caught:
        load(ModelFiles.from_directory(tiny.directory("idefics3")), device="cpu")
    assert caught.value.hint == "pip install 'modelpack[vision]'"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True), ("hidden_act", "gelu"), ("head_dim", 32), ("mlp_bias", True),
        ("model_type", "gemma"), ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3"}), ("sliding_window", 64),
    ],
)  # fmt: skip
def test_fields_that_mlx_vlm_does_not_read(field: str, value: object) -> None:
    config = tiny.config_of("idefics3")
    config["text_config"] = {**config["text_config"], field: value}
    shown = field.replace("parameters", "scaling")
    with pytest.raises(ModelLoadError, match=f"text_config.{shown} .*changes"):
        models.vision_classes(config)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 10**9}, {"num_hidden_layers": 10**6}, {"patch_size": 0}]
)
def test_vision_configs_that_the_tensors_do_not_justify(
    change: dict[str, int], tmp_path: Path
) -> None:
    source = tiny.directory("llava")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tiny.config_of("llava")
    config["vision_config"] = {**config["vision_config"], **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"config\.json|cannot build"):
        load(ModelFiles.from_directory(tmp_path), device="cpu")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_configs_without_a_part(part: str) -> None:
    config = tiny.config_of("llava")
    del config[part]
    with pytest.raises(ModelLoadError, match=f"{part} is missing"):
        models.vision_classes(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": {"height": 10**6, "width": 16}}, "crop_size is 1000000, the limit is 8192"),
        ({"size": {"shortest_edge": -1}}, "size is -1, the limit is 8192"),
        ({"image_processor_type": "Nothing"}, "preprocessor_config.json: "),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, object], message: str) -> None:
    loaded = tiny.tiny_loaded("llava")
    with pytest.raises(ModelLoadError, match=message):
        tiny.processor({**tiny.settings_of("llava"), **settings}, loaded.tokenizer.encode)


def test_a_model_without_settings_reads_text(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ModelFiles.from_directory(tiny.directory("llava"))
    names = {name: path for name, path in files.names.items() if "processor" not in name}
    loaded = load(ModelFiles(files.weights, files.format, names), device="cpu")
    assert loaded.vision is None
    assert loaded.notes == ("pictures are not read: the model has no preprocessor_config.json",)


def test_code_of_models_is_never_run() -> None:
    """`auto_map` names a class in a file of the model; it is left out."""
    loaded = tiny.tiny_loaded("llava")
    settings = {**tiny.settings_of("llava"), "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    made = tiny.processor(settings, loaded.tokenizer.encode)
    assert made.image_token_id == tiny.IMAGE
