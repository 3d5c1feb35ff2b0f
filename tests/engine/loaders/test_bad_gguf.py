"""Truncated, inconsistent and unsupported GGUF files fail with an error that names the cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest

from modelpack.errors import WeightFormatError
from modelpack.formats.gguf import read_gguf_header
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles, load
from tests.engine.loaders.test_architectures import shards
from tests.engine.loaders.tiny_models import TINY_MODELS, TinyModel, Weights
from tests.engine.zoo.not_in_gguf import DIFFERS, NAMED

LLAMA = TINY_MODELS["llama"]


def refuse(path: Path, message: str, kind: type[Exception] = ModelLoadError) -> None:
    with pytest.raises(kind, match=message):
        load(ModelFiles.from_directory(path), device="cpu")


def written(tmp_path: Path, tiny: TinyModel, change: Callable[[Weights], None]) -> Path:
    """Write a model after `change` has been made to its tensors."""

    def converted(config: Any, weights: Weights) -> Weights:
        changed = dict(tiny.converted(config, weights))
        change(changed)
        return changed

    return replace(tiny, converted=converted).write(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["bloom", *sorted({*DIFFERS, *NAMED.values()})])
def test_unknown_architecture(name: str, tmp_path: Path) -> None:
    """Also those that llama.cpp has and that a class of mlx-lm has the name of (Phi-3.5-MoE)."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, name)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = f"architecture '{name}' is not supported in GGUF"
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(ModelFiles.from_directory(path), device="cpu")
    hint = caught.value.hint or ""
    known, otherwise, _ = hint.removeprefix("use one of ").partition(", or load the model from ")
    assert otherwise
    assert {"gpt-oss", "llama", "phi3"} <= set(known.split(", "))
    assert name not in known.split(", ")


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1])
def test_truncated(keep: int, tmp_path: Path) -> None:
    path = LLAMA.write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    refuse(path, "m.gguf", WeightFormatError)


