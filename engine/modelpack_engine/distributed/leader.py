"""Rank 0: an engine as on one device, whose steps the followers run too.

Only rank 0 has requests, schedules and samples. It sends a step before it builds the graph, so that
all ranks build at the same time. From then on every rank has to run the step, because the others
wait in its collectives: any error ends the whole group.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import StepBatch, StepShape
from modelpack_engine.distributed.adapters import DividedAdapters
from modelpack_engine.distributed.channel import Kind, LeaderChannel, pack_step
from modelpack_engine.distributed.group import Group, make_ordered_runner
from modelpack_engine.distributed.sharding import Divisions, shard
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, OutOfMemoryError
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.loader import Shard
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.runner.adapters import AdapterSet
from modelpack_engine.runner.kv_cache_size import Sizes, on_gpu
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.model_runner import ModelRunner
from modelpack_engine.sampling.sampler import Sampled, SampleRow
from modelpack_engine.speculation.speculator import Draft


class Ranks:
    """The group of ranks, as rank 0 uses it. It holds one model at a time."""

    def __init__(self, group: Group, channel: LeaderChannel) -> None:
        self.group = group
        self.channel = channel
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._key: str | None = None
        self._in_step = False
        #: How the layers of the model that they hold are divided.
        self.divisions: Divisions = {}

    @property
    def size(self) -> int:
        """The number of ranks, rank 0 included."""
        return self.group.size

    def shard(self, model: Module, config: Mapping[str, Any]) -> None:
        """Reduce a model to this rank's part."""
        self.divisions = shard(model, config, self.group.mlx)

    def engine(
        self,
        key: str,
        load: Callable[[Shard], LoadedModel],
        configure: Callable[[LoadedModel], EngineConfig],
    ) -> ParallelEngine:
        """Load the model `key` on all ranks, here by `load`; return an engine over them.

        Has to run in the thread that steps the engine. Raises `OutOfMemoryError` while the ranks
        hold another model, and the error of a rank that cannot load its part.
        """
        with self._lock:
            if self._key is not None:
                raise OutOfMemoryError(
                    f"the {self.size} ranks hold another model ({self._key}) already",
                    hint="unload it first",
                )
            self._key = key
        try:
            asked = self.ask(Kind.LOAD, key=key)
            loaded = load(self.shard)
            self.channel.gather(asked)
            return ParallelEngine(loaded, configure(loaded), model_id=key, ranks=self)
        except Exception as error:
            if self._in_step:
                self.fail(error)
            self.give_back()
            raise

    def give_back(self) -> None:
        """Make the followers drop the model, before rank 0 asks them to load another."""
        with self._lock:
            try:
                self.channel.send(Kind.UNLOAD)
            finally:
                self._key, self._in_step = None, False

    def close(self) -> None:
        """Make the followers end."""
        self.channel.close()

    def fail(self, error: Exception) -> None:
        """End the group, because this rank is out of step with the others."""
        text = f"rank 0 of {self.size} failed: {error or type(error).__name__}"
        self.channel.fail(EngineError(text, hint="start the ranks again"))

    # For the engine.

    def ask(self, kind: Kind, **body: Any) -> int:
        """Send a request to every follower; return the number of the request."""
        number = self.number()
        if kind is Kind.BUILD:
            self._in_step = True
        self.channel.send(kind, {"number": number, **body})
        return number

    def number(self) -> int:
        """Return the number of a new request."""
        return next(self._numbers)


