"""SwiGLU computed by powers of two equals mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from modelpack_engine.patches.functions import install, native_swiglu, swiglu, swiglu_patches
from tests.engine.runner.models import tiny_llama


def test_equal() -> None:
    gate = mx.concatenate([mx.linspace(-30, 30, 997), mx.array([-1e4, -200.0, 0.0, 200.0, 1e4])])
    x = mx.random.normal(gate.shape) + 2
    expected, found = native_swiglu(gate, x), swiglu(gate, x)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6).item()


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16])
def test_other_types_are_mlx_lms_matter(kind: mx.Dtype) -> None:
    gate = mx.random.normal((3, 8)).astype(kind)
    assert mx.array_equal(swiglu(gate, gate), native_swiglu(gate, gate)).item()


def test_install() -> None:
    for _ in range(2):  # installing twice has no effect
        patches = swiglu_patches(tiny_llama())
        assert [str(patch) for patch in patches] == ["mlx_lm.models.llama.swiglu"]
        install(patches)
        assert llama.swiglu is swiglu
