"""Benchmarks that need neither a GPU nor a peer still run, here in their smallest sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.models import ModelFiles
from modelpack_engine.models.loader import gguf_tokenizer_of
from tests.engine.real.export import CONFIG, add_tokenizer, save, write_export

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.long


def benchmark(name: str, *args: str) -> list[str]:
    """Return the lines that a benchmark prints."""
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'engine'}"}
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *args],
        cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def test_the_hosts_part_of_a_step_is_measured() -> None:
    found = json.loads(benchmark("host.py", "--rounds", "1", "--workloads", "load-m-32")[-1])
    assert found["steps"] > 100
    assert found["build"] > 0


def test_a_head_is_trained_further_and_measured(tmp_path: Path) -> None:
    small = ("--generation", "60", "--prompts", "16", "--tokens", "16", "--length", "96")
    steps = ("--steps", "1", "--batch", "4", "--held", "4", "--unrolled", "2")
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    size = ("--vocabulary", "300", "--width", "2048")
    assert benchmark("eagle.py", "train", first, *small, *steps, *size)[-1].startswith("1 steps")
    benchmark("eagle.py", "train", second, *small, *steps, "--start", first)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (config["draft_vocab_size"], config["intermediate_size"]) == (300, 2048)
    lines = benchmark(
        "eagle.py", "measure", second, "--rounds", "1", "--tokens", "8", "--num-tokens", "3",
        "--workloads", "chat",
    )  # fmt: skip
    rows = [line.split(" | ")[2] for line in lines if line.startswith("| chat")]
    assert rows == ["none", "ngram", "eagle3, 3"]


@pytest.mark.weights
def test_log_probabilities_in_bfloat16_are_nearer_to_float32_than_mlx_lms(tmp_path: Path) -> None:
    weights = mx.load(str(write_export(tmp_path) / "model.safetensors"))
    assert isinstance(weights, dict)
    save(tmp_path, {name: array.astype(mx.bfloat16) for name, array in weights.items()}, CONFIG)
    add_tokenizer(tmp_path, gguf_tokenizer_of(ModelFiles.from_directory(smollm2_gguf())))
    lines = benchmark("log_probabilities.py", str(tmp_path), "--tokens", "24", "--answer", "3")
    ours, theirs = map(json.loads, lines[:2])
    assert (ours["engine"], theirs["engine"]) == ("modelpack", "mlx-lm")
    for part, positions in (("prompts", 3 * 23), ("answers", 3 * 3)):
        assert ours[part]["positions"] == theirs[part]["positions"] == positions
        assert ours[part]["mean_error"] < theirs[part]["mean_error"]
        assert theirs[part]["mean_error"] > 0.001  # mlx-lm does compute in bfloat16
