"""Slots: a reused prefix always has the sequence's own first tokens."""

from __future__ import annotations

import random

import pytest

from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.llama_cpp.engine import Slots
from modelpack_engine.request import SamplingParams


class Cells:
    """A cache that records the tokens of each slot, and limits their number."""

    def __init__(self, slots: int, cells: int) -> None:
        self.slots: list[list[int]] = [[] for _ in range(slots)]
        self.cells = cells

    def copy(self, source: int, target: int, length: int) -> None:
        assert not self.slots[target], "a slot is emptied before it is given away"
        assert len(self.slots[source]) >= length
        self.slots[target] = self.slots[source][:length]

    def cut(self, slot: int, length: int) -> None:
        assert len(self.slots[slot]) >= length
        del self.slots[slot][length:]

    def clear(self) -> None:
        for slot in self.slots:
            slot.clear()

    def write(self, slot: int, position: int, token: int) -> None:
        assert len(self.slots[slot]) == position, "a token comes after all before it"
        self.slots[slot].append(token)
        assert sum(map(len, self.slots)) <= self.cells, "there is room"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("keep", [True, False])
def test_prefixes_under_any_load(seed: int, keep: bool) -> None:
    """A scheduler runs random requests that share prefixes, are preempted, aborted and failed."""
    generator = random.Random(seed)
    blocks, size, seqs = generator.choice([12, 30]), 4, 4
    cells = Cells(seqs + generator.choice([1, 3]), blocks * size)
    slots = Slots(blocks, size, num_slots=len(cells.slots), memory=cells, keep_prefixes=keep)
    scheduler = Scheduler(SchedulerConfig(seqs, 16, 40, overtaking=seed % 3), slots)
    stems = [[generator.randrange(9) for _ in range(30)] for _ in range(3)]
    live: list[Sequence] = []
    for number in range(150):
        if len(live) < 6:
            stem = generator.choice(stems)[: generator.randrange(1, 30)]
            params = SamplingParams(max_tokens=generator.randrange(1, 12))
            sequence = Sequence(f"r{number}", [*stem, generator.randrange(9)], params)
            scheduler.add(sequence)
            live.append(sequence)
        if generator.random() < 0.1:
            scheduler.abort(generator.choice(live).request_id)
        if generator.random() < 0.03:
            slots.forget_content()
            for sequence in live:
                scheduler.abort(sequence.request_id)
        output = scheduler.schedule()
        if output is not None:
            work = [(s, s.num_computed_tokens, 1) for s in output.decode]
            work += [(c.sequence, c.start, c.length) for c in output.prefill]
            slots.make_room(sum(length for _, _, length in work))
            for sequence, start, length in work:
                slot = slots.slot(sequence.seq_id)
                held = cells.slots[slot][:start]
                assert held == sequence.token_ids(0, start), "its own tokens are there"
                for at, token in enumerate(sequence.token_ids(start, start + length), start):
                    cells.write(slot, at, token)
            scheduler.submitted(output)
            scheduler.collect(output, [generator.randrange(9) for _ in output.sampled])
        live = [sequence for sequence in live if not sequence.is_finished]
    for sequence in live:
        scheduler.abort(sequence.request_id)
    assert slots.num_used == 0
    stats = scheduler.stats()
    assert (stats.cached_tokens > 0) == keep
    assert stats.blocks_cached == (slots.num_cached if keep else 0)


def placed(slots: Slots, tokens: list[int], computed: int | None = None) -> Sequence:
    """Run a prompt through a slot without a scheduler."""
    sequence = Sequence("r", tokens, SamplingParams(max_tokens=1))
    slots.share_prefix(sequence)
    count = len(tokens) if computed is None else computed
    slots.grow(sequence, count)
    memory = slots._memory
    assert isinstance(memory, Cells)
    memory.slots[slots.slot(sequence.seq_id)] = tokens[:count]
    sequence.num_computed_tokens = count
    return sequence


def test_a_conversation_keeps_its_slot_and_others_copy() -> None:
    cells = Cells(4, 400)
    slots = Slots(100, 4, num_slots=4, memory=cells)
    first = placed(slots, list(range(40)))
    slot = slots.slot(first.seq_id)
    slots.free(first)
    assert slots.num_cached == 10
    follow = Sequence("b", [*range(40), 99], SamplingParams())
    assert slots.num_cached_tokens(follow) == 40
    assert slots.share_prefix(follow) == 40
    assert slots.slot(follow.seq_id) == slot
    slots.free(follow)
    short = Sequence("c", [*range(10), 77], SamplingParams())
    assert slots.share_prefix(short) == 10
    assert slots.slot(short.seq_id) != slot, "the longer one is kept for its own"
    beside = Sequence("d", [*range(9), 66], SamplingParams())
    assert slots.share_prefix(beside) == 9


def test_what_was_withdrawn_is_shared_with_nobody() -> None:
    slots = Slots(100, 4, num_slots=4, memory=Cells(4, 400))
    spoilt = placed(slots, list(range(40)))
    slots.withdraw(spoilt)
    assert slots.share_prefix(Sequence("b", [*range(40)], SamplingParams())) == 0
    slots.free(spoilt)
    assert slots.share_prefix(Sequence("c", [*range(40)], SamplingParams())) == 0


def test_salts_keep_requests_apart() -> None:
    slots = Slots(100, 4, num_slots=5, memory=Cells(5, 400))
    running = placed(slots, list(range(40)))
    slots.free(placed(slots, list(range(50, 90))))
    for start in (0, 50):
        tokens = [*range(start, start + 40), 99]
        salted = Sequence("s", tokens, SamplingParams(), cache_salt=b"other")
        assert slots.share_prefix(salted) == 0
        assert slots.share_prefix(Sequence("p", tokens, SamplingParams())) == 40
    assert slots.slot(running.seq_id) == 4


def test_prompts_whose_logprobs_are_wanted_are_computed() -> None:
    slots = Slots(100, 4, num_slots=4, memory=Cells(4, 400))
    slots.free(placed(slots, list(range(40))))
    wanted = Sequence("b", [*range(40)], SamplingParams(prompt_logprobs=1))
    assert slots.share_prefix(wanted) == 0


def test_the_oldest_goes_first() -> None:
    cells = Cells(8, 100)
    slots = Slots(26, 4, num_slots=8, memory=cells)
    for start in (0, 100, 200):
        slots.free(placed(slots, list(range(start, start + 30))))
    slots.make_room(25)
    kept = sorted(tokens[0] for tokens in cells.slots if tokens)
    assert kept == [100, 200]
