"""Start ranks of `rank_process`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from modelpack_engine.distributed.launch import Outcome, launch

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def command(what: str, size: int, out: Path, *args: str) -> list[str]:
    module = "tests.engine.parallel.rank_process"
    return [sys.executable, "-m", module, what, str(size), str(out), *args]


def run_ranks(
    what: str, size: int, out: Path, *args: str, **environment: str
) -> tuple[Outcome, Any]:
    """Run a task on `size` ranks; return how they ended, and what rank 0 wrote."""
    outcome = launch(
        command(what, size, out, *args),
        size,
        backend="ring",
        environ=ENVIRONMENT | environment,
        deadline=240,
    )
    return outcome, json.loads(out.read_text()) if out.exists() else None
