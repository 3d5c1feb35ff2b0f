"""Commands that connect to a registry, and `registry serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack.registry_server import RegistryServer
from modelpack.testing import registry
from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf, tiny_safetensors
from tests.peers import free_port


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with registry() as running:
        yield running


@pytest.fixture
def pushed(server: RegistryServer, tmp_path: Path) -> tuple[str, str]:
    """Return the reference and digest of a model that is only in the registry."""
    reference = f"{server.host}/team/tiny:v1"
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "--push", reference).out
    succeed("rm", reference)
    return reference, digest


def test_package_push_pull(pushed: tuple[str, str]) -> None:
    reference, digest = pushed
    result = succeed("pull", reference)
    assert result.out == digest
    assert "2 blobs fetched" in result.err
    again = succeed("pull", "--json", reference).json
    assert again["bytesWritten"] == 0
    assert again["blobsExisted"] == 2


def test_push_says_what_was_there(pushed: tuple[str, str]) -> None:
    reference, digest = pushed
    succeed("pull", reference)
    result = succeed("push", reference)
    assert result.out == digest
    assert "0 blobs sent (0 B), 2 already there" in result.err


def test_several_models(server: RegistryServer, tmp_path: Path) -> None:
    first, second = f"{server.host}/team/first:v1", f"{server.host}/team/second:v1"
    digests = [succeed("package", "--gguf", tiny_gguf(tmp_path), first).out]
    directory = tiny_safetensors(tmp_path)
    digests.append(succeed("package", "--safetensors-dir", directory, second).out)
    assert succeed("push", first, second).out.splitlines() == digests
    succeed("rm", first, second)

    absent = f"{server.host}/team/absent:v1"
    result = modelpack("pull", first, absent, "not a name", second)
    assert result.code == 3
    assert result.out.splitlines() == digests
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "absent" in errors[0]
    assert "not a name" in errors[1]
    result = modelpack("push", "not a name", absent, second)
    assert (result.code, result.out) == (2, digests[1])

    models = succeed("pull", "--json", first, second).json["models"]
    assert [model["digest"] for model in models] == digests
    assert [model["reference"] for model in models] == [first, second]
    failed = modelpack("pull", "--json", absent, first)
    assert failed.code == 3
    missed, pulled = failed.json["models"]
    assert "absent" in missed["error"]
    assert pulled["digest"] == digests[0]
    assert json.loads(failed.err.splitlines()[-1])["error"]["exitCode"] == 3
    assert modelpack("push", first, second, "--to", absent).code == 2


def test_push_elsewhere(server: RegistryServer, tmp_path: Path) -> None:
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "tiny:v1").out
    target = f"{server.host}/other/name:v9"
    assert succeed("push", "tiny:v1", "--to", target).out == digest
    assert succeed("inspect", "-r", "--json", target).json["digest"] == digest


def test_a_target_without_to_is_refused_before_anything_is_pushed(
    server: RegistryServer, tmp_path: Path
) -> None:
    own, target = f"{server.host}/team/tiny:v1", f"{server.host}/other/name:v9"
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), own).out
    for name in (own, digest.removeprefix("sha256:")[:12]):
        refused = modelpack("push", name, target)
        assert (refused.code, refused.out) == (2, "")
        assert f"error: no such model: {target}; nothing was pushed" in refused.err
        assert f"modelpack push {name} --to {target}" in refused.err
        assert modelpack("inspect", "-r", own).code == 3
    missing = modelpack("push", own, "other")  # a model's name, which is not in the store
    assert (missing.code, missing.out) == (3, digest)
    succeed("tag", own, target)
    assert succeed("push", own, target).out.splitlines() == [digest, digest]


@pytest.mark.parametrize("command", ["pull", "push"])
def test_an_interrupted_transfer_says_how_to_go_on(
    command: str, pushed: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    succeed("pull", pushed[0])
    monkeypatch.setattr(f"modelpack.operations.{command}.transfer_model", interrupted)
    stopped = modelpack(command, pushed[0])
    assert stopped.code == 130
    assert stopped.err.endswith("interrupted\nhint: run the same command again to resume\n")
    assert "hint" not in modelpack(command, pushed[0], "--quiet").err


def test_a_registry_whose_port_is_in_use(tmp_path: Path) -> None:
    with registry() as server:
        address = server.host
        failed = modelpack("registry", "serve", "--store", tmp_path / "served", "--addr", address)
    assert failed.code == 2
    assert failed.err.startswith(f"error: cannot listen on {address}: Address already in use")


def test_a_model_that_is_neither_stored_nor_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    failed = modelpack("resolve", "--pull", "nope")
    assert failed.code == 6
    assert "error: nope is not in the store and cannot be pulled: docker.io/ai/nope" in failed.err


def test_an_id_is_pushed_only_with_to(server: RegistryServer, tmp_path: Path) -> None:
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "tiny:v1").out
    encoded = digest.removeprefix("sha256:")
    for name in (encoded[:6], encoded[:12], digest):
        refused = modelpack("push", name)
        assert refused.code == 2
        assert f"error: {name}: an id does not name a registry" in refused.err
        assert "--to" in refused.err
        assert "docker.io" not in refused.err
    target = f"{server.host}/other/name:v9"
    assert succeed("push", encoded[:6], "--to", target).out == digest


def test_a_name_that_looks_like_an_id_is_pushed(
    server: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpack.artifacts.reference.DEFAULT_REGISTRY", server.host)
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "deadbeef").out
    assert succeed("push", "deadbeef").out == digest
    assert succeed("inspect", "-r", "--json", f"{server.host}/ai/deadbeef").json["digest"] == digest


@pytest.mark.parametrize("verb", ["copy", "cp", "transfer"])
def test_copy_leaves_nothing_here(pushed: tuple[str, str], verb: str) -> None:
    reference, digest = pushed
    with registry() as other:
        target = f"{other.host}/prod/tiny:v1"
        assert succeed(verb, reference, target).out == digest
        assert succeed("inspect", "--remote", "--json", target).json["digest"] == digest
    assert succeed("list", "-q").out == ""


def test_copy_in_one_registry_mounts_or_finds(
    server: RegistryServer, pushed: tuple[str, str]
) -> None:
    reference, digest = pushed
    result = succeed("copy", "--json", reference, f"{server.host}/prod/tiny:v1").json
    assert result["digest"] == digest
    assert result["bytesWritten"] == 0


def test_remote_reading(pushed: tuple[str, str]) -> None:
    reference, digest = pushed
    assert f"Digest:       {digest}" in succeed("inspect", "-r", reference).out
    assert succeed("manifest", "-r", reference).stdout.startswith(b'{"schemaVersion":2')
    assert b'"format":"gguf"' in succeed("config", "--remote", reference).stdout
    assert modelpack("inspect", reference).code == 3


def test_resolve_and_bundle_pull_when_asked(pushed: tuple[str, str], tmp_path: Path) -> None:
    reference, _ = pushed
    assert modelpack("resolve", reference).code == 3
    assert Path(succeed("resolve", "--pull", reference).out).read_bytes()[:4] == b"GGUF"
    succeed("rm", reference)
    assert Path(succeed("bundle", "--pull", reference, tmp_path / "run").out).is_file()


def test_pull_by_digest(pushed: tuple[str, str]) -> None:
    reference, digest = pushed
    name = reference.rpartition(":")[0]
    assert succeed("pull", f"{name}@{digest}").out == digest
    assert succeed("inspect", "--json", digest).json["digest"] == digest
    assert succeed("pull", f"{reference}@{digest}").out == digest


def test_pull_with_a_wrong_digest(pushed: tuple[str, str]) -> None:
    reference, digest = pushed
    wrong = "sha256:" + "1" * 64
    result = modelpack("pull", f"{reference}@{wrong}")
    assert result.code == 5
    assert digest in result.err
    assert wrong in result.err


def test_package_from_a_remote_model(
    server: RegistryServer, pushed: tuple[str, str], tmp_path: Path
) -> None:
    reference, digest = pushed
    license_file = tmp_path / "LICENSE"
    license_file.write_text("MIT\n")
    target = f"{server.host}/team/licensed:v1"
    made = succeed(
        "package", "--from", reference, "--license", license_file, "--context-size", "99",
        "--push", target,
    ).out  # fmt: skip
    assert made != digest
    value = succeed("inspect", "-r", "--json", target).json
    assert value["digest"] == made
    assert value["config"]["contextSize"] == 99
    assert [file["role"] for file in value["files"]] == ["weight", "license"]


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_conversion_both_ways(kind: str, tmp_path: Path) -> None:
    if kind == "gguf":
        first = succeed("package", "--gguf", tiny_gguf(tmp_path), "m:docker").out
    else:
        first = succeed("package", "--safetensors-dir", tiny_safetensors(tmp_path), "m:docker").out
    cncf = succeed("package", "--from", "m:docker", "--format", "cncf", "m:cncf").out
    assert cncf != first
    assert "CNCF ModelPack" in succeed("inspect", "m:cncf").out
    succeed("package", "--from", "m:cncf", "--format", "docker", "m:back")
    assert "Docker v0." in succeed("inspect", "m:back").out
    # Without a format, the source's format is kept.
    assert succeed("package", "--from", "m:cncf", "m:same").out == cncf


def test_not_found_and_unreachable(server: RegistryServer) -> None:
    missing = modelpack("pull", f"{server.host}/nobody/nothing:v1")
    assert missing.code == 3
    assert f"{server.host}/nobody/nothing" in missing.err


def test_nobody_listens() -> None:
    result = modelpack("pull", f"127.0.0.1:{free_port()}/team/x:v1")
    assert result.code == 6
    assert "127.0.0.1" in result.err


def test_registry_serve_as_a_process(tmp_path: Path) -> None:
    root = tmp_path / "root"
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpack", "registry", "serve", "--host", "127.0.0.1",
         "--port", "0", "--root", root],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    host = process.stdout.readline().strip()
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "--push", f"{host}/team/tiny:v1").out
    # A pushed model can be run from that root at once.
    assert succeed("--store", root, "inspect", "--json", "team/tiny:v1").json["digest"] == digest
    assert Path(succeed("--store", root, "resolve", "team/tiny:v1").out).is_file()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "where",
    [["--addr", "0.0.0.0:0"], ["--host", "0.0.0.0"], ["--host", "::", "--port", "0"]],
    ids=["addr", "host", "IPv6"],
)
def test_serving_beyond_loopback_needs_a_word(tmp_path: Path, where: list[str]) -> None:
    result = modelpack("registry", "serve", *where, "--root", tmp_path / "root")
    assert result.code == 2
    assert "--allow-anonymous" in result.err or "allow_remote" in result.err


def test_docker_store_both_ways(tmp_path: Path) -> None:
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "team/tiny:v1").out
    docker = tmp_path / "docker"
    docker.mkdir()
    assert succeed("export", "--docker-store", docker, "team/tiny:v1").out == digest
    other = tmp_path / "other"
    assert succeed("--store", other, "import", "--docker-store", docker, "--all").out == digest
    assert succeed("--store", other, "inspect", "--json", "team/tiny:v1").json["digest"] == digest


def test_docker_store_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS_PATH", str(tmp_path / "models"))
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "team/tiny:v1").out
    succeed("export", "--docker-store", "team/tiny:v1")
    assert (tmp_path / "models" / "models.json").is_file()
    other = tmp_path / "other"
    assert succeed("--store", other, "import", "--docker-store", "team/tiny:v1").out == digest
