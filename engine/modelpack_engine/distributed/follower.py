"""A follower: a rank other than 0, which runs the requests of rank 0 on its part of a model.

    LOAD       read the files and keep this rank's part; respond
    CONFIGURE  respond with the number of blocks that fit
    BUILD      make the runner and test it, as rank 0 does at the same time; respond
    WARM_UP    compile steps
    STEP …     build the graph, launch it, and wait for the previous step
    ADAPTER …  keep this rank's part of an adapter; respond (`distributed.adapters`)
    UNLOAD     drop the model

A follower launches a step when rank 0 does: before or after it waits for the previous step. It
reports errors up to BUILD, and those of adapters, and continues; another error ends the follower,
and with it the group.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.config import EngineConfig, parse_kv_cache_dtype
from modelpack_engine.core.batch import StepBatch, StepShape
from modelpack_engine.distributed import channel as wire
from modelpack_engine.distributed.adapters import AdapterParts, unpack_layer
from modelpack_engine.distributed.channel import (
    FollowerChannel,
    Kind,
    WireError,
    unpack_integers,
    unpack_step,
)
from modelpack_engine.distributed.group import Group, make_ordered_runner
from modelpack_engine.distributed.sharding import Divisions, shard
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.loader import Shard
from modelpack_engine.runner.kv_cache_size import (
    Sizes,
    choose_sizes,
    limit_memory,
    max_num_seqs,
    on_gpu,
    step_memory,
)
from modelpack_engine.runner.model_layout import ModelLayout, layout_with_cache_type
from modelpack_engine.runner.model_runner import ModelRunner
from modelpack_engine.runner.step import row_token_ids
from modelpack_engine.sampling.sampler import Sampled

_log = logging.getLogger(__name__)

#: Loads this rank's part: gets the name of the model that rank 0 loads, and what divides it.
Load = Callable[[str, Shard], LoadedModel]


@dataclass(slots=True)
class _Held:
    """A model that is loaded in steps; each field needs those before it."""

    loaded: LoadedModel
    config: EngineConfig | None = None
    layout: ModelLayout | None = None  # None: not paged
    sizes: Sizes | None = None
    runner: ModelRunner | None = None
    adapters: AdapterParts | None = None  # None: without adapters
    #: The tokens of the step in flight, and its arrays to wait for.
    sampled: Sampled | None = None
    in_flight: list[mx.array] | None = None


class Follower:
    """A rank other than 0, connected to it."""

    _load: Load

    def __init__(self, group: Group, channel: FollowerChannel) -> None:
        self._group, self._channel = group, channel
        self._held: _Held | None = None
        self._divisions: Divisions = {}

    def follow(self, load: Load) -> None:
        """Run rank 0's requests until its BYE; raise the errors of running steps."""
        self._load = load
        try:
            while True:
                kind, body = self._channel.receive()
                if kind is Kind.BYE:
                    return
                self._handle(kind, body)
        except Exception as error:
            _log.exception("rank %d ends", self._group.rank)
            self._channel.fail(error)
            raise

    def _handle(self, kind: Kind, body: bytes) -> None:
        if kind is Kind.UNLOAD:
            self._unload()
        elif kind is Kind.LOAD:
            self._try(body, self._load_part, key=str)
        elif kind is Kind.CONFIGURE:
            self._try(body, self._configure, config=dict)
        elif kind is Kind.BUILD:
            self._build(body)
        elif kind in (Kind.ADAPTER, Kind.ADAPTER_LAYER, Kind.ADAPTER_NORMS):
            self._adapt(kind, body)
        else:
            self._run(kind, body)

    def _try(self, body: bytes, work: Callable[..., dict[str, Any]], **types: type) -> None:
        """Respond with the result of `work`, or with its error."""
        given = wire.fields(body, number=int, **types)
        number = given.pop("number")
        try:
            answer = work(**given)
        except Exception as error:  # noqa: BLE001 - rank 0 gets every error
            self._unload()
            self._channel.refuse(number, error)
        else:
            self._channel.answer(number, **answer)

    # Loading a model

    def _load_part(self, key: str) -> dict[str, Any]:
        self._unload()
        self._held = _Held(self._load(key, self._shard))
        return {}

    def _shard(self, model: Module, config: Mapping[str, Any]) -> None:
        self._divisions = shard(model, config, self._group.mlx)

    def _configure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        held = self._held
        if held is None:
            raise WireError("CONFIGURE before LOAD")
        names = {field.name for field in fields(EngineConfig)}
        if set(config) != names:
            raise WireError(
                f"the configuration has the fields {sorted(config)}, expected {sorted(names)}"
            )
        held.config = EngineConfig(**config)
        kv_cache_dtype = parse_kv_cache_dtype(held.config.kv_cache_dtype)
        held.layout = layout = layout_with_cache_type(held.loaded.model, kv_cache_dtype)
        held.sizes = choose_sizes(
            layout,
            held.loaded.context_length,
            held.config,
            window=layout.window if layout else None,
            step_memory=step_memory(
                held.loaded.model, layout.vocab_size if layout else 0, max_num_seqs(held.config)
            ),
        )
        return {"num_blocks": held.sizes.num_blocks, "gpu": on_gpu()}

    def _build(self, body: bytes) -> None:
        held = self._held
        if held is None or held.config is None or held.sizes is None:
            raise WireError("BUILD before CONFIGURE")
        given = wire.fields(
            body, number=int, num_blocks=int, max_model_len=int, max_num_batched_tokens=int
        )
        number = given.pop("number")
        held.sizes = replace(held.sizes, **given)
        per_token = held.layout.bytes_per_token if held.layout else 0
        cache_bytes = held.sizes.cache_bytes(held.config.block_size, per_token)
        limit_memory(mx.get_active_memory() + cache_bytes, held.sizes.step_bytes)
        held.runner = make_ordered_runner(held.loaded.model, held.sizes, held.config)
        if held.config.max_loras and (rows := held.runner.adapter_rows) is not None:
            held.adapters = AdapterParts(held.loaded.model, rows, self._divisions)
        limit_memory(held.loaded.weight_bytes + cache_bytes, held.sizes.step_bytes)
        self._channel.answer(number, tier=held.runner.tier)

    def _unload(self) -> None:
        if self._held is None:
            return
        self._wait(self._held)
        self._held = None
        gc.collect()  # a model has reference cycles; free its memory now
        mx.clear_cache()

    # Adapters

    def _adapt(self, kind: Kind, body: bytes) -> None:
        """Respond to a message about an adapter, with the error if there is one: nothing is lost.

        Rank 0 then makes all ranks forget the adapter.
        """
        parts = None if self._held is None else self._held.adapters
        if parts is None:
            raise WireError(f"{kind.name} for a model without adapters")
        given = wire.fields(body, number=int, slot=int, layers=int) if kind is Kind.ADAPTER else {}
        if given:
            number = given["number"]
        else:
            number, layer, matrices = unpack_layer(body)
        answer: dict[str, Any] = {}
        try:
            if kind is Kind.ADAPTER:
                parts.place(given["slot"], given["layers"])
            elif kind is Kind.ADAPTER_LAYER:
                parts.keep(layer, matrices)
            else:
                rows, squares = parts.squares(layer, matrices.a, matrices.b)
                answer = {"rows": rows, "squares": squares}
        except Exception as error:  # noqa: BLE001 - rank 0 gets every error
            self._channel.refuse(number, error)
        else:
            self._channel.answer(number, **answer)

    # Running a model

    def _run(self, kind: Kind, body: bytes) -> None:
        held = self._held
        if held is None or held.runner is None:
            raise WireError(f"{kind.name} before BUILD")
        if kind is Kind.STEP:
            self._step(held, held.runner, *unpack_step(body))
        elif kind is Kind.RELEASE:
            held.runner.release(unpack_integers(body).tolist())
        elif kind is Kind.SCRUB:
            held.runner.scrub(unpack_integers(body).tolist())
        elif kind is Kind.SCRUB_SLOTS:
            held.runner.scrub_slots(unpack_integers(body).tolist())
        elif kind is Kind.WARM_UP:
            shapes = zip(*[iter(unpack_integers(body))] * 3, strict=True)
            held.runner.warm_up(StepShape(*shape) for shape in shapes)
        else:
            raise WireError(f"a message of the unexpected kind {kind.name}")

    def _step(self, held: _Held, runner: ModelRunner, batch: StepBatch, num_sampled: int) -> None:
        logits = runner.forward(batch, row_token_ids(batch, held.sampled, runner.staging))
        sampled, outputs = None, []
        if num_sampled:
            if len(batch.sample_rows) > num_sampled:
                logits = logits[:num_sampled]  # log-probabilities of a prompt need the others
            # Compiled steps pad the logits, and rank 0 samples all rows. NCCL does not compare the
            # sizes of a collective: with other ones, it hangs.
            sampled = Sampled.of(self._group.take_tokens(logits))
            outputs = list(sampled.arrays())
        elif batch.sample_rows:
            outputs = [logits]  # log-probabilities of a prompt need them
        if not runner.writes_in_place:
            self._wait(held)
        mx.async_eval(*outputs, *runner.pools())
        self._wait(held)
        held.sampled, held.in_flight = sampled, outputs

    def _wait(self, held: _Held) -> None:
        if held.in_flight:
            mx.eval(held.in_flight)
        held.in_flight = None
