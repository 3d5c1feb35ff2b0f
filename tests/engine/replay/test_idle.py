"""Shapes of steps wait for idle time before they are recorded, so that no burst waits for that."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine import async_engine
from modelpack_engine import engine as engine_module
from modelpack_engine.async_engine import Abort, EngineCall, EngineLoop
from modelpack_engine.core.batch import StepShape, padding_batch
from modelpack_engine.engine import Engine
from modelpack_engine.runner import kv_cache_size, replay
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.paged import Layout, PagedRunner
from modelpack_engine.runner.recurrent import StateRows
from modelpack_engine.runner.replay import Replays
from tests.engine.replay import test_hybrids, test_replay
from tests.engine.replay.conftest import FakeDriver
from tests.engine.replay.test_hybrids import conversation
from tests.engine.replay.test_replay import (
    SCENARIOS,
    Tokens,
    add,
    by_mlx,
    drafting_engine,
    make_engine,
    prompts_between,
    step,
    with_adapters,
)


def idle(engine: Engine) -> int:
    """Use idle time to the end; return the number of pieces."""
    count = 1
    while engine.use_idle_time():
        count += 1
    return count


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """The layouts that are recorded."""
    found: list[Layout] = []
    record = Replays._record

    def noted(self: Replays, shape: Any, *given: Any) -> Any:
        found.append(shape.layout)
        return record(self, shape, *given)

    monkeypatch.setattr(Replays, "_record", noted)
    return found


@pytest.mark.parametrize(
    ("name", "scenario"),
    [
        ("llama", "batches"),
        ("nemotron_h", "batches"),
        pytest.param("llama", "drawn", marks=pytest.mark.long),
        pytest.param("llama", "in turn", marks=pytest.mark.long),
        pytest.param("qwen3_5", "in turn", marks=pytest.mark.long),
    ],
)
def test_bursts_record_nothing(
    driver: FakeDriver, recorded: list[Layout], name: str, scenario: str
) -> None:
    """Idle time does, one shape at a time, and later bursts launch the graphs."""
    make = make_engine if name == "llama" else partial(test_hybrids.make_engine, name)
    run = SCENARIOS[scenario]
    wanted = by_mlx(run, make)
    engine = make()
    assert not engine.use_idle_time()
    assert run(engine) == wanted
    assert not recorded
    pieces = idle(engine)
    assert pieces == len(recorded) == len(driver.graphs) > 1
    launches = driver.num_launches
    assert launches == pieces, "each graph once, to compare its tokens"
    assert run(engine) == wanted
    assert len(recorded) == pieces
    assert driver.num_launches > launches + 3
    engine.close()
    assert driver.graphs == {}


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_5", marks=pytest.mark.long)])
def test_bursts_of_prompts(
    launched: list[Layout], recorded: list[Layout], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(replay, "_OVERDUE", 1000)
    make = make_engine if name == "llama" else partial(test_hybrids.make_engine, name)
    wanted, engine = by_mlx(prompts_between, make), make()
    engine.use_idle_time()
    for _ in range(2):  # in the first, arrays of states grow
        assert prompts_between(engine) == wanted
    assert not launched
    idle(engine)
    assert any(layout.tiles for layout in recorded)
    before = len(recorded)
    assert prompts_between(engine) == wanted
    assert len(recorded) == before
    assert any(layout.tiles for layout in launched)


def written(engine: Engine) -> dict[str, bytes]:
    """The keys, values and snapshots that later requests may read."""
    runner = engine._runner
    assert isinstance(runner, PagedRunner)
    arrays = {f"pool {index}": array for index, array in enumerate(runner.adapted.slots())}
    for index, kv in enumerate(runner.adapted.paged):
        arrays |= {f"keys {index}": kv.pools.keys, f"values {index}": kv.pools.values}
    mx.eval(list(arrays.values()))
    return {name: np.array(array.view(mx.uint8)).tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", {}),
        ("nemotron_h", {}),
        pytest.param("qwen3_5", {}, marks=pytest.mark.long),
        pytest.param("llama", {"kv_cache_dtype": "q8"}, marks=pytest.mark.long),
    ],
)
def test_idle_time_changes_nothing_that_is_cached(
    launched: list[Layout], recorded: list[Layout], monkeypatch: pytest.MonkeyPatch,
    name: str, given: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(ModelLayout, "num_snapshots", 6)
    make = make_engine if name == "llama" else partial(test_hybrids.make_engine, name)

    def twice(engine: Any) -> list[Tokens]:
        found = []
        for _ in range(2):
            found.append(conversation(engine))
            before = written(engine)
            idle(engine)
            assert written(engine) == before
        return found

    wanted = by_mlx(twice, partial(make, **given))
    engine = make(**given)
    engine.use_idle_time()
    assert twice(engine) == wanted
    assert any(layout.tiles for layout in recorded)
    assert engine.stats().cached_tokens > 100
    assert launched
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "clear_writes", lambda self, packed: None)
        other = make(**given)
        other.use_idle_time()
        with pytest.raises(AssertionError):
            twice(other)


def test_a_server_that_is_never_idle_has_graphs(
    driver: FakeDriver, recorded: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_OVERDUE", 9)

    def scenario(engine: Engine) -> Tokens:
        add(engine, "one", [1, 2, 3], 15)
        found = step(engine, {}, 8)
        assert not recorded
        return step(engine, found)

    wanted = by_mlx(scenario)
    engine = make_engine()
    engine.use_idle_time()
    assert scenario(engine) == wanted
    assert len(recorded) == 1
    assert driver.num_launches >= 4
    assert not engine.use_idle_time()
    assert len(recorded) == 1, "it waits no more"


def test_no_idle_time_without_a_call(driver: FakeDriver, recorded: list[Layout]) -> None:
    """A library's caller may have none."""
    SCENARIOS["batches"](make_engine())
    assert recorded


