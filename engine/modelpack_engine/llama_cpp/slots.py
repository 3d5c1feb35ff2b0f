"""Slots: which sequence of llama.cpp's cache holds which of ours, and what others left there.

The scheduler counts blocks, as everywhere; here they are counts only. llama.cpp finds cells for
tokens itself, and a cell may belong to several of its sequences. What a finished request leaves is
kept until its cells or its slot are needed: a prompt that begins with the same tokens goes on from
there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Tokens
from typing import Protocol

from modelpack_engine.block_manager import BlockManager
from modelpack_engine.sequence import Sequence

# A prefix shorter than this is not worth a slot.
_SHORTEST = 8


class SlotMemory(Protocol):
    """What a slot's tokens are in; `Context` is one."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first tokens of another."""

    def cut(self, slot: int, length: int) -> None:
        """Forget a slot's tokens after the first."""

    def clear(self) -> None:
        """Forget all."""


class Slots(BlockManager):
    """Blocks by number, and slots by content. Calls come between steps, never during one."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_slots: int,
        memory: SlotMemory,
        keep_prefixes: bool = True,
    ) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=False)
        self._memory = memory
        self._keeps = keep_prefixes
        self._empty = list(range(num_slots))
        self._running: dict[int, tuple[int, Sequence]] = {}  # by seq_id: slot and sequence
        self._left: OrderedDict[int, list[int]] = OrderedDict()  # slot: tokens; oldest first
        self._salts: dict[int, bytes] = {}  # by slot: only requests of the same salt share
        self._spoilt: set[int] = set()

    def slot(self, seq_id: int) -> int:
        """Return where a sequence that was given a prefix, or none, has its tokens."""
        return self._running[seq_id][0]

    @property
    def num_cached(self) -> int:
        """Blocks of what is left of finished requests."""
        return sum(self.blocks_for(len(tokens)) for tokens in self._left.values())

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of a sequence that has just come are in a slot."""
        return self._find(sequence)[1]

    def share_prefix(self, sequence: Sequence) -> int:
        """Give a sequence that begins a slot; return how many of its tokens are there already."""
        if sequence.seq_id in self._running:
            return 0
        slot, length = self._place(sequence)
        self._salts[slot] = sequence.cache_salt
        self._running[sequence.seq_id] = slot, sequence
        self.grow(sequence, length)  # the scheduler has made sure that there is room
        sequence.num_computed_tokens = length
        return length

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's slot, and keep what is in it."""
        slot, _ = self._running.pop(sequence.seq_id)
        tokens = sequence.all_token_ids()[: sequence.num_computed_tokens]
        if self._keeps and sequence.seq_id not in self._spoilt and len(tokens) >= _SHORTEST:
            self._left[slot] = tokens
        else:
            self._drop(slot)
        self._spoilt.discard(sequence.seq_id)
        super().free(sequence)

    def withdraw(self, sequence: Sequence) -> list[int]:
        """Have nobody go on from what a sequence wrote."""
        self._spoilt.add(sequence.seq_id)
        return []

    def forget_content(self) -> None:
        """Forget all that is in the slots; running sequences are to be ended or restarted."""
        self._empty += self._left
        self._left.clear()
        self._spoilt.update(self._running)
        self._memory.clear()

    def make_room(self, num_rows: int) -> None:
        """Drop what was left, the oldest first, until the cache holds `num_rows` tokens more."""
        used = num_rows + sum(s.num_computed_tokens for _, s in self._running.values())
        room = self.num_total * self.block_size - used
        kept = sum(map(len, self._left.values()))
        while kept > room and self._left:
            slot, tokens = self._left.popitem(last=False)
            kept -= len(tokens)
            self._drop(slot)

    def _place(self, sequence: Sequence) -> tuple[int, int]:
        """Return a slot for a sequence, and how many of its first tokens it holds."""
        source, length = self._find(sequence)
        if source is None:
            return self._take_empty(), 0
        if source in self._left:
            tokens = self._left.pop(source)
            if len(tokens) <= 2 * length or not (self._empty or self._left):
                self._memory.cut(source, length)  # it was this conversation's, or nearly
                return source, length
            self._left[source] = tokens  # used just now: the last to go
        slot = self._take_empty(keep=source)
        self._memory.copy(source, slot, length)
        return slot, length

    def _find(self, sequence: Sequence) -> tuple[int | None, int]:
        """Return the slot that a sequence can go on from, and how many of its tokens are there."""
        if sequence.wants_prompt_logprobs:
            return None, 0
        wanted = sequence.token_ids(0, sequence.num_prefill_tokens)[:-1]  # the last is computed
        source, length = self._longest(wanted, sequence.cache_salt)
        return (source, length) if length >= _SHORTEST else (None, 0)

    def _longest(self, wanted: Tokens[int], salt: bytes) -> tuple[int | None, int]:
        """Return the slot of this salt that shares most of its beginning with `wanted`, and how
        much.
        """
        found: tuple[int | None, int] = (None, 0)
        if not self._keeps:
            return found
        running = (
            (slot, other.all_token_ids()[: other.num_computed_tokens])
            for seq_id, (slot, other) in self._running.items()
            if seq_id not in self._spoilt
        )
        for slot, tokens in (*self._left.items(), *running):
            length = _common(tokens, wanted) if self._salts[slot] == salt else 0
            if length > found[1]:
                found = slot, length
        return found

    def _take_empty(self, keep: int | None = None) -> int:
        if not self._empty:
            oldest = next(slot for slot in self._left if slot != keep)
            del self._left[oldest]
            self._drop(oldest)
        return self._empty.pop()

    def _drop(self, slot: int) -> None:
        self._memory.cut(slot, 0)
        self._empty.append(slot)


def _common(first: Tokens[int], second: Tokens[int]) -> int:
    """Return how many tokens are the same at the beginning."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(at for at in range(length) if first[at] != second[at])
