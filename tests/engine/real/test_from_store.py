"""Safetensors packaged, stored and served from the store: mlx-lm's tokens, and no second copy."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import requests
from mlx_lm.utils import load_model, quantize_model, save_model

from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.request import SamplingParams
from modelpack_server import open_model
from tests.cli.running import succeed
from tests.engine.real.conftest import single
from tests.engine.real.export import CONFIG, add_tokenizer, save

pytestmark = pytest.mark.weights

NUM_TOKENS = 8
CHOSEN = (0, 3, 11)


def large_files(*roots: Path) -> dict[Path, int]:
    """Return the files of more than a megabyte below `roots`, with their sizes."""
    found = {}
    for root in roots:
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size > 1_000_000:
                found[path] = path.stat().st_size
    return found


def stored(name: str, directory: Path, store: Path) -> None:
    """Package `directory`, and drop it: what is served lies in the store alone."""
    succeed("package", "--safetensors-dir", directory, "--store", store, name)
    shutil.rmtree(directory)


@pytest.mark.long
def test_plain(
    engine: Engine,
    prompts: list[list[int]],
    export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16, as most models come; the reference computes in float32, as the engine does."""
    directory, store, scratch = (tmp_path / name for name in ("plain", "store", "scratch"))
    directory.mkdir()
    scratch.mkdir()
    weights: Any = mx.load(str(export / "model.safetensors"))
    save(directory, {name: w.astype(mx.bfloat16) for name, w in weights.items()}, CONFIG)
    reference, _ = load_model(add_tokenizer(directory, engine.tokenizer))
    reference.set_dtype(mx.float32)
    expected = [single(reference, prompts[at], NUM_TOKENS) for at in CHOSEN]
    del reference, weights
    stored("real/plain:v1", directory, store)
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = large_files(tmp_path, Path(os.environ["HOME"]))
    opened = open_model("real/plain:v1", store=LayoutStore(store), pull=False)
    assert {path.parent for path in opened.files.weights} == {store / "blobs" / "sha256"}
    assert set(opened.files.weights) <= set(before)
    served = opened.engine(EngineConfig(device="cpu", max_num_seqs=4, max_model_len=256))
    assert large_files(tmp_path, Path(os.environ["HOME"])) == before
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
    answers = served.generate([prompts[at] for at in CHOSEN], params)
    assert [[t for e in events for t in e.token_ids] for events in answers] == expected
    assert large_files(tmp_path, Path(os.environ["HOME"])) == before


@pytest.mark.long
def test_four_bits_over_http(
    engine: Engine, prompts: list[list[int]], export: Path, tmp_path: Path
) -> None:
    """Quantised by mlx-lm, answered by `modelpack serve`, a process with a home of its own."""
    directory, store = tmp_path / "packed", tmp_path / "store"
    directory.mkdir()
    model, _ = load_model(export)
    model, config = quantize_model(model, copy.deepcopy(CONFIG), group_size=64, bits=4)
    save_model(directory, model)
    save(tmp_path, {"unused": mx.zeros(1)}, config)
    (tmp_path / "config.json").rename(directory / "config.json")
    expected = [single(model, prompts[at], NUM_TOKENS) for at in CHOSEN]
    del model
    stored("real/packed:v1", add_tokenizer(directory, engine.tokenizer), store)
    before = large_files(tmp_path)
    with serving("real/packed:v1", store, tmp_path) as (url, process):
        for at, tokens in zip(CHOSEN, expected, strict=True):
            body = {"model": "real/packed:v1", "prompt": prompts[at], "temperature": 0}
            answer = requests.post(
                f"{url}/v1/completions", json=body | {"max_tokens": NUM_TOKENS}, timeout=120
            ).json()
            text = engine.tokenizer.decode(tokens)
            assert answer["choices"][0]["text"].strip() == text.strip()
            assert answer["usage"]["completion_tokens"] == len(tokens)
        assert large_files(tmp_path) == before
        assert open_large_files(process.pid) <= set(before)


@contextmanager
def serving(name: str, store: Path, home: Path) -> Iterator[tuple[str, Any]]:
    """Run `modelpack serve` with HOME and TMPDIR below `home`; yield its URL once it is ready."""
    (home / "tmp").mkdir()
    environment = {
        **os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"),
        "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-m", "modelpack", "serve", name, "--port", "0"]
    command += ["--store", str(store), "--device", "cpu", "--max-num-seqs", "4"]
    command += ["--max-model-len", "256"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        ready = requests.Session()
        retry = requests.adapters.Retry(total=None, status=200, status_forcelist=[503],
                                        backoff_factor=0.1, backoff_max=0.2)  # fmt: skip
        ready.mount(url, requests.adapters.HTTPAdapter(max_retries=retry))
        assert ready.get(f"{url}/health", timeout=60).status_code == 200
        yield url, process
    finally:
        process.terminate()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def open_large_files(pid: int) -> set[Path]:
    """Return what a process of Linux has open or mapped, deleted files included, if it is large."""
    found = set()
    for link in (*Path(f"/proc/{pid}/fd").iterdir(), *Path(f"/proc/{pid}/map_files").iterdir()):
        try:
            path, size = Path(os.readlink(link)), link.stat().st_size
        except OSError:
            continue
        library = ".so" in path.name or "python" in path.name or "locale" in path.name
        if path.is_absolute() and size > 1_000_000 and not library:
            found.add(path)
    return found
