"""SmolLM2 as transformers has it: the GGUF file turned into safetensors by the gguf package."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import mlx.core as mx

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.models import Tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


def write_export(directory: Path) -> Path:
    """Write model.safetensors in float32 and config.json into `directory`."""
    reader = gguf.GGUFReader(smollm2_gguf())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    hf = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for layer in range(30):
        for part in _PARTS:
            name = f"model.layers.{layer}.{part}.weight"
            hf[str(names.get_name(name, try_suffixes=(".weight",)))] = name
    weights = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = hf[tensor.name]
        for part, heads in ((".q_proj.", 9), (".k_proj.", 3)):
            if part in name:  # conversion/llama.py: permute, the other way round
                values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2)
                values = values.reshape(-1, values.shape[-1])
        weights[name] = mx.array(values)
    save(directory, weights, CONFIG)
    return directory


def save(directory: Path, weights: dict[str, mx.array], config: object) -> None:
    """Write one file of weights and the config."""
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))


def add_tokenizer(directory: Path, tokenizer: Tokenizer) -> Path:
    """Put tokenizer.json beside the weights, and the chat template of the GGUF file."""
    (directory / "tokenizer.json").write_text(tokenizer._backend.to_str())
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return directory
