"""A process that runs one turn of a conversation with tiny models, and keeps their prefixes.

`python -m tests.engine.offload.turns DIR JSON` prints, for each model of {id: prompt}, the tokens
of its reply, and how many of the prompt's tokens it computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def open_turn_engine(model: nn.Module, directory: Path, **settings: object) -> Engine:
    """Return an engine that keeps its prefixes in files."""
    given: dict[str, object] = {
        "device": "cpu", "max_num_seqs": 2, "max_num_batched_tokens": 64, "self_test": False,
        "kv_offload_memory": 0, "kv_offload_dir": str(directory),
    }  # fmt: skip
    loaded = LoadedModel(model, {"vocab_size": VOCABULARY}, tiny_tokenizer(), "zoo", 512, (), 0)
    return Engine(loaded, EngineConfig(**given | settings), model_id="zoo")  # type: ignore[arg-type]


def answer(engine: Engine, prompt: list[int], max_tokens: int = 6) -> tuple[list[int], int]:
    """Return the tokens of an answer, and how many of the prompt's tokens were computed."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    (events,) = engine.generate([prompt], params)
    usage = events[-1].usage
    assert usage is not None
    tokens = [token for event in events for token in event.token_ids]
    return tokens, len(prompt) - usage.cached_tokens


def main(directory: str, prompts: str) -> None:
    mx.disable_compile()  # g++ would compile the kernels one by one
    turns = {}
    for name, prompt in json.loads(prompts).items():
        engine = open_turn_engine(MODELS[name].build(), Path(directory) / name)
        turns[name] = answer(engine, prompt)
        engine.close()
        engine._runner.undo()
    print(json.dumps(turns))


if __name__ == "__main__":
    main(*sys.argv[1:])
