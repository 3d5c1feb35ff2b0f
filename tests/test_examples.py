"""Each example runs, and does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelpack
from modelpack.testing import registry
from tests.adapters import write_peft
from tests.engine.adapters.test_zoo import linears
from tests.engine.serving.tiny import tiny_model, write_tiny
from tests.models import tiny_gguf, tiny_safetensors

EXAMPLES = Path(__file__).parent.parent / "examples"
COVERED = {"package_and_push.py", "resolve_by_media_type.py", "ci_pipeline.py", "lora_adapters.py"}


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


def test_lora_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPACK_STORE", str(tmp_path / "store"))
    request = modelpack.PackageRequest(safetensors_dir=write_tiny(tmp_path / "files"))
    modelpack.package("team/tiny:v1", request)
    targets = linears(tiny_model())
    paths = [
        write_peft(tmp_path / name, targets, seed=seed, size=0.3)
        for seed, name in enumerate(("support", "legal"))
    ]
    output = run_example("lora_adapters.py", "team/tiny:v1", "My printer", *map(str, paths))
    texts = dict(line.split(": ", 1) for line in output.splitlines())
    assert texts.keys() == {"the base", "support", "legal"}
    assert len(set(texts.values())) == 3
