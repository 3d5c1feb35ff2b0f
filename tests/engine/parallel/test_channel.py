"""The channel: which connections it accepts, which messages it delivers, and how it fails."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from modelpack_engine.distributed import channel
from modelpack_engine.distributed.channel import FollowerChannel, Kind, LeaderChannel, encode
from modelpack_engine.errors import EngineError, ModelLoadError

Failures = queue.SimpleQueue[EngineError]
HOST = "127.0.0.1"


@pytest.fixture
def leaders() -> Iterator[Callable[[int], tuple[LeaderChannel, Failures]]]:
    made: list[LeaderChannel] = []

    def make(size: int) -> tuple[LeaderChannel, Failures]:
        failures: Failures = queue.SimpleQueue()
        made.append(LeaderChannel(size, HOST, failures.put))
        return made[-1], failures

    yield make
    for leader in made:
        leader.close()


def follower(leader: LeaderChannel, rank: int) -> tuple[FollowerChannel, Failures]:
    failures: Failures = queue.SimpleQueue()
    return FollowerChannel(rank, leader.address, leader.token, failures.put), failures


Leaders = Callable[[int], tuple[LeaderChannel, Failures]]


def test_questions_and_answers(leaders: Leaders) -> None:
    leader, _ = leaders(3)
    ends = [follower(leader, rank)[0] for rank in (2, 1)]
    leader.accept(10)
    leader.send(Kind.LOAD, {"number": 1, "key": "model"})
    for end in ends:
        assert end.receive() == (Kind.LOAD, b'{"number": 1, "key": "model"}')
        end.answer(0, blocks=99)  # the response to an earlier request
        end.answer(1, blocks=end.rank)
    assert [answer["blocks"] for answer in leader.gather(1, blocks=int)] == [1, 2]


def test_a_refusal_keeps_its_class_and_hint_and_the_group(leaders: Leaders) -> None:
    leader, failures = leaders(2)
    end, _ = follower(leader, 1)
    leader.accept(10)
    end.refuse(4, ModelLoadError("no such file", hint="pull it"))
    with pytest.raises(ModelLoadError, match="rank 1: no such file") as caught:
        leader.gather(4)
    assert caught.value.hint == "pull it"
    leader.send(Kind.UNLOAD)
    assert end.receive()[0] is Kind.UNLOAD
    assert failures.empty()


def test_who_does_not_know_the_token_is_turned_away(leaders: Leaders) -> None:
    leader, _ = leaders(2)
    with socket.create_connection(leader.address) as stranger:
        stranger.sendall(b"x" * channel.TOKEN_BYTES)
        end, _ = follower(leader, 1)
        leader.accept(10)
        assert stranger.recv(1) == b""
    leader.send(Kind.BYE)
    assert end.receive()[0] is Kind.BYE


@pytest.mark.parametrize("rank", [0, 2, -1])
def test_ranks_that_there_are_not_are_turned_away(rank: int, leaders: Leaders) -> None:
    leader, _ = leaders(2)
    _, failures = follower(leader, rank)
    with pytest.raises(EngineError, match=r"ranks \[1\] did not connect"):
        leader.accept(0.5)
    assert "rank 0 ended" in str(failures.get(timeout=10))


def test_other_versions_are_refused(leaders: Leaders, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, _ = leaders(2)
    monkeypatch.setattr(channel, "versions", lambda: {"mlx": "0.1"})
    follower(leader, 1)
    monkeypatch.setattr(channel, "versions", lambda: {"mlx": "0.2"})
    with pytest.raises(
        EngineError, match=r"rank 1 has the versions .*0\.1.*, but rank 0 has .*0\.2"
    ):
        leader.accept(10)


def connected(leaders: Leaders) -> tuple[LeaderChannel, Failures, FollowerChannel, Failures]:
    leader, failures = leaders(2)
    end, ends = follower(leader, 1)
    leader.accept(10)
    return leader, failures, end, ends


def test_a_follower_that_ends_without_a_word(leaders: Leaders) -> None:
    leader, failures, end, _ = connected(leaders)
    end._connection.shutdown(socket.SHUT_RDWR)
    assert "rank 1 of 2 ended: its connection was closed" in str(failures.get(timeout=10))
    with pytest.raises(EngineError, match="rank 1"):
        leader.send(Kind.STEP, b"")
    with pytest.raises(EngineError, match="rank 1"):
        leader.gather(1)


def test_a_follower_that_says_why(leaders: Leaders) -> None:
    leader, failures, end, _ = connected(leaders)
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def gather() -> None:
        try:
            leader.gather(1)
        except EngineError as error:
            waiting.put(error)

    threading.Thread(target=gather, daemon=True).start()
    end.fail(RuntimeError("out of memory"))
    assert str(failures.get(timeout=10)) == "rank 1: out of memory"
    assert str(waiting.get(timeout=10)) == "rank 1: out of memory"


@pytest.mark.parametrize("data", [encode(Kind.STEP), b"\xff" * 5])
def test_a_follower_that_talks_nonsense(data: bytes, leaders: Leaders) -> None:
    _, failures, end, _ = connected(leaders)
    end._connection.sendall(data)
    assert "rank 1 of 2 ended: a message of" in str(failures.get(timeout=10))


def test_the_end_of_rank_0_is_heard_and_a_goodbye_is_none(leaders: Leaders) -> None:
    leader, _, end, ends = connected(leaders)
    leader.close()
    assert end.receive()[0] is Kind.BYE
    assert ends.empty()
    leader, failures, end, ends = connected(leaders)
    leader.fail(EngineError("a step failed"))
    assert str(failures.get(timeout=10)) == "a step failed"
    assert "rank 0 ended" in str(ends.get(timeout=10))


def test_failures_are_told_once(leaders: Leaders) -> None:
    leader, failures, end, _ = connected(leaders)
    leader.fail(EngineError("first"))
    leader.fail(EngineError("second"))
    assert str(failures.get(timeout=10)) == "first"
    assert failures.empty()
    end._connection.close()


def test_no_rank_0_to_reach() -> None:
    with socket.create_server((HOST, 0)) as server:
        address = server.getsockname()
    with pytest.raises(EngineError, match="rank 1 cannot reach rank 0"):
        FollowerChannel(1, address, b"", lambda _: None)


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(EngineError, match="rank 0 cannot listen") as caught:
        LeaderChannel(2, "203.0.113.1", lambda _: None)
    assert "MODELPACK_CHANNEL_HOST" in (caught.value.hint or "")
