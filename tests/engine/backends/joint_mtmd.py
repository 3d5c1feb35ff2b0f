"""The process of mtmd, as if the tokens of a picture attended to each other."""

import importlib
from typing import Any

from modelpack_engine.llama_cpp import mtmd


def main() -> None:
    bindings: Any = importlib.import_module("llama_cpp.mtmd_cpp")
    bindings.mtmd_decode_use_non_causal = lambda *_: True
    mtmd.main()
