"""The modules of `core` work on plain integers: they import no array library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MODULES = ("sequence", "block_manager", "buckets", "scheduler", "batch")


@pytest.mark.parametrize("module", MODULES)
def test_no_array_library_is_loaded(module: str) -> None:
    code = (
        f"import modelpack_engine.core.{module}, sys;"
        " print(*{m.split('.')[0] for m in sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert "modelpack_engine" in loaded
    assert not {"mlx", "mlx_lm", "numpy", "gguf", "tokenizers"} & set(loaded)
