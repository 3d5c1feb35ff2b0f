"""The files of an embedding model: modules in directories, and tokenizers of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack_engine.models import ModelFiles
from modelpack_engine.models.json_tokenizer import tokenizer_of

MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def lay_out(root: Path, modules: object = MODULES) -> Path:
    for directory in ("1_Pooling", "2_Dense", "other"):
        (root / directory).mkdir()
        (root / directory / "config.json").write_text("{}")
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "config.json").write_text('{"model_type": "bert"}')
    for path in (root, root / "2_Dense"):
        mx.save_safetensors(str(path / "model.safetensors"), {"x": mx.zeros((2,))})
    return root


def in_store(root: Path, tmp_path: Path) -> ModelFiles:
    store = LayoutStore(tmp_path / "store")
    modelpack.package("e", modelpack.PackageRequest(safetensors_dir=root), store=store)
    return ModelFiles.from_model(modelpack.resolve("e", store=store).model, store.blob_path)


@pytest.mark.parametrize("where", ["directory", "store"])
def test_modules_are_beside_the_model(where: str, tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    lay_out(root)
    files = ModelFiles.from_directory(root) if where == "directory" else in_store(root, tmp_path)
    assert len(files.weights) == 1
    assert files.json("1_Pooling/config.json") == {}
    dense = files.names["2_Dense/model.safetensors"]
    assert dense.read_bytes() == (root / "2_Dense/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "modules",
    [{}, "x", [[]], [{}, {"path": "../other"}], [{}, {"path": "/etc"}], [{}, {"path": 1}], []],
)
def test_odd_modules_lead_nowhere(modules: object, tmp_path: Path) -> None:
    files = ModelFiles.from_directory(lay_out(tmp_path, modules))
    assert all("/" not in name for name in files.names)


def test_weights_elsewhere_are_those_of_other_models(tmp_path: Path) -> None:
    """As in a directory: modules.json does not name the folder."""
    root = tmp_path / "model"
    root.mkdir()
    lay_out(root, modules=MODULES[:2])
    files = in_store(root, tmp_path)
    assert [path.read_bytes() for path in files.weights] == [
        (root / "model.safetensors").read_bytes()
    ]
    assert "2_Dense/model.safetensors" not in files.names
    assert files.notes == ("weights in folders are left out: 2_Dense/model.safetensors",)


def test_pairs_are_typed_and_cut(minilm: Path) -> None:
    tokenizer = tokenizer_of(ModelFiles.from_directory(minilm), {})
    cls, sep = 101, 102
    one = tokenizer.encode_typed("a cat")
    assert one == (tokenizer.encode("a cat"), [0] * 4)
    ids, types = tokenizer.encode_typed("a cat", "sat on the mat")
    assert ids == [cls, *one[0][1:-1], sep, *tokenizer.encode("sat on the mat")[1:]]
    assert types == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    cut, cut_types = tokenizer.encode_typed("a cat", "sat on the mat", max_length=7)
    assert cut == [*ids[:6], sep]
    assert cut_types == types[:7]
    assert tokenizer.encode_typed("a cat", max_length=3)[0] == [cls, ids[1], sep]
    assert tokenizer.encode_typed("a cat \ud800")[0][0] == cls  # nothing else is cut
    assert len(tokenizer.encode("word " * 50)) == 52
