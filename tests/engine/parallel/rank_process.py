"""One rank of a test: `python -m tests.engine.parallel.rank_process WHAT SIZE OUT`.

Rank 0 runs the task WHAT and writes its result to the file OUT, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelpack_engine.platform import blas

blas.prepare()

import mlx.core as mx  # noqa: E402
from mlx.nn import quantize  # noqa: E402

from modelpack.formats.adapter import read_adapter  # noqa: E402
from modelpack.testing.weights import smollm2_gguf  # noqa: E402
from modelpack_engine.config import EngineConfig  # noqa: E402
from modelpack_engine.distributed.adapters import AdapterParts  # noqa: E402
from modelpack_engine.distributed.follower import Follower  # noqa: E402
from modelpack_engine.distributed.launch import join  # noqa: E402
from modelpack_engine.distributed.leader import Ranks  # noqa: E402
from modelpack_engine.engine import Engine  # noqa: E402
from modelpack_engine.errors import EngineError, OutOfMemoryError  # noqa: E402
from modelpack_engine.models import LoadedModel, ModelFiles  # noqa: E402
from modelpack_engine.models import load as load_files  # noqa: E402
from modelpack_engine.models.loader import Shard  # noqa: E402
from modelpack_engine.models.precision import evaluate  # noqa: E402
from modelpack_engine.patches.lora import Matrices  # noqa: E402
from modelpack_engine.request import EngineRequest  # noqa: E402
from tests.engine.parallel import playing  # noqa: E402
from tests.engine.runner.models import tiny_llama  # noqa: E402
from tests.engine.serving.tiny import tiny_loaded  # noqa: E402
from tests.engine.zoo.catalogue import CATALOGUE  # noqa: E402
from tests.engine.zoo.configuration import COMMON, VOCABULARY  # noqa: E402


def load(key: str, shard: Shard | None) -> LoadedModel:
    """Return a model by its key: the tiny one, one of the zoo, or none at all on rank 1."""
    if key == "refused by rank 1" and os.environ.get("MLX_RANK") == "1":
        raise EngineError("the disk is on fire", hint="call somebody")
    if key == "smollm2":
        return load_files(ModelFiles.from_directory(smollm2_gguf()), device="cpu", shard=shard)
    if key.startswith("zoo "):
        loaded = zoo_loaded(key.removeprefix("zoo "))
    else:
        loaded = tiny_loaded()
        loaded = replace(loaded, config={**loaded.config, "num_attention_heads": 4})
    if shard is not None:
        shard(loaded.model, loaded.config)
    return replace(loaded, weight_bytes=evaluate(loaded.model))


def zoo_loaded(name: str) -> LoadedModel:
    """Return a model of the zoo, by its id or, with weights in 4 bits, "ID, 4 bits"."""
    if name == playing.WIDE:
        model = tiny_llama(hidden_size=128, vocab_size=VOCABULARY)
        return replace(tiny_loaded(), model=model, config={"model_type": "llama"})
    quantised = name.endswith(", 4 bits")
    [configuration] = [c for c in CATALOGUE if c.id == name.removesuffix(", 4 bits")]
    model = configuration.build()
    if quantised:
        quantize(model, group_size=32, bits=4)
    config = {"model_type": configuration.architecture, **COMMON, **configuration.args}
    return replace(tiny_loaded(), model=model, config=config)


def engine_of(ranks: Ranks, key: str, config: EngineConfig) -> Engine:
    return ranks.engine(key, lambda shard: load(key, shard), lambda _: config)


def play(ranks: Ranks) -> Any:
    """Run everything, and in between load a model that one rank cannot load."""
    told = ""
    try:
        engine_of(ranks, "refused by rank 1", playing.config())
    except EngineError as error:
        told = f"{error} ({error.hint})"
    answers = playing.play(lambda config: engine_of(ranks, "tiny", config), ranks.size)
    return {"refused": told, **answers}


def play_zoo(ranks: Ranks) -> Any:
    answers: dict[str, Any] = {}
    adapters, *names = sys.argv[4:]
    for name in names:
        try:
            engine = engine_of(ranks, f"zoo {name}", playing.zoo_config(name))
        except EngineError as error:
            answers[name] = str(error)
            continue
        answers[name] = [
            playing.run_greedy(engine),
            playing.run_adapted(engine, Path(adapters, name)),
            engine._runner.tier,
        ]
        engine.close()
    return answers


def play_adapters(ranks: Ranks) -> Any:
    """Run adapters, one of them without a place on rank 1: when it is added, and when admitted."""
    directory = Path(sys.argv[4])
    engine = engine_of(ranks, "tiny", playing.config(max_loras=2))
    refused = []
    try:
        engine.add_adapter("large", read_adapter(directory / "large"), "large")
    except EngineError as error:
        refused.append(str(error))
    answers = playing.run_adapters(engine, directory)
    engine.close()
    engine = engine_of(ranks, "tiny", playing.config(max_loras=1))
    for name in ("two", "large"):
        engine.add_adapter(name, read_adapter(directory / name), name)
    for name in ("large", "two"):
        request = EngineRequest(playing.prompt(1), playing.SEEDED[0], adapter=name)
        engine.add_request(name, request)
    events = [event for _ in range(40) for event in engine.step()]
    refused += [event.error for event in events if event.error]
    ends = {event.request_id: str(event.finish_reason) for event in events if event.finished}
    return {**answers, "refused by rank 1": refused, "ends": ends}


def refuse_large_adapters() -> None:
    """Make this rank fail to keep adapters of rank 7."""
    keep = AdapterParts.keep

    def kept(parts: AdapterParts, layer: str, whole: Matrices) -> None:
        if whole.a.shape[-1] == 7 and "layers.1" in layer:
            raise OutOfMemoryError("no memory for it")
        keep(parts, layer, whole)

    AdapterParts.keep = kept  # type: ignore[method-assign]


def play_smollm2(ranks: Ranks) -> Any:
    engine = engine_of(ranks, "smollm2", playing.config(max_model_len=256))
    return {"texts": playing.run_texts(engine), "bytes": engine.memory_bytes}


def raise_in_step(ranks: Ranks) -> Any:
    """Fail a step on rank 0 after the others have begun it."""
    engine = engine_of(ranks, "tiny", playing.config())

    def broken(*_: Any) -> Any:
        raise RuntimeError("the sampler is broken")

    engine._sampler.sample = broken  # type: ignore[method-assign]
    return playing.run_seeded(engine)


TASKS: dict[str, Callable[[Ranks], Any]] = {
    function.__name__: function
    for function in (play, play_adapters, play_zoo, play_smollm2, raise_in_step)
}


def end(error: EngineError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(3)


def main() -> None:
    mx.set_default_device(mx.cpu)
    joined = join(int(sys.argv[2]), end)
    if isinstance(joined, Follower):
        refuse_large_adapters()
        joined.follow(load)
        return
    answers = TASKS[sys.argv[1]](joined)
    Path(sys.argv[3]).write_text(json.dumps(answers))
    joined.close()


if __name__ == "__main__":
    main()
