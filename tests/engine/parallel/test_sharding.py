"""The part of a model that a rank holds, and models that cannot be divided."""

from __future__ import annotations

import gc
import json
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2, llama

from modelpack_engine.distributed.sharding import check_sizes, shard
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.models.files import ModelFiles as Files
from modelpack_engine.patches.lora import dense_weight
from tests.engine.serving.tiny import tiny_model, tiny_tokenizer
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import COMMON


class Ranks:
    """A group without ranks, for which a model can be divided but not run."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def group(rank: int, size: int) -> mx.distributed.Group:
    return cast("mx.distributed.Group", Ranks(rank, size))


HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [
        ("llama", HEADS, 8),
        ("llama", {"text_config": HEADS}, 4),
        ("deepseek_v3", {**HEADS, "num_key_value_heads": 3, "kv_lora_rank": 64}, 16),
        ("qwen3_5", {**HEADS, "num_key_value_heads": 2}, 4),
        ("llama", {}, 7),
    ],
)
def test_sizes_that_can_be_divided(name: str, config: dict[str, Any], size: int) -> None:
    check_sizes(name, config, size)


@pytest.mark.parametrize(
    ("name", "config", "size", "text", "hint"),
    [
        ("llama", HEADS, 3, "llama has 32 attention heads, which 3 devices", "[2, 4, 8, 16, 32]"),
        ("llama", HEADS, 16, "8 key-value heads, which 16 devices", "[2, 4, 8]"),
        ("smol", {"n_heads": 9, "n_kv_heads": 3}, 2, "9 attention heads", "[3, 9]"),
        ("x", {"text_config": {"num_attention_heads": 1}}, 2, "1 attention heads", "one device"),
        ("qwen3_5", {**HEADS, "num_key_value_heads": 3}, 4, "3 key-value heads", "[3]"),
    ],
)
def test_sizes_that_cannot(
    name: str, config: dict[str, Any], size: int, text: str, hint: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        check_sizes(name, config, size)
    assert text in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_an_architecture_that_mlx_lm_cannot_divide() -> None:
    arguments = gpt2.ModelArgs("gpt2", 64, 64, 4, 2, 64, 1e-5, 100)
    with pytest.raises(ModelLoadError, match="cannot divide the architecture 'gpt2'") as caught:
        shard(gpt2.Model(arguments), {"model_type": "gpt2"}, group(0, 2))
    assert "one device" in (caught.value.hint or "")


def test_layers_that_cannot_be_divided() -> None:
    model = tiny_model()  # its inner layers are 128 wide
    with pytest.raises(
        ModelLoadError, match="cannot be divided between 3 devices: Cannot shard the"
    ):
        shard(model, {"model_type": "llama"}, group(0, 3))


def test_the_parts_together_are_the_model() -> None:
    whole = dict(tree_flatten(tiny_model().parameters()))
    parts = []
    for rank in range(2):
        model = tiny_model()
        shard(model, {"model_type": "llama", "num_attention_heads": 4}, group(rank, 2))
        parts.append(dict(tree_flatten(model.parameters())))
        assert model.layers[0].self_attn.n_kv_heads == 1
    for name, value in whole.items():
        halves = [part[name] for part in parts]
        if halves[0].shape == value.shape:
            assert mx.array_equal(halves[0], value), name
            continue
        axis = next(i for i, n in enumerate(halves[0].shape) if n != value.shape[i])
        assert mx.array_equal(mx.concatenate(halves, axis=axis), value), name


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "qwen3_5", "deepseek_v41", "llama, 4 bits"])
def test_the_divisions_of_layers_are_those_of_their_weights(name: str) -> None:
    """An adapter is cut by them: in segments where mlx-lm divides fused layers so."""
    [configuration] = [c for c in CATALOGUE if c.id == name.removesuffix(", 4 bits")]

    def build() -> nn.Module:
        model = configuration.build()
        if name.endswith("4 bits"):
            nn.quantize(model, group_size=32, bits=4)
        return model

    whole = dict(build().named_modules())
    config = {"model_type": configuration.architecture, **COMMON, **configuration.args}
    kinds, experts = set(), 0
    for rank in range(2):
        model = build()
        divisions = shard(model, config, group(rank, 2))
        parts: dict[str, Any] = dict(model.named_modules())
        for path, division in divisions.items():
            weight = mx.array(dense_weight(whole[path]))
            assert division.shape == tuple(weight.shape), path
            kinds.add((division.rows is not None, division.columns is not None))
            if division.experts is not None:
                weight, experts = weight[division.experts], experts + 1
            if division.rows is not None:
                weight = weight[..., division.rows, :]
            if division.columns is not None:
                weight = weight[..., division.columns]
            assert mx.array_equal(dense_weight(parts[path]), weight), path
    assert kinds >= {(False, False), (True, False), (False, True)}
    assert (experts > 0) == (name == "deepseek_v41")


# Weights of a part in memory

WIDTH = 512


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A llama of 16 MB, most of it in layers that are divided."""
    root = tmp_path_factory.mktemp("wide")
    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=WIDTH, num_hidden_layers=2, intermediate_size=2 * WIDTH,
        num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5, vocab_size=257,
        max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    model = llama.Model(arguments)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(root / "model.safetensors"), weights, metadata={"format": "pt"})
    (root / "config.json").write_text(json.dumps(vars(arguments)))
    tiny_tokenizer()._backend.save(str(root / "tokenizer.json"))
    return ModelFiles.from_directory(root)


def bytes_held(files: Files, size: int) -> tuple[int, int]:
    """Return the bytes of a rank's weights, and the bytes that MLX holds for them."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()

    def part(model: Any, config: Any) -> None:
        shard(model, config, group(1, size))

    loaded = load(files, device="cpu", shard=part if size > 1 else None)
    return loaded.weight_bytes, mx.get_active_memory() - before


@pytest.mark.long
def test_a_rank_holds_no_more_than_its_part(wide: Files) -> None:
    whole, held = bytes_held(wide, 1)
    assert whole * 0.98 < held < whole * 1.02
    for size in (2, 4):
        part, held = bytes_held(wide, size)
        assert part < whole / size * 1.2  # embeddings and norms are whole
        assert part * 0.98 < held < part * 1.02
