"""The seeded traffic detects mistakes between the prefix cache and its offload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.offload.tiers import PrefixOffload
from tests.engine.offload.test_scheduling import test_prefixes_come_back_and_others_go_on as drive
from tests.engine.scheduling.test_mutations import apply

MUTATIONS = [
    (BlockManager._evicted, "self.offload.evict(block, hash_)", "pass"),
    (BlockManager._evicted, "self.snapshots.evict(hash_)", "pass"),
    (BlockManager.set_offload, "partial(offload.evict, group=group)", "None"),
    (BlockManager._hold, "offload.restore(block, contents[key], group)", "pass"),
    (BlockManager._hold, "pool.release_all(", "list("),
    (BlockManager._hold, "not self.releases_blocks and self._may_go_on(hash_)", "True"),
    (BlockManager._restore, "sequence.snapshot = self.snapshots.get(last)", "pass"),
    (BlockManager._drop_restore, "pool.release_all(reversed(blocks))", "pass"),
    (PrefixOffload.evict, "group_key(hash_, group)", "hash_"),
    (BlockManager.set_offload, "self.snapshots.evicted = offload.evict_state", "pass"),
    (PrefixOffload.fetch, "if hash_ not in load.contents:", "if not load.contents:"),
    (PrefixOffload.take, "self._left = self.per_step", "pass"),
    (Scheduler.schedule, "or self._blocks.is_awaited", ""),
]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("method", "old", "new"), MUTATIONS, ids=[f"{m.__qualname__}: {o}" for m, o, _ in MUTATIONS]
)
def test_mistakes_are_noticed(
    monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], old: str, new: str
) -> None:
    apply(monkeypatch, method, old, new)
    with pytest.raises(Exception):  # noqa: B017, PT011 (however it shows)
        drive()
