"""The extra `vision`: what it imports, and what happens without it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import LoadedModel, load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.loader import may_read_pictures
from modelpack_engine.patches import mlx_vlm_imports
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.vision.models import vision_classes
from tests.engine.vision import tiny
from tests.engine.vision.tiny import kinds

pytestmark = pytest.mark.long

TOWERS = ("gemma3", "gemma4", "llava", *tiny.MISTRAL, *tiny.QWEN)


def test_it_imports_model_and_processor_modules_only() -> None:
    """None of mlx-vlm's own dependencies but transformers and Pillow."""
    code = (
        "import sys; from tests.engine.vision import tiny; tiny.tiny_engine('idefics3');"
        "[tiny.tiny_loaded(kind) for kind in ('llava', 'aya_vision', 'glm4v', 'internvl',"
        " 'kimi_vl', 'lfm2_vl', 'llava_next', 'llava_onevision')];"
        "heavy = 'cv2 datasets miniaudio mlx_audio pandas pyarrow scipy torch'.split();"
        "print([n for n in heavy + ['mlx_vlm.generate', 'mlx_vlm.utils'] if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import modelpack_engine; {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_transformers_is_imported_beside_the_weights() -> None:
    """The class of the model needs none of it, and several threads get all of it."""
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from modelpack_engine.patches.mlx_vlm_imports import import_processors, prepare\n"
        "prepare()\n"
        "import mlx_vlm.models.idefics3 as package\n"
        "print('transformers' in sys.modules)\n"
        "def use(_):\n"
        "    import_processors(); prepare()\n"
        "    from transformers import AutoImageProcessor\n"
        "    return AutoImageProcessor.__name__\n"
        "print(*ThreadPoolExecutor(4).map(use, range(4)))\n"
        "sys.setswitchinterval(1e-4)\n"
        "def processor(_):\n"
        "    from mlx_vlm.models.idefics3.processing_idefics3 import Idefics3Processor\n"
        "    return Idefics3Processor.__name__\n"
        "print(*ThreadPoolExecutor(4).map(processor, range(4)))\n"
        "import mlx_vlm.models.idefics3.processing_idefics3 as module\n"
        "print(type(module).__name__, hasattr(module, 'nothing'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import modelpack_engine, sys\n{code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = " ".join(["AutoImageProcessor"] * 4)
    processors = " ".join(["Idefics3Processor"] * 4)
    expected = ["False", names, processors, "module False"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_models_without_it_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_vlm_imports, "is_installed", lambda: False)
    with pytest.raises(ModelLoadError, match="'idefics3' needs the extra 'vision'") as caught:
        load(ModelFiles.from_directory(tiny.directory("idefics3")), device="cpu")
    assert caught.value.hint == "run pip install 'modelpack[vision]'"


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
        vision_classes(config)


def copied(kind: str, path: Path, **change: object) -> ModelFiles:
    """Return the files of a tiny model in another directory, with changes of its config.json."""
    for file in tiny.directory(kind).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = tiny.config_of(kind)
    if kind in tiny.HYBRID and isinstance(rope := change.get("rope_scaling"), dict):
        rope = {**config["text_config"]["rope_parameters"], **rope, "rope_type": rope["type"]}
        change = {"rope_parameters": rope}
    if kind in (*tiny.DEEP, *tiny.HYBRID) and "vision_config" not in change:
        change = {"text_config": config["text_config"] | change}
    (path / "config.json").write_text(json.dumps(config | change))
    return ModelFiles.from_directory(path)


HOSTILE = [{"hidden_size": 10**9}, {"num_hidden_layers": 10**6}, {"patch_size": 0}]


@pytest.mark.parametrize("change", HOSTILE)
def test_hostile_vision_configs(change: dict[str, int], tmp_path: Path) -> None:
    vision = {**tiny.config_of("idefics3")["vision_config"], **change}
    with pytest.raises(ModelLoadError, match=r"config\.json|cannot build"):
        load(copied("idefics3", tmp_path, vision_config=vision), device="cpu")


@pytest.mark.parametrize("change", HOSTILE)
def test_hostile_vision_configs_beside_text(change: dict[str, int], tmp_path: Path) -> None:
    """A model whose language model mlx-lm runs then reads text only."""
    vision = {**tiny.config_of("llava")["vision_config"], **change}
    loaded = load(copied("llava", tmp_path, vision_config=vision), device="cpu")
    assert loaded.vision is None
    assert loaded.notes[0].startswith("pictures are not read: ")


def name_of(loaded: LoadedModel) -> str:
    """Return the name of the model's class; corrected classes are made for each model."""
    return f"{type(loaded.model).__module__}.{type(loaded.model).__name__}"


@pytest.mark.parametrize("kind", kinds(*TOWERS))
def test_text_is_as_before_without_the_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The language model is mlx-lm's, with the extra and without it."""
    seeing = tiny.tiny_loaded(kind)
    monkeypatch.setattr(mlx_vlm_imports, "is_installed", lambda: False)
    loaded = tiny.tiny_loaded(kind)
    assert name_of(loaded) == name_of(seeing)
    module = {"llava": "mistral3", "qwen2_5_vl": "qwen2_vl"}.get(kind, kind)
    assert type(loaded.model).__module__ == f"mlx_lm.models.{module}"
    assert loaded.vision is None
    [note] = loaded.notes
    assert note == (
        "pictures are not read: the extra 'vision' is not installed"
        " (run pip install 'modelpack[vision]')"
    )
    assert seeing.weight_bytes > loaded.weight_bytes


def without_tower(path: Path) -> None:
    weights = mx.load(str(path / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {name: value for name, value in weights.items() if name.startswith("language_model.")}
    mx.save_safetensors(str(path / "model.safetensors"), kept)


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "the files have no vision tower"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"vision_config": {"patch_size": "?"}}, "config.json|cannot build"),
        ({"rope_scaling": YARN}, "not M-RoPE with three sections"),
        ({"rope_scaling": {**MROPE, "mrope_section": [2, 3, 4]}}, "not M-RoPE"),
        ({"sliding_window": 8, "use_sliding_window": False}, ""),
    ],
    ids=["no tower", "no vision", "damaged vision", "yarn", "sections", "window"],
)
@pytest.mark.parametrize("kind", kinds(*tiny.QWEN))
def test_text_is_never_worse_with_the_extra(
    kind: str,
    change: dict[str, object],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Models whose pictures cannot be read load, and answer text with the same tokens."""
    files = copied(kind, tmp_path, **change)
    if not change:
        without_tower(tmp_path)
    found = []
    for installed in (True, False):
        if not installed:
            monkeypatch.setattr(mlx_vlm_imports, "is_installed", lambda: False)
        loaded = load(files, device="cpu")
        if installed:
            assert (loaded.vision is None) == bool(reason)
            assert re.search(reason, loaded.no_vision)
        engine = Engine(loaded, EngineConfig(device="cpu"))
        ids = engine.tokenizer.encode("hello there", add_special_tokens=False)
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        found.append((tiny.run(engine, EngineRequest(ids, params)), name_of(loaded)))
    assert found[0] == found[1]


def test_axes_of_qwen3_5_take_turns(tmp_path: Path) -> None:
    """mlx-vlm takes it for granted, and mlx-lm's class reads no axes."""
    text = tiny.config_of("qwen3_5")["text_config"]
    rope = text["rope_parameters"] | {"mrope_interleaved": False}
    files = copied("qwen3_5", tmp_path, rope_parameters=rope)
    assert "rotation of qwen3_5 is not M-RoPE" in load(files, device="cpu").no_vision


def test_mrope_needs_the_paged_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiers have one position a token: they read text only, rather than wrong positions."""
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    engine = tiny.tiny_engine("qwen2_vl")
    assert engine._runner.tier == "fallback"
    assert engine.vision is None
    assert engine.notes == ("pictures are not read: M-RoPE positions need the paged tier",)


@pytest.mark.parametrize("kind", kinds(*(k for k in TOWERS if k not in ("gemma3", "pixtral"))))
def test_the_layout_of_transformers_5(kind: str, tmp_path: Path) -> None:
    """It saves all parts under `model`, and convolutions with channels first.

    mlx-lm's gemma3 and pixtral read the layout of published files only, with pictures or without.
    """
    files = copied(kind, tmp_path)
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    renamed = {}
    for name, value in weights.items():
        if kind in tiny.QWEN:
            name = name.replace("vision_tower.", "visual.")
            value = mx.moveaxis(value, -1, 1) if value.ndim == 5 else value
        name = f"model.{name}".replace("language_model.model.", "language_model.")
        renamed[name.replace("model.language_model.lm_head", "lm_head")] = value
    mx.save_safetensors(str(tmp_path / "model.safetensors"), renamed)
    loaded = load(files, device="cpu")
    assert loaded.notes == ()
    assert loaded.vision is not None
    engine = Engine(loaded, EngineConfig(device="cpu"))
    made = tiny.request(engine, "<image>What is it?", [tiny.picture(1)])
    assert tiny.run(engine, made) == [tiny.expected(kind, "<image>What is it?", [tiny.picture(1)])]


def test_a_missing_tensor_of_the_tower(tmp_path: Path) -> None:
    files = copied("llava", tmp_path)
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    weights.pop("multi_modal_projector.linear_1.weight")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    loaded = load(files, device="cpu")
    assert loaded.vision is None
    assert "multi_modal_projector.linear_1.weight" in loaded.notes[0]


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_configs_without_a_part(part: str) -> None:
    config = tiny.config_of("idefics3")
    del config[part]
    with pytest.raises(ModelLoadError, match=f"{part} is missing"):
        vision_classes(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": {"height": 10**6, "width": 16}}, "crop_size is 1000000, the limit is 8192"),
        ({"size": {"shortest_edge": -1}}, "size is -1, the limit is 8192"),
        ({"image_processor_type": "Nothing"}, "preprocessor_config.json: "),
        ({"image_processor_type": []}, "preprocessor_config.json: "),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, object], message: str) -> None:
    loaded = tiny.tiny_loaded("llava")
    with pytest.raises(ModelLoadError, match=message):
        tiny.processor({**tiny.settings_of("llava"), **settings}, loaded.tokenizer.encode)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preprocessor_config.json": "{}"},
        {"processor_config.json": '{"image_seq_len": 64, "image_processor": null}'},
    ],
)
def test_a_model_without_settings_reads_text(settings: dict[str, str], tmp_path: Path) -> None:
    """Defaults of transformers would be those of another model."""
    files = ModelFiles.from_directory(tiny.directory("qwen2_5_vl"))
    names = {name: path for name, path in files.names.items() if "processor" not in name}
    for name, text in settings.items():
        (tmp_path / name).write_text(text)
        names[name] = tmp_path / name
    found = ModelFiles(files.weights, files.format, names)
    assert may_read_pictures(files)
    assert not may_read_pictures(found)
    loaded = load(found, device="cpu")
    assert loaded.vision is None
    assert loaded.notes == ("pictures are not read: the model has no preprocessor_config.json",)


def test_code_of_models_is_never_run() -> None:
    """`auto_map` names a class in a file of the model; it is left out."""
    loaded = tiny.tiny_loaded("llava")
    settings = {**tiny.settings_of("llava"), "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    made = tiny.processor(settings, loaded.tokenizer.encode)
    assert made.image_token_id == tiny.IMAGE
