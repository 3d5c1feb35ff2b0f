"""Each example runs, and does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelpack
from modelpack.testing import registry
from tests.models import tiny_gguf, tiny_safetensors

EXAMPLES = Path(__file__).parent.parent / "examples"
COVERED = {"package_and_push.py", "resolve_by_media_type.py", "ci_pipeline.py"}


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == COVERED


def test_package_push_and_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    license_file = tmp_path / "LICENSE"
    license_file.write_text("MIT\n")
    gguf = tiny_gguf(tmp_path)
    with registry() as server:
        reference = f"{server.host}/team/tiny:v1"
        digest = run_example("package_and_push.py", str(gguf), str(license_file), reference)
        assert str(modelpack.inspect(reference, from_registry=True).digest) == digest.strip()

        monkeypatch.setenv("MODELPACK_STORE", str(tmp_path / "another-store"))
        output = run_example("resolve_by_media_type.py", reference)
    assert "first bytes of the weight: b'GGUF'" in output
    assert "LICENSE" in output


def test_ci_pipeline(tmp_path: Path) -> None:
    directory = tiny_safetensors(tmp_path)
    with registry() as server:
        staging, production = f"{server.host}/staging/m:v1", f"{server.host}/prod/m:v1"
        digest = run_example("ci_pipeline.py", str(directory), staging, production).strip()
        assert str(modelpack.inspect(production, from_registry=True).digest) == digest
