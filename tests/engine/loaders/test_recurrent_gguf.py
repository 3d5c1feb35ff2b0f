"""GGUF files whose metadata do not fit mlx-lm's class, most with recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.layers.blocks import BLOCK_TYPES, BlockLinear
from modelpack_engine.models import gguf_blocks, planes
from modelpack_engine.models.precision import parameters_of
from tests.engine.loaders.blocks import random_blocks
from tests.engine.loaders.test_architectures import distance, load_tiny
from tests.engine.loaders.tiny_models import TINY_MODELS, TinyModel

Q = gguf.GGMLQuantizationType


def write(name: str, path: Path, **values: Any) -> Path:
    """Write a tiny model whose metadata are changed, with `__` for a dot in a name."""
    tiny = TINY_MODELS[name]

    def keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
        tiny.keys(writer, config)
        for key, value in values.items():
            key = f"{tiny.arch}.{key.replace('__', '.')}"
            for shard in writer.kv_data:
                shard.pop(key, None)
            match value:
                case list():
                    writer.add_array(key, value)
                case bool():
                    writer.add_bool(key, value)
                case float():
                    writer.add_float32(key, value)
                case _:
                    writer.add_uint32(key, value)

    return replace(tiny, keys=keys).write(path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lfm2", {"attention__head_count_kv": 2}, "head_count_kv that is not given for each layer"),
        ("lfm2", {"attention__head_count_kv": [0, 0, 0, 0]}, "no layer with attention"),
        ("lfm2", {"attention__sliding_window": 8}, "sliding windows"),
        ("lfm2moe", {"expert_gating_func": 1}, "experts that are not scored by a sigmoid"),
        ("nemotron_h", {"feed_forward_length": 96}, "feed_forward_length that is not given"),
        ("nemotron_h_moe", {"expert_group_count": 2}, "groups of experts"),
        ("qwen35", {"attention__recurrent_layers": [1, 0, 0, 1]}, "recurrent in another pattern"),
        ("qwen3next", {"attention__recurrent_layers": [1, 1, 0, 1]}, "recurrent in another"),
        ("qwen3next", {"attention__recurrent_layers": True}, "recurrent in another pattern"),
        ("mamba", {"ssm__dt_b_c_rms": True}, "norms in recurrent layers"),
        ("mamba2", {"attention__layer_norm_rms_epsilon": 1e-6}, "another epsilon"),
        ("gemma3n", {"altup__num_inputs": 3}, "another number of alternating updates"),
        ("gemma3n", {"attention__sliding_window_pattern": [1] * 25}, "windows in all layers"),
        ("granitehybrid", {"ssm__group_count": 2}, "norms of several groups"),
    ],
)
def test_a_variant_that_the_class_does_not_have(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=f"{name} with .*{message}.* is not supported"):
        load_tiny(write(name, tmp_path, **values))


@pytest.mark.parametrize("name", ["qwen35", "qwen35moe"])
def test_the_usual_pattern_of_recurrent_layers_is_accepted(name: str, tmp_path: Path) -> None:
    """Converters of 2026 write it beside the interval."""
    path = write(name, tmp_path, attention__recurrent_layers=[1, 0, 1, 0])
    tiny = TINY_MODELS[name]
    assert np.abs(tiny.logits(load_tiny(path).model) - tiny.logits(tiny.build())).max() < 1e-4


def test_falcon_with_norms(tmp_path: Path) -> None:
    tiny = TINY_MODELS["falcon-h1"]
    norms = {f"model.layers.{at}.mamba.norm.weight": np.ones((2, 64), np.float32) for at in (0, 1)}
    written = replace(tiny, converted=lambda config, w: tiny.converted(config, w) | norms)
    with pytest.raises(ModelLoadError, match="falcon-h1 with norms in recurrent layers"):
        load_tiny(written.write(tmp_path / "m.gguf"))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", ["qwen35moe", "nemotron_h_moe", "qwen3next", "qwen3next-old", "mamba2", "jamba"]
)
def test_quantised_weights_are_reordered(name: str, tmp_path: Path) -> None:
    """Packed weights, whose rows are moved as they are stored, give the logits of dense ones."""
    tiny = TINY_MODELS[name]

    def quantize(tensor: str, values: np.ndarray) -> Any:
        if values.shape[-1] % 32 or "ffn_gate_inp" in tensor:
            return None
        return gguf.quants.quantize(values, Q.Q8_0), Q.Q8_0

    path = tiny.write(tmp_path / "m.gguf", quantize)
    dense, packed = load_tiny(path, dense=True), load_tiny(path, dense=False, dtype=mx.float32)
    assert packed.weight_bytes < dense.weight_bytes / 2
    assert np.abs(tiny.logits(packed.model) - tiny.logits(dense.model)).max() < 1e-3


#: The shapes of Qwen3.5-27B, and of Qwen3.5-35B-A3B and Qwen3-Next-80B-A3B with 8 experts. Widths
#: are divided so that rows stay multiples of 256; heads are as wide as theirs.
_WIDE = {
    "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "linear_num_key_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "full_attention_interval": 4,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512
}  # fmt: skip
WIDTHS: dict[str, dict[str, int]] = {
    "qwen35": {**_WIDE, "linear_num_value_heads": 6, "intermediate_size": 1792},
    "qwen35moe": {**_WIDE, "linear_num_value_heads": 4, **_EXPERTS},
    "qwen3next": {**_WIDE, "linear_num_value_heads": 4, **_EXPERTS},
}
_MAMBA2 = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 128}
#: Other models with recurrent layers, in widths that have the same use.
OTHERS: dict[str, dict[str, int]] = {
    "falcon-h1": {
        "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "mamba_d_ssm": 1024,
        **_MAMBA2,
    },
    "granitehybrid": {"hidden_size": 512, "intermediate_size": 1024, **_MAMBA2},
    "nemotron_h_moe": {
        "hidden_size": 512, "intermediate_size": 512, "head_dim": 128, "mamba_num_heads": 16,
        "mamba_head_dim": 64, "ssm_state_size": 128, "moe_intermediate_size": 512,
        "moe_shared_expert_intermediate_size": 512,
    },
    "lfm2": {"hidden_size": 512, "intermediate_size": 1536, "block_ff_dim": 1536, "block_dim": 512},
}  # fmt: skip
Q4_K_M = {"output.weight": "Q6_K", "attn_qkv.weight": "Q5_K", "weight": "Q4_K"}
Q3_K_M = {"output.weight": "Q6_K", "attn_qkv.weight": "Q4_K", "weight": "Q3_K"}
Q5_K_M = {"output.weight": "Q6_K", "attn_qkv.weight": "Q6_K", "weight": "Q5_K"}
TYPES = sorted(gguf_blocks.SUPPORTED_TYPES - {"F32", "F16", "BF16"})


def in_types(name: str, path: Path, kinds: Mapping[str, str], **widths: int) -> TinyModel:
    """Write a model whose matrices are random blocks; `kinds` has types by the ends of names."""
    tiny = TINY_MODELS[name]
    tiny = replace(tiny, config={**tiny.config, **widths})

    def quantize(tensor: str, values: np.ndarray) -> Any:
        kind = next((kind for end, kind in kinds.items() if tensor.endswith(end)), None)
        if kind is None or values.ndim < 2 or "conv1d" in tensor or "ffn_gate_inp" in tensor:
            return None
        *outer, columns = values.shape
        quantised = gguf.GGMLQuantizationType[kind]
        if columns % gguf.GGML_QUANT_SIZES[quantised][0]:
            return None
        raw = random_blocks(kind, int(np.prod(outer)), columns)
        return raw.reshape(*outer, -1), quantised

    tiny.write(path, quantize)
    return tiny


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("head", [32, 128])
def test_columns_of_all_types_are_reordered(head: int, kind: str, tmp_path: Path) -> None:
    """The projection after linear attention stays quantised; exactly where its type is kept."""
    widths = {"linear_num_value_heads": 768 // head, "linear_value_head_dim": head}
    path = tmp_path / "m.gguf"
    tiny = in_types("qwen35", path, {"ssm_out.weight": kind}, hidden_size=256, **widths)
    expected = tiny.logits(load_tiny(path, dense=True).model)[-1]
    for blocks in ((), planes.KEPT_ON_CUDA, tuple(BLOCK_TYPES)):
        model: Any = load_tiny(path, dense=False, blocks=blocks, dtype=mx.float32).model
        module = dict(model.named_modules())["language_model.model.layers.0.linear_attn.out_proj"]
        is_kept = kind in blocks and (head == 128 or BLOCK_TYPES[kind].block == 32)
        assert type(module).__name__ == ("BlockLinear" if is_kept else "QuantizedLinear")
        exact = is_kept or kind == "MXFP4" or gguf_blocks.affine_bits(kind) is not None
        assert distance(tiny.logits(model)[-1], expected) < (1e-9 if exact else 1e-3)


def test_columns_less_than_a_group_wide(tmp_path: Path) -> None:
    """Heads of 16 columns, which no published model has, are not packed."""
    path = tmp_path / "m.gguf"
    tiny = in_types("qwen35", path, {"ssm_out.weight": "Q4_0"})
    expected = tiny.logits(load_tiny(path, dense=True).model)[-1]
    model: Any = load_tiny(path, dense=False, dtype=mx.float32).model
    assert type(model.language_model.model.layers[0].linear_attn.out_proj) is nn.Linear
    assert distance(tiny.logits(model)[-1], expected) < 1e-9


@pytest.mark.parametrize(
    ("qkv", "gate", "held", "exact"),
    [
        ("Q5_K", "Q4_K", "Q5_K", True),  # Q4_K_M
        ("Q4_K", "Q5_K", "Q5_K", True),
        ("Q8_0", "Q5_1", 8, True),
        ("Q5_0", "Q5_1", 8, True),
        ("Q8_0", "Q4_K", 8, True),
        ("Q4_0", "Q4_1", 4, True),
        ("Q4_K", "Q3_K", 8, False),  # Q3_K_M
        ("Q6_K", "Q5_K", 8, False),  # Q5_K_M
        ("F16", "Q4_K", None, True),
    ],
)
def test_joined_rows_of_two_types(
    qkv: str, gate: str, held: str | int | None, exact: bool, tmp_path: Path
) -> None:
    """Mixtures such as Q4_K_M give a layer's projections different types."""
    path, kinds = tmp_path / "m.gguf", {"attn_qkv.weight": qkv, "attn_gate.weight": gate}
    tiny = in_types("qwen3next", path, kinds, hidden_size=256)
    expected = tiny.logits(load_tiny(path, dense=True).model)[-1]
    model: Any = load_tiny(path, dense=False, blocks=planes.KEPT, dtype=mx.float32).model
    joined = model.model.layers[0].linear_attn.in_proj_qkvz
    kind = joined.kind.name if isinstance(joined, BlockLinear) else None
    assert (kind or getattr(joined, "bits", None)) == held
    assert distance(tiny.logits(model)[-1], expected) < (1e-9 if exact else 1e-3)
    unrounded: Any = load_tiny(path, dense=False, requantize=False, dtype=mx.float32).model
    assert distance(tiny.logits(unrounded)[-1], expected) < 1e-9


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, {"weight": kind}) for name in WIDTHS for kind in sorted({*BLOCK_TYPES, "Q8_0"})),
        *((name, kinds) for name in WIDTHS for kinds in (Q4_K_M, Q5_K_M)),
        # Of Qwen3-Next, it needs more experts: joined tensors take 8 bits.
        *((name, Q3_K_M) for name in ("qwen35", "qwen35moe")),
        *((name, kinds) for name in OTHERS for kinds in (Q4_K_M, {"weight": "Q2_K"})),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_at_most_a_tenth_more_than_the_file(
    name: str, kinds: dict[str, str], tmp_path: Path
) -> None:
    """All block types but those that are always held in 8 bits."""
    path = tmp_path / "m.gguf"
    in_types(name, path, kinds, **{**WIDTHS, **OTHERS}[name])
    held = load_tiny(path, dense=False, blocks=planes.KEPT_ON_CUDA, dtype=mx.bfloat16)
    stored = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert held.weight_bytes <= 1.1 * stored


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("nemotron_h_moe", {"A_log", "e_score_correction_bias"}),
        ("qwen35", {"A_log"}),
        ("deepseek-v3", {"e_score_correction_bias"}),
        ("falcon-h1", set()),
    ],
)
def test_parameters_that_mlx_lm_keeps_in_float32(name: str, kept: set[str], tmp_path: Path) -> None:
    path = TINY_MODELS[name].write(tmp_path / "m.gguf")
    model = load_tiny(path, dense=True, dtype=mx.bfloat16).model
    found = parameters_of(model)
    wide = {name.rpartition(".")[2] for name, array in found.items() if array.dtype == mx.float32}
    assert wide == kept
    assert model(mx.array([[1, 2, 3]])).dtype == mx.bfloat16
