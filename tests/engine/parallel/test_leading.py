"""What rank 0 refuses, and what it takes of the others' sizes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from modelpack_engine.buckets import EXACT
from modelpack_engine.errors import EngineError
from modelpack_engine.parallel.leading import ParallelEngine, Ranks, fewer_blocks
from modelpack_engine.sizing import Sizes
from tests.engine.parallel import playing
from tests.engine.serving.tiny import tiny_loaded


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"draft_model": "ai/small"}, "a draft model"),
        ({"kv_offload_dir": "/tmp/prefixes"}, "kv_offload_dir"),
        ({"kv_offload_memory": 1 << 20}, "kv_offload_memory"),
        ({"backend": "llama.cpp"}, "llama.cpp"),
    ],
)
def test_what_only_one_device_does(settings: dict[str, Any], text: str) -> None:
    nobody = cast(Ranks, None)  # the ranks are not asked
    with pytest.raises(EngineError, match=f"{text}.* is not supported where a model is divided"):
        ParallelEngine(tiny_loaded(), playing.config(**settings), model_id="", ranks=nobody)


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [(100, (100, 500)), (500, (100, 500)), (11, (11, 161)), (2, (2, 17))],
)
def test_the_rank_with_the_least_room_decides(num_blocks: int, expected: tuple[int, int]) -> None:
    sizes = fewer_blocks(Sizes(100, 500, 64, EXACT), num_blocks, 16)
    assert (sizes.num_blocks, sizes.max_model_len) == expected
    assert sizes.max_num_batched_tokens == 64
