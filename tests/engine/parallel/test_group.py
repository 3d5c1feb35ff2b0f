"""Joining MLX's group, with slow ranks, missing ranks, and too many ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.distributed import group
from modelpack_engine.distributed.group import Group, Place
from modelpack_engine.errors import EngineError
from modelpack_engine.patches import functions
from tests.engine.parallel.test_sharding import Ranks

PLACE = Place(1, "ring", "127.0.0.1")


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Make MLX return these groups one after the other, and raise those that are errors."""

    def script(*answers: object) -> list[Any]:
        left = list(answers)

        def init(**_: object) -> Any:
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(functions, "install", lambda _: None)
        monkeypatch.setattr(mx.distributed, "init", init)
        return left

    return script


def test_a_rank_that_starts_slowly_is_waited_for(joining: Callable[..., list[Any]]) -> None:
    late = RuntimeError("[ring] Couldn't connect (error: 111)")
    left = joining(late, late, Ranks(1, 2))
    joined = Group(PLACE, 2)
    assert (joined.rank, joined.size, left) == (1, 2, [])


def test_one_that_never_comes_is_not(
    joining: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_JOINING", -1.0)
    joining(RuntimeError("[ring] Couldn't connect (error: 111)"))
    with pytest.raises(EngineError, match=r"rank 1 cannot join the others over ring: .*connect"):
        Group(PLACE, 2)


def test_what_cannot_be_mended_is_told_at_once(joining: Callable[..., list[Any]]) -> None:
    left = joining(RuntimeError("[ring] Couldn't bind socket (error: 98)"), Ranks(1, 2))
    with pytest.raises(EngineError, match="bind socket"):
        Group(PLACE, 2)
    assert len(left) == 1


def test_another_number_of_ranks_than_asked_for(joining: Callable[..., list[Any]]) -> None:
    joining(Ranks(1, 4))
    with pytest.raises(EngineError, match=r"4 ranks were started, .* size is 2") as caught:
        Group(PLACE, 2)
    assert "--tensor-parallel-size 4" in (caught.value.hint or "")
