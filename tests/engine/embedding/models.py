"""Directories of tiny embedding models, for the loader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

from tests.engine.embedding import tiny

GOLDEN = Path(__file__).parent / "golden"

#: 0 to 3 are special; the rest are words w4, w5, ….
PAD, CLS, SEP, UNK = range(4)


def golden(name: str) -> Any:
    """Return the content of a file that `make_goldens.py` wrote."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def write_tokenizer(root: Path, vocab_size: int, *, appends: str = "") -> None:
    """Write a tokenizer of words; it adds only the special token `appends`, at the end."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{at}" for at in range(4, vocab_size))]
    tokenizer = Tokenizer(WordLevel({name: at for at, name in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names[:4])
    if appends:
        ends = [(appends, names.index(appends))]
        tokenizer.post_processor = processors.TemplateProcessing(f"$A {appends}", None, ends)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", CLS), ("[SEP]", SEP)]
        )
    (root / "tokenizer.json").write_text(tokenizer.to_str())


def write_model(
    root: Path,
    name: str,
    *,
    prefix: str = "",
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    """Write the tiny model `name` of the goldens as transformers saves it."""
    entry = golden("tiny")[name]
    weights = tiny.weights(entry["shapes"])
    weights.pop(without, None)
    tensors = {f"{prefix}{key}": mx.array(value) for key, value in weights.items()}
    tensors |= {key: mx.array(value) for key, value in (extra or {}).items()}
    mx.save_safetensors(str(root / "model.safetensors"), tensors)
    (root / "config.json").write_text(json.dumps({**entry["config"], **(config or {})}))
    write_tokenizer(root, entry["config"]["vocab_size"])
    return root


def write_nomic(root: Path) -> Path:
    """Write the tiny nomic_bert model as its own code saves it, with fused attention weights."""
    write_model(root, "nomic_bert")
    path = root / "model.safetensors"
    old = {name: mx.array(np.array(array)) for name, array in mx.load(str(path)).items()}
    new = {}
    for name, array in old.items():
        if "_proj" in name and "self_attn" in name and "o_proj" not in name:
            continue
        for before, after in (
            ("layers.", "encoder.layers."),
            ("embeddings.LayerNorm", "emb_ln"),
            ("self_attn.o_proj", "attn.out_proj"),
            ("up_proj", "fc11"),
            ("gate_proj", "fc12"),
            ("down_proj", "fc2"),
            ("post_attention_layernorm", "norm1"),
            ("post_mlp_layernorm", "norm2"),
        ):
            name = name.replace(before, after)
        new[name] = array
    for layer in range(2):
        parts = [old[f"layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        new[f"encoder.layers.{layer}.attn.Wqkv.weight"] = mx.concatenate(parts, axis=0)
    path.unlink()
    mx.save_safetensors(str(path), new)
    config = {
        "model_type": "nomic_bert", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_inner": 48, "activation_function": "swiglu", "type_vocab_size": 2, "prenorm": False,
        "rotary_emb_fraction": 1.0, "rotary_emb_base": 1000, "qkv_proj_bias": False,
        "mlp_fc1_bias": False, "layer_norm_epsilon": 1e-12, "max_trained_positions": 160,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))
    return root


def write_modules(root: Path, *modules: tuple[str, Mapping[str, Any]]) -> None:
    """Write modules.json: a Transformer, then a directory and a config for each module."""
    listed = [("", "Transformer")]
    for number, (kind, config) in enumerate(modules, start=1):
        directory = f"{number}_{kind}"
        (root / directory).mkdir(exist_ok=True)
        (root / directory / "config.json").write_text(json.dumps(config))
        listed.append((directory, kind))
    entries = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(listed)
    ]
    (root / "modules.json").write_text(json.dumps(entries))
