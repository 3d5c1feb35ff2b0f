"""Tiny random models of every architecture, and their inputs.

Imports only numpy, because `make_goldens.py` runs where the engine is not installed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
}
_MODERNBERT = {
    **_SIZES,
    "model_type": "modernbert",
    "num_hidden_layers": 4,
    "local_attention": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 96,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 160,
}
_NOMIC = {**_SIZES, "model_type": "nomic_bert", "hidden_act": "silu", "type_vocab_size": 2}

#: config.json by the name of the tiny model.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bert": {**_SIZES, "model_type": "bert", "type_vocab_size": 2},
    "bert-relu": {**_SIZES, "model_type": "bert", "hidden_act": "relu", "type_vocab_size": 2},
    "bert-gelu-new": {
        **_SIZES,
        "model_type": "bert",
        "hidden_act": "gelu_new",
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-5,
    },
    "roberta": {**_SIZES, "model_type": "roberta", "type_vocab_size": 1},
    "xlm-roberta": {
        **_SIZES,
        "model_type": "xlm-roberta",
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "camembert": {**_SIZES, "model_type": "camembert", "type_vocab_size": 1},
    "distilbert": _DISTILBERT,
    "mpnet": {**_SIZES, "model_type": "mpnet"},
    "modernbert": _MODERNBERT,
    "nomic_bert": _NOMIC,
    "rank-bert": {**_SIZES, "model_type": "bert", "type_vocab_size": 2, "num_labels": 1},
    "rank-xlm-roberta": {
        **_SIZES,
        "model_type": "xlm-roberta",
        "type_vocab_size": 1,
        "num_labels": 1,
    },
    "rank-distilbert": {**_DISTILBERT, "num_labels": 1},
    "rank-mpnet": {**_SIZES, "model_type": "mpnet", "num_labels": 1},
    "rank-modernbert": {**_MODERNBERT, "num_labels": 1},
    "rank-modernbert-mean": {**_MODERNBERT, "num_labels": 1, "classifier_pooling": "mean"},
}

POOLING_LENGTHS = (7, 3, 5)
POOLING_MODES: Sequence[tuple[str, ...]] = (
    ("cls",),
    ("max",),
    ("mean",),
    ("mean_sqrt_len_tokens",),
    ("weightedmean",),
    ("lasttoken",),
    ("cls", "max", "mean"),
)

SENTENCES = [
    "The cat sat on the mat.",
    "A feline rested upon a rug.",
    "Interest rates were raised by half a point.",
    "Déjà vu: naïve café, 東京タワー, Привет, мир! 🙂",
    "x",
    "   spaces   and\ttabs\n\nand lines ",
    "[CLS] special [SEP] tokens [MASK]",
    "import numpy as np; print(np.arange(10) ** 2)",
    "A long one. " * 20,
]


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return random weights, equal on every machine: numpy guarantees RandomState's stream."""
    made = {}
    for name, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        near = 1.0 if name.lower().endswith("norm.weight") else 0.0
        made[name] = (near + 0.3 * values).astype(np.float32)
    return made


def inputs(vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """Return token ids with their types: one token, a few with padding's id among them, many."""
    random = np.random.RandomState(7)
    many = [int(at) for at in random.randint(4, vocab_size, 150)]
    few = [2, 17, 5, 1, 0, 40, 3]
    return [([9], [0]), (few, [0, 0, 0, 0, 1, 1, 1]), (many, [0] * 60 + [1] * 90)]
