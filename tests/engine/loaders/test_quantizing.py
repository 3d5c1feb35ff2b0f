"""`modelpack package --quantize`: mlx-lm quantises files, and the engine runs the result."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import quantize_model

import modelpack
from modelpack.errors import ModelpackError, UsageError
from modelpack.formats.config_json import mlx_bits
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.models import quantization as quantizing
from modelpack_engine.models.quantization import quantize_directory
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS

TINY = TINY_MODELS["llama"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    save(directory, TINY.build(), copy.deepcopy(TINY.config), shards=2)
    (directory / "LICENSE").write_text("MIT\n")
    (directory / "README.md").write_text("# Tiny\n")
    return directory


def packaged(source: Path, store: Path, quantize: str = "q4") -> str:
    return succeed(
        "package", "tiny/q:v1", "--safetensors-dir", source, "--quantize", quantize,
        "--store", store,
    ).out  # fmt: skip


@pytest.mark.parametrize(("quantize", "bits"), [("q4", 4), ("q8", 8)])
def test_the_engine_runs_what_mlx_lm_would_have_made(
    source: Path, tmp_path: Path, quantize: str, bits: int
) -> None:
    store = modelpack.Store(tmp_path / "store")
    assert len(packaged(source, store.root, quantize).splitlines()) == 1
    model = modelpack.inspect("tiny/q:v1", store=store)
    assert mlx_bits(model.config) == bits
    assert model.config.quantization == f"{bits}bit"
    plain = modelpack.PackageRequest(safetensors_dir=source)
    before = modelpack.package("x/y", plain, dry_run=True, store=store).config
    assert model.config.parameters == before.parameters
    assert {f.filepath for f in model.files()} == {
        "LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    loaded = load(ModelFiles.from_model(model, store.blob_path), device="cpu", dense=False)
    expected, _ = quantize_model(TINY.build(), copy.deepcopy(TINY.config), 64, bits)
    expected.set_dtype(mx.float32)
    np.testing.assert_allclose(
        TINY.logits(loaded.model), TINY.logits(expected), rtol=1e-4, atol=1e-4
    )


@pytest.mark.long
def test_two_processes_make_the_same_bytes(source: Path, tmp_path: Path) -> None:
    here = packaged(source, tmp_path / "one")
    again = subprocess.run(
        [sys.executable, "-m", "modelpack", "package", "tiny/q:v1", "--safetensors-dir", source,
         "--quantize", "q4", "--store", tmp_path / "two"],
        capture_output=True, text=True, check=True,
        # mlx-lm sets the variable if another test has imported it.
        env={k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"},
    )  # fmt: skip
    assert again.stdout.strip() == here
    # Nothing of mlx-lm or transformers: stdout is the digest, stderr our own lines.
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", again.stdout)
    words = [line.split()[0] for line in again.stderr.splitlines()]
    # A slow machine also reports progress.
    assert [word for word in words if word != "Quantising"] == [
        "tiny/q:v1",
        "quantised",
        "packaged",
    ]


def test_large_weights_are_sharded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "SHARD_BYTES", 30_000)
    target = tmp_path / "target"
    reports: list[tuple[int, int]] = []
    done = quantize_directory(
        source, target, bits=4, progress=lambda made, total: reports.append((made, total))
    )
    assert len(list(target.glob("*.safetensors"))) > 2
    assert reports == sorted(reports)
    [total] = {total for _, total in reports}
    assert len(reports) > 2
    assert reports[-1] == (total, total)
    assert total < done.after  # which counts the headers of the files too
    request = modelpack.PackageRequest(safetensors_dir=target)
    modelpack.package("x/y", request, dry_run=True, store=modelpack.Store(tmp_path / "store"))
    whole = load(ModelFiles.from_directory(target), device="cpu", dense=False)
    monkeypatch.undo()
    quantize_directory(source, tmp_path / "other", bits=4)
    other = load(ModelFiles.from_directory(tmp_path / "other"), device="cpu", dense=False)
    assert np.array_equal(TINY.logits(whole.model), TINY.logits(other.model))


def changed(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def narrow(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    config = copy.deepcopy(TINY.config) | {"hidden_size": 32, "intermediate_size": 32}
    import mlx_lm.models.llama as llama

    save(source, llama.Model(llama.ModelArgs.from_dict(config)), config, tokenizer=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: changed(d, quantization={"bits": 4, "group_size": 64}),
            "the model is quantised already",
        ),
        (
            lambda d: changed(d, quantization_config={"quant_method": "awq"}),
            "'quantization_config'",
        ),
        (lambda d: changed(d, model_type="nothing"), "'nothing' is not supported"),
        (lambda d: changed(d, model_file="evil.py"), "the code of models is never run"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: [p.unlink() for p in d.glob("*.safetensors")], "no weights"),
        (narrow, "no module is wide enough to be quantised in groups of 64"),
    ],
)
def test_what_cannot_be_quantised(
    source: Path, tmp_path: Path, change: Callable[[Path], Any], said: str
) -> None:
    change(source)
    with pytest.raises(ModelpackError) as caught:
        quantize_directory(source, tmp_path / "target", bits=4)
    assert said in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_only_four_and_eight_bits(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected 4 or 8"):
        quantize_directory(source, tmp_path / "target", bits=3)


@pytest.mark.parametrize(
    ("option", "said"),
    [("--gguf", "requires --safetensors-dir"), ("--safetensors-dir", "is not a directory")],
)
def test_only_directories(tmp_path: Path, option: str, said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    result = command("package", "x/y", option, path, "--quantize", "q4", "--store", tmp_path / "s")
    assert result.code == 2
    assert said in result.err
