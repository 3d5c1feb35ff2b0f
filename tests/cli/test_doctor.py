"""`modelpack doctor`: the problems that it finds."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_engine.cpu.library import library
from modelpack_server.cli.doctor import (
    Verdict,
    check_kernels,
    check_model,
    check_port,
    check_registry,
    check_store,
)
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.models import tiny_gguf, tiny_safetensors


@pytest.fixture
def store(tmp_path: Path) -> LayoutStore:
    made = LayoutStore(tmp_path / "store")
    modelpack.package("team/tiny", modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)), store=made)
    return made


def checks(value: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in value["checks"]}


def test_a_machine_that_is_well(store: LayoutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpack_engine.llama_cpp.library.is_installed", lambda: True)
    with registry() as server:
        host = server.host
        value = succeed(
            "doctor", "team/tiny", "--registry", host, "--store", store.root, "--json"
        ).json
    found = checks(value)
    assert found["store"]["details"]["models"] == 1
    assert found[f"registry {host}"]["verdict"] == "ok"
    assert {"port 12434", "port 12435", "port 5000", "backend mlx", "backend vllm"} <= set(found)
    device = found["device"]["details"]["device"]
    chosen = "llama.cpp" if device == "cpu" else "mlx"
    assert found["gguf files"]["details"] == {
        "format": "gguf", "backend": chosen, "device": device
    }  # fmt: skip
    assert found["safetensors files"]["details"]["backend"] == "mlx"
    of_model = "cpu kernels" if device == "cpu" and library() is not None else chosen
    assert found["model docker.io/team/tiny:latest"]["details"]["backend"] == of_model
    assert found["memory"]["details"]["available"] > 0


class Library:
    """The library for CPUs, as far as doctor asks it."""

    def mp_kernels(self) -> bytes:
        return b"avx2"


def test_kernels_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpack_engine.platform.device.usable_cores", lambda: 3)
    monkeypatch.setattr("modelpack_engine.cpu.library.library", Library)
    check = check_kernels("cpu")
    assert (check.verdict, check.message) == (Verdict.OK, "avx2, 3 threads")
    assert check.details == {"kernels": "avx2", "threads": 3}


@pytest.mark.parametrize(("device", "verdict"), [("cpu", Verdict.WARNING), ("gpu", Verdict.OK)])
def test_kernels_for_cpus_that_are_not_built(
    device: Literal["cpu", "gpu"], verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpack_engine.cpu.library.library", lambda: None)
    check = check_kernels(device)
    assert (check.verdict, "not built" in check.message) == (verdict, True)
    assert check.hint == "install g++, then install modelpack again from its source"


def test_what_has_failed_is_the_exit_code(store: LayoutStore) -> None:
    result = run("doctor", "team/none", "--offline", "--store", store.root)
    assert result.code == 1
    [line] = [line for line in result.out.splitlines() if "team/none" in line]
    assert line.startswith("failed")
    assert "registry" not in result.out.replace("(registry serve)", "")


def test_without_an_engine_the_rest_is_checked(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = "modelpack_server.cli.engine_options.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    value = succeed("doctor", "--offline", "--store", store.root, "--json").json
    assert checks(value)["engine"]["hint"] == "run pip install 'modelpack[engine]'"
    assert {"store", "backend vllm"} <= checks(value).keys()
    assert run("doctor", "team/tiny", "--offline", "--store", store.root).code == 1


def test_a_model_that_has_no_room_or_no_backend(store: LayoutStore, tmp_path: Path) -> None:
    model = modelpack.inspect("team/tiny", store=store)
    assert check_model(model, "cpu", 2**32).verdict is Verdict.OK
    large = check_model(model, "cpu", 2**20)
    assert large.verdict is Verdict.FAILED
    assert large.hint is not None
    layers = tuple(layer for layer in model.manifest.layers if "gguf" not in layer.media_type)
    bare = replace(model, manifest=replace(model.manifest, layers=layers))
    assert "no backend for" in check_model(bare, "cpu", 2**32).message


def test_safetensors_are_for_mlx(store: LayoutStore, tmp_path: Path) -> None:
    request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
    modelpack.package("team/st", request, store=store)
    check = check_model(modelpack.inspect("team/st", store=store), "cpu", 2**32)
    assert check.details is not None
    assert check.details["backend"] == "mlx"


def test_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "will be created" in check_store(str(tmp_path / "new")).message
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    assert check_store(str(tmp_path / "file")).verdict is Verdict.FAILED
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").touch()
    assert check_store(str(other)).verdict is Verdict.FAILED
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "not writable" in check_store(str(tmp_path / "new")).message


def test_a_full_disk_is_a_warning(store: LayoutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.statvfs(store.root)
    small = os.statvfs_result((*whole[:4], 1000, *whole[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    check = check_store(str(store.root))
    assert (check.verdict, check.hint) == (
        Verdict.WARNING, "run `modelpack gc` to delete unused blobs"
    )  # fmt: skip


def test_registries() -> None:
    with registry() as server:
        assert check_registry(server.host).verdict is Verdict.OK
        host = server.host
    gone = check_registry(host)
    assert gone.verdict is Verdict.WARNING
    assert "refused" in gone.message


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert check_port(port, "serve").verdict is Verdict.WARNING
    assert check_port(port, "serve").verdict is Verdict.OK
    assert "cannot listen" in check_port(80, "serve", "203.0.113.1").message
