"""try_out: load a GGUF model in a process of its own first, which llama.cpp may abort.

llama.cpp ends its process (GGML_ASSERT) for some metadata that a file may hold: a server's other
models and requests would go with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.models.load_budget import LOAD_SECONDS
from modelpack_engine.worker.process import worker_environment

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from modelpack_engine.llama_cpp.trial import main; main(sys.argv[2:])"
)
_CELLS, _SLOTS = 256, 2


def try_out(weights: Sequence[Path]) -> None:
    """Raise `ModelLoadError` if llama.cpp ends its process while it loads or runs the model.

    What it refuses in an orderly way passes: the caller meets it again.
    """
    command = [sys.executable, "-I", "-c", _PROGRAM, json.dumps([p for p in sys.path if p])]
    # No debugger is to be started to print where it was.
    environment = worker_environment() | {"GGML_NO_BACKTRACE": "1"}
    try:
        ended = subprocess.run(
            [*command, *map(os.fspath, weights)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=LOAD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelLoadError(f"{weights[0].name} cannot be tried out: {error}") from error
    if ended.returncode:
        raise ModelLoadError(
            f"llama.cpp ended its process when it tried {weights[0].name} out"
            f" (exit status {ended.returncode})",
            hint="its metadata may be damaged: --backend mlx says what is wrong",
        )


def main(arguments: Sequence[str]) -> None:
    """Load the files and compute two tokens."""
    import resource

    from modelpack_engine.llama_cpp.model import Context, LlamaModel

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        model = LlamaModel([Path(argument) for argument in arguments], repack=False)
        context = Context(model, num_cells=_CELLS, num_slots=_SLOTS, max_rows=_SLOTS)
        context.compute([0, 0], [0, 1], [0, 0], [1])
        context.close()
    except EngineError:
        return  # ModelLoadError too: raised again where it can be told
