"""config.json in the spellings of transformers 4 and 5: the same meaning, and named errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.models.loader import context_length_of
from modelpack_engine.models.model_config import completed, normalised, with_tied_embeddings
from tests.engine.loaders.published_configs import PUBLISHED
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def logits(directory: Path, config: dict[str, Any]) -> np.ndarray:
    directory.mkdir()
    tiny = TINY_MODELS["llama"]
    save(directory, tiny.build(), config)
    return tiny.logits(load(ModelFiles.from_directory(directory), device="cpu").model)


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_both_spellings_give_the_same_model(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    plain = {k: v for k, v in TINY_MODELS["llama"].config.items() if not k.startswith("rope")}
    old = logits(tmp_path / "4", {**plain, "rope_theta": 77.0, "rope_scaling": scaling})
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": 77.0}
    new = logits(tmp_path / "5", {**plain, "rope_parameters": rope})
    both = {**plain, "rope_theta": 77.0, "rope_scaling": scaling, "rope_parameters": rope}
    assert np.array_equal(old, new)
    assert np.array_equal(old, logits(tmp_path / "both", both))
    assert not np.allclose(old, logits(tmp_path / "none", plain))  # the theta matters


def test_one_rotation_per_layer_type() -> None:
    full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    config = {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    for made in (normalised(config), normalised({"text_config": config})["text_config"]):
        assert made["rope_theta"] == 1e6
        assert made["rope_local_base_freq"] == 1e4
        assert made["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 8.0}
        assert made["rope_parameters"] == config["rope_parameters"]


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25, "rotary_pct": 0.25}),
        ({"rope_theta": 5.0}, {"rope_theta": 5.0, "rotary_emb_base": 5.0, "rope_scaling": None}),
        (
            {"type": "yarn", "factor": 2.0},
            {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 2.0}},
        ),
    ],
)  # fmt: skip
def test_members_go_where_classes_read_them(rope: Any, expected: Any) -> None:
    made = normalised({"rope_parameters": {"rope_type": "default", **rope}}
                      if "type" not in rope else {"rope_parameters": rope})  # fmt: skip
    assert {name: made[name] for name in expected} == expected


def test_normalising_twice_changes_nothing() -> None:
    for config in (
        {"rope_theta": 1e4, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0, "rope_type": "default"}}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "su", "rope_type": "longrope"}},
    ):
        before = copy.deepcopy(config)
        once = normalised(config)
        assert config == before
        assert normalised(once) == once


DISAGREE: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0"),
    ({"rotary_emb_base": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rotary_emb_base"),
    ({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}}, "partial"),
    ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
    ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 4.0}}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "yarn", "type": "linear"}}, "rope_type"),
    ({"text_config": {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}}, "text_con"),
    ({"torch_dtype": "float16", "dtype": "bfloat16"}, "dtype is 'bfloat16', but torch_dtype"),
    ({"rope_parameters": [1]}, "rope_parameters is not an object"),
    ({"rope_scaling": "linear"}, "rope_scaling is not an object"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), DISAGREE)
def test_spellings_that_disagree_are_an_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        normalised(config)


def test_same_dtype_in_two_spellings() -> None:
    assert normalised({"torch_dtype": "torch.float16", "dtype": "float16"})


def test_tagged_floats() -> None:
    assert normalised({"a": [{"__float__": "-Infinity"}], "b": {"__float__": "x"}}) == {
        "a": [float("-inf")],
        "b": {"__float__": "x"},
    }


def test_names_of_experts_and_sizes_that_are_left_out() -> None:
    class Arguments:
        def __init__(self, num_experts: int, head_dim: int) -> None: ...

    config = {"num_local_experts": 4, "hidden_size": 64, "num_attention_heads": 4}
    made = completed(config, Arguments)
    assert (made["num_experts"], made["head_dim"]) == (4, 16)


TIED: list[tuple[dict[str, Any], bool, Any]] = [
    ({"text_config": {}}, True, False),  # transformers 4 leaves it out
    ({"text_config": {}}, False, True),
    ({"tie_word_embeddings": False, "text_config": {}}, True, False),
    ({"text_config": {"tie_word_embeddings": False}}, True, False),
    ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False, True),
    ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True, False),
    ({"tie_word_embeddings": True}, True, True),  # a copy of the embeddings
    ({"tie_word_embeddings": False}, False, False),  # its head is missing: an error later
    ({}, False, True),
    ({}, True, None),
]


@pytest.mark.parametrize(("config", "has_head", "expected"), TIED)
def test_tied_embeddings(config: dict[str, Any], has_head: bool, expected: bool | None) -> None:
    names = ["model.embed_tokens.weight", *(["language_model.lm_head.weight"] * has_head)]
    made = with_tied_embeddings(config, names)
    for part in (made, made.get("text_config", made)):
        assert part.get("tie_word_embeddings") is expected


def no_fields() -> None:
    """A class of arguments that requires no fields."""


FULL, SLIDING = "full_attention", "sliding_attention"
COMPLETED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gemma3_text", {"layer_types": [SLIDING, FULL] * 2}, {"sliding_window_pattern": 2}),
    ("exaone4", {"layer_types": [SLIDING, FULL]}, {"sliding_window_pattern": "LG"}),
    ("exaone4", {"layer_types": [FULL] * 2}, {"sliding_window_pattern": None}),
    (
        "granitemoehybrid",
        {"layer_types": ["linear_attention", FULL]},
        {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"},
    ),
    ("granitemoehybrid", {"position_embedding_type": "rope"}, {"position_embedding_type": "rope"}),
    ("lfm2", {"hidden_size": 8}, {"block_dim": 8}),
    ("lfm2", {"hidden_size": 8, "block_dim": 16}, {"block_dim": 16}),
    ("mamba2", {"num_heads": 4, "head_dim": 8}, {"intermediate_size": 32}),
    ("minimax_m2", {"head_dim": 16, "partial_rotary_factor": 0.5}, {"rotary_dim": 8}),
    (
        "minimax_m3_vl_text",
        {"head_dim": 16, "rotary_dim": 8, "partial_rotary_factor": 0.25},
        {"rotary_dim": 4},
    ),
    ("exaone_moe", {"mlp_layer_types": ["dense", "sparse"]}, {"is_moe_layer": [False, True]}),
    ("falcon_h1", {"hidden_size": 64, "num_attention_heads": 4}, {"head_dim": 16}),
]


@pytest.mark.parametrize(("kind", "config", "expected"), COMPLETED)
def test_fields_that_transformers_names_otherwise(
    kind: str, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    made = completed({"model_type": kind, **config}, no_fields)  # type: ignore[arg-type]
    assert made | expected == made
    nested = {"model_type": "outer", "text_config": {"model_type": kind, **config}}
    if kind != "falcon_h1":
        inner = completed(nested, no_fields)["text_config"]  # type: ignore[arg-type]
        assert inner | expected == inner


@pytest.mark.parametrize(
    "layers",
    [[SLIDING] * 4, [SLIDING, FULL, FULL, SLIDING], [SLIDING, FULL, SLIDING, SLIDING, FULL], []],
)
def test_layers_of_which_a_class_cannot_be_told(layers: list[str]) -> None:
    config = {"model_type": "gemma3_text", "layer_types": layers}
    with pytest.raises(ModelLoadError, match="these layer_types of gemma3_text are not supported"):
        completed(config, no_fields)  # type: ignore[arg-type]


def test_two_bases_of_one_rotation() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    made = normalised({"rope_parameters": rope, "attn_config": {"clip_qkv": 8}})
    assert made["attn_config"] == {"clip_qkv": 8, "rope_theta": 5e5}
    with pytest.raises(ModelLoadError, match=r"attn_config.rope_theta is 10000.0, but"):
        normalised({"rope_parameters": rope, "attn_config": {"rope_theta": 1e4}})


def test_a_module_that_exits_is_an_error(tmp_path: Path) -> None:
    """mlx-lm's olmo calls exit() if its package is missing."""
    tiny = TINY_MODELS["llama"]
    save(tmp_path, tiny.build(), tiny.config | {"model_type": "olmo"})
    with pytest.raises(ModelLoadError, match="olmo"):
        load(ModelFiles.from_directory(tmp_path), device="cpu")


QUANTISATIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "quantisation method 'bitsandbytes' is not supported",
    ),
    (
        {"quantization_config": {"quant_method": "hqq", "bits": 4}},
        "quantisation method 'hqq' is not supported",
    ),
    ({"quantization_config": {"quant_method": ["awq"]}}, "quantisation method .* is not supported"),
    ({"quantization_config": "fp8"}, "quantisation method 'None' is not supported"),
    (
        {
            "quantization": {"bits": 4, "group_size": 32},
            "quantization_config": {"bits": 8, "group_size": 32},
        },
        "quantization.bits is 4, but quantization_config says 8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), QUANTISATIONS)
def test_quantisation_that_cannot_be_read(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = TINY_MODELS["llama"]
    save(tmp_path, tiny.build(), tiny.config | changes)
    with pytest.raises(ModelLoadError, match=message):
        load(ModelFiles.from_directory(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_yarn_extends_the_context_unless_it_names_another(name: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    config = {"max_position_embeddings": 64, "rope_theta": 1e4, name: rope}
    made = normalised(config)
    assert made["rope_scaling"]["original_max_position_embeddings"] == 64
    assert made["rope_parameters"]["original_max_position_embeddings"] == 64
    named = normalised({**config, name: {**rope, "original_max_position_embeddings": 16}})
    assert named["rope_parameters"]["original_max_position_embeddings"] == 16
    assert context_length_of(made) == (256, True)
    assert context_length_of({"text_config": made}) == (256, True)
    assert context_length_of(named) == (64, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_type": "linear"},
        {"factor": 10**400},
        {"factor": float("inf")},
        {"factor": float("nan")},
        {"factor": -4.0},
        {"factor": "4"},
        {"original_max_position_embeddings": float("inf")},
        {"original_max_position_embeddings": -(10**400)},
    ],
)
def test_rotations_that_do_not_extend_the_context(changes: dict[str, Any]) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **changes}
    config = {"max_position_embeddings": 64, "rope_scaling": rope}
    assert context_length_of(config) == (64, True)


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("Yarn-Llama-2-7b-128k", 131072),
        ("Qwen2.5-7B-Instruct with YaRN", 131072),
        ("Olmo-3-1025-7B", 65536),
    ],
)
def test_contexts_of_published_models_with_yarn(name: str, context: int) -> None:
    assert context_length_of(normalised(PUBLISHED[name])) == (context, True)


class Arguments:
    """A class of arguments that needs none."""


def test_the_language_model_of_llava_has_llamas_defaults() -> None:
    """LLaVA 1.5 names only what differs from LlamaConfig."""
    text = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}
    made = completed({"model_type": "llava", "text_config": text}, Arguments)["text_config"]
    assert (made["hidden_size"], made["num_hidden_layers"]) == (4096, 32)
    assert (made["vocab_size"], made["rms_norm_eps"]) == (32064, 1e-5)
    other = {"model_type": "llava", "text_config": {"model_type": "mistral"}}
    assert "hidden_size" not in completed(other, Arguments)["text_config"]
