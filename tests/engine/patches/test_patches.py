"""Every patch of MLX and mlx-lm by name; `uninstall` restores the originals."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import mlx.core as mx
import pytest

from modelpack_engine.patches import modules
from modelpack_engine.patches.corrections import CORRECTIONS
from modelpack_engine.patches.functions import (
    COLLECTIVES,
    FUNCTIONS,
    install,
    swiglu_patches,
    uninstall,
)
from modelpack_engine.patches.modules import ClassSwaps
from tests.engine.runner.models import tiny_llama

REPLACED = {
    "mlx.core.conv1d",
    "mlx.core.distributed.all_gather",
    "mlx.core.distributed.all_sum",
    "mlx.core.fast.rope",
    "mlx.core.fast.scaled_dot_product_attention",
    "mlx_lm.models.gated_delta.gated_delta_kernel",
    "mlx_lm.models.bailing_hybrid.recurrent_gla",
    "mlx_lm.models.bailing_moe_linear.recurrent_gla",
    "mlx_lm.models.rwkv7.Rwkv7TimeMixing._wkv7",
    "mlx_lm.models.rwkv7.TokenShift.__call__",
    "mlx_lm.models.gated_delta.gated_delta_ops",
    "mlx_lm.models.llama.swiglu",
    "mlx_lm.models.ssm.ssm_attn",
}
MODULES = {
    "mlx_lm.models.afm7.KVReuseAttention",
    "mlx_lm.models.gemma2.Attention",
    "mlx_lm.models.gpt_bigcode.GPTBigCodeModel",
    "mlx_lm.models.longcat_flash_ngram.NgramEmbedding",
}
CORRECTED = {
    "cohere", "cohere2", "dbrx", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2",
    "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granitemoehybrid", "helium",
    "hunyuan", "jamba", "mamba2", "minimax_m2", "mixtral", "muse_glimmer", "phi", "qwen2_moe",
    "qwen3_5_moe", "qwen3_moe", "qwen3_vl_moe", "recurrent_gemma", "solar_open", "stablelm",
    "starcoder2",
}  # fmt: skip


@pytest.fixture
def clean() -> Iterator[None]:
    """Uninstall all patches, as in a new process; other tests reinstall those that they need."""
    uninstall()
    yield
    uninstall()


@pytest.mark.usefixtures("clean")
def test_functions_are_replaced_and_restored() -> None:
    patches = [*FUNCTIONS, *COLLECTIVES, *swiglu_patches(tiny_llama())]
    before = [getattr(patch.owner, patch.name) for patch in patches]
    for _ in range(2):  # The second call must not record our functions as the originals.
        install(patches)
    after = [getattr(patch.owner, patch.name) for patch in patches]
    assert after == [patch.replacement for patch in patches]
    assert all(new is not old for new, old in zip(after, before, strict=True))
    uninstall()
    restored = [getattr(patch.owner, patch.name) for patch in patches]
    assert all(now is old for now, old in zip(restored, before, strict=True))


@pytest.mark.usefixtures("clean")
def test_function_patches_are_named() -> None:
    patches = [*FUNCTIONS, *COLLECTIVES, *swiglu_patches(tiny_llama())]
    assert {str(patch) for patch in patches} == REPLACED
    assert all(patch.reason and patch.until for patch in patches)


def test_module_patches_are_named_and_exist() -> None:
    assert set(modules.PATCHES) == MODULES
    for name, patch in modules.PATCHES.items():
        module, _, kind = name.rpartition(".")
        assert hasattr(importlib.import_module(module), kind), name
        assert patch.reason
        assert patch.until


def test_corrected_models_are_named_and_exist() -> None:
    assert set(CORRECTIONS) == CORRECTED
    for model_type in CORRECTIONS:
        name = {"minimax_m2": "minimax"}.get(model_type, model_type)  # as mlx-lm remaps it
        assert hasattr(importlib.import_module(f"mlx_lm.models.{name}"), "Model")


def test_swaps_are_undone() -> None:
    model = tiny_llama()
    before = [type(module) for _, module in model.named_modules()]
    expected = model(mx.array([[1, 2, 3]]))
    swaps = ClassSwaps()
    modules.halve_linears(model, swaps, mx.new_stream(mx.cpu))
    for _, module in model.named_modules():
        swaps.override(module, lambda original, *args, **kwargs: None)
    assert model(mx.array([[1, 2, 3]])) is None
    swaps.undo()
    assert [type(module) for _, module in model.named_modules()] == before
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), expected).item()
