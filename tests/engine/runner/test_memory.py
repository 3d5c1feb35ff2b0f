"""A GPU's memory and the memory of steps, with fake CUDA and Metal devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from modelpack_engine import engine
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import FEW
from modelpack_engine.errors import OutOfMemoryError
from modelpack_engine.platform import device
from modelpack_engine.runner import kv_cache_size
from modelpack_engine.runner.kv_cache_size import StepMemory, step_memory
from modelpack_server.pool import memory as device_memory
from tests.engine.runner.models import tiny_llama
from tests.engine.serving.tiny import tiny_engine

GIB = 1 << 30
LAYOUT: Any = SimpleNamespace(bytes_per_token=1 << 10, snapshot_bytes=0, bytes_per_sequence=0)
CUDA = {"device_name": "NVIDIA H200", "total_memory": 64 * GIB, "free_memory": 60 * GIB}
METAL = {"memory_size": 64 * GIB, "max_recommended_working_set_size": 48 * GIB}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    def use(info: dict[str, Any]) -> None:
        monkeypatch.setattr(mx, "device_info", lambda: info)
        monkeypatch.setattr(mx, "get_active_memory", lambda: GIB)
        monkeypatch.setattr(kv_cache_size, "on_gpu", lambda: True)
        monkeypatch.setattr(mx.cuda, "is_available", lambda: "total_memory" in info)
        monkeypatch.setattr("modelpack_engine.platform.device.choose_device", lambda _: "gpu")

    return use


@pytest.mark.parametrize(
    ("info", "total", "used"),
    [
        (CUDA, 64 * GIB, 4 * GIB),  # other processes take some
        (CUDA | {"free_memory": 64 * GIB}, 64 * GIB, GIB),
        (METAL, 48 * GIB, GIB),
        ({"memory_size": 8 * GIB}, 8 * GIB, GIB),
    ],
)
def test_what_a_gpu_has(
    gpu: Callable[[dict[str, Any]], None], info: dict[str, Any], total: int, used: int
) -> None:
    gpu(info)
    assert (device.total_memory(), device.used_memory()) == (total, used)
    config = EngineConfig(gpu_memory_utilization=0.5)
    assert device_memory.device_memory(config) == total // 2


@pytest.mark.parametrize(
    ("info", "expected"),
    [(CUDA, 256), (CUDA | {"total_memory": 24 * GIB, "free_memory": 20 * GIB}, 64), (METAL, 64)],
)
def test_large_cuda_devices_run_more_sequences(
    gpu: Any, info: dict[str, Any], expected: int
) -> None:
    assert kv_cache_size.max_num_seqs(EngineConfig()) == 64  # on a CPU
    gpu(info)
    assert kv_cache_size.max_num_seqs(EngineConfig()) == expected
    assert kv_cache_size.max_num_seqs(EngineConfig(max_num_seqs=7)) == 7


def test_steps_leave_less_for_the_kv_cache_on_cuda(gpu: Any) -> None:
    config = EngineConfig(max_num_seqs=1 << 10)
    memory = StepMemory(per_row=GIB // 2048, per_step=GIB)
    sizes = {}
    for name, info in (("cuda", CUDA), ("metal", METAL)):
        gpu(info)
        for about in (memory, StepMemory()):
            found = kv_cache_size.choose_sizes(LAYOUT, 1 << 20, config, step_memory=about)
            sizes[name, about] = found.num_blocks * LAYOUT.bytes_per_token * 16
            planned = (name, about) == ("cuda", memory)
            assert found.step_bytes == (3 * GIB if planned else 0)
            assert found.recorded_weight_bytes == (3 * GIB // 4 if planned else None)
            assert found.recorded_rows == (int(2048 * 3 * 0.75 / 1.7) if planned else 4096)
    assert sizes["cuda", StepMemory()] - sizes["cuda", memory] == 3 * GIB
    assert sizes["metal", StepMemory()] == sizes["metal", memory]


def test_recurrent_states_leave_less_for_the_kv_cache(gpu: Any) -> None:
    sizes = {}
    for info, running in ((CUDA, 256), (METAL, 64)):
        gpu(info)
        for each in (0, 1 << 20, GIB):
            layout: Any = SimpleNamespace(**{**vars(LAYOUT), "bytes_per_sequence": each})
            found = kv_cache_size.choose_sizes(layout, 1 << 20, EngineConfig())
            sizes[each] = found.num_blocks * LAYOUT.bytes_per_token * 16
            rows = {0: 1, 1 << 20: 2 * running}.get(each, found.state_rows)
            assert found.state_rows == rows
            assert 0 <= sizes[0] - sizes[each] - rows * each <= LAYOUT.bytes_per_token * 16
        # A step rarely has as many sequences as it may have.
        assert 0 <= sizes[0] // 2 - rows * GIB < GIB


def test_restored_snapshots_leave_less_for_the_kv_cache(gpu: Any) -> None:
    gpu(CUDA)
    layout: Any = SimpleNamespace(**{**vars(LAYOUT), "snapshot_bytes": GIB})
    sizes = [
        kv_cache_size.choose_sizes(layout, 1 << 20, EngineConfig(kv_offload_memory=memory))
        for memory in (None, GIB)
    ]
    bytes_of = [found.num_blocks * LAYOUT.bytes_per_token * 16 for found in sizes]
    assert bytes_of[0] - bytes_of[1] == GIB


def test_pictures_that_layers_attend_to_leave_less_for_the_kv_cache(gpu: Any) -> None:
    config, bytes_of_block = EngineConfig(max_num_seqs=1 << 10), LAYOUT.bytes_per_token * 16
    for info in (CUDA, METAL):
        gpu(info)
        without, beside = (
            kv_cache_size.choose_sizes(LAYOUT, 1 << 20, config, picture_bytes=size).num_blocks
            for size in (0, 2 * GIB)
        )
        assert (without - beside) * bytes_of_block == 2 * GIB


@pytest.mark.parametrize(
    ("total", "share", "expected"),
    [(141, 1.0, 141 / 12), (141, 0.5, 141 / 24), (24, 0.9, 1.8), (16, 0.9, 1.5), (141, 0.07, 1.5)],
)
def test_arrays_of_steps_have_a_limit(
    gpu: Any, total: float, share: float, expected: float
) -> None:
    """Eight billion weights in 4 bits: 15 GiB when dequantised, and 9 GiB of activations."""
    gpu(CUDA | {"total_memory": int(total * GIB), "free_memory": int(total * GIB)})
    config = EngineConfig(max_num_seqs=8, kv_cache_bytes=GIB, gpu_memory_utilization=share)
    memory = StepMemory(per_row=(9 << 30) // 2048, per_step=15 * GIB)
    found = kv_cache_size.choose_sizes(LAYOUT, 4096, config, step_memory=memory)
    assert found.step_bytes == pytest.approx(expected * GIB, rel=1e-6)
    assert found.recorded_weight_bytes == found.step_bytes // 4
    rows = 0.75 * expected / 9 * 2048 / 1.7  # norms and SwiGLU of packed weights are computed twice
    assert found.recorded_rows == int(min(rows, 4096)), "a recording has all arrays in memory"
    assert found.recorded_row_bytes == int(1.7 * memory.per_row)
    plain = kv_cache_size.choose_sizes(
        LAYOUT, 4096, config, step_memory=replace(memory, per_step=0)
    )
    assert plain.recorded_row_bytes == int(1.2 * memory.per_row)


@pytest.mark.parametrize(
    ("asked", "tokens", "chunk"),
    [((None, None), 512, 512), ((None, 100), 512, 100), ((300, None), 300, 300)],
)
def test_a_prompt_may_fill_a_step_of_the_library_for_cpus(
    asked: tuple[int | None, int | None], tokens: int, chunk: int
) -> None:
    config = EngineConfig(
        max_num_batched_tokens=asked[0], max_prefill_chunk=asked[1], kv_cache_bytes=GIB
    )
    found = kv_cache_size.choose_sizes(LAYOUT, 4096, config, packed=True)
    limits = found.scheduler_config(config)
    assert (limits.max_num_batched_tokens, limits.chunk_rows) == (tokens, chunk)
    other = kv_cache_size.choose_sizes(LAYOUT, 4096, config).scheduler_config(config)
    assert not other.whole_steps


def test_mlx_waits_from_the_limit_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts what is planned or, if more exists already, that."""
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_memory_limit", limits.append)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 5)
    kv_cache_size.limit_memory(7, 0)
    assert limits == []
    kv_cache_size.limit_memory(7, 2)
    kv_cache_size.limit_memory(3, 2)
    assert limits == [9, 7]