def test_missing_tensor(tmp_path: Path) -> None:
    path = written(tmp_path, LLAMA, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(path, r"missing model\.layers\.1\.mlp\.up_proj\.weight")


def test_missing_embeddings(tmp_path: Path) -> None:
    path = written(tmp_path, LLAMA, lambda w: w.pop("model.embed_tokens.weight"))
    refuse(path, r"'token_embd\.weight' is missing")


def test_missing_layer(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if ".layers.1." in name]:
            del weights[name]

    refuse(written(tmp_path, LLAMA, change), "name 2 layers, but the tensors are of 1")


def test_extra_tensor(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    refuse(written(tmp_path, LLAMA, change), r"llama has no such tensors: blk\.0\.attn_rot_embd")


def test_bias_that_the_class_does_not_have(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["model.layers.0.self_attn.o_proj.bias"] = np.ones(64, np.float32)

    path = written(tmp_path, TINY_MODELS["qwen2"], change)
    refuse(path, r"not known to the model: model\.layers\.0\.self_attn\.o_proj\.bias")


def test_wrong_shape(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        weights[name] = np.ascontiguousarray(weights[name].T)

    path = written(tmp_path, LLAMA, change)
    refuse(path, r"down_proj\.weight has the shape \[96, 64\], expected \[64, 96\]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "no attention heads, or heads of size 0"),
        ({"num_hidden_layers": 2**31}, "name 2147483648 layers, but the tensors are of 2"),
        ({"num_hidden_layers": 0}, "the metadata name 0 layers"),
        ({"num_key_value_heads": 0}, "make no llama model|shape|largest dimension"),
        ({"hidden_size": 32}, "rope on a part of each head|shape"),
        ({"intermediate_size": 2**31}, "make no llama model|shape|largest dimension"),
        ({"head_dim": 48}, "rope on a part of each head|shape"),
        ({"head_dim": 0}, "no attention heads, or heads of size 0"),
    ],
)
def test_lying_metadata(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        LLAMA.keys(writer, config)
        for name, value in changes.items():
            key = {
                "num_attention_heads": "attention.head_count",
                "num_key_value_heads": "attention.head_count_kv",
                "num_hidden_layers": "block_count",
                "hidden_size": "embedding_length",
                "intermediate_size": "feed_forward_length",
                "head_dim": "attention.key_length",
            }[name]
            writer.kv_data[0].pop(f"llama.{key}", None)
            writer.add_uint32(f"llama.{key}", value)

    refuse(replace(LLAMA, keys=keys).write(tmp_path / "m.gguf"), message)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("llama", "llama.expert_count", 8, r"has no 'llama\.expert_used_count'"),
        ("command-r", "command-r.rope.scaling.factor", 4.0, "command-r with rope scaling 'linear'"),
        ("olmo2", "olmo2.rope.dimension_count", 8, "rope on a part of each head"),
        ("stablelm", "stablelm.rope.scaling.type", "strange", "rope scaling 'strange'"),
        ("llama", "llama.rope.scaling.type", "strange", "rope scaling 'strange'"),
        ("llama", "llama.context_length", "many", "'llama.context_length' is STRING"),
        ("phi3", "phi3.rope.scaling.type", "yarn", "phi3 with rope scaling 'yarn'"),
        ("gemma3", "gemma3.final_logit_softcapping", 30.0, "gemma3 with softcapped logits"),
        ("gpt-oss", "gpt-oss.attention.sliding_window_pattern", 3, "another pattern"),
        ("glm4moe", "glm4moe.expert_gating_func", 1, "not scored by a sigmoid"),
        ("gemma4", "gemma4.attention.sliding_window_pattern", 2, "windows in all layers, or in"),
        ("nemotron", "nemotron.rope.scaling.factor", 4.0, "nemotron with rope scaling 'linear'"),
        ("bailingmoe2", "bailingmoe2.expert_gating_func", 1, "not scored by a sigmoid"),
        ("bailingmoe2", "bailingmoe2.attention.key_length", 32, "another size than its width"),
        ("dots1", "dots1.expert_gating_func", 1, "not scored by a sigmoid"),
        ("afmoe", "afmoe.expert_gating_func", 1, "not scored by a sigmoid"),
        ("kimi-linear", "kimi-linear.expert_gating_func", 1, "not scored by a sigmoid"),
        ("kimi-linear", "kimi-linear.attention.head_count_kv", [0] * 4, "no layer with attention"),
        ("deci", "deci.attention.head_count_kv", [2, 0, 0, 0], "linear attention"),
        ("mistral4", "mistral4.attention.temperature_length", 9, "from another length on"),
        ("mistral4", "mistral4.expert_gating_func", 2, "scored by another function"),
        ("chatglm", "chatglm.rope.scaling.factor", 4.0, "chatglm with rope scaling 'linear'"),
        ("deepseek", "deepseek.expert_weights_scale", 2.0, "normalised or scaled scores"),
        ("exaone-moe", "exaone-moe.attention.sliding_window_pattern", 3, "another pattern"),
        (
            "hunyuan-moe",
            "hunyuan-moe.expert_shared_feed_forward_length",
            100,
            "shared experts of another size",
        ),
        ("hunyuan-moe", "hunyuan-moe.feed_forward_length", 0, "experts without a size"),
        ("hunyuan-moe", "hunyuan-moe.expert_used_count", 99, r"expert_used_count' is 99, but"),
        ("afmoe", "afmoe.attention.sliding_window", 0, r"sliding_window' is 0, expected 1"),
        ("afmoe", "afmoe.expert_used_count", 0, r"expert_used_count' is 0, expected 1"),
        ("exaone-moe", "exaone-moe.attention.sliding_window", 0, r"sliding_window' is 0, expected"),
        ("exaone-moe", "exaone-moe.expert_used_count", 99, r"expert_used_count' is 99, but"),
        ("kimi-linear", "kimi-linear.expert_used_count", 99, r"expert_used_count' is 99, but"),
        ("deepseek", "deepseek.expert_used_count", 0, r"expert_used_count' is 0, expected 1"),
        ("starcoder", "starcoder.attention.head_count_kv", 4, "more than one head of keys"),
        ("deepseek-v2-lite", "deepseek2.expert_gating_func", 3, "scored by another function"),
        ("deepseek-v2-lite", "deepseek2.expert_group_count", 4, "groups of experts"),
        ("deepseek-v3", "deepseek2.attention.temperature_scale", 0.1, "scaled by the position"),
        ("apertus", "xielu.beta", [0.5], r"'xielu.beta' has 1 values for 2 layers"),
        ("apertus", "xielu.eps", 0.5, r"xielu.eps.* expected an array"),
        ("openelm", "openelm.embedding_length", 0, r"embedding_length' is 0, expected 1"),
        ("openelm", "openelm.attention.head_count", [4], r"has 1 values for 2 layers"),
        ("openelm", "openelm.attention.head_count", [float("inf"), 2.0], "no whole numbers"),
        ("openelm", "openelm.feed_forward_length", [float("nan"), 160.0], "no whole numbers"),
        ("openelm", "openelm.feed_forward_length", [96.4, 160.0], "no whole numbers"),
        ("qwen", "qwen.rope.freq_base", 1e6, r"qwen with a rope of base 1e\+06"),
        ("qwen2-yarn", "qwen2.rope.scaling.yarn_attn_factor", 2.0, "scales attention"),
    ],
)
def test_variants_that_mlx_lm_does_not_have(
    name: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    tiny = TINY_MODELS[name]

    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        tiny.keys(writer, config)
        writer.kv_data[0].pop(key, None)
        add = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array,
        }  # fmt: skip
        add[type(value)](key, value)

    refuse(replace(tiny, keys=keys).write(tmp_path / "m.gguf"), message)


def test_rows_that_do_not_fit_the_heads(tmp_path: Path) -> None:
    granite = TINY_MODELS["granite"]

    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        granite.keys(writer, config)
        writer.kv_data[0].pop("granite.attention.head_count")
        writer.add_head_count(48)
        writer.add_key_length(16)

    path = replace(granite, keys=keys).write(tmp_path / "m.gguf")
    refuse(path, r"shape of blk\.0\.attn_q\.weight, \[64, 64\], does not fit the metadata")


def test_tensors_of_two_variants(tmp_path: Path) -> None:
    """Queries that are there alone, and joined with keys and values."""

    def change(weights: Weights) -> None:
        weights["model.layers.0.self_attn.q_proj.weight"] = np.ones((64, 64), np.float32)

    path = written(tmp_path, TINY_MODELS["phi2-joined"], change)
    refuse(path, r"q_proj\.weight has the shape \[128, 64\], expected \[64, 64\]")


def test_old_files_with_a_tensor_for_each_expert(tmp_path: Path) -> None:
    tiny = TINY_MODELS["mixtral"]

    def change(weights: Weights) -> None:
        for name in [name for name in weights if "experts" in name]:
            weights["model.layers.0.mlp.up_proj.weight"] = weights.pop(name)[0]

    refuse(written(tmp_path, tiny, change), r"llama has no such tensors: blk\.0\.ffn_up\.weight")


def test_gemma4_without_heads_for_each_layer(tmp_path: Path) -> None:
    tiny = TINY_MODELS["gemma4"]

    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        tiny.keys(writer, config)
        writer.kv_data[0].pop("gemma4.attention.head_count_kv")
        writer.add_head_count_kv([1, 1])

    path = replace(tiny, keys=keys).write(tmp_path / "m.gguf")
    refuse(path, "head_count_kv' has 2 values for 6 layers")


def test_gemma4_with_rope_factors_of_the_wrong_length(tmp_path: Path) -> None:
    tiny = TINY_MODELS["gemma4"]

    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        tiny.keys(writer, config)
        for key in ("gemma4.attention.key_length", "gemma4.rope.dimension_count"):
            writer.kv_data[0].pop(key)
            writer.add_uint32(key, 64)

    path = replace(tiny, keys=keys).write(tmp_path / "m.gguf")
    refuse(path, "expected 32 rope factors, got 16")


def test_half_of_the_rope_factors(tmp_path: Path) -> None:
    tiny = TINY_MODELS["phi3"]

    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        tiny.keys(writer, config)
        writer.add_tensor("rope_factors_long.weight", np.ones(8, np.float32))

    refuse(replace(tiny, keys=keys).write(tmp_path / "m.gguf"), "long and short rope factors")


def test_rope_factors_of_the_wrong_length(tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        LLAMA.keys(writer, config)
        writer.add_tensor("rope_freqs.weight", np.ones(5, np.float32))

    refuse(replace(LLAMA, keys=keys).write(tmp_path / "m.gguf"), "expected 8 rope factors, got 5")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["llama-3", "gemma3", "gpt-oss", "phi3-long"])
def test_damaged_headers_are_model_errors(name: str, tmp_path: Path) -> None:
    """A header with a few wrong bytes raises only our own errors."""
    path = TINY_MODELS[name].write(tmp_path / "m.gguf")
    raw, header = path.read_bytes(), read_gguf_header(path)
    places = [value.offset for value in header.metadata.values()]
    random = Random(name)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(raw)
        for _ in range(random.choice((1, 1, 3))):
            near = random.choice((*places, *range(header.infos_end - 2000, header.infos_end, 40)))
            at = min(near + random.randrange(40), header.infos_end - 1)
            damaged[at] = random.choice((0, 1, 2, 0x7F, 0xFF))
        path.write_bytes(damaged)
        try:
            load(ModelFiles.from_directory(path), device="cpu")
        except (ModelLoadError, WeightFormatError) as error:
            outcomes.add(type(error))
    assert outcomes == {ModelLoadError, WeightFormatError}


def test_missing_shard(tmp_path: Path) -> None:
    paths = shards(TINY_MODELS["qwen2"].write(tmp_path / "m.gguf"), tmp_path, 3)
    for given, message in ((paths[:2], "missing 3"), (paths[1:], "missing 1"), (paths[:1] * 3, "")):
        with pytest.raises(ModelLoadError, match=f"expected shards 1 to 3.*{message}"):
            load(ModelFiles(tuple(given), "gguf"), device="cpu")


def test_two_models(tmp_path: Path) -> None:
    paths = [LLAMA.write(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    with pytest.raises(ModelLoadError, match="the 2 GGUF files are not shards of one model"):
        load(ModelFiles(tuple(paths), "gguf"), device="cpu")


def test_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(path, "is big-endian")
