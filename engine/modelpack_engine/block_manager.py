"""BlockManager: which KV blocks belong to whom, and which hold a prefix worth keeping.

A block is free, used (ref count > 0), or cached: used by nobody, but its content has a hash, so
that it can be shared again until the room is needed. Block 0 is nobody's: padding rows write there.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from modelpack_engine.config import BLOCK_SIZE
from modelpack_engine.prefix_hash import block_hash, root_hash
from modelpack_engine.sequence import Sequence

#: Where padding rows write; never handed out.
TRASH_BLOCK = 0


class BlockManager:
    """Hands out `num_blocks` blocks (one of them trash) of `block_size` tokens each.

    `model_id` names the weights: KV of another model never matches. Without prefix caching every
    sequence has all its blocks to itself.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        *,
        model_id: str = "",
        enable_prefix_caching: bool = True,
    ) -> None:
        assert num_blocks > 1, "one block is trash, so there are at least two"
        assert block_size > 0
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._model_id = model_id.encode()
        self._ref_counts = [0] * num_blocks
        self._free = deque(range(TRASH_BLOCK + 1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    # Counts, in blocks.

    @property
    def num_total(self) -> int:
        """All that can be handed out."""
        return len(self._ref_counts) - 1

    @property
    def num_available(self) -> int:
        """Free ones, and cached ones that would be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_available

    @property
    def num_cached(self) -> int:
        """Used by nobody, kept for their content."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_available

    # One block.

    def allocate(self) -> int:
        """Return a block of unknown content, evicting the least recently used if none is free."""
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        assert self._ref_counts[block] == 0
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Count one more user of a block that is used or cached."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Count one user less; without any, the block is free, or cached if it has a hash."""
        assert self._ref_counts[block] > 0, f"block {block} is released once too often"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, hash_: bytes) -> None:
        """Let a used, full block be found by its hash, unless another block of the hash is."""
        assert self._ref_counts[block] > 0, f"block {block} is nobody's"
        if hash_ not in self._block_of and block not in self._hash_of:
            self._block_of[hash_] = block
            self._hash_of[block] = hash_

    def withdraw(self, sequence: Sequence) -> list[int]:
        """Let nobody find the blocks of a sequence by their hash any more: they may hold anything.

        Return those that nobody else uses, which can be overwritten.
        """
        for block in sequence.block_table:
            hash_ = self._hash_of.pop(block, None)
            if hash_ is not None:
                del self._block_of[hash_]
        return [block for block in sequence.block_table if self._ref_counts[block] == 1]

    def forget_content(self) -> None:
        """Empty the prefix cache: whatever the blocks held is not to be shared any more."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()

    # A sequence's table.

    def room_for(self, sequence: Sequence) -> int:
        """Return how many tokens more a sequence could compute if it got every available block."""
        blocks = len(sequence.block_table) + self.num_available
        return blocks * self.block_size - sequence.num_computed_tokens

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make its table hold `num_tokens`; False, and nothing done, if blocks are lacking."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if not self.can_allocate(missing):
            return False
        sequence.block_table.extend(self.allocate() for _ in range(missing))
        return True

    def free(self, sequence: Sequence) -> None:
        """Release its whole table, the tail first: a prefix is evicted after what follows it."""
        for block in reversed(sequence.block_table):
            self.release(block)
        sequence.block_table.clear()
        sequence.num_published_blocks = 0

    # A sequence's prefix.

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """Return the blocks that hold what the sequence is to compute next, as far as any do.

        The last token is never among them, since its logits are needed.
        """
        blocks: list[int] = []
        if self._may_share(sequence):
            first = len(sequence.block_table)
            for index in range(first, (sequence.num_prefill_tokens - 1) // self.block_size):
                block = self._block_of.get(self._hash(sequence, index))
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def share_prefix(self, sequence: Sequence) -> int:
        """Give a sequence the blocks that match; return how many tokens that makes."""
        blocks = self.match_prefix(sequence)
        for block in blocks:
            self.share(block)
        sequence.block_table.extend(blocks)
        sequence.num_published_blocks += len(blocks)
        sequence.num_computed_tokens += len(blocks) * self.block_size
        return len(blocks) * self.block_size

    def num_idle(self, blocks: list[int]) -> int:
        """Return how many of `blocks` are cached: sharing these makes fewer available."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def next_hash(self, sequence: Sequence) -> bytes | None:
        """Return the hash of the block that the sequence computes next, if it could be shared."""
        index = len(sequence.block_table)
        if not self._may_share(sequence):
            return None
        if index >= (sequence.num_prefill_tokens - 1) // self.block_size:
            return None
        return self._hash(sequence, index)

    def hashes_between(self, sequence: Sequence, start: int, stop: int) -> list[bytes]:
        """Return the hashes of the blocks that tokens `start` to `stop` complete."""
        if not self.enable_prefix_caching:
            return []
        blocks = range(start // self.block_size, stop // self.block_size)
        return [self._hash(sequence, index) for index in blocks]

    def publish_prefix(self, sequence: Sequence) -> None:
        """Publish the blocks that are full of known tokens whose KV a submitted step writes."""
        if not self.enable_prefix_caching:
            return
        full = min(sequence.num_computed_tokens, sequence.num_known_tokens) // self.block_size
        for index in range(sequence.num_published_blocks, full):
            self.publish(sequence.block_table[index], self._hash(sequence, index))
            sequence.num_published_blocks = index + 1

    def _may_share(self, sequence: Sequence) -> bool:
        # Blocks are shared whole, so only where the sequence stands between two of them; and who
        # wants log-probabilities of the prompt needs its logits.
        between = sequence.num_computed_tokens == len(sequence.block_table) * self.block_size
        return self.enable_prefix_caching and between and not sequence.wants_prompt_logprobs

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else root_hash(self._model_id, sequence.cache_salt)
            hashes.append(block_hash(parent, sequence.token_ids(start, start + self.block_size)))
        return hashes[index]
