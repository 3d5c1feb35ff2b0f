"""The configuration of docker-registry that the documentation gives: models move there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import modelpack
from modelpack.errors import AuthError
from modelpack.operations.remote import RemoteOptions
from modelpack.registry import Credential, StaticCredentials, TlsOptions
from modelpack.testing import registry
from tests.models import tiny_gguf
from tests.peers import free_port, require, wait_for_port
from tests.registry.auth_servers import HTPASSWD, PASSWORD, USER, make_pair

DOCUMENT = Path(__file__).parents[2] / "docs" / "registries.md"


@pytest.mark.peer("docker-registry")
def test_models_move_to_docker_registry(tmp_path: Path) -> None:
    [config] = re.findall(r"```yaml\n(version: 0\.1.*?)```", DOCUMENT.read_text(), re.DOTALL)
    authority = make_pair(tmp_path, "authority")
    pair = make_pair(tmp_path, "server", authority)
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    port = free_port()
    for documented, here in {
        "/var/lib/docker-registry": str(tmp_path / "data"),
        "/etc/docker/registry/server.crt": str(pair.certificate),
        "/etc/docker/registry/server.key": str(pair.key),
        "/etc/docker/registry/htpasswd": str(tmp_path / "htpasswd"),
        "0.0.0.0:5000": f"127.0.0.1:{port}",
    }.items():
        assert documented in config
        config = config.replace(documented, here)
    (tmp_path / "config.yml").write_text(config)
    words = [require("docker-registry"), "serve", tmp_path / "config.yml"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        wait_for_port(port, process)
        _move(f"127.0.0.1:{port}", authority.certificate, tmp_path)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _move(host: str, authority: Path, work: Path) -> None:
    there = f"{host}/team/tiny:v1"
    credentials = StaticCredentials({host: Credential(USER, PASSWORD)})
    tls = TlsOptions(ca_file=authority)
    with registry(work / "embedded") as embedded:
        here = f"{embedded.host}/team/tiny:v1"
        request = modelpack.PackageRequest(gguf=tiny_gguf(work))
        made = modelpack.package(here, request, push=True, store=modelpack.Store(work / "origin"))
        store = modelpack.Store(work / "store")
        modelpack.pull(here, store=store)
    store.tag(here, modelpack.Reference.parse(there))
    https = RemoteOptions(plain_http=False, credentials=credentials, tls=tls)
    stranger = RemoteOptions(plain_http=False, credentials=StaticCredentials({}), tls=tls)
    with pytest.raises(AuthError):
        modelpack.push(there, store=store, remote=stranger)
    modelpack.push(there, store=store, remote=https)
    back = modelpack.Store(work / "back")
    assert modelpack.pull(there, store=back, remote=https).digest == made.digest
