"""A process that runs one turn of a conversation with tiny models, and keeps their prefixes.

`python -m tests.engine.offload.turns DIR JSON` prints, for each model of {id: prompt}, the tokens
of its reply, and how many of the prompt's tokens it computed.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.request import SamplingParams
from tests.engine.serving.tiny import tiny_tokenizer
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import VOCABULARY

MODELS = {configuration.id: configuration for configuration in CATALOGUE}
BLOCK = 16
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

_rng = random.Random(9)
FIRST = [_rng.randrange(1, VOCABULARY) for _ in range(150)]
NEXT = [_rng.randrange(1, VOCABULARY) for _ in range(20)]


def open_turn_engine(model: nn.Module, **settings: object) -> Engine:
    """Return an engine whose prefixes are kept in files only, if `kv_offload_dir` is given."""
    given: dict[str, object] = {
        "device": "cpu", "max_num_seqs": 2, "max_num_batched_tokens": 64, "self_test": False,
        "kv_offload_memory": 0,
    }  # fmt: skip
    loaded = LoadedModel(model, {"vocab_size": VOCABULARY}, tiny_tokenizer(), "zoo", 512, (), 0)
    return Engine(loaded, EngineConfig(**given | settings), model_id="zoo")  # type: ignore[arg-type]


def answer(engine: Engine, prompt: list[int], max_tokens: int = 6) -> tuple[list[int], int]:
    """Return the tokens of an answer, and how many of the prompt's tokens were computed."""
    (events,) = engine.generate([prompt], replace(GREEDY, max_tokens=max_tokens))
    usage = events[-1].usage
    assert usage is not None
    tokens = [token for event in events for token in event.token_ids]
    return tokens, len(prompt) - usage.cached_tokens


def main(directory: str, prompts: str) -> None:
    mx.disable_compile()  # g++ would compile the kernels one by one
    turns = {}
    for name, prompt in json.loads(prompts).items():
        engine = open_turn_engine(MODELS[name].build(), kv_offload_dir=f"{directory}/{name}")
        turns[name] = answer(engine, prompt)
        engine.close()
    print(json.dumps(turns))


if __name__ == "__main__":
    main(*sys.argv[1:])