@pytest.mark.parametrize(
    ("per_row", "asked", "rows"),
    [
        (0, None, 2048),
        (2 << 20, None, 2048),
        (4 << 20, None, 1024),
        (16 << 20, None, 256),
        (1 << 30, None, 256),  # the minimum
        (16 << 20, 1024, 1024),  # configured by the user
    ],
)
def test_steps_have_fewer_rows_where_these_take_much(
    gpu: Any, per_row: int, asked: int | None, rows: int
) -> None:
    gpu(CUDA)
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=asked, kv_cache_bytes=GIB)
    found = kv_cache_size.choose_sizes(LAYOUT, 4096, config, step_memory=StepMemory(per_row))
    assert found.max_num_batched_tokens == rows


@pytest.mark.parametrize(
    ("num_blocks", "max_model_len", "max_num_seqs", "expected"),
    [
        (1000, 4096, 64, (512,) * 4),
        (65, 4096, 64, (512,) * 2),  # as many as the blocks hold
        (1000, 4096, 3, (512,) * 3),
        (1000, 100, 64, (100,) * 20),
        (21, 300, 64, (300,)),
        (2, 17, 64, ()),
    ],
)
def test_prompts_that_fill_a_step(
    num_blocks: int, max_model_len: int, max_num_seqs: int, expected: tuple[int, ...]
) -> None:
    sizes = kv_cache_size.Sizes(num_blocks, max_model_len, 2048, FEW, max_prefill_chunk=512)
    assert sizes.full_step(EngineConfig(max_num_seqs=max_num_seqs)) == expected


