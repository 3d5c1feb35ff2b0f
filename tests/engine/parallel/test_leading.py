"""What rank 0 rejects, and how it combines the sizes of all ranks."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from modelpack_engine.core.buckets import EXACT
from modelpack_engine.distributed.channel import Kind, LeaderChannel
from modelpack_engine.distributed.group import Group
from modelpack_engine.distributed.leader import ParallelEngine, Ranks, fewer_blocks
from modelpack_engine.errors import EngineError, OutOfMemoryError
from modelpack_engine.runner.kv_cache_size import Sizes
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
    with pytest.raises(EngineError, match=f"{text}.* is not supported for a model that is divided"):
        ParallelEngine(tiny_loaded(), playing.config(**settings), model_id="", ranks=nobody)


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [(100, (100, 500)), (500, (100, 500)), (11, (11, 161)), (2, (2, 17))],
)
def test_the_rank_with_the_least_room_decides(num_blocks: int, expected: tuple[int, int]) -> None:
    sizes = fewer_blocks(Sizes(100, 500, 64, EXACT), num_blocks, 16)
    assert (sizes.num_blocks, sizes.max_model_len) == expected
    assert sizes.max_num_batched_tokens == 64


class Recorded:
    """A channel that records what is sent, and calls `unloading` before UNLOAD is."""

    def __init__(self) -> None:
        self.sent: list[Kind] = []
        self.loading = threading.Event()
        self.unloading = lambda: None

    def send(self, kind: Kind, body: Any = b"") -> None:
        if kind is Kind.UNLOAD:
            self.unloading()
        self.sent.append(kind)
        if kind is Kind.LOAD:
            self.loading.set()


class CannotLoadError(Exception):
    pass


def refused(*_: Any) -> Any:
    raise CannotLoadError


def test_ranks_that_hold_a_model_load_no_other() -> None:
    channel = Recorded()
    ranks = Ranks(cast(Group, None), cast(LeaderChannel, channel))

    def load(_: Any) -> Any:
        with pytest.raises(OutOfMemoryError, match=r"hold another model \(one\)"):
            ranks.engine("two", refused, refused)
        raise CannotLoadError

    ranks.group = cast(Group, type("Two", (), {"size": 2}))
    with pytest.raises(CannotLoadError):
        ranks.engine("one", load, refused)
    assert channel.sent == [Kind.LOAD, Kind.UNLOAD]


def test_a_model_is_dropped_before_another_is_loaded() -> None:
    """Otherwise the other model would be dropped, and the ranks out of step with rank 0."""
    channel = Recorded()
    ranks = Ranks(cast(Group, None), cast(LeaderChannel, channel))

    def load_another() -> None:
        with pytest.raises(CannotLoadError):
            ranks.engine("two", refused, refused)

    other = threading.Thread(target=load_another)

    def unloading() -> None:
        channel.unloading = lambda: None
        channel.loading.clear()
        other.start()
        channel.loading.wait(0.3)  # long enough for a load that does not wait

    channel.unloading = unloading
    with pytest.raises(CannotLoadError):
        ranks.engine("one", refused, refused)
    other.join(10)
    assert channel.sent == [Kind.LOAD, Kind.UNLOAD] * 2


def test_an_engine_gives_the_ranks_back_once() -> None:
    given: list[str] = []
    engine = object.__new__(ParallelEngine)
    engine._ranks = cast(Ranks, type("R", (), {"give_back": lambda self: given.append("back")})())
    engine._holds_ranks = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelpack_engine.engine.Engine.close", lambda self: None)
        engine.close()
        engine.close()
    assert given == ["back"]