def shrink(engine: Engine) -> None:
    """Run a step that computes new arrays of fewer states, as one that is not compiled."""
    runner = engine._runner
    assert isinstance(runner, PagedRunner)
    runner.release([*runner.adapted.rows.rows])
    runner.adapted.begin(padding_batch(StepShape(1, 1), 16))


@pytest.mark.parametrize("change", [shrink, lambda engine: engine.fail_all("it failed")])
def test_examples_go_with_the_states(
    driver: FakeDriver, recorded: list[Layout], change: Callable[[Engine], object]
) -> None:
    """They have rows of the arrays, and there may be fewer."""
    engine = test_hybrids.make_engine("nemotron_h")
    engine.use_idle_time()
    SCENARIOS["batches"](engine)
    assert engine._replays is not None
    assert engine._replays._noted
    change(engine)
    assert not engine.use_idle_time()
    assert not recorded


def test_other_arrays_of_states_are_counted() -> None:
    rows = StateRows()
    rows.begin(padding_batch(StepShape(1, 1), 16))
    rows.clear()
    assert rows.generation == 0, "none stayed"
    rows._stays = True
    rows.begin(padding_batch(StepShape(1, 1), 16))
    rows.clear()
    assert rows.generation == 1


def test_examples_go_with_adapters(
    driver: FakeDriver, recorded: list[Layout], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replay, "_SETTLED_STEPS", 0)
    wanted = by_mlx(
        lambda engine: with_adapters(engine, tmp_path), partial(make_engine, max_loras=3)
    )
    engine = make_engine(max_loras=3)
    engine.use_idle_time()
    assert with_adapters(engine, tmp_path) == wanted
    replays = engine._replays
    assert replays is not None
    assert any(shape.layout.adapted for shape in replays._noted)
    engine.remove_adapter("a")
    assert not any(shape.layout.adapted for shape in replays._noted)
    idle(engine)
    assert not any(layout.adapted for layout in recorded)
    engine.close()


