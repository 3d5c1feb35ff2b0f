"""A scheduler alone, driven step by step; blocks have 4 tokens."""

from __future__ import annotations

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig, SchedulerOutput


def scheduler(
    *,
    num_blocks: int = 65,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 200,
    max_waiting: int = 10,
    max_prefill_chunk: int | None = None,
    whole_steps: bool = False,
    overtaking: int = 0,
    buckets: Buckets = Buckets(),  # noqa: B008 (a frozen value)
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_prefill_chunk=max_prefill_chunk,
        whole_steps=whole_steps,
        max_waiting=max_waiting,
        overtaking=overtaking,
        buckets=buckets,
    )
    return Scheduler(config, BlockManager(num_blocks, 4))


def prompt(length: int, start: int = 1) -> list[int]:
    """Return tokens that differ from those of prompts with another start."""
    return [1000 * start + i for i in range(length)]


def scheduled(sched: Scheduler) -> SchedulerOutput:
    output = sched.schedule()
    assert output is not None
    return output


def run(sched: Scheduler, token_id: int = 7) -> SchedulerOutput:
    """Run a step, and read it at once."""
    output = scheduled(sched)
    sched.submitted(output)
    sched.collect(output, [token_id] * len(output.sampled))
    return output


def chunks(output: SchedulerOutput) -> list[tuple[str, int, int]]:
    return [(c.sequence.request_id, c.start, c.length) for c in output.prefill]
