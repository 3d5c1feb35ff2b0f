"""Engine: requests in, events out, one step at a time.

`AsyncEngine` and the server call it, and it calls the scheduler, the model runner and the sampler.
Read `Engine.step` first.

The host builds the graph of step N + 1 while the device computes step N, whose tokens stay on the
device. `Engine.step` therefore schedules and builds N + 1, collects the tokens of N, launches
N + 1, and emits the tokens of N while the device computes N + 1. The launch comes after the
collection because MLX writes the KV pools in place only once N has freed them. Where our kernel
writes the pools, N + 1 is launched before N is collected, and the device never waits.

Masks need the tokens of N before they can allow tokens for N + 1. A step with a mask is launched
without its sampling: the host computes the masks during the forward pass, and launches the sampling
last.

The library for CPUs computes a step while it is built; its tokens are emitted in the same step.

Speculation needs the tokens of N before it can propose tokens for N + 1. If proposals are likely, N
is collected before N + 1 is scheduled. The step that verifies proposals is collected early as well.
A drafting head's draft is launched behind N, and read when N + 1 is scheduled.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx

from modelpack.formats.adapter import Adapter
from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.config import EngineConfig, parse_kv_cache_dtype
from modelpack_engine.core.batch import StepBatch, StepShape, build_batch
from modelpack_engine.core.block_manager import BlockManager, root_hash
from modelpack_engine.core.buckets import round_down
from modelpack_engine.core.metrics import StepClock
from modelpack_engine.core.scheduler import Proposal, Proposed, Scheduler, SchedulerOutput
from modelpack_engine.errors import RequestError
from modelpack_engine.kernels import TILE_ROWS
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.precision import check_token_rows
from modelpack_engine.outputs import EngineStats, RequestEvent
from modelpack_engine.request import EngineRequest
from modelpack_engine.runner.adapters import AdapterSet, KnownAdapter
from modelpack_engine.runner.base_engine import BaseEngine
from modelpack_engine.runner.continued import Continued, Expected
from modelpack_engine.runner.cpu import CpuRunner
from modelpack_engine.runner.kv_cache_size import (
    Sizes,
    by_context,
    choose_sizes,
    limit_memory,
    max_num_seqs,
    on_gpu,
    step_memory,
)
from modelpack_engine.runner.kv_offload import open_offload
from modelpack_engine.runner.model_layout import ModelLayout, layout_with_cache_type
from modelpack_engine.runner.model_runner import ModelRunner, make_engine_runner
from modelpack_engine.runner.output_processor import OutputProcessor
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.runner.replay import NextStep, ReplayedTokens, Replays, make_replays
from modelpack_engine.runner.step import (
    LaunchedStep,
    NextToken,
    ScheduledStep,
    StepResult,
    masked_rows,
    read_step,
    row_token_ids,
    sample_rows,
    split_logits,
    with_prompt_rows,
)
from modelpack_engine.sampling.sampler import NO_TOKEN, Sampled, Sampler, SampleRow
from modelpack_engine.speculation.speculator import (
    Draft,
    DraftingHead,
    check_draft,
    make_speculator,
)


class Engine(BaseEngine):
    """Serves one model with MLX."""

    #: Whether the model runs on several devices.
    is_divided = False

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig | None = None,
        *,
        model_id: str = "",
        draft: LoadedModel | DraftingHead | None = None,
    ) -> None:
        """Allocate the KV cache, test the model and warm it up.

        `model_id` names the weights in the prefix cache. `draft` is the model or head that
        `config` names for speculation. Raises `OutOfMemoryError`, saying what would fit, if a
        prompt would not.
        """
        self.config = config or EngineConfig()
        self.tokenizer = loaded.tokenizer
        self.model_type = str(loaded.config.get("model_type") or loaded.architecture)
        self.vision, self.no_vision = loaded.vision, loaded.no_vision
        kind = parse_kv_cache_dtype(self.config.kv_cache_dtype)
        layout = layout_with_cache_type(loaded.model, kind)
        drafting = check_draft(self.config, loaded, draft)
        self.vocab_size = layout.vocab_size if layout else int(loaded.config["vocab_size"])
        check_token_rows(loaded.model, self.vocab_size)
        small = drafting if isinstance(drafting, Draft) else None
        # Proposals of a draft model, ranks and the library for CPUs know one table of a sequence.
        self._has_window_pools = not (drafting or loaded.packed or self.is_divided)
        self._is_packed = loaded.packed is not None
        self._step_memory = step_memory(loaded.model, self.vocab_size, max_num_seqs(self.config))
        self._sizes = self._choose_sizes(layout, loaded.context_length, small)
        self.max_model_len = self._sizes.max_model_len
        per_token = sum(each.bytes_per_token for each in (layout, small and small.layout) if each)
        self.kv_cache_bytes = self._sizes.cache_bytes(self.config.block_size, per_token)
        self.weight_bytes = loaded.weight_bytes + (drafting.weight_bytes if drafting else 0)
        #: Bytes of the weights and the KV cache, and of steps' arrays where these stay for long.
        self.memory_bytes = self.weight_bytes + self.kv_cache_bytes + self._sizes.step_bytes
        # The self-test runs whole steps. The KV cache is not allocated yet.
        limit_memory(mx.get_active_memory() + self.kv_cache_bytes, self._sizes.step_bytes)
        self._runner = self._make_runner(loaded, layout)
        #: What restores the models, the last one first.
        self._restoring = ExitStack()
        self._restoring.callback(self._runner.undo)
        try:
            self._prepare(loaded, layout, drafting, model_id)
        except BaseException:
            self._restoring.close()
            raise

    def _prepare(
        self,
        loaded: LoadedModel,
        layout: ModelLayout | None,
        drafting: Draft | DraftingHead | None,
        model_id: str,
    ) -> None:
        """Make all that serves requests, and warm up."""
        kind = parse_kv_cache_dtype(self.config.kv_cache_dtype)
        notes = list(loaded.notes)
        if self.vision is not None and self._runner.tier != "paged":
            needs = self.vision.processor
            what = "M-RoPE positions" if needs.mrope else "pictures that attend in both directions"
            what = "layers that attend to pictures" if needs.cross else what
            if needs.mrope or needs.largest_span or needs.cross:
                self.vision, self.no_vision = None, f"{what} need the paged tier"
                notes.append(f"pictures are not read: {self.no_vision}")
        self._adapters: AdapterSet | None = None
        rows = self._runner.adapter_rows
        if self.vision is not None and loaded.adapter_for_files and rows is None:
            self.vision, self.no_vision = None, "adapters need the paged tier"
            notes.append(f"sounds are not read: {self.no_vision}")
        if rows is not None and (self.config.max_loras or loaded.adapter_for_files):
            self._adapters = self._make_adapters(loaded, rows)
            self._restoring.callback(self._adapters.close)
        caching = self.config.enable_prefix_caching and self._runner.supports_prefix_cache
        self._blocks = BlockManager(
            self._sizes.num_blocks,
            self.config.block_size,
            model_id=model_id if kind == "auto" else f"{model_id} {kind}",
            enable_prefix_caching=caching,
            snapshots=self._runner.snapshots,
            snapshot_interval=layout.snapshot_interval(self.config.block_size) if layout else 0,
            window=layout.window if layout else None,
            window_pools=self._sizes.window_pools,
            doubts=not on_gpu(),  # our kernels read nothing that a token does not see
        )
        self._mover = open_offload(self.config, self._runner, self._blocks, model_id)
        limits = self._sizes.scheduler_config(self.config)
        if isinstance(self._runner, PagedRunner) and self._runner.tiles_prompts and not self.vision:
            buckets = limits.buckets
            limits = replace(
                limits,
                buckets=replace(buckets, tile=TILE_ROWS),
                # All tiles of a step are padded to a bucket.
                max_num_batched_tokens=round_down(limits.max_num_batched_tokens, buckets.chunk),
            )
        self._scheduler = Scheduler(
            limits,
            self._blocks,
            None if self.vision is None else self.vision.encoder,
            self._adapters,
        )
        eos_token_ids = self.tokenizer.eos_token_ids
        self._sampler = Sampler(
            self.vocab_size, max_num_seqs(self.config), eos_token_ids, self._runner.staging
        )
        self._speculator, refused = make_speculator(
            self.config, drafting, self._runner, self._sampler, self._sizes, self.vocab_size
        )
        if self._speculator is not None:
            self._restoring.callback(self._speculator.close)
            if isinstance(self._runner, PagedRunner):
                self._runner.expect_proposals()
        self._replays: Replays | None = None
        # What else writes to the pools, or reads hidden states, runs by MLX.
        speculates = self._speculator is not None and not self._speculator.may_replay
        if not (speculates or self._mover.has_offload or self.is_divided):
            sizes = self._sizes
            self._replays = make_replays(
                self._runner,
                sizes.recorded_rows,
                sizes.recorded_row_bytes,
                sizes.recorded_weight_bytes,
            )
            if self._replays is not None:
                self._restoring.callback(self._replays.close)
        self.notes = (*notes, *self._runner.notes, *refused)
        self._outputs = OutputProcessor(self._scheduler)
        self._in_flight: LaunchedStep | None = None
        self._clock = StepClock()
        #: Shapes of steps that wait for idle time to be warmed up.
        self._cold = deque[StepShape]()
        self._has_idle_time = False
        limit_memory(self.weight_bytes + self.kv_cache_bytes, self._sizes.step_bytes)
        if self.config.warm_up and on_gpu():
            most = self._speculator.most_rows if self._speculator else 0
            shapes = self._sizes.step_shapes(self.config, most)
            if not self.is_divided:  # an error in idle time would end all ranks
                shapes, later = by_context(shapes, self._sizes.buckets, self.config.block_size)
                self._cold.extend(later)
            dtype = self._runner.warm_up(shapes)
            self._sampler.warm_up(dtype or mx.float32)
            if self._speculator is not None:
                self._speculator.warm_up()

    def add_request(self, request_id: str, request: EngineRequest) -> None:
        if request.media and self.vision is None:
            raise RequestError("this model reads no pictures", param="messages")
        adapter = self._adapter_of(request)
        if adapter is None:
            super().add_request(request_id, request)
            return
        salt = root_hash(b"adapter", adapter.identity.encode(), request.cache_salt)
        self._add(request_id, replace(request, cache_salt=salt), adapter)

    def _adapter_of(self, request: EngineRequest) -> KnownAdapter | None:
        """Return the adapter that a request names, or the model's own for prompts with files."""
        own = None if self._adapters is None else self._adapters.for_files
        if request.adapter is None:
            return own if request.media else None
        found = self._adapters_or_refuse().find(request.adapter)
        if request.media and own is not None:
            raise RequestError(
                "prompts with files have an adapter of the model's own, and no other",
                param="model",
                hint="leave out the adapter or the files",
            )
        return found

    @property
    def runs_adapters(self) -> bool:
        return self._adapters is not None and self.config.max_loras > 0

    def add_adapter(self, name: str, adapter: Adapter, identity: str) -> None:
        adapters = self._adapters_or_refuse()
        with self._counted(adapters):
            adapters.add(name, adapter, identity)

    def remove_adapter(self, name: str) -> None:
        adapters = self._adapters_or_refuse()
        with self._counted(adapters):
            adapters.remove(name)

    def _unload_removed_adapters(self) -> None:
        if self._adapters is not None and self._adapters.has_removed:
            with self._counted(self._adapters):
                self._adapters.unload_removed()

    @contextmanager
    def _counted(self, adapters: AdapterSet) -> Iterator[None]:
        """Count the memory of adapters that the block loads or unloads."""
        before = adapters.nbytes
        try:
            yield
        finally:
            self.memory_bytes += adapters.nbytes - before
            if self._replays is not None:
                self._replays.drop_adapted()

    def _adapters_or_refuse(self) -> AdapterSet:
        if self._adapters is None or not self.config.max_loras:
            raise RequestError(
                "the model is loaded without LoRA adapters", param="model",
                hint="set max_loras in EngineConfig",
            )  # fmt: skip
        return self._adapters

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return super().has_work or self._in_flight is not None

    def step(self) -> list[RequestEvent]:
        """Run one step; return the new events."""
        self._clock.start()
        self._collect_for_proposals()
        scheduled = self._schedule()
        if self._runner.writes_in_place:
            self._launch(scheduled)
            result = self._collect()
        else:  # MLX copies the pools that a step in flight still holds
            result = self._collect()
            self._launch(scheduled)
        self._emit(result)
        self._in_flight = self._finish_launch(scheduled)
        if self._runner.computes_at_once:
            self._emit(self._collect())
        self._unload_removed_adapters()
        return self._outputs.take_events()

    def use_idle_time(self) -> bool:
        assert not self.has_work, "a request is unfinished"
        is_first, self._has_idle_time = not self._has_idle_time, True
        if self._replays is not None and self._replays.use_idle_time():
            return True
        if self._cold and not is_first:
            self._warm_up(self._cold.popleft())
        return bool(self._cold)

    def _warm_up(self, shape: StepShape) -> None:
        """Warm up a shape between requests; if that fails, warm up no others."""
        try:
            if self._replays is not None:
                self._replays.drop_ahead()
                self._replays.follow_mlx = True
            self._runner.warm_up([shape])
        except BaseException:
            self._cold.clear()
            self._blocks.forget_content()  # as after a step that fails
            self.fail_all("a step could not be warmed up")
            raise

    def abort(self, request_id: str, index: int | None = None) -> list[RequestEvent]:
        events = super().abort(request_id, index)
        self._unload_removed_adapters()
        return events

    def fail_all(self, message: str) -> list[RequestEvent]:
        in_flight, self._in_flight = self._in_flight, None
        if self._replays is not None:
            self._replays.forget()
        if in_flight is not None:
            self._scheduler.fail(in_flight.output)
        self._mover.forget()
        if isinstance(self._runner, PagedRunner):
            self._runner.adapted.reset()  # or the next step would compute the states of this one
        self._outputs.fail_all(message)
        self._unload_removed_adapters()
        return self._outputs.take_events()

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        stats = replace(super().stats(), offload=self._mover.stats())
        return stats if self._speculator is None else self._speculator.counted(stats)

    def close(self) -> None:
        """Write the prefix cache to disk, if the configuration says so, and restore the models.

        Another engine can then run them.
        """
        self._mover.close()
        self._restoring.close()
        gc.collect()  # replaced calls, which hold joint weights, are in reference cycles

    # `ParallelEngine`, over several devices, overrides these four methods.

    def _make_adapters(self, loaded: LoadedModel, rows: AdapterRows) -> AdapterSet:
        own = loaded.adapter_for_files
        return AdapterSet(loaded.model, loaded.config, rows, self.config.max_loras, own)

    def _choose_sizes(
        self, layout: ModelLayout | None, context_length: int, draft: Draft | None
    ) -> Sizes:
        # A draft model may have no attention window.
        window = None if layout is None or draft is not None else layout.window
        return choose_sizes(
            layout,
            context_length,
            self.config,
            draft_bytes=0 if draft is None else draft.layout.bytes_per_token,
            draft_state_bytes=0 if draft is None else draft.state_bytes(self.config),
            window=window,
            groups=layout.window_groups if layout is not None and self._has_window_pools else (),
            step_memory=self._step_memory,
            span=0 if self.vision is None else self.vision.processor.largest_span,
            picture_bytes=0 if self.vision is None else self.vision.encoder.reserved_bytes,
            packed=self._is_packed,
        )

    def _make_runner(self, loaded: LoadedModel, layout: ModelLayout | None) -> ModelRunner:
        if loaded.packed is None:
            return make_engine_runner(loaded.model, self._sizes, self.config)
        assert layout is not None, "packed models have a KV cache"
        return CpuRunner(
            loaded.model,
            loaded.packed,
            layout,
            num_blocks=self._sizes.num_blocks,
            block_size=self.config.block_size,
            max_rows=self._sizes.max_num_batched_tokens,
        )

    def _sample(self, logits: mx.array, rows: Tokens[SampleRow]) -> Sampled:
        return self._sampler.sample(logits, rows)

    # The phases of a step, in their order

    def _collect_for_proposals(self) -> None:
        """Collect the step in flight before the next is scheduled, if speculation needs its tokens.

        It needs them to propose, and after a step that verifies proposals, to count the accepted.
        """
        if self._speculator is None or self._in_flight is None:
            return
        decoding = self._scheduler.decoding()
        if self._in_flight.output.proposals or self._speculator.worth_waiting(decoding):
            expected = self._expected(self._in_flight)
            result = self._collect()
            if result is not None and expected is not None:
                self._launch_ahead(result, expected)
            self._emit(result)
            self._clock.ended("wait")

    def _expected(self, last: LaunchedStep) -> Expected[NextStep] | None:
        """Return the steps that may follow one whose graph drafts, for `_launch_ahead`."""
        replays, sampled, sequences = self._replays, last.sampled, last.output.sampled
        if (
            replays is None
            or not isinstance(sampled, ReplayedTokens)
            or sampled.draft is None
            or not sampled.draft.num_drafted
            or any(sequence.media for sequence in sequences)  # rotations are not the positions
            or not self._scheduler.has_only(sequences)
        ):
            return None
        proposed = {each.sequence: len(each.token_ids) for each in last.output.proposals}
        sampler = self._sampler

        def lay_out(found: list[Continued]) -> NextStep | None:
            rows = (
                [] if sampler.is_greedy else [row for each in found for row in each.sample_rows()]
            )
            return replays.expected(sampled, found, partial(sampler.settings, rows))

        most = [1 + proposed.get(sequence, 0) for sequence in sequences]
        return Expected(sequences, most, sampled.draft.num_drafted, self._blocks, lay_out)

    def _launch_ahead(self, result: StepResult, expected: Expected[NextStep]) -> None:
        """Launch the step expected after one that drafts, before it is scheduled.

        The device computes it while the host emits tokens and schedules.
        """
        assert self._replays is not None
        assert self._speculator is not None
        tokens = [[token.token_id for token in row] for row in result.tokens]
        proposed = self._speculator.next_proposals(result.output.sampled, tokens)
        if proposed is not None and (found := expected.after(tokens, proposed)) is not None:
            self._replays.launch_ahead(*found)

    def _schedule(self) -> ScheduledStep | None:
        """Schedule the next step and build its graph; return None if there is nothing to run."""
        proposed = None
        if self._speculator is not None and self._in_flight is None:
            proposed = self._speculator.propose(self._scheduler.decoding(), self._outputs.mask_of)
        if self.vision is not None:
            last = self._in_flight
            self.vision.encoder.begin_step(after_prompts=bool(last and last.output.prefill))
        output = self._scheduled(proposed)
        if self._replays is not None and output is None:
            self._replays.drop_ahead()
        scrub = self._blocks.take_to_scrub()
        self._mover.move(scrub, has_step=output is not None, in_flight=self._in_flight is not None)
        scheduled = None
        if output is not None:
            self._forget(output.released)
            for chunk in output.prefill:
                self._register(chunk.sequence)
            scheduled = self._build(output)
        if self.vision is not None:  # the step may compute the text before a bad picture
            for sequence, error in self.vision.encoder.take_failures():
                self._outputs.fail(sequence, str(error), error.param)
        if output is None:
            self._forget(self._scheduler.take_released())
        self._clock.ended("build")
        return scheduled

    def _scheduled(self, proposed: Proposed | None) -> SchedulerOutput | None:
        """Return the next step; it may load adapters, and ends requests whose adapter cannot be."""
        if self._adapters is None:
            return self._scheduler.schedule(proposed)
        with self._counted(self._adapters):
            output = self._scheduler.schedule(proposed)
        for sequence, error in self._adapters.take_failures():
            self._outputs.fail(sequence, str(error))
        return output

    def _build(self, output: SchedulerOutput) -> ScheduledStep:
        last = self._in_flight
        buckets, size = self._sizes.buckets, self.config.block_size
        interval = self._blocks.snapshot_interval
        before = last.batch if last else None
        recurrent = self._runner.snapshots is not None
        batch = build_batch(output, before, buckets, size, interval, proposals_as_rows=recurrent)
        staging = self._runner.staging
        staging_step = staging.next_step()
        masked = self._outputs.has_masks and any(
            sequence.params.mask is not None for sequence in batch.sample_seqs
        )
        if self._replays is not None:
            replayed = self._replay(output, batch, masked=masked)
            if replayed is not None:
                return ScheduledStep(output, batch, replayed, None, None, staging_step)
            self._replays.drop_ahead()
            if last is not None and isinstance(last.sampled, ReplayedTokens):
                last.sampled.read()  # MLX does not wait for it
        token_ids = row_token_ids(batch, last.sampled if last else None, staging)
        embeddings = None
        if self.vision is not None:
            embeddings = self.vision.encoder.input_embeddings(batch, token_ids)
            if embeddings is not None:
                token_ids = self.vision.encoder.shown_ids(token_ids)
        logits = self._runner.forward(with_prompt_rows(batch), token_ids, embeddings)
        if self.vision is not None:
            self.vision.encoder.end_step()
        logits, prompt_logprobs = split_logits(batch, logits)
        sampled = masked_logits = None
        if masked:
            masked_logits = logits
        elif batch.sample_seqs:
            sampled = self._sample(logits, sample_rows(output))
        if self._speculator is not None and isinstance(self._runner, PagedRunner):
            next_ids = None
            # Log-probabilities would wait for a draft that is launched behind the step.
            if sampled is not None and sampled.logprobs is None:
                next_ids = sampled.next_ids
            self._speculator.record(output, batch, self._runner.hidden_rows(), next_ids)
        return ScheduledStep(output, batch, sampled, masked_logits, prompt_logprobs, staging_step)

    def _replay(
        self, output: SchedulerOutput, batch: StepBatch, *, masked: bool
    ) -> ReplayedTokens | None:
        """Return a step that runs as a graph; None if MLX has to run it."""
        assert self._replays is not None
        settings = draft = embed = None
        encoder = self.vision.encoder if self.vision is not None and batch.media_rows else None
        is_ready = not masked and (encoder is None or encoder.is_ready)
        if is_ready and self._replays.takes(batch):
            padded = self._sizes.buckets.pad_rows(len(batch.sample_rows))
            num_sampled = padded if batch.chunks else batch.num_rows
            rows = () if self._sampler.is_greedy else sample_rows(output)
            settings = self._sampler.settings(rows, num_sampled)
        if settings is not None and self._speculator is not None:
            if self._replays.takes_draft(batch):
                draft = self._speculator.draft_within(output, batch)
            if draft is None and self._speculator.reads_hidden(output):
                settings = None  # MLX keeps the hidden states, for a later draft
        if settings is None:
            self._replays.end_run()
            return None
        previous = self._in_flight.sampled if self._in_flight else None
        if encoder is not None:
            embed = partial(self._embeddings, batch, previous)
        replayed = self._replays.step(batch, previous, settings, draft, embed)
        if replayed is None:
            return None
        if draft is not None and self._speculator is not None:
            self._speculator.drafts(output, draft, replayed)
        if encoder is not None:
            encoder.end_step()
        return replayed

    def _embeddings(self, batch: StepBatch, previous: Sampled | ReplayedTokens | None) -> mx.array:
        """Return the embeddings of the rows of a step with pictures; wait for the step before."""
        assert self.vision is not None
        token_ids = row_token_ids(batch, previous, self._runner.staging)
        found = self.vision.encoder.input_embeddings(batch, token_ids)
        assert found is not None, "rows of pictures have embeddings"
        return found

    def _launch(self, scheduled: ScheduledStep | None) -> None:
        """Launch the graph of a step on the device."""
        if scheduled is not None:
            try:
                if isinstance(scheduled.sampled, ReplayedTokens):
                    scheduled.sampled.launch()
                else:
                    if self._replays is not None:
                        self._replays.follow_mlx = True
                    mx.async_eval(*scheduled.arrays(), *self._runner.pools())
            except BaseException:
                self._blocks.forget_content()  # it has the snapshots of this step
                raise
            if self._speculator is not None:
                self._speculator.launched()
        self._clock.ended("launch")

    def _collect(self) -> StepResult | None:
        """Wait for the step in flight; return its tokens.

        A step that failed raises here. It stays in flight until its result is emitted, so that
        `fail_all` can account for it.
        """
        result = None
        if self._in_flight is not None:
            result = read_step(self._in_flight)
            if self._in_flight.sampled is not None:
                self._runner.staging.read(self._in_flight.staging_step)
            self._outputs.take_prompt_logprobs(result.prompt_logprobs)
        self._clock.ended("wait")
        self._mover.collect()
        if result is not None:
            self._fail_rows(result)
        return result

    def _fail_rows(self, result: StepResult) -> None:
        """End the sequences whose logits are NaN, and zero the blocks that they wrote."""
        failed = [tokens for tokens in result.tokens if tokens and tokens[0].token_id == NO_TOKEN]
        if self._replays is not None and (failed or any(result.broken_slots)):
            self._replays.forget()  # MLX may move the pools that it zeroes
        for sequence, tokens in zip(result.output.sampled, result.tokens, strict=True):
            if not tokens:
                self._blocks.withdraw(sequence)
            elif tokens[0].token_id == NO_TOKEN and sequence in self._outputs:
                for group, blocks in enumerate(self._blocks.withdraw(sequence)):
                    self._runner.scrub(blocks, group)
                self._outputs.fail_undecided(sequence)
        for group, slots in enumerate(result.broken_slots):
            self._runner.scrub_slots(slots, group)

    def _emit(self, result: StepResult | None) -> None:
        """Append the tokens of a step to its sequences, and emit them as events."""
        if result is None:
            return
        self._in_flight = None
        if self._speculator is not None:
            self._speculator.emitted(result.output, time.perf_counter())
        for proposal, tokens in result.verified():
            self._verified(proposal, tokens)
        firsts = [tokens[0].token_id if tokens else None for tokens in result.tokens]
        for index, sequence in self._scheduler.collect(result.output, firsts):
            first, *others = result.tokens[index]
            self._outputs.emit(sequence, first)
            for number, token in enumerate(others, 2):
                if self._scheduler.take(sequence, token.token_id):
                    # All were proposed but the last one.
                    sequence.num_accepted_tokens += number <= len(others)
                    self._outputs.emit(sequence, token)

    def _verified(self, proposal: Proposal, tokens: list[NextToken]) -> None:
        """Count the accepted tokens of a proposal."""
        if proposal.sequence.is_finished:
            return
        assert self._speculator is not None
        num_accepted = max(0, len(tokens) - 1)
        self._runner.verified(proposal.sequence.seq_id, len(tokens))
        self._scheduler.verified(proposal, num_accepted)
        self._speculator.verified(proposal, num_accepted, spoilt=not tokens)
        self._sampler.accept(proposal.sequence.seq_id, [token.token_id for token in tokens])

    def _finish_launch(self, scheduled: ScheduledStep | None) -> LaunchedStep | None:
        """Sample the logits that waited for masks; return the step that is now in flight."""
        if scheduled is None:
            return None
        sampled = scheduled.sampled
        if scheduled.masked_logits is not None:
            rows, failures = masked_rows(scheduled.output, self._outputs.mask_of)
            self._outputs.fail_masks(failures)
            sampled = self._sample(scheduled.masked_logits, rows)
            mx.async_eval(*sampled.arrays())
        self._scheduler.submitted(scheduled.output)
        return LaunchedStep(
            scheduled.output, scheduled.batch, sampled,
            scheduled.prompt_logprobs, scheduled.staging_step,
        )  # fmt: skip

    # Details

    def _forget(self, seq_ids: Tokens[int]) -> None:
        """Release the state of sequences that ended or were preempted, except their blocks."""
        self._runner.release(seq_ids)
        if self._speculator is not None:
            self._speculator.release(seq_ids)
        super()._forget(seq_ids)
