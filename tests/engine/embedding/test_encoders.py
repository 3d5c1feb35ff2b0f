"""Every architecture compared with transformers' results, and rejected configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.embedding import CrossEncoder, Embedder, load_embedder, purpose_of
from modelpack_engine.embedding.encoder_checkpoint import load_encoder
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles
from tests.engine.embedding import tiny
from tests.engine.embedding.models import golden, write_model, write_nomic

#: The tolerance: float32 sums are in another order than torch's.
TOLERANCE = 2e-5
EMBEDDING = [name for name in tiny.CONFIGS if not name.startswith("rank-")]
RANKING = [name for name in tiny.CONFIGS if name.startswith("rank-")]
PREFIXES = {
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "distilbert": "distilbert.",
    "mpnet": "mpnet.",
    "modernbert": "model.",
}


def results(root: Path) -> list[np.ndarray]:
    files = ModelFiles.from_directory(root)
    config = files.json("config.json")
    assert config is not None
    encoder = load_encoder(files, config, mx.float32)
    found = []
    for ids, types in tiny.inputs(config["vocab_size"]):
        lengths = mx.array([len(ids)])
        hidden = encoder(mx.array([ids]), lengths, mx.array([types]))
        if encoder.config.num_labels:
            found.append(np.array(encoder.classify(hidden, lengths)[0]))
        else:
            found.append(np.array(hidden[0].mean(axis=0)))
    return found


def assert_golden(root: Path, name: str) -> None:
    for got, want in zip(results(root), golden("tiny")[name]["results"], strict=True):
        assert got.shape == (len(want),)
        assert np.abs(got - np.array(want)).max() < TOLERANCE


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_as_transformers(name: str, tmp_path: Path) -> None:
    root = write_model(tmp_path, name)
    assert_golden(root, name)
    purpose = "ranking" if name in RANKING else "embedding"
    assert purpose_of(ModelFiles.from_directory(root)) == purpose


@pytest.mark.parametrize("name", list(PREFIXES))
def test_saved_with_a_head(name: str, tmp_path: Path) -> None:
    """A prefix, a buffer and a training head do not change the result."""
    zeros = np.zeros((2, 2), np.float32)
    extra = {"lm_head.dense.weight": zeros, "cls.predictions.bias": zeros}
    assert_golden(write_model(tmp_path, name, prefix=PREFIXES[name], extra=extra), name)


def test_names_of_old(tmp_path: Path) -> None:
    """BERT's first checkpoints call a norm's weights gamma and beta, and save position ids."""
    root = write_model(tmp_path, "bert")
    path = root / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): mx.array(np.array(array))
        for name, array in mx.load(str(path)).items()
    }
    tensors["embeddings.position_ids"] = mx.arange(160)[None]
    path.unlink()
    mx.save_safetensors(str(path), tensors)
    assert_golden(root, "bert")


def test_names_of_nomics_own_code(tmp_path: Path) -> None:
    assert_golden(write_nomic(tmp_path), "nomic_bert")


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_a_batch_is_as_each_alone(name: str, tmp_path: Path) -> None:
    model = load_embedder(ModelFiles.from_directory(write_model(tmp_path, name)), device="cpu")
    texts = [" ".join(f"w{4 + (at * at) % 90}" for at in range(count)) for count in (1, 9, 30, 60)]
    if name in RANKING:
        assert isinstance(model, CrossEncoder)
        pairs = [(text, "w7 w8") for text in texts]
        together = model.run(model.read(pairs, truncate=False))
        alone = [model.run(model.read([pair], truncate=False))[0] for pair in pairs]
    else:
        assert isinstance(model, Embedder)
        prepared = model.read(texts, options=_options())
        together = model.run(prepared)
        alone = [model.run([each])[0] for each in prepared]
    assert np.abs(np.array(together) - np.array(alone)).max() < 1e-5


def _options() -> Any:
    from modelpack_engine.embedding import EmbedOptions

    return EmbedOptions()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "t5"}, "t5"),
        ({"model_type": "xlnet"}, "xlnet"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "mish"}, "mish"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization": {"bits": 4}}, "quantization"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        (
            {"num_attention_heads": 5},
            "hidden_size is 32, expected a multiple of the 5 attention heads",
        ),
        ({"num_hidden_layers": 3}, "missing layers.2"),
        ({"num_hidden_layers": 1}, "not known to the model: encoder.layer.1|layers.1"),
        ({"vocab_size": 97}, r"embeddings.word.weight has the shape \[96, 32\]"),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 3}, "missing head.out"),
    ],
)
def test_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    files = ModelFiles.from_directory(write_model(tmp_path, "bert", config=change))
    with pytest.raises(ModelLoadError, match=said):
        load_encoder(files, files.json("config.json") or {}, None)


@pytest.mark.parametrize("name", ["modernbert", "nomic_bert"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor '0.5'"),
        ({"rope_parameters": [1000.0]}, "rope_parameters is not an object"),
    ],
)
def test_rotations_that_are_not_computed_are_refused(
    name: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    files = ModelFiles.from_directory(write_model(tmp_path, name, config=change))
    with pytest.raises(ModelLoadError, match=said):
        load_encoder(files, files.json("config.json") or {}, None)


def test_tensors_are_exactly_those_of_the_model(tmp_path: Path) -> None:
    odd = {"encoder.layer.0.adapter.weight": np.zeros((2, 2), np.float32)}
    files = ModelFiles.from_directory(write_model(tmp_path, "bert", extra=odd))
    with pytest.raises(ModelLoadError, match=r"not known to the model: encoder\.layer\.0\.adapter"):
        load_embedder(files, device="cpu")
    name = "encoder.layer.1.output.dense.bias"
    files = ModelFiles.from_directory(write_model(tmp_path, "bert", without=name))
    with pytest.raises(ModelLoadError, match=r"missing layers\.1\.mlp\.down\.bias"):
        load_embedder(files, device="cpu")


def test_several_labels_do_not_rank(tmp_path: Path) -> None:
    root = write_model(tmp_path, "rank-bert", config={"num_labels": 2, "id2label": None})
    path = root / "model.safetensors"
    tensors = {name: mx.array(np.array(array)) for name, array in mx.load(str(path)).items()}
    tensors |= {"classifier.weight": mx.zeros((2, 32)), "classifier.bias": mx.zeros((2,))}
    path.unlink()
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(ModelLoadError, match="2 labels"):
        load_embedder(ModelFiles.from_directory(root), device="cpu")


def test_long_texts_are_attended_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bert", "mpnet", "modernbert"):
        root = tmp_path / name
        root.mkdir()
        write_model(root, name)
        with monkeypatch.context() as patch:
            patch.setattr("modelpack_engine.embedding.encoder._QUERY_CHUNK", 37)
            assert_golden(root, name)
