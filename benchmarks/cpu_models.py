"""The models of cpu.py: SmolLM2-135M, and random weights of Llama-3.2-1B's shape.

Each is made once, in a directory that later runs can use again: in bf16 as safetensors with a
configuration, and as GGUF in the file types that llama.cpp writes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.models import ModelFiles
from modelpack_engine.models.loader import gguf_tokenizer_of
from tests.engine.loaders.vocabularies import GOLDEN
from tests.engine.real.export import CONFIG, add_tokenizer, save, write_export

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "head_dim": 64,
    **CONFIG,
}
LLAMA_1B: dict[str, Any] = {
    **SMOLLM2,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
CONFIGS: dict[str, dict[str, Any]] = {"smollm2": SMOLLM2, "llama-1b": LLAMA_1B}
FORMATS = ("bf16", "q4_1", "q4_k_m", "q8_0", "q4_0")


def kv_bytes_per_token(model: str) -> int:
    """Return the bytes of a token's keys and values in 16 bits."""
    config = CONFIGS[model]
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return int(2 * heads * config["head_dim"] * 2)


def prepare(model: str, file_type: str, directory: Path, llama_cpp: str | None) -> Path:
    """Return the file or directory of `model` in `file_type`; make it if it does not exist.

    `llama_cpp` is the Python that quantises.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if file_type == "bf16":
        return _safetensors(model, directory)
    if (model, file_type) == ("smollm2", "q4_1"):
        return smollm2_gguf()
    target = directory / f"{model}-{file_type}.gguf"
    if not target.exists():
        if llama_cpp is None:
            raise SystemExit(f"{target.name} cannot be made: MODELPACK_LLAMA_CPP_PYTHON is not set")
        source = smollm2_gguf() if model == "smollm2" else _random_gguf(directory)
        _quantise(source, target, file_type, llama_cpp)
    return target


def size_of(path: Path) -> int:
    """Return the bytes of the weights."""
    return (path / "model.safetensors" if path.is_dir() else path).stat().st_size


def _safetensors(model: str, directory: Path) -> Path:
    target = directory / f"{model}-bf16"
    if not (target / "tokenizer.json").exists():
        target.mkdir(exist_ok=True)
        if model == "smollm2":
            weights = mx.load(str(write_export(target) / "model.safetensors"))
            assert isinstance(weights, dict)
        else:
            weights = _random_weights()
        halves = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
        mx.eval(halves)
        save(target, halves, CONFIGS[model])
        add_tokenizer(target, gguf_tokenizer_of(ModelFiles.from_directory(smollm2_gguf())))
    return target


def _random_weights() -> dict[str, mx.array]:
    """Return random weights of the 1B model, by the names of transformers."""
    mx.random.seed(0)
    hidden, inner = LLAMA_1B["hidden_size"], LLAMA_1B["intermediate_size"]
    queries, keys = LLAMA_1B["num_attention_heads"] * 64, LLAMA_1B["num_key_value_heads"] * 64

    def matrix(rows: int, columns: int) -> mx.array:
        made = (mx.random.normal((rows, columns)) * 0.02).astype(mx.bfloat16)
        mx.eval(made)
        return made

    weights = {
        "model.embed_tokens.weight": matrix(LLAMA_1B["vocab_size"], hidden),
        "model.norm.weight": mx.ones(hidden),
    }
    for layer in range(LLAMA_1B["num_hidden_layers"]):
        matrices = {
            "self_attn.q_proj": matrix(queries, hidden),
            "self_attn.k_proj": matrix(keys, hidden),
            "self_attn.v_proj": matrix(keys, hidden),
            "self_attn.o_proj": matrix(hidden, queries),
            "mlp.gate_proj": matrix(inner, hidden),
            "mlp.up_proj": matrix(inner, hidden),
            "mlp.down_proj": matrix(hidden, inner),
            "input_layernorm": mx.ones(hidden),
            "post_attention_layernorm": mx.ones(hidden),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": m for name, m in matrices.items()}
    return weights


def _random_gguf(directory: Path) -> Path:
    """Write the random weights as GGUF in f16, with SmolLM2's tokenizer and unused tokens."""
    target = directory / "llama-1b-f16.gguf"
    if target.exists():
        return target
    config, vocabulary = LLAMA_1B, gguf.GGUFReader(smollm2_gguf()).fields
    writer = gguf.GGUFWriter(target.with_suffix(".part"), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tokens = vocabulary["tokenizer.ggml.tokens"].contents()
    types = vocabulary["tokenizer.ggml.token_type"].contents()
    unused = range(len(tokens), config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *(f"[unused{at}]" for at in unused)])
    writer.add_token_types([*types, *(gguf.TokenType.UNUSED for _ in unused)])
    writer.add_token_merges(vocabulary["tokenizer.ggml.merges"].contents())
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in _random_weights().items():
        dtype = mx.float32 if weight.ndim == 1 else mx.float16
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None
        writer.add_tensor(found, np.array(weight.astype(dtype)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target.with_suffix(".part").rename(target)


def _quantise(source: Path, target: Path, file_type: str, python: str) -> None:
    job, answers = target.with_suffix(".json"), target.with_suffix(".answers")
    part = target.with_suffix(".part")
    task = {"task": "quantize", "source": str(source), "target": str(part)}
    job.write_text(json.dumps([{**task, "type": file_type.upper()}]))
    subprocess.run(
        [python, str(GOLDEN / "oracle.py"), str(job), str(answers)], check=True, capture_output=True
    )
    [answer] = json.loads(answers.read_text())
    if answer["code"] != 0:
        raise SystemExit(f"{target.name} cannot be made: llama_model_quantize: {answer['code']}")
    part.rename(target)
    job.unlink()
    answers.unlink()
