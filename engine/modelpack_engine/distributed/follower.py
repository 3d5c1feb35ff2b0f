"""Any rank but 0: it holds its part of a model, and runs what rank 0 says, in that order.

    LOAD       read the files, keep this rank's part; answer
    CONFIGURE  answer how many blocks there is room for
    BUILD      make the runner and test it, as rank 0 does at the same time; answer
    WARM_UP    compile steps
    STEP …     build the graph, launch it, and wait for the step before
    UNLOAD     drop the model

A step is launched when rank 0 launches it: before or after the one before it has been waited for.
Errors up to BUILD are answers, and the rank goes on; later ones end it, and with it the group.
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
from modelpack_engine.distributed import channel as wire
from modelpack_engine.distributed.channel import (
    FollowerChannel,
    Kind,
    RemoteStep,
    WireError,
    unpack_integers,
    unpack_step,
)
from modelpack_engine.distributed.group import Group, OrderedRunner
from modelpack_engine.distributed.sharding import shard
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.loader import Shard
from modelpack_engine.runner.kv_cache_size import Sizes, choose_sizes, on_gpu
from modelpack_engine.runner.model_layout import layout_with_cache_type
from modelpack_engine.runner.model_runner import ModelRunner
from modelpack_engine.runner.step import row_token_ids
from modelpack_engine.runner.warm_up import StepShape, step_memory
from modelpack_engine.sampling.sampler import Sampled

_log = logging.getLogger(__name__)

#: From the name of a model that rank 0 loads, and what divides it, to this rank's part.
Load = Callable[[str, Shard], LoadedModel]


def follow(group: Group, channel: FollowerChannel, load: Load) -> None:
    """Do what rank 0 says until it says BYE; raises what goes wrong once steps run."""
    follower = _Follower(group, channel, load)
    try:
        while True:
            kind, body = channel.receive()
            if kind is Kind.BYE:
                return
            follower.obey(kind, body)
    except Exception as error:
        _log.exception("rank %d ends", group.rank)
        channel.fail(error)
        raise


@dataclass(slots=True)
class _Held:
    """A model on its way to running: each part follows from those before."""

    loaded: LoadedModel
    config: EngineConfig | None = None
    sizes: Sizes | None = None
    runner: ModelRunner | None = None
    #: The tokens of the step in flight, and what of it is waited for.
    sampled: Sampled | None = None
    in_flight: list[mx.array] | None = None


class _Follower:
    def __init__(self, group: Group, channel: FollowerChannel, load: Load) -> None:
        self._group, self._channel, self._load = group, channel, load
        self._held: _Held | None = None

    def obey(self, kind: Kind, body: bytes) -> None:
        """Do what one message says."""
        if kind is Kind.UNLOAD:
            self._unload()
        elif kind is Kind.LOAD:
            self._try(body, self._load_part, key=str)
        elif kind is Kind.CONFIGURE:
            self._try(body, self._configure, config=dict)
        elif kind is Kind.BUILD:
            self._build(body)
        else:
            self._run(kind, body)

    def _try(self, body: bytes, work: Callable[..., dict[str, Any]], **types: type) -> None:
        """Answer what comes of `work`, or what it raises."""
        given = wire.fields(body, number=int, **types)
        number = given.pop("number")
        try:
            answer = work(**given)
        except Exception as error:  # noqa: BLE001 - rank 0 has to hear of it, whatever it is
            self._unload()
            self._channel.refuse(number, error)
        else:
            self._channel.answer(number, **answer)

    # Up to a model that runs.

    def _load_part(self, key: str) -> dict[str, Any]:
        self._unload()

        def part(model: Module, config: Mapping[str, Any]) -> None:
            shard(model, config, self._group.mlx)

        self._held = _Held(self._load(key, part))
        return {}

    def _configure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        held = self._held
        if held is None:
            raise WireError("a configuration before a model")
        names = {field.name for field in fields(EngineConfig)}
        if set(config) != names:
            raise WireError(f"a configuration of {sorted(config)}, expected {sorted(names)}")
        held.config = EngineConfig(**config)
        kv_cache_dtype = parse_kv_cache_dtype(held.config.kv_cache_dtype)
        layout = layout_with_cache_type(held.loaded.model, kv_cache_dtype)
        held.sizes = choose_sizes(
            layout,
            held.loaded.context_length,
            held.config,
            window=layout.window if layout else None,
            step_memory=step_memory(held.loaded.model, layout.vocab_size if layout else 0),
        )
        return {"num_blocks": held.sizes.num_blocks, "gpu": on_gpu()}

    def _build(self, body: bytes) -> None:
        held = self._held
        if held is None or held.config is None or held.sizes is None:
            raise WireError("steps are to run before the model was configured")
        given = wire.fields(
            body, number=int, num_blocks=int, max_model_len=int, max_num_batched_tokens=int
        )
        number = given.pop("number")
        held.sizes = replace(held.sizes, **given)
        held.runner = OrderedRunner.sized(held.loaded.model, held.sizes, held.config)
        self._channel.answer(number, tier=held.runner.tier)

    def _unload(self) -> None:
        if self._held is None:
            return
        self._wait(self._held)
        self._held = None
        gc.collect()  # a model is full of cycles, and its memory is wanted now
        mx.clear_cache()

    # A model that runs.

    def _run(self, kind: Kind, body: bytes) -> None:
        held = self._held
        if held is None or held.runner is None:
            raise WireError(f"{kind.name} before the model was built")
        if kind is Kind.STEP:
            self._step(held, held.runner, unpack_step(body))
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
            raise WireError(f"a message of the kind {kind.name}")

    def _step(self, held: _Held, runner: ModelRunner, step: RemoteStep) -> None:
        batch = step.batch
        logits = runner.forward(batch, row_token_ids(batch, held.sampled, runner.staging))
        sampled = None
        outputs = []
        if step.num_sampled:
            sampled = Sampled.of(self._group.take_tokens(step.num_sampled, logits))
            outputs = list(sampled.arrays())
        elif batch.sample_rows:
            outputs = [logits]  # for the log-probabilities of a prompt
        if not runner.writes_in_place:
            self._wait(held)
        mx.async_eval(*outputs, *runner.pools())
        self._wait(held)
        held.sampled, held.in_flight = sampled, outputs

    def _wait(self, held: _Held) -> None:
        if held.in_flight:
            mx.eval(held.in_flight)
        held.in_flight = None
