"""Decoder models as embedders: hidden states, the last token, and the missing head."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import YarnRoPE
from mlx_lm.utils import quantize_model

from modelpack_engine.embedding import Embedder, load_embedder, purpose_of
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles
from tests.engine.embedding.models import write_modules, write_tokenizer

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {**_SIZES, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "llama": {**_SIZES, "model_type": "llama", "tie_word_embeddings": False},
    "gemma2": {**_SIZES, "model_type": "gemma2", "query_pre_attn_scalar": 16,
               "sliding_window": 64},
    "gpt2": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4,
             "n_ctx": 128, "n_positions": 128, "layer_norm_epsilon": 1e-5,
             "num_key_value_heads": 4},
}  # fmt: skip
LAST = ("Pooling", {"pooling_mode_lasttoken": True})
TEXTS = ["w5", "w9 w11 w80 w33", " ".join(f"w{4 + at % 90}" for at in range(40)), "w7 w8"]


def write(
    root: Path, name: str, *, prefix: bool = True, bits: int = 0, **changes: Any
) -> tuple[Any, Path]:
    """Write a model; return mlx-lm's model with its head. The end token is [SEP], 2."""
    config = {**CONFIGS[name], **changes}
    kind = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(3)
    model = kind.Model(kind.ModelArgs.from_dict(config))
    if bits:
        model, config = quantize_model(model, dict(config), 32, bits)
    weights = dict(tree_flatten(model.parameters()))
    if not prefix:
        weights = {
            key.removeprefix("model."): value
            for key, value in weights.items()
            if not key.startswith("lm_head")
        }
    mx.save_safetensors(str(root / "model.safetensors"), weights, metadata={"format": "pt"})
    (root / "config.json").write_text(json.dumps(config))
    write_tokenizer(root, 96, appends="[SEP]")
    return model, root


def load(root: Path) -> Embedder:
    model = load_embedder(ModelFiles.from_directory(root), device="cpu")
    assert isinstance(model, Embedder)
    return model


def expected(model: Any, tokens: list[int], *, mean: bool = False) -> np.ndarray:
    """Return the unit vector of one text, run alone through the whole model."""
    inner = model.model if "model" in model else model.transformer
    hidden = inner(mx.array([tokens]))
    # They are the last hidden states, because the head turns them into the model's logits.
    head = model.lm_head if "lm_head" in model else getattr(inner, "embed_tokens", None)
    if head is not None and "gemma2" not in type(model).__module__:
        logits = head(hidden) if "lm_head" in model else head.as_linear(hidden)
        assert np.allclose(np.array(logits), np.array(model(mx.array([tokens]))), atol=1e-5)
    vector = np.array(hidden[0].mean(axis=0) if mean else hidden[0, -1], np.float64)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [(name, prefix) for name in CONFIGS for prefix in (True, False) if prefix or name != "gpt2"],
)
def test_the_last_token_of_each(name: str, prefix: bool, tmp_path: Path) -> None:
    whole, root = write(tmp_path, name, prefix=prefix)
    write_modules(root, LAST, ("Normalize", {}))
    model = load(root)
    assert purpose_of(ModelFiles.from_directory(root)) == "embedding"
    assert model.config.pooling == ("lasttoken",)
    # mlx-lm's gemma2 has no window: no text may be longer than that.
    longest = CONFIGS[name].get("sliding_window", 128)
    assert (model.config.dimension, model.config.max_length) == (64, longest)
    embedded = model.embed(TEXTS)
    assert embedded.token_counts == (2, 5, 41, 3)  # each with the token that ends it
    for text, vector in zip(TEXTS, embedded.vectors, strict=True):
        tokens = [*(int(word[1:]) for word in text.split()), 2]
        assert np.abs(vector - expected(whole, tokens)).max() < 1e-5
    together = model.run(model.read(TEXTS, _options()))  # of different lengths
    assert np.abs(np.array(together) - np.array(embedded.vectors)).max() < 1e-5


def _options() -> Any:
    from modelpack_engine.embedding import EmbedOptions

    return EmbedOptions()


def test_rotations_are_scaled_where_the_class_ignores_it(tmp_path: Path) -> None:
    plain, root = write(tmp_path, "gemma2")
    text = "w9 w11 w80 w33"
    [before] = load(root).embed([text]).vectors
    (tmp_path / "yarn").mkdir()
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    _, root = write(tmp_path / "yarn", "gemma2", rope_scaling=scaling)
    for layer in plain.layers:
        layer.self_attn.rope = YarnRoPE(16, False, 128, 10000.0, 4.0, 32)
    [vector] = load(root).embed([text]).vectors
    right = expected(plain, [9, 11, 80, 33, 2])
    assert np.abs(vector - right).max() < 1e-5
    assert np.abs(before - right).max() > 1e-3


def test_mean_where_its_files_say_so(tmp_path: Path) -> None:
    whole, root = write(tmp_path, "qwen3")
    write_modules(root, ("Pooling", {"pooling_mode_mean_tokens": True}), ("Normalize", {}))
    [vector] = load(root).embed(["w9 w11 w80"]).vectors
    assert np.abs(vector - expected(whole, [9, 11, 80, 2], mean=True)).max() < 1e-5


def test_quantised(tmp_path: Path) -> None:
    whole, root = write(tmp_path, "qwen3", bits=8)
    write_modules(root, LAST, ("Normalize", {}))
    [vector] = load(root).embed(["w9 w11 w80"]).vectors
    assert np.abs(vector - expected(whole, [9, 11, 80, 2])).max() < 1e-3


def test_without_modules_it_generates_unless_asked(tmp_path: Path) -> None:
    _, root = write(tmp_path, "qwen3")
    assert purpose_of(ModelFiles.from_directory(root)) == "generation"
    model = load(root)
    assert model.config.pooling == ("lasttoken",)
    assert model.config.normalize
    assert any("modules.json" in note for note in model.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"is_causal": False}, "is_causal"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "cross-encoder .* 'qwen3'"),
        ({"model_type": "t5"}, "'t5' is not supported"),
    ],
)
def test_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, root = write(tmp_path, "qwen3")
    config = {**CONFIGS["qwen3"], **changes}
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=said):
        load(root)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    _, root = write(tmp_path, "qwen3")
    path = root / "model.safetensors"
    tensors = {name: mx.array(np.array(array)) for name, array in mx.load(str(path)).items()}
    del tensors["model.norm.weight"]
    path.unlink()
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        load(root)
