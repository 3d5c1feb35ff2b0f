"""The memory tier keeps to its limit, and evicts the least recently used blocks."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from modelpack_engine.offload.tiers import BlockMemory

actions = st.lists(
    st.tuples(st.sampled_from(["put", "put", "get", "discard"]), st.integers(0, 5),
              st.integers(1, 12)),
    max_size=40,
)  # fmt: skip


@given(limit=st.integers(0, 20), actions=actions)
def test_the_least_recently_used_go(limit: int, actions: list[tuple[str, int, int]]) -> None:
    memory = BlockMemory(limit)
    model: list[tuple[bytes, bytes]] = []  # least recently used first
    for action, number, size in actions:
        hash_ = bytes([number])
        found = [entry for entry in model if entry[0] == hash_]
        rest = [entry for entry in model if entry[0] != hash_]
        if action == "put":
            model = [*rest, (hash_, b"x" * size)] if size <= limit else rest
            memory.put(hash_, b"x" * size)
            while sum(len(content) for _, content in model) > limit:
                model.pop(0)
        elif action == "get":
            assert memory.get(hash_) == (found[0][1] if found else None)
            model = rest + found
        else:
            memory.discard(hash_)
            model = rest
        assert memory.num_bytes == sum(len(content) for _, content in model) <= limit
        assert [hash_ for hash_, _ in model] == list(memory._blocks)
