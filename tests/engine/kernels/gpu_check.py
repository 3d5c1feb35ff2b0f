"""The real kernels on this machine's GPU. CI has no GPU, so pytest collects it by name only.

python -m pytest tests/engine/kernels/gpu_check.py
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine import kernels
from modelpack_engine.kernels import AttentionShape, cuda, launch, operations, reference
from modelpack_engine.kernels.plan import plan_decode
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.layers import adapters, blocks, state_space
from modelpack_engine.layers.blocks import BLOCK_TYPES
from modelpack_engine.sampling import sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.backend() == "none", reason="MLX has no GPU here"),
]

S = AttentionShape
SHAPES = {
    "llama-1b": S(32, 8, 64, 64),
    "mha-64": S(8, 8, 64, 64),
    "mqa-ragged": S(9, 1, 64, 64),
    "72": S(8, 2, 72, 72),
    "80": S(8, 2, 80, 80),
    "96": S(8, 2, 96, 96),
    "llama-8b": S(32, 8, 128, 128),
    "qwen2-7b": S(28, 4, 128, 128),
    "gemma2": S(8, 4, 256, 256, softcap=True, window=300),
    "gpt-oss": S(64, 8, 64, 64, window=128, sinks=True),
    "deepseek-v2": S(16, 16, 192, 128),
    "deepseek-v3": S(16, 1, 512, 512, 64, latent=True),
    "one-latent-pool": S(4, 1, 72, 64, latent=True),
    "block-8": S(4, 2, 64, 64, block_size=8),
    "block-32": S(4, 2, 128, 128, block_size=32, sinks=True),
    "odd": S(4, 2, 20, 12),
    "q8-64": S(32, 8, 64, 64, bits=8, group=64),
    "q4-128": S(32, 8, 128, 128, bits=4, group=64),
    "q8-odd-rows": S(9, 3, 64, 64, bits=8, group=64, sinks=True),
    "q4-96": S(8, 2, 96, 96, bits=4, group=32, window=300),
    "q8-256": S(8, 4, 256, 256, bits=8, group=64, softcap=True),
}
DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}


@pytest.fixture(autouse=True)
def _probes_pass(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on any warning: a refused kernel would be replaced by MLX's functions, and pass."""
    yield
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not warnings


#: Every shape in the usual type, some in all: a kernel takes a second or two to compile.
DECODES = [(name, "bf16") for name in SHAPES]
DECODES += [
    (name, dtype) for name in ("llama-1b", "gemma2", "gpt-oss", "odd") for dtype in ("f16", "f32")
]


@pytest.mark.skipif(launch.backend() != "cuda", reason="MLX compiles for CUDA only")
def test_mlx_finds_what_we_compile() -> None:
    assert cuda.found_by_mlx()


@pytest.mark.parametrize(("name", "dtype"), DECODES)
def test_decode_is_right(name: str, dtype: str) -> None:
    on, shape = launch.backend(), SHAPES[name]
    pool = mx.uint32 if shape.bits else DTYPES[dtype]
    assert operations.probe_decode(shape, on, DTYPES[dtype], pool) is None


def test_pools_may_have_another_type_than_queries() -> None:
    shape = SHAPES["llama-1b"]
    assert operations.probe_decode(shape, launch.backend(), mx.float32, mx.bfloat16) is None


@pytest.mark.parametrize(("rows", "kv_heads"), [("f32", "bf16"), ("bf16", "bf16"), ("f16", "f32")])
def test_write_is_right_and_in_place(rows: str, kv_heads: str) -> None:
    assert operations.probe_write(launch.backend(), DTYPES[rows], DTYPES[kv_heads]) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Quantisation(8, 64), Quantisation(4, 32)], ids=str)
def test_rows_are_quantised_in_place(kind: Quantisation, dtype: str) -> None:
    assert operations.probe_quantise(launch.backend(), DTYPES[dtype], kind) is None


