"""What `run` and `serve` take for MODEL: files, and the last path element of a stored name."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import requests

import modelpack
from modelpack.cli.options import Settings
from modelpack.errors import AmbiguousError, NotFoundError, UsageError
from modelpack.operations.package import PackageRequest
from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore
from modelpack_server.cli.model_sources import ModelSources, add_file, path_in, stored_name
from modelpack_server.pool.file_store import FileStore
from tests.cli.running import modelpack as run
from tests.engine.serving.test_api import wait_until_ready
from tests.engine.serving.tiny import write_tiny
from tests.models import tiny_gguf
from tests.peers import free_port

SMALL = ("--device", "cpu", "--kv-cache-bytes", "2000000")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> LayoutStore:
    """A store with assistants of three teams; two of them are the same model."""
    root = tmp_path_factory.mktemp("shelf")
    made = LayoutStore(root / "store")
    request = PackageRequest(gguf=tiny_gguf(root))
    other = PackageRequest(gguf=request.gguf, context_size=7)
    for name in ("team/assistant:v1", "reg.example/deep/path/assistant:v1", "team/writer"):
        modelpack.package(name, request, store=made)
    for name in ("other/writer:v2", "ai/coder:v3"):
        modelpack.package(name, other, store=made)
    return made


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("assistant", "reg.example/deep/path/assistant:v1"),  # the same model as team/assistant
        ("assistant:v1", "reg.example/deep/path/assistant:v1"),
        ("assistant:v9", "assistant:v9"),
        ("writer:v2", "other/writer:v2"),
        ("coder", "coder:v3"),
        ("team/writer", "team/writer"),
        ("deep/path/assistant", "deep/path/assistant"),
        ("unknown", "unknown"),
        ("Not A Name", "Not A Name"),
    ],
)
def test_the_last_element_of_a_stored_name(shelf: LayoutStore, typed: str, name: str) -> None:
    assert stored_name(shelf, typed) == name


def test_several_models_of_a_name_are_listed(shelf: LayoutStore) -> None:
    with pytest.raises(AmbiguousError, match=r"several names: other/writer:v2, team/writer$"):
        stored_name(shelf, "writer")


def test_no_registry_is_asked_for_a_stored_last_element(shelf: LayoutStore) -> None:
    result = run("serve", "writer", "--store", shelf.root, "--port", "0", *SMALL)
    assert result.code == AmbiguousError.exit_code
    assert "hint: write one of them" in result.err


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ai").mkdir()
    (tmp_path / "ai" / "smollm2").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"")
    assert path_in("./ai/smollm2") == Path("ai/smollm2")
    assert path_in(".") == Path()
    assert path_in(str(tmp_path)) == tmp_path
    assert path_in("m.gguf") == Path("m.gguf")
    assert path_in("ai/smollm2") is None  # a name, whatever directories there are
    assert path_in("n.gguf") is None
    with pytest.raises(NotFoundError, match=r"no such file or directory: \./n\.gguf"):
        path_in("./n.gguf")


def test_a_directory_without_its_dot(
    shelf: LayoutStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "weights")
    monkeypatch.setenv("DEFAULT_REGISTRY", f"localhost:{free_port()}")
    for typed, hint in (("weights", "if you mean the files, write ./weights"), ("else", "check")):
        failed = run("serve", typed, "--port", "0", "--store", shelf.root, *SMALL)
        assert failed.code == 6
        assert f"hint: {hint}" in failed.err


def test_files_are_read_where_they_are(tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path)
    files = FileStore(tmp_path / "store")
    assert add_file(files, gguf).familiar == gguf.stem.lower()
    [model] = files.models()
    assert files.missing(model.descriptor) == ()
    held = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert held < gguf.stat().st_size + 8192
    assert gguf.name not in [path.name for path in (tmp_path / "store").rglob("*")]
    with pytest.raises(UsageError, match="is not a model"):
        add_file(files, Path(__file__))
    with pytest.raises(UsageError, match=r"a\.dduf is a DDUF file, a model that generates images"):
        add_file(files, tmp_path / "a.dduf")


def test_run_a_directory(
    store: LayoutStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "My Model", temperature=0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    arguments = ("hello", "--json", "--max-tokens", "4", "--store", store.root, *SMALL)
    found = run("run", tmp_path / "My Model", *arguments)
    assert found.code == 0, found.err
    assert found.json["text"] == run("run", "tiny", *arguments).json["text"]
    assert len(store.models()) == 2  # it was not packaged into the store


def test_two_files_of_one_name(store: LayoutStore, tmp_path: Path) -> None:
    for name, temperature in (("a", 0.5), ("b", 1.0)):
        (tmp_path / name).mkdir()
        write_tiny(tmp_path / name / "m", temperature=temperature)
    paths = [str(tmp_path / name / "m") for name in "ab"]
    result = run("serve", *paths, "--store", store.root, "--port", "0", *SMALL)
    assert (result.code, "two files have the same name" in result.err) == (2, True)


def test_names_need_no_temporary_directory(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's root may be read-only."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    sources = ModelSources(Settings(store_root=str(store.root)), RemoteOptions())
    with sources:
        assert sources.open("tiny").name == "team/tiny"


@pytest.mark.long
def test_serve_a_file_and_a_short_name(store: LayoutStore, tmp_path: Path) -> None:
    from modelpack.testing.weights import smollm2_gguf

    link = tmp_path / "Small.Q4.gguf"
    link.symlink_to(smollm2_gguf())
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpack", "serve", str(link), "tiny", "--port", "0",
         "--store", str(store.root), "--device", "cpu", "--kv-cache-bytes", "30000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    wait_until_ready(url)
    names = [model["id"] for model in requests.get(f"{url}/v1/models", timeout=10).json()["data"]]
    [served] = [name for name in names if name == "small-q4"]
    for name in (served, "tiny", "team/tiny"):
        body = {"model": name, "prompt": "hello", "max_tokens": 2}
        assert requests.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0
