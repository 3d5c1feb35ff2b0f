"""The block manager, compared with a naive model and in single cases."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelpack_engine.core import block_manager
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.block_pool import NULL_BLOCK, BlockPool
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import Media
from tests.engine.scheduling.simulation import audit, sequence

SIZE = 3
#: The content of a block: a salt, and all tokens up to the block's end.
Content = tuple[bytes, tuple[int, ...]]


class Blocks(RuleBasedStateMachine):
    """Sequences over a tiny alphabet allocate, fill, publish, share and free blocks.

    The model keeps lists and compares contents token by token; it has no hashes and no counts.
    """

    @initialize(
        num_blocks=st.sampled_from([2, 6, 9, 12]),
        texts=st.lists(st.lists(st.integers(0, 1), min_size=14, max_size=14), min_size=2),
    )
    def start(self, num_blocks: int, texts: list[list[int]]) -> None:
        self.blocks = BlockManager(num_blocks, SIZE)
        self.texts = texts
        self.live: list[Sequence] = []
        self.offered: dict[Sequence, int] = {}  # how many of its blocks were published, or shared
        self.published: dict[int, Content] = {}
        self.unused = num_blocks - 1  # blocks without users or content
        self.idle: list[int] = []  # blocks without users, with content; least recently used first

    def users(self, block: int) -> int:
        return sum(block in seq.block_table for seq in self.live)

    @rule(
        data=st.data(),
        length=st.integers(1, 14),
        salt=st.sampled_from([b"", b"", b"", b"adapter"]),
        logprobs=st.sampled_from([None, None, None, 0]),
        computed=st.booleans(),
    )
    def arrive(
        self, data: st.DataObject, length: int, salt: bytes, logprobs: int | None, computed: bool
    ) -> None:
        tokens = data.draw(st.sampled_from(self.texts))[:length]
        seq = sequence(tokens, salt=salt, prompt_logprobs=logprobs)
        self.live.append(seq)
        self.offered[seq] = 0
        self._share(seq)
        if computed:
            self._compute(seq, length)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """A sequence whose blocks are all full may find that its next blocks are cached now."""
        self._share(data.draw(st.sampled_from(self.live)))

    def _share(self, seq: Sequence) -> None:
        """A new sequence gets the longest published prefix without its last token."""
        table, tokens = list(seq.block_table), seq.prompt_token_ids
        stands_between = seq.num_computed_tokens == len(table) * SIZE
        expected: list[Content] = []
        if stands_between and (seq.params.prompt_logprobs is None or len(tokens) == 1):
            for end in range((len(table) + 1) * SIZE, len(tokens), SIZE):
                if (seq.cache_salt, tuple(tokens[:end])) not in self.published.values():
                    break
                expected.append((seq.cache_salt, tuple(tokens[:end])))
        matched = self.blocks.match_prefix(seq)
        assert [self.published[block] for block in matched] == expected
        assert self.blocks.num_idle(matched) == sum(block in self.idle for block in matched)
        before = seq.num_computed_tokens
        assert self.blocks.share_prefix(seq) == len(expected) * SIZE
        assert seq.block_table == table + matched
        assert seq.num_computed_tokens == before + len(expected) * SIZE
        self.idle = [block for block in self.idle if block not in matched]
        self.offered[seq] += len(matched)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(1, 14))
    def compute(self, data: st.DataObject, more: int) -> None:
        self._compute(data.draw(st.sampled_from(self.live)), more)

    def _compute(self, seq: Sequence, more: int) -> None:
        """A sequence grows by some tokens; it gets new blocks, or nothing if they are lacking."""
        end = min(seq.num_computed_tokens + more, len(seq.prompt_token_ids))
        before = list(seq.block_table)
        missing = -(-end // SIZE) - len(before)
        fits = missing <= self.unused + len(self.idle)
        room = (len(before) + self.unused + len(self.idle)) * SIZE - seq.num_computed_tokens
        assert self.blocks.room_for(seq) == room
        assert self.blocks.grow(seq, end) is fits
        if not fits:
            assert seq.block_table == before
            return
        new = seq.block_table[len(before) :]
        assert seq.block_table[: len(before)] == before
        assert len(new) == missing
        self._take(new)
        seq.num_computed_tokens = end
        self._publish(seq)

    def _take(self, new: list[int]) -> None:
        """Take unused blocks, then the least recently used ones, whose content is lost."""
        num_lost = max(len(new) - self.unused, 0)
        lost, self.idle = self.idle[:num_lost], self.idle[num_lost:]
        assert [block for block in new if block in self.published] == lost
        for block in lost:
            del self.published[block]
        self.unused -= len(new) - num_lost

    def _publish(self, seq: Sequence) -> None:
        self.blocks.publish_prefix(seq)
        full = seq.num_computed_tokens // SIZE
        for index in range(self.offered[seq], full):
            content = (seq.cache_salt, tuple(seq.prompt_token_ids[: (index + 1) * SIZE]))
            if content not in self.published.values():
                self.published[seq.block_table[index]] = content
        self.offered[seq] = full

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self._leave(data.draw(st.sampled_from(self.live)))

    def _leave(self, seq: Sequence) -> None:
        self.live.remove(seq)
        for block in reversed(seq.block_table):
            if not self.users(block):
                if block in self.published:
                    self.idle.append(block)
                else:
                    self.unused += 1
        self.blocks.free(seq)
        assert seq.block_table == []

    @rule(seldom=st.integers(0, 9))
    def forget(self, seldom: int) -> None:
        """The contents of all blocks are lost: the sequences that use them restart."""
        if seldom:
            return
        self.blocks.forget_content()
        self.published = {}
        self.unused += len(self.idle)
        self.idle = []
        for seq in list(self.live):
            self._leave(seq)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "blocks"):
            return
        audit(self.blocks, self.live)
        assert list(self.blocks.pool._cached) == self.idle
        assert self.blocks.num_cached == len(self.idle)
        assert self.blocks.num_available == self.unused + len(self.idle)
        assert set(self.blocks.pool._hash_of) == set(self.published)
        for seq in self.live:
            waste = len(seq.block_table) * SIZE - seq.num_computed_tokens
            assert 0 <= waste < SIZE


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def filled(blocks: BlockManager, tokens: list[int], **params: object) -> Sequence:
    """Return a sequence whose prompt is computed and published."""
    seq = sequence(tokens, **params)  # type: ignore[arg-type]
    blocks.share_prefix(seq)
    assert blocks.grow(seq, len(tokens))
    seq.num_computed_tokens = len(tokens)
    blocks.publish_prefix(seq)
    return seq


def test_all_blocks_but_the_null_block_are_allocated_once() -> None:
    blocks = BlockManager(6, SIZE)
    assert {blocks.pool.allocate() for _ in range(5)} == {1, 2, 3, 4, 5}
    assert not blocks.can_allocate(1)
    assert blocks.can_allocate(0)
    assert (blocks.num_total, blocks.num_used, blocks.num_available) == (5, 5, 0)


def test_blocks_are_used_again_before_new_ones() -> None:
    """On a CPU, blocks that were never used take no memory."""
    blocks = BlockPool(100)
    for count in (3, 2, 3):
        used = [blocks.allocate() for _ in range(count)]
        assert max(used) <= 3
        blocks.release_all(used)


def test_a_block_is_not_released_twice() -> None:
    blocks = BlockPool(3)
    block = blocks.allocate()
    blocks.release(block)
    with pytest.raises(AssertionError, match="released too often"):
        blocks.release(block)
    with pytest.raises(AssertionError, match="released too often"):
        blocks.release(NULL_BLOCK)
    with pytest.raises(AssertionError, match="is not in use"):
        blocks.publish(block, b"hash")


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10)]
)
def test_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(3).blocks_for(num_tokens) == num_blocks


@pytest.mark.parametrize(
    ("length", "hits"), [(1, 0), (3, 0), (4, 1), (6, 1), (7, 2), (9, 2), (10, 3), (12, 3)]
)
def test_the_last_token_is_always_computed(length: int, hits: int) -> None:
    blocks = BlockManager(20, SIZE)
    tokens = list(range(12))
    filled(blocks, tokens)
    assert len(blocks.match_prefix(sequence(tokens[:length]))) == min(hits, 3)


@pytest.mark.parametrize(
    ("tokens", "params"),
    [
        ([9, 1, 2, 3, 4, 5, 6], {}),  # another first block
        ([0, 1, 2, 3, 4, 5, 6], {"salt": b"x"}),
        ([0, 1, 2, 3, 4, 5, 6], {"prompt_logprobs": 0}),
        ([3, 4, 5, 6], {}),  # the same block elsewhere
        ([0, 1], {}),
    ],
)
def test_no_hit(tokens: list[int], params: dict[str, object]) -> None:
    blocks = BlockManager(20, SIZE)
    filled(blocks, [0, 1, 2, 3, 4, 5, 6])
    assert blocks.match_prefix(sequence(tokens, **params)) == []  # type: ignore[arg-type]
    assert len(blocks.match_prefix(sequence([0, 1, 2, 3, 4, 5, 7]))) == 2


def test_a_long_prefix_is_found_up_to_where_it_ends() -> None:
    blocks = BlockManager(300, SIZE)
    tokens = list(range(200 * SIZE))
    filled(blocks, tokens)
    for same in (0, 1, 63, 64, 65, 128, 199):
        other = [*tokens[: same * SIZE], *range(1000, 1000 + 200 * SIZE)]
        assert len(blocks.match_prefix(sequence(other))) == same


def test_a_hash_can_be_asked_for_before_those_that_it_follows() -> None:
    blocks = BlockManager(20, SIZE)
    tokens = list(range(9 * SIZE))
    in_order = blocks.hashes_between(sequence(tokens), 0, 9 * SIZE)
    assert blocks.hashes_between(sequence(tokens), 8 * SIZE, 9 * SIZE) == in_order[8:]


def with_pictures(tokens: list[int], *pictures: tuple[int, int, bytes]) -> Sequence:
    """Return a sequence with pictures: the first token, their number, and the digest."""
    seq = sequence(tokens)
    seq.media = tuple(
        Media(start, tuple(tokens[start : start + count]), digest, {})
        for start, count, digest in pictures
    )
    return seq


@pytest.mark.parametrize(("start", "count"), [(0, 20), (1, 1), (2, 2), (3, 7), (4, 11), (17, 13)])
@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_another_picture_changes_all_blocks_from_its_first_token(
    start: int, count: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [7] * 40

    def hashes(first: bytes, then: bytes = b"last") -> list[bytes]:
        seq = with_pictures(tokens, (start, count, first), (start + count, 9, then))
        return BlockManager(20, SIZE).hashes_between(seq, 0, 39)

    expected = hashes(b"one")
    monkeypatch.setattr(block_manager, "HASHED_AT_ONCE", at_once)
    found = hashes(b"one")
    assert found == expected
    assert len(set(found)) == len(found)
    for other, position in ((hashes(b"two"), start), (hashes(b"one", b"two"), start + count)):
        same = [a == b for a, b in zip(found, other, strict=True)]
        assert same == [(index + 1) * SIZE <= position for index in range(13)]


def test_blocks_of_a_picture_are_hashed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    hashes = block_manager.block_hashes
    monkeypatch.setattr(
        block_manager, "block_hashes", lambda *given: calls.append(given) or hashes(*given)
    )
    monkeypatch.setattr(block_manager, "HASHED_AT_ONCE", 64)
    seq = with_pictures(list(range(120)), (4, 50, b"one"), (54, 50, b"two"))
    assert len(BlockManager(50, SIZE).hashes_between(seq, 0, 120)) == 40
    assert len(calls) == 3  # the block before the first picture, and one for each


def test_blocks_of_another_model_do_not_match() -> None:
    one, other = BlockManager(9, SIZE, model_id="one"), BlockManager(9, SIZE, model_id="other")
    assert filled(one, [1, 2, 3]).block_hashes != filled(other, [1, 2, 3]).block_hashes


def test_without_prefix_caching_nothing_is_shared() -> None:
    blocks = BlockManager(9, SIZE, enable_prefix_caching=False)
    seq = filled(blocks, [1, 2, 3, 4])
    assert blocks.match_prefix(sequence([1, 2, 3, 4])) == []
    assert blocks.next_hash(sequence([1, 2, 3, 4])) is None
    assert blocks.hashes_between(seq, 0, 3) == []
    blocks.free(seq)
    assert (blocks.num_cached, blocks.num_available) == (0, 8)


def test_a_tail_is_evicted_before_its_prefix() -> None:
    blocks = BlockManager(4, SIZE)
    tokens = list(range(9))
    blocks.free(filled(blocks, tokens))
    blocks.pool.allocate()
    assert len(blocks.match_prefix(sequence([*tokens, 9]))) == 2
    blocks.pool.allocate()
    assert len(blocks.match_prefix(sequence([*tokens, 9]))) == 1


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    blocks = BlockManager(3, SIZE)
    for token in (1, 2):
        blocks.free(filled(blocks, [token] * 3))
    again = filled(blocks, [1, 1, 1, 1])  # its second block evicts an unused block
    assert blocks.match_prefix(sequence([2] * 4)) == []
    assert again.num_computed_tokens == 4


def test_generated_tokens_are_published_once_they_are_known() -> None:
    blocks = BlockManager(9, SIZE)
    seq = filled(blocks, [1, 2])
    seq.num_inflight = 1
    assert blocks.grow(seq, 3)
    seq.num_computed_tokens = 3
    blocks.publish_prefix(seq)
    assert blocks.match_prefix(sequence([1, 2, 5, 6])) == []
    seq.num_inflight = 0
    seq.output_token_ids.append(5)
    blocks.publish_prefix(seq)
    assert blocks.match_prefix(sequence([1, 2, 5, 6])) == seq.block_table


def test_two_blocks_of_one_content() -> None:
    """The second block stays private; the first one stays in the prefix cache."""
    blocks = BlockManager(9, SIZE)
    one, two = sequence([1, 2, 3, 4]), sequence([1, 2, 3, 4])
    for seq in (one, two):
        assert blocks.grow(seq, 4)
        seq.num_computed_tokens = 4
        blocks.publish_prefix(seq)
    assert blocks.match_prefix(sequence([1, 2, 3, 9])) == one.block_table[:1]
    blocks.free(two)
    assert blocks.num_cached == 0
    blocks.free(one)
    assert blocks.num_cached == 1


def test_sharing_goes_on_where_a_block_ends() -> None:
    blocks = BlockManager(20, SIZE)
    late = sequence([1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.grow(late, 3)
    late.num_computed_tokens = 3
    blocks.publish_prefix(late)
    other = filled(blocks, [1, 2, 3, 4, 5, 6, 7])
    assert blocks.share_prefix(late) == 3
    assert late.block_table == other.block_table[:2]
    assert blocks.grow(late, 7)
    late.num_computed_tokens = 7
    assert blocks.share_prefix(late) == 0
    assert blocks.next_hash(late) is None


@pytest.mark.parametrize("sampled", [False, True])
def test_blocks_that_may_hold_nan_are_scrubbed_once(sampled: bool) -> None:
    manager = BlockManager(6, 4, enable_prefix_caching=False)
    first, second = sequence(list(range(8))), sequence(list(range(20)))
    assert manager.grow(first, 8)
    held = sorted(first.block_table)
    if sampled:
        first.output_token_ids.append(1)
    manager.free(first)
    assert manager.take_to_scrub() == [[]]
    assert manager.grow(second, 20)
    assert manager.take_to_scrub() == [[] if sampled else held]
    assert manager.take_to_scrub() == [[]]


@pytest.mark.parametrize("doubts", [False, True])
def test_blocks_before_a_window_may_hold_nan(doubts: bool) -> None:
    manager = BlockManager(
        6, 4, enable_prefix_caching=False, window=4, window_pools=[(2, 6)], doubts=doubts
    )
    first, second = sequence(list(range(16))), sequence(list(range(8)))
    assert manager.grow(first, 16)
    released = [table[:2] for table in (first.block_table, *first.window_tables)]
    first.num_computed_tokens = 12
    manager.release_unseen(first)
    assert manager.grow(second, 8)
    for found, before in zip(manager.take_to_scrub(), released, strict=True):
        assert found == (sorted(before) if doubts else [])
