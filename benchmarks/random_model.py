"""Write a model with random weights of a published shape, for servers that read directories.

    python benchmarks/random_model.py DIRECTORY [--shape llama-8b] [--layers 4] [--seed 7]

The weights are bfloat16 and normal with a deviation of 0.02. The tokenizer has every word of the
prompts of `modelpack bench` as one token, so that prompts have the lengths that were asked for.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import mlx.core as mx
from gpu_engine import COMMON, CONTEXT, SHAPES, VOCABULARY
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modelpack_server.bench.server import text_of

BEGIN, END = "<begin>", "<end>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
SHARD_BYTES = 4 << 30


def write(directory: Path, shape: str, layers: int | None, seed: int) -> None:
    """Write the configuration, the tokenizer and the weights of `shape` into `directory`.

    `layers` replaces the shape's number of layers.
    """
    directory.mkdir(parents=True)
    module, own = SHAPES[shape]
    if layers is not None:
        own = own | {"num_hidden_layers": layers}
    config = COMMON | own | {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    model = module.Model(module.ModelArgs.from_dict(config))
    published = {
        "architectures": [ARCHITECTURES[config["model_type"]]],
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
    }
    (directory / "config.json").write_text(json.dumps(config | published))
    _write_tokenizer(directory)
    mx.random.seed(seed)
    _write_weights(directory, {name: leaf.shape for name, leaf in tree_flatten(model.parameters())})


def _write_weights(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        own = 2 * math.prod(shape)
        if size + own > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += own
    files: dict[str, str] = {}
    for at, shard in enumerate(shards):
        file = f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        weights = {name: _random(shape) for name, shape in shard.items()}
        mx.eval(weights)
        mx.save_safetensors(str(directory / file), weights, {"format": "pt"})
        files |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def _random(shape: tuple[int, ...]) -> mx.array:
    if len(shape) == 1:
        return mx.ones(shape, mx.bfloat16)
    return (mx.random.normal(shape, mx.float32) * 0.02).astype(mx.bfloat16)


def _write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE whose merges build the words of prompts from left to right."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in sorted(set(text_of(range(4096)).split())):
        built = "Ġ"
        for letter in word:
            if (built, letter) not in merges:
                merges.append((built, letter))
                tokens.append(built + letter)
            built += letter
    tokens += [f"w{at}" for at in range(VOCABULARY - 2 - len(tokens))]
    vocabulary = {token: at for at, token in enumerate([*tokens, BEGIN, END])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BEGIN,
                "eos_token": END,
                "chat_template": TEMPLATE,
                "model_max_length": CONTEXT,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--layers", type=int, help="instead of the shape's number")
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args()
    write(chosen.directory, chosen.shape, chosen.layers, chosen.seed)


if __name__ == "__main__":
    main()
