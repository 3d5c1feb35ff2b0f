"""Compare the text of a stored model with its text under LoRA adapters, in one batch.

python examples/lora_adapters.py team/model:v1 "My printer" ./support ./legal
"""

from __future__ import annotations

import sys
from pathlib import Path

from modelpack.formats.adapter import read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server import open_model


def main(model: str, text: str, directories: list[Path]) -> None:
    engine = open_model(model).engine(EngineConfig(max_loras=len(directories)))
    prompt, params = engine.tokenizer.encode(text), SamplingParams(temperature=0.0, max_tokens=16)
    engine.add_request("the base", EngineRequest(prompt, params))
    for directory in directories:
        name = directory.name
        # The last argument stands for the content in the prefix cache.
        engine.add_adapter(name, read_adapter(directory), str(directory.resolve()))
        engine.add_request(name, EngineRequest(prompt, params, adapter=name))
    texts: dict[str, str] = {}
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] = texts.get(event.request_id, "") + event.text
    for name, generated in texts.items():
        print(f"{name}: {generated!r}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [Path(path) for path in sys.argv[3:]])