class LeadingRunner:
    """Runs rank 0's part of a model, and sends each step to the other ranks before running it."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner, self._channel = runner, ranks.channel
        self.adapter_rows = runner.adapter_rows
        self.model, self.layout = runner.model, runner.layout
        self.buckets, self.staging = runner.buckets, runner.staging
        self.tier, self.fused, self.notes = runner.tier, runner.fused, runner.notes
        self.snapshots = runner.snapshots
        #: Not with recurrent state: the other ranks do not learn which tokens were accepted.
        self.can_go_back = runner.can_go_back and runner.snapshots is None
        #: Not with recurrent state: each rank has snapshots of its own, which are not synchronised.
        self.supports_prefix_cache = self.can_go_back
        self.writes_in_place = runner.writes_in_place
        self.computes_at_once = runner.computes_at_once
        self.pools, self.undo = runner.pools, runner.undo
        self.block_contents, self.state_contents = runner.block_contents, runner.state_contents

    def forward(
        self, batch: StepBatch, token_ids: mx.array, input_embeddings: mx.array | None = None
    ) -> mx.array:
        assert input_embeddings is None, "models with a vision tower run on one device"
        self._channel.send(Kind.STEP, pack_step(batch, len(batch.sample_seqs)))
        return self._runner.forward(batch, token_ids)

    def release(self, seq_ids: Iterable[int]) -> None:
        seq_ids = tuple(seq_ids)
        if seq_ids:
            self._channel.send_integers(Kind.RELEASE, seq_ids)
        self._runner.release(seq_ids)

    def verified(self, seq_id: int, num_tokens: int) -> None:
        """Do nothing: ranks have no proposals for models with recurrent state."""

    def scrub(self, blocks: Iterable[int], group: int = 0) -> None:
        assert not group, "a divided model has one group"
        blocks = tuple(blocks)
        self._channel.send_integers(Kind.SCRUB, blocks)
        self._runner.scrub(blocks)

    def scrub_slots(self, slots: list[int], group: int = 0) -> None:
        assert not group, "a divided model has one group"
        self._channel.send_integers(Kind.SCRUB_SLOTS, slots)
        self._runner.scrub_slots(slots)

    def warm_up(self, shapes: Iterable[StepShape]) -> mx.Dtype | None:
        shapes = list(shapes)
        numbers = ((s.decode_rows, s.table_width, s.chunk_length) for s in shapes)
        self._channel.send_integers(Kind.WARM_UP, itertools.chain.from_iterable(numbers))
        return self._runner.warm_up(shapes)


class ParallelEngine(Engine):
    """An engine over all ranks; the rank with the least memory determines its sizes."""

    is_divided = True

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, *, model_id: str, ranks: Ranks
    ) -> None:
        _check_supported(config)
        self._ranks = ranks
        self._holds_ranks = True
        super().__init__(loaded, config, model_id=model_id)

    def step(self) -> list[RequestEvent]:
        """Run one step. An error ends the group: other ranks may be inside another step."""
        try:
            return super().step()
        except Exception as error:
            self._ranks.fail(error)
            raise

    def close(self) -> None:
        """Drop the model on all ranks, once: later the ranks may hold another model."""
        super().close()
        if self._holds_ranks:
            self._holds_ranks = False
            self._ranks.give_back()

    def _choose_sizes(
        self, layout: ModelLayout | None, context_length: int, draft: Draft | None
    ) -> Sizes:
        asked = self._ranks.ask(Kind.CONFIGURE, config=asdict(self.config))
        own = super()._choose_sizes(layout, context_length, draft)
        found = [own.num_blocks]
        for rank, answer in enumerate(
            self._ranks.channel.gather(asked, num_blocks=int, gpu=bool), start=1
        ):
            if answer["gpu"] != on_gpu():
                raise EngineError(
                    f"rank {rank} and rank 0 do not compute on the same kind of device",
                    hint="choose one for all: --device gpu or --device cpu",
                )
            found.append(answer["num_blocks"])
        return fewer_blocks(own, min(found), self.config.block_size)

    def _make_runner(self, loaded: LoadedModel, layout: ModelLayout | None) -> ModelRunner:
        sizes = self._sizes
        asked = self._ranks.ask(
            Kind.BUILD,
            num_blocks=sizes.num_blocks,
            max_model_len=sizes.max_model_len,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
        )
        runner = make_ordered_runner(loaded.model, sizes, self.config)
        for rank, answer in enumerate(self._ranks.channel.gather(asked, tier=str), start=1):
            if answer["tier"] != runner.tier:
                raise EngineError(
                    f"rank {rank} runs the model in the tier {answer['tier']!r}, and rank 0 in "
                    f"{runner.tier!r}"
                )
        return LeadingRunner(runner, self._ranks)

    def _make_adapters(self, loaded: LoadedModel, rows: AdapterRows) -> AdapterSet:
        ranks = self._ranks
        return DividedAdapters(
            loaded.model,
            loaded.config,
            rows,
            self.config.max_loras,
            ranks.divisions,
            ranks.channel,
            ranks.number,
        )

    def _sample(self, logits: mx.array, rows: Sequence[SampleRow]) -> Sampled:
        sampled = super()._sample(logits, rows)
        given = Sampled.of(self._ranks.group.give_tokens(sampled.token_ids))
        return replace(given, logprobs=sampled.logprobs)


def fewer_blocks(sizes: Sizes, num_blocks: int, block_size: int) -> Sizes:
    """Return `sizes` with at most `num_blocks` blocks, and requests that fit in them."""
    num_blocks = min(sizes.num_blocks, num_blocks)
    capacity = (num_blocks - 1) * block_size
    return replace(
        sizes, num_blocks=num_blocks, max_model_len=min(sizes.max_model_len, capacity + 1)
    )


def _check_supported(config: EngineConfig) -> None:
    """Raise `EngineError` for features that need a single device."""
    unsupported = {
        "llama.cpp": config.backend == "llama.cpp",
        "a draft model": config.speculation in ("draft", "eagle3", "mtp"),
        "keeping evicted prefixes (kv_offload_dir, kv_offload_memory)": (
            config.kv_offload_dir is not None or bool(config.kv_offload_memory)
        ),
    }
    for what, wanted in unsupported.items():
        if wanted:
            raise EngineError(
                f"{what} is not supported for a model that is divided between devices",
                hint="leave it out, or use one device",
            )
