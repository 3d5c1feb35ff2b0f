"""BERT and nomic-bert as llama.cpp's converter writes them: gguf-py's names, WordPiece with ▁.

Source: llama.cpp conversion/bert.py (BertModel.set_vocab, BertModel.modify_tensors,
NomicBertModel.set_gguf_parameters).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from tests.engine.loaders.vocabularies import Vocabulary

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def convert(
    source: Path,
    target: Path,
    *,
    half: bool = False,
    pooling: int = 1,
    byte_level: Vocabulary | None = None,
) -> Path:
    """Write the model in the directory `source` as a GGUF file; return `target`.

    `byte_level` is written as RoBERTa's vocabulary, instead of the WordPiece of `source`.
    """
    config = json.loads((source / "config.json").read_text())
    nomic = config["model_type"] == "nomic_bert"
    kind = gguf.MODEL_ARCH.NOMIC_BERT if nomic else gguf.MODEL_ARCH.BERT

    def field(*keys: str) -> Any:
        return next(config[key] for key in keys if key in config)

    writer = gguf.GGUFWriter(str(target), gguf.MODEL_ARCH_NAMES[kind])
    writer.add_name("minilm")
    writer.add_context_length(field("max_position_embeddings", "max_trained_positions"))
    writer.add_embedding_length(field("hidden_size", "n_embd"))
    num_layers = field("num_hidden_layers", "n_layer")
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(field("intermediate_size", "n_inner"))
    writer.add_head_count(field("num_attention_heads", "n_head"))
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", config.get("layer_norm_eps", 1e-12)))
    if nomic:
        writer.add_rope_freq_base(config["rotary_emb_base"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    if byte_level is None:
        _add_vocabulary(writer, source)
    else:
        add_roberta(writer, byte_level)
    names = gguf.get_tensor_name_map(kind, num_layers)
    for name, array in mx.load(str(source / "model.safetensors")).items():
        if name.endswith("position_ids") or name.startswith("pooler."):
            continue
        values = np.array(array.astype(mx.float32))
        if half and values.ndim > 1 and "position" not in name and "token_type" not in name:
            values = values.astype(np.float16)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        writer.add_tensor(known, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def add_roberta(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write a byte-level vocabulary whose texts begin and end with special tokens."""
    vocabulary.add_to(writer, pre="roberta-bpe", special=("bos", "eos"))
    writer.add_sep_token_id(vocabulary.id("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_token_type_count(2)


def _add_vocabulary(writer: gguf.GGUFWriter, source: Path) -> None:
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens, types = [], []
    for piece in pieces:
        special = piece in _SPECIAL
        bare = piece.removeprefix("##")
        tokens.append(piece if special else bare if bare != piece else f"▁{piece}")
        types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_type_count(2)
    for name, piece in (("pad", "[PAD]"), ("unk", "[UNK]"), ("bos", "[CLS]"), ("sep", "[SEP]")):
        getattr(writer, f"add_{name}_token_id")(vocabulary[piece])
