"""The address of this machine for containers, from the output of `docker`."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.deploy.local_server import DESKTOP, container_host
from modelpack.errors import ModelpackError


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake `docker` that prints the files of this directory."""
    program = tmp_path / "docker"
    program.write_text(
        f"""#!/bin/sh
case "$*" in
info*) cat {tmp_path}/system ;;
*Gateway*) cat {tmp_path}/gateways ;;
*bridge.name*) cat {tmp_path}/interface ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize(
    ("system", "gateways", "interface", "expected"),
    [
        ("Docker Desktop", "192.168.65.1", "docker0", DESKTOP),
        ("Debian GNU/Linux 12", "172.17.0.1", "docker0", "172.17.0.1"),
        ("Debian GNU/Linux 12", "fd00::1 10.0.0.1", "docker0", "10.0.0.1"),
        ("Debian GNU/Linux 12", "", "lo", "127.0.0.1"),
        ("Debian GNU/Linux 12", "<no value>", "lo", "127.0.0.1"),
    ],
)
def test_addresses(docker: Path, system: str, gateways: str, interface: str, expected: str) -> None:
    (docker / "system").write_text(system + "\n")
    (docker / "gateways").write_text(gateways + "\n")
    (docker / "interface").write_text(interface + "\n")
    assert container_host() == expected


@pytest.mark.parametrize("interface", ["", "no-such-0", "a-name-that-is-far-too-long", "a b/c"])
def test_no_address(docker: Path, interface: str) -> None:
    (docker / "system").write_text("Debian\n")
    (docker / "gateways").write_text("\n")
    (docker / "interface").write_text(interface + "\n")
    with pytest.raises(ModelpackError, match="no IPv4 gateway") as caught:
        container_host()
    assert "MODELPACK_ENDPOINT" in str(caught.value.hint)


def test_no_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelpackError, match="cannot run `docker info`"):
        container_host()


def test_no_engine(docker: Path) -> None:
    (docker / "docker").write_text("#!/bin/sh\necho 'no daemon is running' >&2\nexit 1\n")
    with pytest.raises(ModelpackError, match="no daemon is running"):
        container_host()
