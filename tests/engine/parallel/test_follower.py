"""A rank other than 0, in this process."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.distributed import follower
from modelpack_engine.distributed.follower import Follower
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