def test_a_gpu_that_others_fill_has_no_room(gpu: Any) -> None:
    gpu(CUDA | {"free_memory": 6 * GIB})
    with pytest.raises(OutOfMemoryError, match="the KV cache has 0 bytes"):
        kv_cache_size.choose_sizes(LAYOUT, 4096, EngineConfig())


def test_what_layers_put_out() -> None:
    model = tiny_llama(
        num_hidden_layers=2, tie_word_embeddings=False
    )  # its head has 64 outputs, too
    # Query, key, value, output, gate, up and down projections, in float32, times 1.6.
    outputs = 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    assert step_memory(model, 64) == StepMemory(per_row=int(outputs * 1.6) * 4)
    nn.quantize(model, group_size=32, bits=4)
    weights = 2 * 32 * (32 + 16 + 16 + 32 + 64 + 64 + 64)
    assert step_memory(model, 64) == StepMemory(int(outputs * 1.6) * 4, weights * 4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("bits", "mode", "rows", "counted"),
    [(4, "affine", 128, 0), (4, "affine", 129, 1), (8, "affine", 256, 1), (6, "affine", 256, 0),
     (4, "mxfp4", 256, 0)],
)  # fmt: skip
def test_a_quantised_head_counts_if_its_values_are_computed(
    bits: int, mode: str, rows: int, counted: int, tied: bool
) -> None:
    """With more rows than our kernels take, it is dequantised, as layers are."""
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=tied)
    nn.quantize(model, group_size=32, bits=bits, mode=mode)
    few, many = (step_memory(model, 64, count).per_step for count in (1, rows))
    assert many - few == counted * 64 * 32 * 4


@pytest.mark.parametrize(
    ("bits", "fits"),
    [pytest.param(4, True, id="4 bits"), pytest.param(8, False, id="8 bits, in a control")],
)
def test_an_8b_model_serves_16k_tokens_in_10_gb(gpu: Any, bits: int, fits: bool) -> None:
    """Weights, KV cache and steps of Llama-3.1-8B's shape, whose arrays MLX never evaluates."""
    card = 10 * 10**9
    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=4096, num_hidden_layers=32, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256,
        rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=False,
        max_position_embeddings=131072,
    )  # fmt: skip
    model = llama.Model(arguments)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=bits)
    weights = sum(leaf.nbytes for _, leaf in tree_flatten(model.parameters()))
    per_token = 2 * 32 * 8 * 128 * 2
    layout: Any = SimpleNamespace(bytes_per_token=per_token, snapshot_bytes=0, bytes_per_sequence=0)
    gpu({"device_name": "a card", "total_memory": card, "free_memory": card - weights})
    steps = step_memory(model, 128256, 64)
    config = EngineConfig(max_model_len=16384)
    if not fits:
        with pytest.raises(OutOfMemoryError):
            kv_cache_size.choose_sizes(layout, 131072, config, step_memory=steps)
        return
    sizes = kv_cache_size.choose_sizes(layout, 131072, config, step_memory=steps)
    cache = sizes.cache_bytes(config.block_size, per_token)
    assert (sizes.num_blocks - 1) * config.block_size >= 16384
    assert weights + cache + sizes.step_bytes <= card
    assert sizes.step_bytes > 10**9  # not because steps have no memory
    assert sizes.max_num_batched_tokens >= 256


def test_the_limit_of_steps_holds_in_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs whole steps, whose arrays would otherwise all be in memory at once."""
    calls: list[str] = []
    make = engine.make_engine_runner

    def made(*arguments: Any) -> Any:
        calls.append("self-test")
        return make(*arguments)

    monkeypatch.setattr(engine, "limit_memory", lambda *_: calls.append("limit"))
    monkeypatch.setattr(engine, "make_engine_runner", made)
    tiny_engine()
    assert calls == ["limit", "self-test", "limit"]


def test_available_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Linux reports, otherwise half of the memory."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(device, "promised_bytes", lambda: 0)
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    monkeypatch.setattr(device, "MEMINFO", tmp_path / "meminfo")
    assert device.available_memory() == physical // 2
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 700 kB\n")
    assert device.available_memory() == 700 * 1024
