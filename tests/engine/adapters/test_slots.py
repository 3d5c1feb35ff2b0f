"""Requests wait for a slot while others use as many other adapters as fit into memory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.errors import NotFoundError
from modelpack_engine.engine import Engine
from modelpack_engine.outputs import FinishReason, RequestEvent
from modelpack_engine.request import EngineRequest
from tests.engine.adapters.test_engine import PROMPT, adapter, merged_tokens
from tests.engine.serving.test_engine import GREEDY, check_idle, prompts, run, tokens
from tests.engine.serving.tiny import tiny_engine


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """An engine with the adapters a, b and c, of which one fits into memory."""
    made = tiny_engine(max_loras=1, scheduling_policy="fcfs")
    for seed, name in enumerate("abc", start=1):
        made.add_adapter(name, adapter(tmp_path, seed), name)
    return made


def ask(engine: Engine, *named: tuple[str, str | None]) -> None:
    for request_id, name in named:
        engine.add_request(request_id, EngineRequest(PROMPT, GREEDY, adapter=name))


def order_of(engine: Engine) -> tuple[list[str], list[str]]:
    """Run all requests; return their ids in the order of their starts, and of their ends."""
    started: dict[str, None] = {}
    ended: list[str] = []
    while engine.has_work:
        for event in engine.step():
            started |= {event.request_id: None}
            ended += [event.request_id] if event.finished else []
    return list(started), ended


def test_a_request_waits_for_a_slot(engine: Engine, tmp_path: Path) -> None:
    ask(engine, ("0", "a"), ("1", "b"), ("2", "c"))
    found = run(engine)
    for seed, request_id in enumerate("012", start=1):
        expected = merged_tokens(adapter(tmp_path, seed), PROMPT)
        assert tokens(found[request_id, 0]) == expected
    check_idle(engine)
    ask(engine, ("0", "a"), ("1", "b"), ("2", "c"))
    assert order_of(engine) == (["0", "1", "2"], ["0", "1", "2"]), "one after the other"


def test_requests_that_need_no_slot_overtake(engine: Engine) -> None:
    """The base's do; those of the loaded adapter do not, or its slot would never be free."""
    ask(engine, ("a1", "a"))
    engine.step()
    ask(engine, ("b", "b"), ("base", None), ("a2", "a"))
    started, ended = order_of(engine)
    assert started == ["a1", "base", "b", "a2"]
    assert ended.index("base") < ended.index("b") < ended.index("a2")


def test_a_stream_of_requests_does_not_keep_a_slot(tmp_path: Path) -> None:
    engine = tiny_engine(max_loras=1)  # the shortest first: those of a find their prefix
    for seed, name in enumerate("ab", start=1):
        engine.add_adapter(name, adapter(tmp_path, seed), name)
    ask(engine, ("a", "a"))
    engine.step()
    ask(engine, ("b", "b"))
    for number in range(200):
        if f"a{number - 1}" not in engine._outputs._scheduler._requests:
            ask(engine, (f"a{number}", "a"))
        if any(event.request_id == "b" for event in engine.step()):
            break
    else:
        pytest.fail("b does not start")
    order_of(engine)
    check_idle(engine)


def test_two_slots(tmp_path: Path) -> None:
    """Only the adapter that was used least recently gives up its slot."""
    engine = tiny_engine(max_loras=2, scheduling_policy="fcfs")
    for seed, name in enumerate("abc", start=1):
        engine.add_adapter(name, adapter(tmp_path, seed), name)
    ask(engine, ("a", "a"), ("b", "b"))
    engine.step()
    engine.step()
    ask(engine, ("c", "c"), ("a2", "a"), ("b2", "b"))
    started, ended = order_of(engine)
    assert started[:3] == ["a", "b", "b2"]
    assert ended.index("b2") < min(ended.index("c"), ended.index("a2"))


@pytest.mark.parametrize("waiting", ["b", "c"])
def test_a_waiting_request_is_cancelled(engine: Engine, waiting: str, tmp_path: Path) -> None:
    ask(engine, ("a", "a"))
    engine.step()
    memory = engine.memory_bytes
    ask(engine, ("b", "b"), ("c", "c"))
    engine.step()
    (event,) = engine.abort(waiting)
    assert event.finish_reason is FinishReason.ABORT
    assert event.token_ids == ()
    other = "c" if waiting == "b" else "b"
    assert order_of(engine)[1] == ["a", other]
    check_idle(engine)
    assert engine.memory_bytes == memory
    ask(engine, ("a", "a"))
    assert tokens(run(engine)["a", 0]) == merged_tokens(adapter(tmp_path, 1), PROMPT)


