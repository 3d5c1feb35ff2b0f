"""`python -m tests.docs.network SETTINGS`: the registries of a world, on port 443, and the hub.

It runs in the network namespace of a page, where these addresses are nobody else's. A line on
stdout, the address of the hub, says that all of them listen; they do until the process is killed.
"""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import struct
import sys
from contextlib import ExitStack
from pathlib import Path

from modelpack.registry_server import RegistryServer
from tests.docs.world import REGISTRIES
from tests.hub.hub import FakeHub


def bring_loopback_up() -> None:
    """As `ip link set lo up` does, which not every machine has: netdevice(7)."""
    get_flags, set_flags, up = 0x8913, 0x8914, 1
    with socket.socket() as any_socket:
        request = struct.pack("16sh", b"lo", 0).ljust(40, b"\0")
        _, flags = struct.unpack("16sh", fcntl.ioctl(any_socket, get_flags, request)[:18])
        request = struct.pack("16sh", b"lo", flags | up).ljust(40, b"\0")
        fcntl.ioctl(any_socket, set_flags, request)


def main() -> None:
    bring_loopback_up()
    settings = json.loads(Path(sys.argv[1]).read_text())
    registries, tls = Path(settings["registries"]), Path(settings["tls"])
    with ExitStack() as stack:
        for i, host in enumerate(REGISTRIES, start=2):
            server = RegistryServer(
                registries / host,
                address=f"127.0.0.{i}:443",
                tls=(tls / f"{host}.crt", tls / f"{host}.key"),
                allowed_hosts=(host,),
            )
            stack.enter_context(server)
        hub = stack.enter_context(FakeHub())
        for repository, files in settings["hub"].items():
            hub.put(repository, {name: Path(path).read_bytes() for name, path in files.items()})
        print(hub.url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
