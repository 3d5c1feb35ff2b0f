"""How containers reach this machine.

On Linux at the address of Docker's bridge; Docker Desktop's reach its loopback addresses as
host.docker.internal.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import subprocess

from modelpack.errors import ModelpackError

DESKTOP = "host.docker.internal"
_QUESTION_SECONDS = 20
_SIOCGIFADDR = 0x8915  # netdevice(7)
_GATEWAYS = "{{range .IPAM.Config}}{{.Gateway}} {{end}}"
_INTERFACE = '{{index .Options "com.docker.network.bridge.name"}}'


def container_host() -> str:
    """Return the name or the address by which containers reach this machine; asks `docker`.

    Raises `ModelpackError` if it cannot be asked, or its bridge has no address.
    """
    if _docker("info", "--format", "{{.OperatingSystem}}") == "Docker Desktop":
        return DESKTOP
    found = _docker("network", "inspect", "bridge", "--format", _GATEWAYS)
    for address in found.split():
        if _is_ipv4(address):
            return address
    # An engine that made its bridge itself tells the gateway only after its next start.
    interface = _docker("network", "inspect", "bridge", "--format", _INTERFACE)
    if address := _address_of(interface):
        return address
    raise ModelpackError(
        f"Docker's bridge network has no IPv4 gateway (it says {found!r}), and its interface "
        f"{interface!r} no address",
        hint="say how containers reach the model server: "
        "MODELPACK_ENDPOINT=http://HOST:PORT/engines/v1/, and MODELPACK_HOST for this machine",
    )


def _address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface; empty where there is none."""
    request = struct.pack("256s", interface.encode()[:15])  # IFNAMSIZ, with the null
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        try:
            reply = fcntl.ioctl(opened.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return ""
    return socket.inet_ntoa(reply[20:24])


def _docker(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, timeout=_QUESTION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelpackError(
            f"`docker {arguments[0]}` cannot be run: {error}",
            hint="set MODELPACK_HOST and MODELPACK_ENDPOINT, and docker is not asked",
        ) from error
    if done.returncode != 0:
        raise ModelpackError(
            f"`docker {' '.join(arguments[:2])}` failed: {done.stderr.strip()[:300]}",
            hint="is the Docker engine running?",
        )
    return done.stdout.strip()


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
