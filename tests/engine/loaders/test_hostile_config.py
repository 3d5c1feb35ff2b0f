"""Sizes in config.json that no tensor justifies are rejected before anything is built."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module

from modelpack.errors import ModelpackError
from modelpack_engine.embedding.loader import load_embedder
from modelpack_engine.errors import LoadCancelledError, ModelLoadError
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.models.load_budget import LoadBudget, TensorBounds, applied, count_modules
from modelpack_engine.models.precision import evaluate
from tests.engine.embedding.models import write_model
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS

HUGE = 10**7
#: The model, the changes to its config, and a part of the error.
HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"num_hidden_layers": HUGE},
        "num_hidden_layers is 10000000, but the tensors belong to 2 layers",
    ),
    ("llama", {"num_hidden_layers": 10**18}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 1e7}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 9}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": -1}, "cannot build mlx-lm's llama from these files"),
    ("llama", {"num_hidden_layers": -HUGE}, "negative"),
    ("llama", {"num_hidden_layers": True}, "parameters|missing"),
    ("llama", {"num_hidden_layers": "10000000"}, "TypeError"),
    ("llama", {"num_hidden_layers": [HUGE]}, "num_hidden_layers"),
    ("llama", {"hidden_size": HUGE}, "hidden_size is 10000000, but the largest dimension"),
    ("llama", {"hidden_size": 2**63}, "hidden_size"),
    ("llama", {"intermediate_size": HUGE}, "intermediate_size"),
    ("llama", {"vocab_size": HUGE}, "vocab_size"),
    ("llama", {"num_attention_heads": HUGE}, "num_attention_heads"),
    ("llama", {"num_attention_heads": 0}, "Error"),
    ("llama", {"num_key_value_heads": HUGE}, "num_key_value_heads"),
    ("llama", {"head_dim": HUGE}, "head_dim"),
    ("llama", {"max_position_embeddings": 10**12}, "max_position_embeddings"),
    ("llama", {"layer_types": ["full_attention"] * 100_000}, "modules|parameters"),
    ("llama", {"sliding_window": 10**12}, "sliding_window"),
    ("qwen3moe", {"num_experts": HUGE}, "num_experts"),
    ("qwen3moe", {"num_experts_per_tok": HUGE}, "num_experts_per_tok"),
    ("qwen3moe", {"moe_intermediate_size": HUGE}, "moe_intermediate_size"),
    ("qwen3moe", {"decoder_sparse_step": HUGE}, "decoder_sparse_step"),
    ("qwen3moe", {"mlp_only_layers": [HUGE]}, "mlp_only_layers"),
    ("gpt-oss", {"num_local_experts": HUGE}, "num_local_experts"),
    ("gpt-oss", {"num_hidden_layers": HUGE, "layer_types": None}, "num_hidden_layers"),
    ("gemma3", {"num_hidden_layers": HUGE}, "num_hidden_layers"),
    ("gemma3", {"sliding_window_pattern": 0}, "Error"),
    ("llama", {"model_type": "mamba", "num_hidden_layers": HUGE}, "num_hidden_layers"),
    ("llama", {"model_type": "mamba", "conv_kernel": HUGE, "state_size": 4}, "conv_kernel"),
    ("llama", {"model_type": "mamba", "time_step_rank": HUGE, "state_size": 4}, "time_step_rank"),
    ("llama", {"model_type": "deepseek_v3", "kv_lora_rank": HUGE}, "kv_lora_rank"),
    ("llama", {"model_type": "deepseek_v3", "n_routed_experts": HUGE}, "n_routed_experts"),
    ("llama", {"model_type": "gpt2", "n_layer": HUGE, "n_head": 4, "n_embd": 32}, "n_layer"),
    ("llama", {"model_type": "gemma3", "text_config": {"num_hidden_layers": HUGE}}, "text_con"),
    ("llama", {"text_config": {"text_config": {"n_layers": HUGE}}}, "n_layers"),
    ("llama", {"model_type": "qwen3_5", "text_config": {"num_experts": HUGE}}, "num_experts"),
    ("llama", {"model_type": "openelm", "num_transformer_layers": HUGE}, "num_transformer_layers"),
]  # fmt: skip


def memory() -> int:
    """Return the peak of this process's memory, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.sample(9)
