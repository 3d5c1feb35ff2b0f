"""A rank other than 0, in this process."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.distributed import follower
from modelpack_engine.distributed.follower import Follower
from modelpack_engine.distributed.group import Group
from modelpack_engine.platform.device import Staging
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_layout import layout_with_cache_type
from tests.engine.serving.tiny import tiny_loaded


def test_it_limits_the_memory_of_steps_as_rank_0_does(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    sizes = follower.choose_sizes

    def with_steps(*arguments: Any, **options: Any) -> Sizes:
        return replace(sizes(*arguments, **options), step_bytes=5)

    monkeypatch.setattr(follower, "choose_sizes", with_steps)
    monkeypatch.setattr(follower, "limit_memory", lambda *given: limits.append(given))

    def make(*_: Any) -> Any:
        assert len(limits) == 1, "the self-test runs whole steps"
        return SimpleNamespace(tier="paged")

    monkeypatch.setattr(follower, "make_ordered_runner", make)
    loaded, answers = tiny_loaded(), []
    channel: Any = SimpleNamespace(answer=lambda number, **answer: answers.append(answer))
    group: Any = SimpleNamespace(rank=1, mlx=None)
    one = Follower(group, channel)
    one._load = lambda *_: loaded
    one._load_part("tiny")
    one._configure(asdict(EngineConfig(device="cpu")))
    build = {"number": 1, "num_blocks": 7, "max_model_len": 64, "max_num_batched_tokens": 32}
    one._build(json.dumps(build).encode())
    layout = layout_with_cache_type(loaded.model, "auto")
    assert layout is not None
    assert answers == [{"tier": "paged"}]
    cache_bytes = 7 * 16 * layout.bytes_per_token
    assert limits[0][0] >= cache_bytes
    assert limits[0][1] == 5
    assert limits[1:] == [(loaded.weight_bytes + cache_bytes, 5)]


@pytest.mark.parametrize(
    ("wanted_rows", "padded", "tokens"),
    [
        (3, 3, 3),
        (3, 4, 4),  # a compiled step: rank 0 samples the padding, too
        (5, 8, 3),  # two rows of a prompt whose log-probabilities are requested
    ],
)
def test_it_takes_as_many_tokens_as_rank_0_gives(
    wanted_rows: int, padded: int, tokens: int
) -> None:
    """NCCL hangs if the ranks add up arrays of different sizes."""
    group = Group.__new__(Group)
    group.mlx = mx.distributed.init()  # this process alone
    one = Follower(group, SimpleNamespace())  # type: ignore[arg-type]
    batch: Any = SimpleNamespace(
        from_previous=(), token_ids=[1] * 5, num_rows=5, sample_rows=list(range(wanted_rows))
    )
    runner: Any = SimpleNamespace(
        forward=lambda *_: mx.zeros((padded, 7)), staging=Staging(), pools=list,
        writes_in_place=True,
    )  # fmt: skip
    held: Any = SimpleNamespace(sampled=None, in_flight=None)
    one._step(held, runner, batch, 3)
    assert held.sampled.token_ids.shape == (tokens,)