def test_a_driver_that_fails_in_idle_time(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = by_mlx(SCENARIOS["batches"])
    engine = make_engine()
    engine.use_idle_time()
    SCENARIOS["batches"](engine)
    driver.fails = True
    assert not engine.use_idle_time()
    assert "MLX launches all steps from now on" in caplog.text
    assert SCENARIOS["batches"](engine) == wanted


@pytest.mark.long
def test_second_questions_about_pictures(
    driver: FakeDriver, launched: list[Layout], recorded: list[Layout]
) -> None:
    """Their steps are recorded in idle time, with other embeddings than those of a picture."""
    make = partial(test_replay.seeing_engine, "qwen2_5_vl")
    scenario = test_replay.longer_questions
    wanted, engine = by_mlx(scenario, make), make()
    engine.use_idle_time()
    assert scenario(engine) == wanted
    assert not any(layout.tiles for layout in recorded), "a shape of one row is overdue"
    idle(engine)
    assert any(layout.axes == 3 and layout.tiles for layout in recorded)
    count, copies = len(recorded), driver.num_copies
    launched.clear()
    engine._blocks.forget_content()  # the first questions are those of new pictures again
    assert scenario(engine) == wanted
    assert len(recorded) == count
    assert any(layout.axes == 3 and layout.tiles for layout in launched)
    assert driver.num_copies > copies


@pytest.mark.long
def test_many_rows_of_pictures_are_launched_by_mlx(
    driver: FakeDriver, launched: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_MOST_EMBEDDED_ROWS", 16)
    make = partial(test_replay.seeing_engine, "qwen2_5_vl")
    scenario = test_replay.longer_questions
    wanted = by_mlx(scenario, make)
    assert scenario(make()) == wanted
    assert {layout.rows for layout in launched if layout.axes == 3} <= {16}
    assert launched


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """The shapes that are warmed up, as on a GPU; contexts of more than two blocks are long."""
    found: list[StepShape] = []
    warm_up = PagedRunner.warm_up

    def noted(self: PagedRunner, shapes: list[StepShape]) -> mx.Dtype | None:
        found.extend(shapes)
        return warm_up(self, shapes)

    monkeypatch.setattr(PagedRunner, "warm_up", noted)
    monkeypatch.setattr(engine_module, "on_gpu", lambda: True)
    monkeypatch.setattr(kv_cache_size, "_FIRST_CONTEXT", 2 * 16)
    return found


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_5", marks=pytest.mark.long)])
def test_long_contexts_are_warmed_up(
    driver: FakeDriver, warmed: list[StepShape], name: str
) -> None:
    """Short ones before the first request; those of idle time change nothing that is cached."""
    make = make_engine if name == "llama" else partial(test_hybrids.make_engine, name)
    engine = make()
    assert {shape.table_width for shape in warmed} == {2}
    first = len(warmed)
    assert engine.use_idle_time()
    assert len(warmed) == first, "a request may come before there is idle time"
    found = conversation(engine)
    before = written(engine)
    while engine._replays is not None and engine._replays._noted:
        assert engine.use_idle_time()
        assert len(warmed) <= first + 1, "shapes that came are recorded first"
    while engine.use_idle_time():
        assert len(engine._cold) == len(engine._sizes.step_shapes(engine.config)) - len(warmed)
    for name, after in written(engine).items():
        padding = 0 if name.startswith("pool") else len(after) // engine._sizes.num_blocks
        assert after[padding:] == before[name][padding:], name
    assert {shape.table_width for shape in warmed[first:]} == {8, 16}
    assert Counter(warmed) == Counter(engine._sizes.step_shapes(engine.config))
    decoding = [bool(shape.decode_rows) for shape in warmed[first:]]
    assert decoding == sorted(decoding)
    assert conversation(engine) == found
    idle(engine)
    assert not engine.use_idle_time()


def test_a_warm_up_that_fails(
    driver: FakeDriver,
    warmed: list[StepShape],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is in the log, no other one is tried, and requests are answered."""
    wanted = by_mlx(SCENARIOS["batches"], make_engine)
    engine = make_engine()
    assert SCENARIOS["batches"](engine) == wanted
    engine.use_idle_time()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PagedRunner, "warm_up", fail)
    loop = EngineLoop(engine, queue.SimpleQueue(), lambda events: None)
    for _ in range(2):
        loop._use_idle_time()
    assert caplog.messages.count("work in idle time failed") == 1
    assert not engine.has_work
    assert SCENARIOS["batches"](engine) == wanted


@pytest.mark.long
def test_drafts_do_not_wait(
    driver: FakeDriver, recorded: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head frees its memory when its sequences end."""
    test_replay.draft_always(monkeypatch)
    engine = drafting_engine()
    engine.use_idle_time()
    add(engine, "one", test_replay.PROMPTS[0], 20)
    step(engine, {})
    assert recorded
    assert not engine.use_idle_time()


class Idle:
    """An engine with pieces of work that wait for idle time, of which `calls` come between."""

    has_work = False

    def __init__(self, pieces: Iterator[tuple[bool, EngineCall | None]]) -> None:
        self.done: list[str] = []
        self.calls: queue.SimpleQueue[EngineCall | None] = queue.SimpleQueue()
        self._pieces = pieces

    def use_idle_time(self) -> bool:
        more, call = next(self._pieces)
        self.done.append("piece")
        self.calls.put(call)
        return more

    def abort(self, request_id: str, index: int | None = None) -> list[Any]:
        self.done.append(request_id)
        return []


def test_calls_come_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "_QUIET_SECONDS", 0)
    engine: Any = Idle(
        iter([(True, Abort("1")), (True, Abort("2")), (True, Abort("3")), (False, None)])
    )
    EngineLoop(engine, engine.calls, lambda events: None).run()
    assert engine.done == ["piece", "1", "piece", "2", "piece", "3", "piece"]


def test_an_error_in_idle_time_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No request runs that could fail, and later ones do not need the work."""
    monkeypatch.setattr(async_engine, "_QUIET_SECONDS", 0)

    def pieces() -> Iterator[tuple[bool, EngineCall | None]]:
        yield True, Abort("1")
        engine.calls.put(Abort("2"))
        engine.calls.put(None)
        raise MemoryError("no room")

    engine: Any = Idle(pieces())
    EngineLoop(engine, engine.calls, lambda events: None).run()
    assert engine.done == ["piece", "1", "2"]
    assert "no room" in caplog.text
