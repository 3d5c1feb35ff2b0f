"""The guard of config.json: published configs load; changes of the output are rejected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.models.config_guard import Limits, check_fields
from modelpack_engine.models.model_config import normalised
from tests.engine.loaders.published_configs import PUBLISHED, WINDOWS
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS
from tests.engine.oracle.answers import FIXTURES, fixture

Config = dict[str, Any]
SAVED = [
    pytest.param(model["config"], id=f"{version}-{kind}")
    for version, path in FIXTURES.items()
    for kind, model in fixture(path)["models"].items()
    if kind != "olmo"  # mlx-lm's class needs another package
]


def guard(config: Config, *ignored: str) -> Limits:
    from mlx_lm.utils import _get_classes

    config = normalised(config)
    return check_fields(config, _get_classes(config)[1], ignored)


def newer(config: Config) -> Config:
    """Return a config in the spelling of transformers 5."""
    result = {name: value for name, value in config.items() if name not in ("torch_dtype",)}
    rope = {"rope_type": "default", **(result.pop("rope_scaling", None) or {})}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in result:
            rope[name] = result.pop(name)
    if "text_config" in result:
        return {**result, "text_config": newer(result["text_config"])}
    return {**result, "dtype": "bfloat16", "rope_parameters": rope}


def converted(config: Config) -> Config:
    """Return a config as mlx_lm.convert writes it."""
    packing = {"group_size": 64, "bits": 4, "mode": "affine"}
    return {**config, "quantization": packing, "quantization_config": packing}


@pytest.mark.parametrize("spelling", [dict, newer, converted])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_not_refused(name: str, spelling: Any) -> None:
    assert guard(spelling(PUBLISHED[name])).max_length is None


@pytest.mark.parametrize("config", SAVED)
def test_what_transformers_saves_is_not_refused(config: Config) -> None:
    guard(config)


@pytest.mark.parametrize("spelling", [dict, newer, converted])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_limit_the_context(name: str, spelling: Any) -> None:
    config, window = WINDOWS[name]
    limits = guard(spelling(config))
    assert limits.max_length == window
    assert f"the context is limited to {window} tokens" in limits.notes[-1]
    assert guard(spelling(config), "sliding_window") == Limits(None, limits.notes[:-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False},
        {"use_sliding_window": None},
        {"sliding_window": None},
        {"sliding_window": 0},
        {"sliding_window": "4096"},
        {"sliding_window": True},
        {"max_window_layers": 28},
        {"max_position_embeddings": 65536},
        {"layer_types": ["full_attention"] * 28},
    ],
)
def test_windows_that_no_layer_has_limit_nothing(changes: Config) -> None:
    assert guard({**WINDOWS["Qwen2 with its window on"][0], **changes}) == Limits()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "jamba", "sliding_window": 6},
        {
            "model_type": "qwen3_vl_moe",
            "text_config": {"model_type": "qwen3_vl_moe_text", "sliding_window": 6},
        },
    ],
)
def test_windows_that_transformers_does_not_read_limit_nothing(config: Config) -> None:
    assert guard(config) == Limits()


def test_a_window_that_the_class_has_limits_nothing() -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = {"model_type": "mistral", "sliding_window": 64, "layer_types": kinds}
    assert guard(config) == Limits()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
TWO_EXPERTS = {"num_experts_per_tok": 2}
REFUSED: list[tuple[Config, str]] = [
    ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act"),
    ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act"),
    ({"model_type": "nemotron", "hidden_act": "silu"}, "hidden_act"),
    ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv"),
    ({"model_type": "qwen2_moe", "norm_topk_prob": True}, "norm_topk_prob"),
    ({"model_type": "gpt_bigcode", "multi_query": False}, "multi_query"),
    ({"model_type": "gpt_bigcode", "scale_attn_weights": False}, "scale_attn_weights"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional"),
    ({"model_type": "glm4_moe", "num_experts_per_tok": 1}, "num_experts_per_tok"),
    ({"model_type": "mamba", "layer_norm_epsilon": 0.1}, "layer_norm_epsilon"),
    ({"model_type": "minicpm3", "rope_theta": 1e6, "rope_scaling": YARN}, "rope_parameters"),
    ({"model_type": "minicpm3", "rope_parameters": {**YARN, "rope_theta": 1e4}}, "rope_parameters"),
    ({"model_type": "glm4", "rope_scaling": {"rope_type": "longrope"}}, "rope_scaling"),
    ({"model_type": "gpt_oss", "rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling"),
    (
        {"model_type": "llama4", "text_config": {"model_type": "llama4_text", **TWO_EXPERTS}},
        "text_config.num_experts_per_tok",
    ),
    (
        {"model_type": "llama", "rope_scaling": {**YARN, "attention_factor": 1.7}},
        "rope_scaling.attention_factor",
    ),
    (
        {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_act": "gelu"}},
        "text_config.hidden_act",
    ),
    # Values that no published model has.
    (
        {"model_type": "llama", "rope_scaling": {**YARN, "attention_factor": 10**400}},
        "rope_scaling.attention_factor",
    ),
    (
        {"model_type": "llama", "rope_scaling": {**YARN, "attention_factor": "1.0"}},
        "rope_scaling.attention_factor",
    ),
    (
        {
            "model_type": "olmo3",
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": [1e6]},
            },
        },
        "rope_parameters",
    ),
    ({"model_type": "llama", "hidden_act": ["silu", 3]}, "hidden_act"),
    ({"model_type": "llama", "hidden_act": {"silu": True}}, "hidden_act"),
    ({"model_type": "qwen2_moe", "norm_topk_prob": "no"}, "norm_topk_prob"),
]


@pytest.mark.parametrize(("config", "field"), REFUSED)
def test_fields_that_change_the_maths_are_errors_by_name(config: Config, field: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        guard(config)
    assert f"config.json: {field}" in str(caught.value)
    name = str(caught.value.hint).rpartition("--ignore-config-field ")[2]
    assert name.startswith(field)
    guard(config, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": None},
        {"hidden_act": "swish"},
        {"my_own_field": "anything", "attn_logit_softcapping": 30.0},  # unknown to transformers
        {"rope_scaling": {**YARN, "attention_factor": 1.1386294361119891}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 3.0}},
    ],
)
def test_what_changes_nothing_is_not_refused(changes: Config) -> None:
    assert guard({"model_type": "llama", "rope_theta": 1e4, **changes}) == Limits()


def saved(directory: Path, **changes: Any) -> ModelFiles:
    tiny = TINY_MODELS["llama"]
    save(directory, tiny.build(), {**tiny.config, **changes})
    return ModelFiles.from_directory(directory)


def test_a_model_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    files = saved(tmp_path, hidden_act="relu")
    with pytest.raises(ModelLoadError, match='hidden_act = "relu" changes the model'):
        load(files, device="cpu")
    load(files, device="cpu", ignored_fields=("hidden_act",))


def test_a_context_beyond_the_window_is_refused(tmp_path: Path) -> None:
    loaded = load(saved(tmp_path, model_type="mistral", sliding_window=96), device="cpu")
    assert loaded.context_length == 96
    assert any("limited to 96 tokens" in note for note in loaded.notes)
    assert Engine(loaded, EngineConfig()).max_model_len == 96
    with pytest.raises(EngineError, match="max_model_len is 128, but this model's context is 96"):
        Engine(loaded, EngineConfig(max_model_len=128))


@pytest.mark.parametrize("name", ["gemma2", "phi3", "starcoder2"])
def test_windows_of_gguf_files_limit_the_context(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]

    def keys(writer: Any, config: Any) -> None:
        tiny.keys(writer, config)
        if name != "gemma2":  # it has the key already
            writer.add_sliding_window(4096)

    config = {**tiny.config, "max_position_embeddings": 8192}
    path = replace(tiny, config=config, keys=keys).write(tmp_path / "m.gguf")
    loaded = load(ModelFiles.from_directory(path), device="cpu")
    assert loaded.context_length == 4096
    assert any("limited to 4096 tokens" in note for note in loaded.notes)
