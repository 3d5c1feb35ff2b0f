"""The contents of blocks are read and written back unchanged, for pools of any kind."""

from __future__ import annotations

import mlx.core as mx
import pytest

from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import BlockContents, PagedKV
from modelpack_engine.kernels.quantised import Quantisation

SIZE = 4  # tokens of a block
LAYOUTS = {
    "float32": KVLayout(2, 64, 2, 64, mx.float32),
    "bfloat16": KVLayout(3, 8, 3, 8, mx.bfloat16),
    "latent": KVLayout(1, 32, 1, 8, mx.float16),
    "no values": KVLayout(1, 32, 1, 0, mx.float16),
    "8 bits": KVLayout(2, 64, 2, 64, mx.float32, quantised=Quantisation(8, 64)),
    "4 bits": KVLayout(2, 64, 2, 32, mx.float16, quantised=Quantisation(4, 32)),
}


def filled(layout: KVLayout, exact: bool, seed: int) -> PagedKV:
    """A layer of 6 blocks with different values in each slot."""
    kv = PagedKV(layout, StepInputs(SIZE, exact=exact), num_blocks=6)
    mx.random.seed(seed)
    keys, values = (
        mx.random.normal((6 * SIZE, heads, dim)).astype(layout.dtype)
        for heads, dim in (
            (layout.key_heads, layout.key_dim),
            (layout.value_heads, layout.value_dim),
        )
    )
    kv.pools.write(keys, values, mx.arange(6 * SIZE, dtype=mx.int32), None)
    return kv


def held(contents: BlockContents, blocks: list[int]) -> list[bytes]:
    rows = memoryview(contents.read(blocks))  # type: ignore[arg-type]
    assert rows.shape == (len(blocks), contents.length)
    data = rows.tobytes()
    return [data[i : i + contents.length] for i in range(0, len(data), contents.length)]


@pytest.mark.parametrize("exact", [True, False], ids=["head by head", "token by token"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_come_back_as_they_were(name: str, exact: bool) -> None:
    layers = [filled(layout, exact, i) for i, layout in enumerate((LAYOUTS[name],) * 2)]
    contents = BlockContents(layers)
    before = held(contents, [0, 1, 2, 3, 4, 5])
    assert len(set(before)) == 6
    assert contents.length == SIZE * sum(kv.layout.bytes_per_token for kv in layers)
    contents.write([3, 0], [before[1], before[4]])
    after = held(contents, [0, 1, 2, 3, 4, 5])
    assert after == [before[4], before[1], before[2], before[1], before[4], before[5]]


def test_different_layouts_say_so() -> None:
    found = {
        tuple(BlockContents([filled(layout, exact, 0)]).describe())
        for layout in LAYOUTS.values()
        for exact in (True, False)
    }
    assert len(found) == 2 * len(LAYOUTS)