@pytest.mark.parametrize(("name", "changes", "message"), HOSTILE)
def test_refused_before_it_is_built(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = TINY_MODELS[name]
    save(tmp_path, tiny.build(), tiny.config | changes)
    before = memory()
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(ModelFiles.from_directory(tmp_path), device="cpu")
    assert len(str(caught.value)) < 1000
    assert memory() - before < 256 * 1024


def nested(depth: int) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for _ in range(depth):
        config = {"text_config": config}
    return config


def test_deep_nesting(tmp_path: Path) -> None:
    tiny = TINY_MODELS["llama"]
    save(tmp_path, tiny.build(), tiny.config | nested(500))
    with pytest.raises(ModelLoadError, match="nested"):
        load(ModelFiles.from_directory(tmp_path), device="cpu")


ENCODERS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": HUGE}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**15}, "num_hidden_layers"),
    ({"hidden_size": HUGE}, "hidden_size"),
    ({"intermediate_size": HUGE}, "intermediate_size"),
    ({"vocab_size": HUGE}, "vocab_size"),
    ({"type_vocab_size": HUGE}, "type_vocab_size"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
    ({"num_attention_heads": HUGE}, "num_attention_heads"),
]


@pytest.mark.parametrize(("changes", "message"), ENCODERS)
def test_encoders(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_model(tmp_path, "bert", config=changes)
    before = memory()
    with pytest.raises(ModelLoadError, match=message):
        load_embedder(ModelFiles.from_directory(tmp_path), device="cpu")
    assert memory() - before < 256 * 1024


def build(count: int) -> list[Module]:
    return [Module() for _ in range(count)]


def test_layers_are_counted_at_one_place_of_the_names() -> None:
    shapes = [(f"model.layers.{i}.mlp.experts.{j}.w", (4, 8)) for i in range(3) for j in range(50)]
    assert TensorBounds.of(shapes) == TensorBounds(layers=3, tensors=150, largest=8)
    assert TensorBounds.of([]) == TensorBounds(layers=0, tensors=0, largest=1)
    assert TensorBounds.of([("h.0.a.weight", ()), ("h.1.a.weight", (3,))]).layers == 2


def test_what_a_class_builds_is_bounded_whatever_asked_for_it() -> None:
    """A field without a rule: the limit on modules stops the constructor."""
    with count_modules(100, "x"):
        assert len(build(100)) == 100
    with pytest.raises(ModelLoadError, match="more than 100 modules"), count_modules(100, "x"):
        build(HUGE)
    Module()  # outside, nothing is counted


def test_a_cancelled_load_stops_while_it_builds() -> None:
    budget = LoadBudget()
    budget.cancel()
    with pytest.raises(LoadCancelledError), applied(budget), count_modules(HUGE, "x"):
        build(HUGE)


def test_a_load_stops_at_its_deadline() -> None:
    now = [0.0]
    budget = LoadBudget(seconds=5, clock=lambda: now[0])
    with applied(budget), count_modules(HUGE, "x"):
        build(1000)
        now[0] = 5.0
        with pytest.raises(ModelLoadError, match="longer than 5 s"):
            build(1000)


def test_a_cancelled_load_stops_between_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpack_engine.models.precision._MEBIBYTE", 1)
    budget = LoadBudget()
    budget.cancel()
    model = Module()
    model.weight = mx.zeros((1024,))
    with pytest.raises(LoadCancelledError), applied(budget):
        evaluate(model)


def test_the_count_is_of_one_thread() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            build(50)
        except ModelpackError as error:
            errors.append(error)

    with count_modules(10, "x"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert errors == []


def test_real_shapes_pass() -> None:
    """Sizes of real models, with the largest dimension in their files."""
    shapes = [(f"model.layers.{i}.mlp.up_proj.weight", (14336, 512)) for i in range(32)]
    shapes += [("model.embed_tokens.weight", (128256, 4096))]
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "vocab_size": 128256,
        "max_position_embeddings": 10_485_760,
        "rope_theta": 10**11,
        "eos_token_id": [128001, 128008],
        "model_max_length": 1_000_000,
        "num_parameters": 8 * 10**9,
        "max_window_layers": 70,
        "vision_config": {"image_size": 10**9},
    }
    TensorBounds.of(shapes).check(config)
