"""The library for CPUs generates the same tokens as mlx-lm, for all architectures that it runs."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import pytest

from modelpack_engine.cpu import program
from modelpack_engine.cpu.library import library
from modelpack_engine.runner.cpu import CpuRunner
from modelpack_engine.runner.model_layout import find_layout
from tests.engine.cpu.programs import pack, usable
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.driving import Setting
from tests.engine.zoo.specimen import Specimen, make_reference, make_specimen

pytestmark = pytest.mark.long

CONFIGURATIONS = [
    configuration
    for configuration in CATALOGUE
    if configuration.architecture in program.MODELS and configuration.nested is None
]


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda configuration: configuration.id)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return make_specimen(request.param)


def packed(configuration: Configuration, num_blocks: int = 64) -> CpuRunner:
    model = configuration.build()
    assert program.can_run(model)
    layout = find_layout(model)
    weights = pack(model)
    return CpuRunner(model, weights, layout, num_blocks=num_blocks, block_size=16, max_rows=64)


def test_all_architectures_are_in_the_zoo() -> None:
    assert {configuration.architecture for configuration in CONFIGURATIONS} == set(program.MODELS)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(prefix_cache=False),
        Setting(rows=64),
        Setting(blocks=12),
    ],
    ids=["chunks", "no prefix cache", "whole prompts", "preempted"],
)
def test_tokens_are_those_of_mlx_lm(specimen: Specimen, setting: Setting) -> None:
    runner = packed(specimen.configuration, setting.blocks)
    driver = specimen.drive(setting, runner)
    assert driver.tokens == specimen.reference.tokens
    assert driver.scheduler.stats().cached_tokens >= (32 if setting == Setting() else 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_of_mlx_codes(specimen: Specimen, bits: int) -> None:
    """Weights in MLX's affine codes: the tokens are those of mlx-lm for the same codes."""
    configuration = specimen.configuration
    model = configuration.build()
    nn.quantize(model, 32, bits)
    model.set_dtype(mx.float16)  # so that scales and biases are halves
    model.set_dtype(mx.float32)
    dense = configuration.build()
    runner = CpuRunner(
        dense, pack(model), find_layout(dense), num_blocks=64, block_size=16, max_rows=64
    )
    assert specimen.drive(Setting(), runner).tokens == make_reference(configuration, model).tokens


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of an instruction set instead of the processor's best."""
    lib = library()
    best = lib.mp_kernels()
    assert lib.mp_use_kernels(request.param.encode()) == 0
    yield lib.mp_kernels().decode()
    lib.mp_use_kernels(best)


@pytest.mark.parametrize("kernels", usable(), indirect=True)
def test_each_instruction_set(specimen: Specimen, kernels: str) -> None:
    assert kernels in usable()
    driver = specimen.drive(Setting(), packed(specimen.configuration))
    assert driver.tokens == specimen.reference.tokens


def test_other_weights_give_other_tokens(specimen: Specimen) -> None:
    """A negative control: a norm that is not applied would be seen."""
    model = specimen.configuration.build()
    layout, weights = find_layout(model), pack(model)
    for name, vector in weights.vectors.items():
        if name.endswith("input_layernorm.weight"):
            vector[:] = 1
    runner = CpuRunner(model, weights, layout, num_blocks=64, block_size=16, max_rows=64)
    assert specimen.drive(Setting(), runner).tokens != specimen.reference.tokens
