"""Pooling and the steps after it, compared with sentence-transformers and with numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.embedding import Embedder, load_embedder
from modelpack_engine.embedding.sentence_transformers import (
    PoolingMode,
    parse_pooling,
    pool,
    read_sentence_files,
)
from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_engine.models import ModelFiles
from tests.engine.embedding import tiny
from tests.engine.embedding.models import golden, write_model, write_modules

MEAN = ("Pooling", {"pooling_mode_mean_tokens": True})
TEXT = "w5 w9 w20 w31"


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize("modes", tiny.POOLING_MODES, ids="+".join)
def test_as_sentence_transformers(modes: tuple[str, ...], prompt: int) -> None:
    hidden = tiny.weights({"hidden": [3, 7, 4]})["hidden"]
    for row, length in enumerate(tiny.POOLING_LENGTHS):
        hidden[row, length:] = np.inf  # padding may contain anything
    got = pool(
        mx.array(hidden),
        mx.array(tiny.POOLING_LENGTHS),
        [PoolingMode(mode) for mode in modes],
        mx.array([prompt] * 3),
    )
    want = np.array(golden("pooling")[f"{'+'.join(modes)} {prompt}"]).reshape(3, -1)
    assert np.abs(np.array(got) - want).max() < 1e-6


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_cls_token": True}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ("lasttoken",)),
        ({"pooling_mode_weightedmean_tokens": True}, ("weightedmean",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len_tokens",)),
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["max", "cls"]}, ("max", "cls")),
        ({"pooling_mode": "max", "pooling_mode_cls_token": True}, ("max",)),
        ({"word_embedding_dimension": 384}, ("mean",)),
    ],
)
def test_modes_of_a_config(config: dict[str, Any], modes: tuple[str, ...]) -> None:
    assert parse_pooling(config, "1_Pooling/config.json") == modes


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode": "attention"},
        {"pooling_mode": []},
        {"pooling_mode": 3},
        {"pooling_mode_attention": True},
    ],
)
def test_modes_that_are_not_known(config: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match="1_Pooling"):
        parse_pooling(config, "1_Pooling/config.json")


def vector(root: Path, **options: Any) -> np.ndarray:
    model = load_embedder(ModelFiles.from_directory(root), device="cpu")
    return np.array(model.embed([TEXT], **options).vectors[0])


def test_steps_after_pooling(tmp_path: Path) -> None:
    """Dense with tanh, a norm, Dense with a residual, length 1: as numpy does it."""
    write_model(tmp_path, "bert")
    write_modules(tmp_path, MEAN)
    pooled = vector(tmp_path).astype(np.float64)
    shapes = {"linear.weight": [24, 32], "narrow.weight": [10, 24], "residual.weight": [10, 24]}
    shapes |= {name: [24] for name in ("linear.bias", "norm.weight", "norm.bias")}
    made = tiny.weights(shapes)
    torch = "torch.nn.modules.activation.Tanh"
    identity = "torch.nn.modules.linear.Identity"
    write_modules(
        tmp_path,
        MEAN,
        ("Dense", {"in_features": 32, "out_features": 24, "activation_function": torch}),
        ("LayerNorm", {"dimension": 24}),
        ("Dropout", {"dropout": 0.5}),
        (
            "Dense",
            {"in_features": 24, "out_features": 10, "bias": False, "use_residual": True,
             "activation_function": identity},
        ),
        ("Normalize", {}),
    )  # fmt: skip
    for directory, names in {
        "2_Dense": {"linear.weight": "linear.weight", "linear.bias": "linear.bias"},
        "3_LayerNorm": {"norm.weight": "norm.weight", "norm.bias": "norm.bias"},
        "5_Dense": {"linear.weight": "narrow.weight", "residual.weight": "residual.weight"},
    }.items():
        tensors = {name: mx.array(made[source]) for name, source in names.items()}
        mx.save_safetensors(str(tmp_path / directory / "model.safetensors"), tensors)
    want = np.tanh(made["linear.weight"] @ pooled + made["linear.bias"])
    want = (want - want.mean()) / np.sqrt(want.var() + 1e-5)
    want = want * made["norm.weight"] + made["norm.bias"]
    want = made["narrow.weight"] @ want + made["residual.weight"] @ want
    want /= np.linalg.norm(want)
    assert np.abs(vector(tmp_path) - want).max() < 1e-5


def test_without_modules_mean_and_length_1(tmp_path: Path) -> None:
    model = load_embedder(ModelFiles.from_directory(write_model(tmp_path, "bert")), device="cpu")
    assert model.config.pooling == ("mean",)
    assert model.config.normalize
    assert any("modules.json" in note for note in model.notes)
    assert np.isclose(np.linalg.norm(model.embed([TEXT]).vectors[0]), 1, atol=1e-6)


def test_normalize_on_request(tmp_path: Path) -> None:
    write_modules(write_model(tmp_path, "bert"), MEAN)
    plain, unit = vector(tmp_path), vector(tmp_path, normalize=True)
    assert not np.isclose(np.linalg.norm(plain), 1, atol=1e-3)
    assert np.allclose(unit, plain / np.linalg.norm(plain), atol=1e-6)


def test_prompts_are_offered_and_not_applied(tmp_path: Path) -> None:
    write_modules(write_model(tmp_path, "bert"), MEAN)
    prompts = {"query": "w7 w8 ", "document": ""}
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": prompts, "default_prompt_name": "query"}))
    model = load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")
    assert model.config.prompts == prompts
    plain, query, written = (
        model.embed([TEXT]).vectors[0],
        model.embed([TEXT], prompt="query").vectors[0],
        model.embed(["w7 w8 " + TEXT]).vectors[0],
    )
    assert np.array_equal(query, written)
    assert np.abs(plain - query).max() > 0.01
    assert np.array_equal(model.embed([TEXT], prompt="document").vectors[0], plain)
    with pytest.raises(RequestError, match="it has document, query"):
        model.embed([TEXT], prompt="passage")


def test_a_prompt_may_be_left_out_of_the_pooling(tmp_path: Path) -> None:
    root = write_model(tmp_path, "bert")
    settings = {"prompts": {"query": "w7 w8 "}}
    (root / "config_sentence_transformers.json").write_text(json.dumps(settings))
    write_modules(root, ("Pooling", {"pooling_mode": "mean", "include_prompt": False}))
    model = load_embedder(ModelFiles.from_directory(root), device="cpu")
    assert isinstance(model, Embedder)
    [prepared] = model.read([TEXT], _options(prompt="query"))
    assert prepared.skipped == 3  # [CLS] w7 w8
    assert np.abs(vector(root, prompt="query") - vector(root)).max() > 1e-3
    write_modules(root, MEAN)
    assert np.abs(vector(root, prompt="query") - model.run([prepared])[0]).max() > 1e-3


def _options(**options: Any) -> Any:
    from modelpack_engine.embedding import EmbedOptions

    return EmbedOptions(**options)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ("[]", "is not a list of modules"),
        ("{}", "is not a list of modules"),
        ("nonsense", "modules.json: is not JSON"),
        ('[{"type": 3, "path": ""}]', "is not a list of modules"),
        ('[{"type": "a.Transformer", "path": ""}]', "no Pooling"),
        ('[{"type": "a.Transformer", "path": "0_Transformer"}]', "0_Transformer"),
        ('[{"type": "a.CLIPModel", "path": ""}]', "CLIPModel"),
        (
            '[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]',
            "1_Pooling/config.json is missing",
        ),
    ],
)
def test_modules_that_are_refused(modules: str, said: str, tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(ModelLoadError, match=said):
        read_sentence_files(ModelFiles.from_directory(tmp_path))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (("Whitening", {}), "Whitening"),
        (
            ("Dense", {"in_features": 31, "out_features": 4}),
            "expected vectors of 31 numbers, got 32",
        ),
        (("Dense", {"in_features": 32, "out_features": 4}), "2_Dense/model.safetensors is missing"),
        (("Dense", {"in_features": "x", "out_features": 4}), "in_features"),
        (
            ("Dense", {"in_features": 32, "out_features": 4, "activation_function": "x.Mish"}),
            "Mish",
        ),
    ],
)
def test_steps_that_are_refused(
    module: tuple[str, dict[str, Any]], said: str, tmp_path: Path
) -> None:
    write_modules(write_model(tmp_path, "bert"), MEAN, module)
    with pytest.raises(ModelLoadError, match=said):
        load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "longest"),
    [(None, None, 160), (64, None, 64), (64, 32, 64), (None, 32, 32), (500, None, 160)],
)
def test_longest_input(
    sentence: int | None, tokenizer: int | None, longest: int, tmp_path: Path
) -> None:
    write_model(tmp_path, "bert")
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": sentence}))
    settings = {"model_max_length": tokenizer or 10**30}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")
    assert model.config.max_length == longest


def test_roberta_has_fewer_positions_than_rows(tmp_path: Path) -> None:
    model = load_embedder(ModelFiles.from_directory(write_model(tmp_path, "roberta")), device="cpu")
    assert model.config.max_length == 158
    assert model.embed([[5] * 158]).token_counts == (158,)


def test_text_is_lowered_where_the_files_say(tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    path = tmp_path / "sentence_bert_config.json"
    path.write_text('{"max_seq_length": 20, "do_lower_case": true}')
    model = load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")
    lower, upper = model.embed(["w5 w6", "W5 W6"]).vectors
    assert np.array_equal(lower, upper)
