"""A snapshot is a copy of the recurrent state, from which a sequence can continue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.model_layout import Leaf, ModelLayout, StateLayout, find_layout
from modelpack_engine.runner.recurrent import (
    RecurrentState,
    SnapshotSlots,
    StateContents,
    StateRows,
    take_snapshot,
)
from tests.engine.launching import WAYS, launch
from tests.engine.runner.test_step import tiny_mamba
from tests.engine.scheduling.real_shapes import real_layout
from tests.engine.serving.tiny import CONTEXT, tiny_model, tiny_tokenizer

SHAPES = [((3, 5), mx.bfloat16), ((2, 2, 2), mx.float32), ((7,), mx.float16), None]


def test_a_snapshot_gives_back_every_array() -> None:
    step, rows = StepInputs(16, exact=True), StateRows()
    states = [RecurrentState(len(SHAPES), step, rows, name="all alike") for _ in range(3)]
    mx.random.seed(1)
    for state in states:
        for slot, kind in enumerate(SHAPES):
            if kind is not None:
                state.arrays[slot] = mx.random.normal((4, *kind[0])).astype(kind[1])
    expected = [[a if a is None else a[2:3] for a in state.arrays] for state in states]
    snapshot = take_snapshot(states, 2)
    for state, arrays in zip(states, expected, strict=True):
        for array, found in zip(arrays, snapshot.of(state), strict=True):
            assert (array is None) == (found is None)
            if array is not None and found is not None:
                assert (found.dtype, found.shape) == (array.dtype, array.shape)
                assert mx.array_equal(found, array)


def test_a_slot_has_the_bytes_of_a_snapshot_and_is_free_afterwards() -> None:
    layout = StateLayout(((1, 3, 5), (1, 2, 2, 2)), (mx.bfloat16, mx.float32))
    step, rows = StepInputs(16, exact=True), StateRows()
    states = [RecurrentState(2, step, rows) for _ in range(3)]
    slots = SnapshotSlots(states, [layout] * 3, 2)
    first, second = slots.take(), slots.take()
    assert first is not None
    assert second is not None
    assert slots.take() is None
    mx.random.seed(2)
    for state in states:
        state.arrays = [mx.random.normal(a.shape).astype(a.dtype) for a in state.slots]
        state.slots = [array for array in state.arrays if array is not None]
    contents = StateContents(states, [layout] * 3)
    for slot in (first, second):
        found, wanted = contents.read(slot), contents.read(take_snapshot(states, slot.slot))
        assert found is not None
        assert wanted is not None
        assert found.shape == (1, contents.length)
        assert mx.array_equal(found, wanted)
        for state in states:
            for array, row in zip(slot.of(state), state.slots, strict=True):
                assert array is not None
                assert mx.array_equal(array[0], row[slot.slot])
    index = first.slot
    del first, slot
    again = slots.take()
    assert again is not None
    assert again.slot == index
    assert slots.take() is None


def test_a_snapshot_holds_nothing_but_itself() -> None:
    rows = StateRows()
    state = RecurrentState(1, StepInputs(16, exact=True), rows)
    state.arrays[0] = mx.zeros((64, 1 << 16))
    mx.eval(state.arrays[0])
    snapshot = take_snapshot([state], 5)
    (array,) = snapshot.arrays
    mx.eval(array)
    before = mx.get_active_memory()
    state.arrays[0] = None
    freed = before - mx.get_active_memory()
    assert freed == 64 * (1 << 18)
    assert array.nbytes < (1 << 18) + 64


@pytest.mark.sample(1)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("caching", [True, False])
def test_an_engine_shares_prefixes_of_a_recurrent_model(
    caching: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(way, monkeypatch)
    loaded = LoadedModel(
        tiny_mamba(), {"vocab_size": 64}, tiny_tokenizer(), "mamba2", CONTEXT, (), 0
    )
    config = EngineConfig(device="cpu", max_num_seqs=4, enable_prefix_caching=caching)
    engine = Engine(loaded, config)
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    system = [(7 * i + 3) % 64 for i in range(50)]
    prompts = [system + [n] * 25 for n in range(4)]

    def run(prompt: list[int]) -> tuple[list[int], int]:
        events = engine.generate([prompt], greedy)[0]
        usage = events[-1].usage
        assert usage is not None
        return [token for event in events for token in event.token_ids], usage.cached_tokens

    first = [run(prompt) for prompt in prompts]
    again = [run(prompt) for prompt in prompts]
    assert [tokens for tokens, _ in again] == [tokens for tokens, _ in first]
    assert len({tuple(tokens) for tokens, _ in first}) > 1
    assert [n for _, n in first] == ([0, 0, 48, 48] if caching else [0] * 4)
    assert [n for _, n in again] == ([64] * 4 if caching else [0] * 4)


def test_a_step_that_never_ran_leaves_no_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named when a step is built, which may not be launched, with no other in flight."""
    loaded = LoadedModel(
        tiny_mamba(), {"vocab_size": 64}, tiny_tokenizer(), "mamba2", CONTEXT, (), 0
    )
    engine = Engine(loaded, EngineConfig(device="cpu", max_num_seqs=4))
    greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    prompt = [(5 * i + 2) % 64 for i in range(48)]
    engine.add_request("fails", EngineRequest(prompt, greedy))

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "async_eval", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step()
    engine.fail_all("it failed")
    snapshots = engine._blocks.snapshots
    assert snapshots is not None
    assert len(snapshots) == 0
    runner: Any = engine._runner
    assert [state.arrays for state in runner.adapted.states] == [[None, None]] * 2
    wanted = engine.generate([prompt], greedy)[0]
    assert sum(len(event.token_ids) for event in wanted) == 4