@pytest.mark.parametrize("vocab_size", [128256, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_drawn_as_by_functions(dtype: str, vocab_size: int) -> None:
    assert sampler.verdict(DTYPES[dtype], vocab_size) is None


def test_the_kernels_are_available() -> None:
    found = kernels.probe([SHAPES["llama-1b"], SHAPES["gpt-oss"]])
    assert (found.decode, found.write) == (True, True)
    assert found.backend == launch.backend()


class Layer:
    """The cache of one layer for 64 sequences of different lengths."""

    def __init__(self, shape: AttentionShape, rows: int, context: int, dtype: mx.Dtype) -> None:
        rng = random.Random(rows * context)
        size = shape.block_size
        width = -(-context // size)
        blocks = list(range(1, rows * width + 1))
        rng.shuffle(blocks)
        self.shape, self.dtype = shape, dtype
        self.tables = mx.array([blocks[r * width : (r + 1) * width] for r in range(rows)], mx.int32)
        self.lens = mx.array([rng.randint(1, context) for _ in range(rows)], mx.int32)
        slots = (rows * width + 1) * size
        self.k = mx.random.normal((slots, shape.num_kv_heads, shape.key_dim)).astype(dtype)
        self.v = mx.random.normal((slots, shape.num_kv_heads, shape.value_dim)).astype(dtype)
        self.q = mx.random.normal((rows, shape.num_heads, shape.key_dim)).astype(dtype)
        mx.eval(self.tables, self.lens, self.k, self.v, self.q)

    def decode(self, k: mx.array, v: mx.array, q: mx.array, **more: Any) -> mx.array:
        return kernels.decode_attention(
            q, k, v, self.tables, self.lens,
            scale=self.shape.key_dim**-0.5, num_kv_heads=self.shape.num_kv_heads, **more,
        )  # fmt: skip

    def naively(self, k: mx.array, v: mx.array, q: mx.array) -> mx.array:
        with mx.stream(mx.cpu):
            found = reference.decode_attention(
                q.astype(mx.float32), k, v, self.tables, self.lens,
                scale=self.shape.key_dim**-0.5, num_kv_heads=self.shape.num_kv_heads,
            )  # fmt: skip
            mx.eval(found)
        return found


@pytest.mark.parametrize(
    ("rows", "context", "split"),
    [
        (64, 544, None), (64, 544, 2), (3, 5000, None), (1, 8192, None), (1, 8192, 64),
        (200, 40, None),
    ],
)  # fmt: skip
def test_many_rows_and_long_contexts(rows: int, context: int, split: int | None) -> None:
    layer = Layer(S(8, 2, 64, 64), rows, context, mx.float32)
    found = layer.decode(layer.k, layer.v, layer.q, split=split)
    wanted = layer.naively(layer.k, layer.v, layer.q)
    assert mx.max(mx.abs(found - wanted)).item() < 1e-4  # type: ignore[operator]


def test_native_attention_agrees() -> None:
    layer = Layer(S(32, 8, 128, 128), 16, 512, mx.bfloat16)
    layer.lens = mx.array([512] * 16, mx.int32)
    slots = (layer.tables[:, :, None] * 16 + mx.arange(16)).reshape(16, 512)
    k, v = (mx.contiguous(pool[slots].swapaxes(1, 2)) for pool in (layer.k, layer.v))
    wanted = mx.fast.scaled_dot_product_attention(layer.q[:, :, None], k, v, scale=128**-0.5)
    found = layer.decode(layer.k, layer.v, layer.q)
    assert mx.max(mx.abs(found - wanted[:, :, 0])).item() < 5e-3  # type: ignore[operator]


def test_the_same_call_gives_the_same_bits() -> None:
    layer = Layer(S(32, 8, 64, 64), 32, 2000, mx.bfloat16)
    first = layer.decode(layer.k, layer.v, layer.q)
    assert all(mx.array_equal(first, layer.decode(layer.k, layer.v, layer.q)) for _ in range(10))


def test_unwritten_slots_are_never_read() -> None:
    layer = Layer(S(4, 2, 64, 64), 5, 100, mx.float32)
    live = mx.zeros((layer.k.shape[0],), mx.bool_)
    for row in range(layer.lens.size):
        tokens = mx.arange(int(layer.lens[row]))
        live[layer.tables[row][tokens // 16] * 16 + tokens % 16] = True
    k, v = (mx.where(live[:, None, None], pool, mx.nan) for pool in (layer.k, layer.v))
    found = layer.decode(k, v, layer.q)
    wanted = layer.decode(layer.k, layer.v, layer.q)
    assert mx.array_equal(found, wanted)


def test_rows_without_context_are_zero() -> None:
    layer = Layer(S(4, 2, 64, 64), 5, 100, mx.float32)
    layer.lens = mx.array([0, 5, 0, 1, 100], mx.int32)
    for split in (1, 2):
        found = layer.decode(layer.k, layer.v, layer.q, split=split)
        assert mx.all(found[mx.array([0, 2])] == 0)
        assert mx.all(mx.isfinite(found))


@pytest.mark.parametrize("steps", [1, 40])
def test_steps_in_one_evaluation_follow_each_other(steps: int) -> None:
    """Write, attend, and write rows that depend on the result: a model's steps in one graph."""
    layer = Layer(S(4, 2, 64, 64), 16, 64, mx.float32)
    layer.lens = mx.array([64] * 16, mx.int32)
    rng = random.Random(steps)
    chosen = [[rng.randrange(64) for _ in range(16)] for _ in range(steps)]
    rows = mx.arange(16)

    def slots(step: int) -> mx.array:
        tokens = mx.array(chosen[step])
        return (layer.tables[rows, tokens // 16] * 16 + tokens % 16).astype(mx.int32)

    k, v = mx.array(layer.k), mx.array(layer.v)
    mx.eval(k, v)
    q = layer.q
    for step in range(steps):
        new_k, new_v = q[:, :2], q[:, 2:]
        k, written = kernels.write_kv(new_k, new_v, k, v, slots(step))
        assert written is not None
        v = written
        q = layer.decode(k, v, q)
        q = q / mx.max(mx.abs(q), axis=-1, keepdims=True)
    with mx.stream(mx.cpu):
        slow_k, slow_v, slow = mx.array(layer.k), mx.array(layer.v), layer.q
        for step in range(steps):
            slow_k[slots(step)] = slow[:, :2]
            slow_v[slots(step)] = slow[:, 2:]
            slow = layer.naively(slow_k, slow_v, slow)
            slow = slow / mx.max(mx.abs(slow), axis=-1, keepdims=True)
            mx.eval(slow, slow_k, slow_v)
    assert mx.max(mx.abs(q - slow)).item() < 1e-3 * steps  # type: ignore[operator]
    assert mx.allclose(k, slow_k, atol=1e-3 * steps)


def test_a_gather_waits_for_the_write() -> None:
    pool = mx.zeros((1 << 15, 8, 64), mx.bfloat16)
    other = mx.zeros((1 << 15, 8, 64), mx.bfloat16)
    mx.eval(pool, other)
    slots = mx.arange(0, 4096, 2, dtype=mx.int32)
    seen = []
    for value in range(1, 33):
        rows = mx.full((slots.size, 8, 64), value, mx.bfloat16)
        pool, other = kernels.write_kv(rows, rows, pool, other, slots)  # type: ignore[assignment]
        seen.append(pool[kernels.after(slots, pool)].astype(mx.float32).mean())
    # A round may read values of a later round, but never of an earlier one.
    assert all(mean.item() >= value for value, mean in enumerate(seen, 1))  # type: ignore[operator]


def test_a_pool_that_others_hold_is_written_without_a_copy() -> None:
    pools = [mx.zeros((1 << 16, 8, 64), mx.bfloat16) for _ in range(2)]
    mx.eval(pools)
    k, v = pools
    rows = mx.ones((32, 8, 64), mx.bfloat16)
    slots = mx.arange(100, 132, dtype=mx.int32)
    assert operations.may_write(mx.bfloat16, mx.bfloat16)
    mx.eval(kernels.write_kv(rows, rows, k, v, slots))
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        k, v = kernels.write_kv(rows, rows, k, v, slots)  # type: ignore[assignment]
        mx.async_eval(k, v)  # type: ignore[no-untyped-call]
    mx.eval(k, v)
    assert mx.get_peak_memory() - before < pools[0].nbytes // 8
    assert mx.array_equal(pools[0][100:132], rows)


def test_a_decode_can_be_compiled() -> None:
    layer = Layer(S(8, 2, 64, 64), 8, 200, mx.bfloat16)
    compiled = mx.compile(lambda k, v, q: layer.decode(k, v, q) * 2)
    wanted = layer.decode(layer.k, layer.v, layer.q) * 2
    assert mx.array_equal(compiled(layer.k, layer.v, layer.q), wanted)


@pytest.mark.parametrize(
    ("simdgroups", "max_steps"), [(1, 1), (2, 2), (2, 4), (8, 1), (8, 4), (16, 2)]
)
def test_other_plans_are_right_as_well(simdgroups: int, max_steps: int) -> None:
    layer = Layer(S(8, 2, 128, 128), 7, 300, mx.float32)
    wanted = layer.naively(layer.k, layer.v, layer.q)
    for split in (1, 3):
        plan = plan_decode(layer.shape, 4, 7, 304, split, simdgroups, max_steps)
        found = launch.decode(
            plan, layer.shape, launch.backend(), layer.q, layer.k, layer.v, layer.tables,
            layer.lens, scale=128**-0.5,
        )  # fmt: skip
        assert mx.max(mx.abs(found - wanted)).item() < 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_adapters_are_right(dtype: str) -> None:
    assert adapters.verdict(DTYPES[dtype]) is None
    if dtype != "f32" and launch.backend() == "cuda":
        assert adapters.wide_verdict(DTYPES[dtype]) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_state_spaces_are_right(dtype: str) -> None:
    assert state_space.verdict(DTYPES[dtype]) is None
    if dtype != "f32" and launch.backend() == "cuda":
        for dim, size in ((64, 128), (128, 64), (48, 128), (64, 256)):
            assert state_space.wide_verdict(DTYPES[dtype], dim, size) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(BLOCK_TYPES))
def test_kernels_of_blocks_are_right(name: str, dtype: str) -> None:
    kind = BLOCK_TYPES[name]
    for stored in {kind, kind.halved}:
        assert blocks.values_verdict(DTYPES[dtype], stored) is None
        for rows in (1, 2, 4, 8):
            assert blocks.verdict(DTYPES[dtype], stored, rows) is None
        tiles = (blocks.TILE_OF_MANY, *blocks.TILES)
        for tile in tiles if dtype != "f32" and blocks._has_tensor_cores() else ():
            assert blocks.tiles_verdict(DTYPES[dtype], stored, tile) is None
    for biased in (False, True):
        assert blocks.experts_verdict(DTYPES[dtype], kind, biased) is None
    for tile in blocks.TILES if dtype != "f32" and blocks._has_tensor_cores() else ():
        assert blocks.spans_verdict(DTYPES[dtype], kind, tile, True) is None
