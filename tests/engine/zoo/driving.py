"""Drive a ModelRunner with the real scheduler, greedily, building steps ahead as the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from modelpack_engine.core.batch import StepBatch, build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.model_runner import ModelRunner


@dataclass(frozen=True)
class Setting:
    """Scheduling options: few rows per step, so that prompts are chunked and mixed with others."""

    rows: int = 24
    blocks: int = 64
    prefix_cache: bool = True
    buckets: Buckets = EXACT
    max_num_seqs: int = 8
    eos: frozenset[int] = frozenset()
    exact: bool = True


@dataclass
class Driver:
    """An engine without sampling and text."""

    runner: ModelRunner
    setting: Setting
    num_sampled: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    scheduler: Scheduler = field(init=False)
    blocks: BlockManager = field(init=False)
    _flight: tuple[SchedulerOutput, StepBatch, mx.array] | None = None

    def __post_init__(self) -> None:
        setting, layout = self.setting, self.runner.layout
        groups = layout.window_groups if layout is not None else ()
        self.blocks = BlockManager(
            setting.blocks,
            window_pools=[(group.window, setting.blocks) for group in groups],
            enable_prefix_caching=setting.prefix_cache and self.runner.supports_prefix_cache,
            snapshots=self.runner.snapshots,
        )
        config = SchedulerConfig(
            max_num_seqs=setting.max_num_seqs,
            max_num_batched_tokens=setting.rows,
            max_model_len=512,
            max_prefill_chunk=setting.rows,
            buckets=setting.buckets,
        )
        self.scheduler = Scheduler(config, self.blocks)

    def add(self, prompt: list[int], max_tokens: int, *, adapter: int = 0) -> Sequence:
        """Add a prompt that runs with the adapter in this slot."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        name = str(len(self.sequences))
        sequence = Sequence(
            name,
            prompt,
            params,
            eos_token_ids=self.setting.eos,
            cache_salt=b"%d" % adapter if adapter else b"",
            adapter_slot=adapter,
        )
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def step(self) -> bool:
        """Run a step; return False if there is no work left."""
        output = self.scheduler.schedule()
        if output is None:
            if self._flight is None:
                return False
            self._collect()
            return True
        previous = self._flight
        batch = build_batch(
            output, previous[1] if previous else None, self.setting.buckets, self.blocks.block_size
        )
        ids = mx.array(batch.token_ids, mx.int32)
        if batch.from_previous:
            assert previous is not None
            rows, sources = (mx.array(list(a)) for a in zip(*batch.from_previous, strict=True))
            ids[rows] = previous[2][sources].astype(mx.int32)
        logits = self.runner.forward(batch, ids)
        tokens = mx.argmax(logits, axis=-1) if batch.sample_rows else mx.array([], mx.int32)
        if previous is not None:
            self._collect()
        mx.async_eval(tokens, self.runner.pools())
        self.scheduler.submitted(output)
        self._flight = (output, batch, tokens)
        self.num_sampled += len(batch.sample_rows)
        return True

    @property
    def tokens(self) -> list[list[int]]:
        """The output tokens of every request."""
        return [sequence.output_token_ids for sequence in self.sequences]

    def run(self) -> None:
        while self.step():
            pass

    def _collect(self) -> None:
        assert self._flight is not None
        output, batch, tokens = self._flight
        self._flight = None
        # Rows of padding may follow.
        self.scheduler.collect(output, tokens.tolist()[: len(batch.sample_rows)])
