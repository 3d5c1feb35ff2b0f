"""Where the recurrent states of a step come from: sequences start, wait, propose and end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import nemotron_h
from mlx_lm.models.cache import ArraysCache

from modelpack_engine.attention.metadata import Segments, States, StepInputs
from modelpack_engine.core.batch import PADDING_SEQ_ID, Chunk, StepBatch, padding_batch
from modelpack_engine.core.buckets import FEW
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.segments import LayerStates, example
from modelpack_engine.patches import fused_recurrences
from modelpack_engine.patches.modules import ClassSwaps
from modelpack_engine.runner.kv_cache_size import step_shapes
from modelpack_engine.runner.model_layout import StateLayout
from modelpack_engine.runner.recurrent import (
    RecurrentState,
    SlotSnapshot,
    Snapshot,
    SnapshotSlots,
    StateRows,
    take_snapshot,
)

SHAPE = {
    "model_type": "nemotron_h",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "hybrid_override_pattern": ["M"],
}
LAYOUT = StateLayout(((1, 1), (1, 2)), (mx.int32, mx.int32))


def after(state: int, tokens: list[int]) -> int:
    """Return a state that depends on the order of the tokens."""
    for token in tokens:
        state = (state * 31 + token) % 65521
    return state


@dataclass
class Steps:
    """Steps of sequences, whose states are computed by `Segments.runs`."""

    rows: StateRows = field(default_factory=StateRows)
    state: RecurrentState = field(
        default_factory=lambda: RecurrentState(2, StepInputs(16, exact=False), StateRows())
    )
    wanted: dict[int, int] = field(default_factory=dict)
    num_segments: set[int] = field(default_factory=set)
    num_rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = SnapshotSlots([self.state], [LAYOUT], 3)

    def run(
        self,
        decode: list[tuple[int, list[int]]],
        chunks: list[tuple[int, list[int], Snapshot | SlotSnapshot | None, int]],
        marks: dict[int, tuple[int, SlotSnapshot]],
    ) -> None:
        """Compute rows of sequences, several for a proposal, and chunks with their start."""
        ids = [seq_id for seq_id, tokens in decode for _ in tokens]
        padded = -(-len(ids) // 4) * 4
        tokens = [token for _, own in decode for token in own] + [0] * (padded - len(ids))
        made, firsts = [], []
        for seq_id, own, snapshot, before in chunks:
            firsts.append(len(tokens))
            length = before + len(own) if snapshot is None else 1000
            made.append(Chunk(0, len(own), len(own), length, (), seq_id, snapshot))
            tokens += own
        batch: Any = StepBatch(
            [], [], [], (), padded, [], [], tuple(ids), tuple(made), (), ()
        )  # fmt: skip
        self.rows.begin(batch, by_segments=True)
        runs, owners = self.rows.segments(batch, firsts, len(tokens), [self.state], [LAYOUT], marks)
        for row, owner in enumerate(owners.tolist()):
            first, count = len(ids), padded - len(ids)
            if owner >= 0:
                first, count = runs[owner, 1:3].tolist()
            assert first <= row < first + count
        old: Any = [array.tolist() for array in self.state.arrays if array is not None]
        self.num_segments.add(len(runs))
        self.num_rows.append(len(old[0]))
        new = [list(array) for array in old]
        slots: Any = [array.tolist() for array in self.state.slots]
        written = [list(array) for array in slots]
        sources = {source for source, _, count, *_ in runs.tolist() if count >= 0}
        for source, first, count, marked, slot, to in runs.tolist():
            assert count < 0 or (to >= 0 and to not in sources)
            for array, kept, found, kept_now in zip(old, slots, new, written, strict=True):
                start = array[source] if source >= 0 else [0] * len(array[0])
                start = kept[-2 - source] if source < -1 else start
                some = tokens[first : first + count] if count > 0 else []
                if count >= 0:
                    found[to] = [after(state, some) for state in start]
                if marked > 0:
                    assert marked <= count
                    kept_now[slot] = [after(state, some[:marked]) for state in start]
        self.state.arrays = [mx.array(array, mx.int32) for array in new]
        self.state.slots = [mx.array(array, mx.int32) for array in written]
        self.rows.finish()

    def check(self) -> None:
        for seq_id, state in self.wanted.items():
            for array in self.state.arrays:
                assert array is not None
                found: Any = array[self.rows.rows[seq_id]].tolist()
                assert found == [state] * len(found)


@pytest.mark.parametrize("seed", range(12))
def test_states_follow_their_sequences(seed: int) -> None:
    draw, steps = random.Random(seed), Steps()
    waiting, snapshots = list(range(40)), list[tuple[Snapshot | SlotSnapshot, int]]()
    computed: dict[int, int] = {}
    held: dict[int, int] = {}
    while waiting or steps.wanted:
        for seq_id in [each for each in steps.wanted if draw.random() < 0.1]:
            steps.rows.release([seq_id])
            held.pop(seq_id, None)
            del steps.wanted[seq_id]
        running = [each for each in steps.wanted if draw.random() < 0.8]
        draw.shuffle(running)

        def tokens(most: int) -> list[int]:
            return [draw.randrange(1, 999) for _ in range(draw.randint(1, most))]

        chunks = list[tuple[int, list[int], Snapshot | SlotSnapshot | None, int]]()
        while running and draw.random() < 0.2:  # the next part of a prompt
            seq_id = running.pop()
            chunks.append((seq_id, tokens(5), None, max(computed[seq_id], 1)))
        while waiting and draw.random() < 0.5:
            start = draw.choice(snapshots) if snapshots and draw.random() < 0.4 else None
            seq_id = waiting.pop()
            steps.wanted[seq_id] = 0 if start is None else start[1]
            chunks.append((seq_id, tokens(7), None if start is None else start[0], 0))
        plain = [(each, tokens(1)) for each in running]
        proposing = [plain.pop() for _ in range(min(len(plain), draw.randint(0, 2)))]
        proposals = [(each, own + tokens(3)) for each, own in proposing]
        if not plain and not proposals and not chunks:
            continue
        marks = dict[int, tuple[int, SlotSnapshot]]()
        if draw.random() < 0.3:  # the slots of forgotten snapshots are free
            snapshots = draw.sample(snapshots, len(snapshots) // 2)
        for seq_id, own in [*plain, *((each, own) for each, own, _, _ in chunks)]:
            if draw.random() < 0.3 and (slot := steps.slots.take()) is not None:
                count = draw.randint(1, len(own))
                marks[seq_id] = count, slot
                snapshots.append((slot, after(steps.wanted[seq_id], own[:count])))
        steps.run([*plain, *proposals], chunks, marks)
        for seq_id, own in [*plain, *((each, own) for each, own, _, _ in chunks)]:
            steps.wanted[seq_id] = after(steps.wanted[seq_id], own)
            computed[seq_id] = computed.get(seq_id, 0) + len(own)
        for seq_id, own in proposals:
            accepted = draw.randint(0, len(own))
            steps.rows.verified(seq_id, accepted)
            steps.wanted[seq_id] = after(steps.wanted[seq_id], own[:accepted])
            computed[seq_id] += accepted
        for seq_id in list(steps.wanted):
            if seq_id in held and draw.random() < 0.3:
                steps.rows.go_back(seq_id)
                steps.wanted[seq_id] = held.pop(seq_id)
            elif draw.random() < 0.2:
                steps.rows.hold(seq_id)
                held[seq_id] = steps.wanted[seq_id]
        steps.check()
        if steps.wanted and draw.random() < 0.5:
            seq_id = draw.choice(list(steps.wanted))
            found = take_snapshot([steps.state], steps.rows.rows[seq_id])
            snapshots.append((found, steps.wanted[seq_id]))
    assert steps.num_segments <= {1, 4, 16, 64}
    assert len(steps.num_segments) > 1
    assert steps.num_rows == sorted(steps.num_rows)


def chunk(seq_id: int, snapshot: Snapshot | None = None) -> Chunk:
    return Chunk(0, 16, 16, 16 if snapshot is None else 32, (), seq_id, snapshot)


def begun(rows: StateRows, decode: list[int], *chunks: Chunk, by_segments: bool = True) -> Any:
    batch: Any = StepBatch([], [], [], (), len(decode), [], [], tuple(decode), chunks, (), ())
    rows.begin(batch, by_segments=by_segments)
    return batch


def test_arrays_of_other_steps_are_copied() -> None:
    """They may be views, of which a kernel that writes states would get a copy."""
    rows, layout = StateRows(), StateLayout(((1, 3, 2),), (mx.float32,))
    state = RecurrentState(1, StepInputs(16, exact=False), rows)
    batch = begun(rows, [], chunk(0), chunk(1), by_segments=False)
    view = ArraysCache(1)
    view[0] = mx.arange(2 * 19 * 2, dtype=mx.float32).reshape(2, 19, 2)[:, -3:]
    state.store([], [view])
    rows.finish()
    found = state.arrays[0]
    assert found is not None
    wanted = found.tolist()
    rows.release([1])
    batch = begun(rows, [0])
    runs, _ = rows.segments(batch, [], 1, [state], [layout], {})
    array = state.arrays[0]
    assert array is not None
    assert memoryview(array).c_contiguous  # type: ignore[arg-type]
    assert array.tolist()[:2] == wanted
    assert runs[0, [0, 5]].tolist() == [0, 1]


def test_arrays_do_not_grow_beyond_what_is_reserved() -> None:
    """Compiled steps are traced again when arrays grow, so those of the warm-up have all rows."""
    rows, layout = StateRows(FEW.pad_rows, reserved=2 * 12), StateLayout(((1, 2),), (mx.float32,))
    state = RecurrentState(1, StepInputs(16, exact=False), rows)
    shapes = step_shapes(FEW, max_num_seqs=12, max_chunk=64, max_model_len=512, block_size=16)
    for shape in shapes:
        batch = padding_batch(shape, 16)
        rows.begin(batch, by_segments=True)
        starts = [batch.num_decode] * len(batch.chunks)
        rows.segments(batch, starts, batch.num_rows, [state], [layout], {})
        rows.finish()
        rows.release([PADDING_SEQ_ID])
    for first in range(12):
        chunks = [chunk(seq_id) for seq_id in range(first, 12)]
        batch = begun(rows, [*range(first)], *chunks)
        starts = [first + 16 * i for i in range(len(chunks))]
        rows.segments(batch, starts, first + 16 * len(chunks), [state], [layout], {})
        rows.finish()
    assert (rows.total, rows.generation) == (24, 1)


def test_a_snapshot_is_loaded_once() -> None:
    rows, layout = StateRows(), StateLayout(((1, 2),), (mx.float32,))
    state = RecurrentState(1, StepInputs(16, exact=False), rows)
    state.arrays = [mx.ones((4, 2))]
    snapshot = take_snapshot([state], 3)
    batch = begun(rows, [], chunk(0, snapshot), chunk(1, snapshot))
    runs, _ = rows.segments(batch, [0, 16], 32, [state], [layout], {})
    assert len({*runs[:2, 0].tolist()}) == 1
    assert len({*runs[:2, [0, 5]].ravel().tolist()}) == 3
    array = state.arrays[0]
    assert array is not None
    assert array[int(runs[0, 0])].tolist() == [1, 1]


def test_a_layer_takes_its_states_in_order() -> None:
    arrays = [mx.zeros((2, 3, 8)), mx.ones((2, 3, 8)), mx.zeros((2, 4, 8, 16))]
    before = [States(array, array) for array in arrays]
    states = LayerStates(before, example(), "a layer")
    for index in range(3):  # as at the start of a sequence
        assert states[index] is None
    with pytest.raises(IndexError):
        states[3]

    taken = []

    def take(one: States, segments: Segments) -> mx.array:
        taken.append(one)
        return one.rows

    for shape in ((3, 8), (4, 8, 16), (3, 8)):
        with pytest.raises(Exception, match="does not compute all of its states"):
            states.check()
        assert states.replace(shape, take).shape[1:] == shape
    assert taken == [before[0], before[2], before[1]]
    states.check()
    with pytest.raises(Exception, match=r"a layer has no state of the shape \(3, 8\) left"):
        states.replace((3, 8), take)


def test_rows_that_kernels_cannot_load_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of rows are aligned only if the joint projections have a multiple of four outputs."""
    monkeypatch.setattr(fused_recurrences.gated_norm, "verdict", lambda _: None)
    for heads, fused in ((4, 1), (6, 0)):
        args = dict.fromkeys(("mamba_num_heads", "n_groups"), heads)
        mixer = nemotron_h.NemotronHMamba2Mixer(
            nemotron_h.ModelArgs.from_dict({**SHAPE, **args, "n_groups": 2})
        )
        swaps = ClassSwaps()
        found = fused_recurrences.fuse_recurrences(
            mixer, mx.float32, lambda _: None, Sums(), StepInputs(16, exact=False), swaps
        )
        swaps.undo()
        assert found == fused
