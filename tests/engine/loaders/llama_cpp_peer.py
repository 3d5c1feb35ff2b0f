"""llama.cpp as a peer: `golden/oracle.py` run by a Python that has llama-cpp-python.

That is this Python, or the one that MODELPACK_LLAMA_CPP_PYTHON names: llama-cpp-python compiles for
ten minutes, so it may be installed in a separate environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.engine.loaders.vocabularies import GOLDEN
from tests.peers import missing


def python_with_llama_cpp() -> str | None:
    """Return a Python that can import llama_cpp, or None."""
    named = os.environ.get("MODELPACK_LLAMA_CPP_PYTHON")
    if named:
        return named
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


def ask(tasks: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """Return the answers to `tasks`; skip the test without llama-cpp-python."""
    python = python_with_llama_cpp()
    if python is None:
        missing("llama-cpp-python is not installed (see MODELPACK_LLAMA_CPP_PYTHON)")
    assert python is not None
    job, answers = directory / "job.json", directory / "answers.json"
    job.write_text(json.dumps(tasks))
    subprocess.run([python, str(GOLDEN / "oracle.py"), str(job), str(answers)], check=True)
    found: list[dict[str, Any]] = json.loads(answers.read_text())
    return found