def test_a_removed_adapter_serves_requests_that_wait(engine: Engine, tmp_path: Path) -> None:
    expected = merged_tokens(adapter(tmp_path, 2), PROMPT)
    ask(engine, ("a", "a"), ("b", "b"))
    engine.step()
    engine.remove_adapter("b")
    shutil.rmtree(tmp_path / "2")
    with pytest.raises(NotFoundError, match="no such adapter: b"):
        ask(engine, ("x", "b"))
    assert tokens(run(engine)["b", 0]) == expected
    engine.remove_adapter("a")
    without = tiny_engine(max_loras=1).memory_bytes
    engine.remove_adapter("c")
    assert engine.memory_bytes == without


def test_an_adapter_that_cannot_be_read_any_more(engine: Engine, tmp_path: Path) -> None:
    """Its requests end with the error, and others go on."""
    ask(engine, ("a", "a"), ("b1", "b"), ("b2", "b"), ("c", "c"))
    (tmp_path / "2" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    found = run(engine)
    for name in ("b1", "b2"):
        (event,) = found[name, 0]
        assert event.finish_reason is FinishReason.ERROR
        assert "adapter_model.safetensors" in str(event.error)
    assert tokens(found["c", 0]) == merged_tokens(adapter(tmp_path, 3), PROMPT)
    check_idle(engine)


def test_choices_wait_too(engine: Engine, tmp_path: Path) -> None:
    ask(engine, ("a", "a"))
    engine.add_request("b", EngineRequest(PROMPT, GREEDY, n=3, adapter="b"))
    found = run(engine)
    expected = merged_tokens(adapter(tmp_path, 2), PROMPT)
    assert [tokens(found["b", index]) for index in range(3)] == [expected] * 3


def test_owners_take_turns(engine: Engine) -> None:
    """Many requests of one owner that wait for slots do not delay another owner's."""
    for number in range(6):
        request = EngineRequest(PROMPT, GREEDY, owner=b"alice", adapter="ab"[number % 2])
        engine.add_request(f"alice{number}", request)
    request = EngineRequest(PROMPT, GREEDY, owner=b"bob", adapter="c")
    engine.add_request("bob", request)
    started, _ = order_of(engine)
    assert started.index("bob") <= 2


@cache
def expected_tokens(directory: Path, seed: int, number: int) -> list[int]:
    one = adapter(directory, seed) if seed else None
    return merged_tokens(one, prompts(4)[number])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


#: The adapter (0 is none), the prompt, the step before which it arrives, and whether it is aborted.
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 12), st.booleans()),
    min_size=2, max_size=9,
)  # fmt: skip


@pytest.mark.long
@settings(deadline=None, max_examples=25)
@given(ARRIVALS, st.integers(1, 2), st.integers(1, 4), st.sampled_from([8, 64]))
def test_every_request_ends_with_its_tokens(
    directory: Path, arrivals: list[tuple[int, int, int, bool]], slots: int, most: int, blocks: int
) -> None:
    """Whatever arrives and is cancelled, with few blocks, of which sequences are preempted."""
    engine = tiny_engine(
        max_loras=slots, max_num_seqs=most, kv_cache_bytes=blocks * 16 * 2 * 2 * 2 * 16 * 4,
        self_test=False,
    )  # fmt: skip
    for seed in (1, 2, 3):
        engine.add_adapter(str(seed), adapter(directory, seed), str(seed))
    found: dict[str, list[RequestEvent]] = {str(index): [] for index in range(len(arrivals))}

    def keep(events: Sequence[RequestEvent]) -> None:
        for event in events:
            found[event.request_id].append(event)

    for step in range(3000):
        for index, (seed, number, at, _) in enumerate(arrivals):
            if at == step:
                name = str(seed) if seed else None
                request = EngineRequest(prompts(4)[number], GREEDY, adapter=name)
                engine.add_request(str(index), replace(request, owner=bytes([index % 2])))
        for index, (_, _, at, is_aborted) in enumerate(arrivals):
            if is_aborted and at + 3 == step:
                keep(engine.abort(str(index)))
        if step > 12 and not engine.has_work:
            break
        keep(engine.step())
    assert not engine.has_work, "it hangs"
    check_idle(engine)
    for index, (seed, number, _, is_aborted) in enumerate(arrivals):
        got, expected = tokens(found[str(index)]), expected_tokens(directory, seed, number)
        assert got == (expected[: len(got)] if is_aborted else expected)
