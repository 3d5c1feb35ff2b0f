"""Ids and positions beyond a model's tables, for which MLX would read other memory, fail."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from modelpack_engine.config import EngineConfig
from modelpack_engine.embedding.embedder import CrossEncoder, Embedder
from modelpack_engine.embedding.loader import Decoder, load_embedder
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_engine.models import ModelFiles
from tests.engine.embedding.models import write_model
from tests.engine.loaders.test_safetensors import load_cpu, save
from tests.engine.loaders.tiny_models import TINY_MODELS
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import COMMON

FAR = 10**8


def changed_tokenizer(root: Path, kind: str, number: int = FAR) -> None:
    """Change tokenizer.json to give an id or a type that the model's tables do not have."""
    path = root / "tokenizer.json"
    document: dict[str, Any] = json.loads(path.read_text())
    processor = document["post_processor"]
    match kind:
        case "word":
            document["model"]["vocab"]["w5"] = number
        case "special":
            processor["special_tokens"]["[CLS]"]["ids"] = [number]
        case "type":
            processor["single"][1]["Sequence"]["type_id"] = number
        case "pair":
            processor["pair"][3]["Sequence"]["type_id"] = number
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("kind", ["word", "special", "type"])
@pytest.mark.parametrize("number", [96, FAR])
def test_an_encoder_reads_no_row_that_it_has_not(kind: str, number: int, tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    changed_tokenizer(tmp_path, kind, number)
    model = load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")
    assert isinstance(model, Embedder)
    with pytest.raises(
        RequestError, match=f"input 0 contains the token.* {number}, but the .* has"
    ):
        model.embed(["w4 w5"])
    with pytest.raises(
        RequestError, match="input 1 contains the token 96, but the vocabulary has 96"
    ):
        model.embed([[4], [96]])


def test_types_of_pairs(tmp_path: Path) -> None:
    config = {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    head = {"classifier.weight": mx.zeros((1, 32)), "classifier.bias": mx.zeros((1,))}
    entry = write_model(tmp_path, "bert", config=config, extra=head)
    changed_tokenizer(entry, "pair")
    model = load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")
    assert isinstance(model, CrossEncoder)
    with pytest.raises(RequestError, match=f"contains the token type {FAR}, but the model has 2"):
        model.score([("w4", "w5")])


def test_types_that_a_model_does_not_read(tmp_path: Path) -> None:
    write_model(tmp_path, "distilbert")
    changed_tokenizer(tmp_path, "type")
    model = load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")
    assert isinstance(model, Embedder)
    assert len(model.embed(["w4 w5"]).vectors) == 1


def write_gpt2(root: Path, **changes: Any) -> Path:
    from mlx_lm.models import gpt2

    config = {
        "model_type": "gpt2", "n_ctx": 16, "n_positions": 16, "n_embd": 32, "n_head": 2,
        "n_layer": 1, "layer_norm_epsilon": 1e-5, "vocab_size": 256,
    }  # fmt: skip
    model = gpt2.Model(gpt2.ModelArgs.from_dict(config))
    return save(root, model, config | changes)


def test_the_context_ends_with_the_table_of_positions(tmp_path: Path) -> None:
    root = write_gpt2(tmp_path, max_position_embeddings=100_000)
    assert load_cpu(root).context_length == 16


def test_a_table_of_tokens_that_is_too_small(tmp_path: Path) -> None:
    args = next(c for c in CATALOGUE if c.architecture == "gemma4_text").args
    config = {**COMMON, "model_type": "gemma4_text", **args}
    config |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 3}
    module = importlib.import_module("mlx_lm.models.gemma4_text")
    model = module.Model(module.ModelArgs.from_dict(config))
    assert "embed_tokens_per_layer" in " ".join(dict(tree_flatten(model.parameters())))
    loaded = load_cpu(save(tmp_path, model, config))
    with pytest.raises(ModelLoadError, match="256 tokens, but a table of embeddings has 3 rows"):
        Engine(loaded, EngineConfig(device="cpu", kv_cache_bytes=2**22, max_num_seqs=2))


def test_a_decoder_counts_the_rows_that_it_has() -> None:
    """The limit is not the config's vocab_size, which may differ from the text model's."""
    tiny = TINY_MODELS["llama"]
    decoder = Decoder(tiny.build(), {**tiny.config, "vocab_size": FAR})
    assert decoder.vocab_size == tiny.config["vocab_size"]
