"""Prefixes of recurrent models are shared up to a snapshot of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from modelpack_engine.config import BLOCK_SIZE
from modelpack_engine.core.block_manager import BlockManager, PrefixSnapshots
from modelpack_engine.core.buckets import EXACT
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig
from tests.engine.scheduling.driving import ODD_BUCKETS
from tests.engine.scheduling.real_shapes import real_layout, steps
from tests.engine.scheduling.simulation import MODES, Mode, Simulation, sequence
from tests.engine.scheduling.steps import prompt
from tests.engine.scheduling.test_mutations import apply


def simulation(**settings: object) -> Simulation:
    given: dict[str, object] = {
        "num_blocks": 60, "recurrent": True, "max_num_batched_tokens": 40, "max_prefill_chunk": 40,
    }  # fmt: skip
    return Simulation(**given | settings)  # type: ignore[arg-type]


def cached(sim: Simulation, *prompts: list[int]) -> list[int]:
    """Run prompts one after the other; return how many tokens of each were cached."""
    found = []
    for tokens in prompts:
        (seq,) = sim.add(sequence(tokens, 2, request_id=str(len(sim.sequences))))
        sim.drain()
        found.append(seq.num_cached_tokens)
    return found


WITHIN = pytest.mark.parametrize("within", [False, True], ids=["at ends", "within chunks"])


@WITHIN
@pytest.mark.parametrize(("length", "shared"), [(3, 0), (4, 0), (5, 4), (8, 4), (11, 8), (50, 48)])
def test_a_prompt_is_shared_up_to_its_last_full_block(
    length: int, shared: int, within: bool
) -> None:
    text = prompt(length)
    longer = text + [5] * 9
    sim = simulation(snapshots_within_chunks=within)
    assert cached(sim, text, text, longer) == [0, shared, length // 4 * 4]


@WITHIN
def test_where_two_prompts_part_the_third_starts(within: bool) -> None:
    """The first prompt leaves no snapshot at the branch; the second one takes it there."""
    system = prompt(24)
    prompts = [system + prompt(6, start) for start in (2, 3, 4, 5)]
    sim = simulation(snapshots_within_chunks=within)
    assert cached(sim, *prompts) == [0, 0, 24, 24]


@pytest.mark.parametrize(
    ("within", "lengths"), [(False, [12, 8, 1]), (True, [12, 9])], ids=["at ends", "within chunks"]
)
def test_a_snapshot_within_a_chunk_takes_no_step_of_its_own(
    within: bool, lengths: list[int]
) -> None:
    """One is at 12, where a chunk would have two, and one at the last full block."""
    sim = simulation(snapshots_within_chunks=within, snapshot_interval=12)
    assert cached(sim, prompt(21)) == [0]
    found = [(part.length, part.snapshot_after) for out in sim.outputs for part in out.prefill]
    assert [length for length, _ in found] == lengths
    assert [after for _, after in found if after] == [12, 8]


def test_choices_of_one_prompt_compute_it_once() -> None:
    sim = simulation()
    choices = sim.add(sequence(prompt(35)), 3)
    sim.drain()
    assert [choice.num_cached_tokens for choice in choices] == [0, 32, 32]


@WITHIN
@pytest.mark.parametrize(("interval", "shared", "count"), [(8, 24, 6), (12, 24, 5), (0, 0, 3)])
def test_a_long_prompt_leaves_snapshots_at_intervals(
    interval: int, shared: int, count: int, within: bool
) -> None:
    sim = simulation(
        max_num_batched_tokens=12, max_prefill_chunk=12, snapshot_interval=interval,
        num_snapshots=9, snapshots_within_chunks=within,
    )  # fmt: skip
    text = prompt(41)
    assert cached(sim, text, text[:25] + [6] * 9) == [0, shared]
    assert sim.blocks.snapshots is not None
    assert len(sim.blocks.snapshots) == count


@WITHIN
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interval", [8, 20])
def test_a_second_turn_computes_at_most_one_interval(
    mode: Mode, interval: int, within: bool
) -> None:
    """The reply is longer than the prompt: its states are kept while it is decoded."""
    sim = simulation(
        snapshot_interval=interval, mode=mode, num_blocks=99, num_snapshots=50,
        snapshots_within_chunks=within,
    )  # fmt: skip
    (first,) = sim.add(sequence(prompt(30), 75))
    sim.drain()
    conversation = prompt(30) + first.output_token_ids
    (second,) = sim.add(sequence([*conversation, 5, 5, 5], 2, request_id="second"))
    sim.drain()
    assert second.num_cached_tokens == (len(conversation) - 1) // interval * interval
    assert len(conversation) - second.num_cached_tokens <= interval


@WITHIN
@pytest.mark.parametrize("chunk", [512, 2048])
@pytest.mark.parametrize(("name", "interval"), [("qwen3_next", 3584), ("nemotron_h", 4096)])
def test_a_second_turn_of_a_long_conversation(
    name: str, interval: int, chunk: int, within: bool
) -> None:
    """After 60,000 tokens, it computes its own tokens and at most one interval of the first's.

    On a CPU there are fewer snapshots than intervals: the oldest ones are dropped.
    """
    layout = real_layout(name)
    assert layout.snapshot_interval(BLOCK_SIZE) == interval
    count = layout.num_snapshots
    blocks = BlockManager(
        4001, BLOCK_SIZE, model_id="model", snapshot_interval=interval,
        snapshots=PrefixSnapshots(count, within_chunks=within),
    )  # fmt: skip
    config = SchedulerConfig(4, 2 * chunk, 70_000, chunk)
    scheduler = Scheduler(config, blocks)
    text = [3 * i % 50_021 for i in range(56_000)]
    first = sequence(text, 4_000)
    scheduler.add(first)
    outputs = list(steps(scheduler, blocks))
    assert sum(part.length for out in outputs for part in out.prefill) == 56_000
    assert blocks.snapshots is not None
    assert len(blocks.snapshots) <= count
    conversation = text + first.output_token_ids
    assert len(conversation) == 60_000

    second = sequence([*conversation, *range(300)], 2, request_id="second")
    scheduler.add(second)
    outputs = list(steps(scheduler, blocks))
    assert 60_000 - second.num_cached_tokens <= interval
    computed = sum(part.length for out in outputs for part in out.prefill)
    assert computed == 60_300 - second.num_cached_tokens
    assert second.num_cached_tokens == 57_344, "a multiple of both intervals, in the reply"


def test_few_snapshots_are_kept() -> None:
    texts = [[n] * 14 for n in range(1, 5)]
    assert cached(simulation(num_snapshots=2), *texts, texts[3], texts[2], texts[0]) == [
        0, 0, 0, 0, 12, 12, 0
    ]  # fmt: skip
    assert cached(simulation(num_snapshots=0), texts[0], texts[0]) == [0, 0]
    assert cached(simulation(prefix_caching=False), texts[0], texts[0]) == [0, 0]


def test_nothing_is_shared_of_what_failed() -> None:
    sim = simulation()
    text = prompt(30)
    assert cached(sim, text, text) == [0, 28]
    (first,) = sim.add(sequence(text, request_id="fails"))
    sim.step()
    sim.step()
    sim.fail()
    assert sim.blocks.snapshots is not None
    assert len(sim.blocks.snapshots) == 0, "snapshots are dropped like the blocks"
    assert cached(sim, text) == [0]
    sim.blocks.withdraw(first)  # its contents may be NaN
    assert cached(sim, text) == [0]


actions = st.lists(st.tuples(st.sampled_from("pppgd"), st.integers(0, 6)), max_size=40)


@given(limit=st.integers(0, 4), actions=actions)
def test_what_is_unused_goes_first(limit: int, actions: list[tuple[str, int]]) -> None:
    snapshots = PrefixSnapshots(limit)
    model: list[bytes] = []
    for action, number in actions:
        hash_ = bytes([number])
        rest = [other for other in model if other != hash_]
        if action == "p":
            snapshots.put(hash_, number)
            model = [*rest, hash_][-limit:] if limit else []
        elif action == "d":
            snapshots.discard([hash_])
            model = rest
        elif hash_ in model:
            assert snapshots.get(hash_) == number
            model = [*rest, hash_]
        assert [other for other in (bytes([n]) for n in range(7)) if other in snapshots] == (
            sorted(model)
        )
        assert len(snapshots) == len(model)


def drive() -> None:
    """Random traffic of a recurrent model, in which every kind of event occurs."""
    for seed in range(12):
        sim = simulation(
            num_blocks=(14, 40)[seed % 2], mode=MODES[seed % 3], num_snapshots=1 + 3 * (seed % 3),
            max_num_batched_tokens=16, max_prefill_chunk=None, snapshot_interval=4 * (seed % 3),
            buckets=(EXACT, ODD_BUCKETS)[seed % 6 == 5], snapshots_within_chunks=seed > 5,
        )  # fmt: skip
        for turn in range(10):
            text = prompt(7 + 3 * turn, seed) if turn % 3 else prompt(20, seed) + [turn] * 6
            sim.add(sequence(text, 5, request_id=str(turn)), 1 + turn % 2)
            sim.step()
            if turn == 7:
                sim.fail()
        sim.drain()
        assert sim.scheduler.stats().cached_tokens > 20


def drive_all() -> None:
    drive()
    test_nothing_is_shared_of_what_failed()
    for within in (False, True):
        test_a_second_turn_computes_at_most_one_interval("build-ahead", 8, within)
        test_a_prompt_is_shared_up_to_its_last_full_block(8, 4, within)
        test_a_long_prompt_leaves_snapshots_at_intervals(8, 24, 6, within)


def test_traffic() -> None:
    drive()


MUTATIONS = [
    (BlockManager._may_go_on, "self.snapshots is None or hash_ in self.snapshots", "True"),
    (BlockManager.share_prefix, "sequence.snapshot = ", "_ = "),
    (BlockManager.forget_content, "self.snapshots.clear()", "pass"),
    (Scheduler.submitted, "sequence.snapshot = None", "pass"),
    (BlockManager.snapshot_of, "end // self.block_size - 1", "0"),
    (BlockManager.snapshot_of, "return end - start,", "return length,"),
    (BlockManager.publish_prefix, "index, hash_)", "index, b'x')"),
    (BlockManager._snapshot_places, "ends |= ", "_ = "),
    (BlockManager.snapshot_of, "end != sequence.num_prefill_tokens", "True"),
    (BlockManager.most_until_snapshot, "len(ends) == 1", "True"),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("method", "old", "new"), MUTATIONS, ids=[f"{m.__qualname__}: {o}" for m, o, _ in MUTATIONS]
)
def test_mistakes_are_noticed(
    monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], old: str, new: str
) -> None:
    apply(monkeypatch, method, old, new)
    with pytest.raises(Exception):  # noqa: B017, PT011 (however it shows)
        drive_all()