def test_snapshots_are_few_where_states_are_large() -> None:
    layout = find_layout(tiny_mamba())
    assert layout.num_snapshots == 256
    assert layout.snapshot_bytes == 256 * layout.bytes_per_sequence
    leaf = Leaf(0, StateLayout(((1, 1 << 24),), (mx.float32,)), None)  # 64 MiB
    assert replace(layout, tree=(leaf,)).num_snapshots == 4
    assert replace(layout, tree=(leaf,) * 9).num_snapshots == 4
    assert replace(layout, tree=()).num_snapshots == layout_without_states().num_snapshots == 0


@pytest.mark.parametrize(
    ("state", "kv", "block_size", "interval"),
    [
        (0, 1000, 16, 0),  # no recurrent state
        (1000, 1000, 16, 512),  # the shortest
        (512 * 1000, 1000, 16, 512),
        (513 * 1000, 1000, 16, 1024),  # rounded up to where chunks end
        (2048 * 1000, 1000, 16, 2048),
        (4097 * 1000, 1000, 16, 4096),  # the longest
        (1000, 0, 16, 1000 // 512 * 512 + 512),  # no keys and values: a token counts as a byte
        (1 << 30, 0, 16, 4096),
        (1000, 1000, 48, 1536),  # whole blocks too
        (4096 * 1000, 1000, 48, 4608),
    ],
)
def test_the_interval_of_snapshots(state: int, kv: int, block_size: int, interval: int) -> None:
    """Its tokens' keys and values take as much memory as the state."""
    halves = KVLayout(1, kv // 2, 1, 0, mx.bfloat16)
    states = StateLayout(((1, state),), (mx.uint8,))
    leaves = (Leaf(0, states, None), Leaf(1, halves if kv else None, None))
    layout = replace(find_layout(tiny_mamba()), tree=leaves)
    assert (layout.bytes_per_sequence, layout.bytes_per_token) == (state, kv)
    assert layout.snapshot_interval(block_size) == interval


def test_snapshots_of_real_models() -> None:
    """Qwen3-Next's states take as much as 3,144 tokens, Nemotron 3 Nano's as 7,988."""
    qwen, nemotron = real_layout("qwen3_next"), real_layout("nemotron_h")
    assert (qwen.bytes_per_sequence, qwen.bytes_per_token) == (77_266_944, 12 * 2 * 2 * 256 * 2)
    assert qwen.snapshot_interval(16) == 3584
    assert (nemotron.bytes_per_sequence, nemotron.bytes_per_token) == (49_082_368, 6 * 2 * 256 * 2)
    assert nemotron.snapshot_interval(16) == 4096
    assert real_layout("gpt_oss").snapshot_interval(16) == 0
    assert qwen.num_snapshots >= 4


def layout_without_states() -> ModelLayout:
    return find_layout(tiny_model())
