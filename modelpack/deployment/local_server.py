"""The model server of this machine that containers can reach: found, or started.

Containers on Linux reach the host at the gateway of Docker's bridge; Docker Desktop's reach its
loopback addresses as host.docker.internal.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from modelpack.deployment.docker_bridge import DESKTOP, container_host
from modelpack.deployment.runner_client import RunnerClient
from modelpack.errors import RemoteUnavailableError
from modelpack.hosts import is_loopback

PORT = 12434
#: What stands before the OpenAI API for Docker Model Runner's clients.
_API = "/engines/v1/"
_PID = "serve.pid"


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A server as this machine reaches it (`client`), and its OpenAI API as containers do."""

    client: RunnerClient
    endpoint: str


def local_server(environment: Mapping[str, str] = os.environ) -> LocalServer:
    """Return the server that Compose's containers are to use; start one where there is none.

    `MODELPACK_HOST` says where it is, and then none is started; `MODELPACK_API_KEY` is its key;
    `MODELPACK_ENDPOINT` is how containers reach it, where that cannot be found out. Raises
    `RemoteUnavailableError` where none answers, or where containers could not reach the one that
    does.
    """
    key = environment.get("MODELPACK_API_KEY")
    given = environment.get("MODELPACK_HOST")
    endpoint = environment.get("MODELPACK_ENDPOINT")
    if given:
        client = RunnerClient(given, key)
        if not client.answers():
            raise RemoteUnavailableError(
                f"no model server answers at {client.url} (MODELPACK_HOST)",
                hint="start it with `modelpack serve`, or unset MODELPACK_HOST",
            )
        return LocalServer(client, endpoint or _endpoint_of(client.url))
    address = container_host()
    host = "127.0.0.1" if address == DESKTOP else address
    client = RunnerClient(f"http://{host}:{PORT}", key)
    if not client.answers():
        _start(host, client)
    return LocalServer(client, endpoint or f"http://{address}:{PORT}{_API}")


def _endpoint_of(url: str) -> str:
    """Return what containers call for the server that is at `url` for this machine."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    if not is_loopback(host):
        return f"{url}{_API}"
    if container_host() == DESKTOP:
        return f"{parts.scheme}://{DESKTOP}:{port}{_API}"
    raise RemoteUnavailableError(
        f"containers cannot reach {url}: it is a loopback address of this machine",
        hint=f"serve at the address of Docker's bridge (`modelpack serve --host "
        f"{container_host()} --keys FILE`) and set MODELPACK_HOST to it, or say how containers "
        "reach it: MODELPACK_ENDPOINT",
    )


def _start(host: str, client: RunnerClient) -> None:
    """Start a server that goes on after this process, for those who reach `host`."""
    directory = _state_directory()
    log = directory / "serve.log"
    command = [sys.executable, "-m", "modelpack", "serve", "--host", host, "--port", str(PORT)]
    # Containers have no key to show: who may reach the bridge may use the server, as with Docker's.
    command += ["--allow-host", DESKTOP] if is_loopback(host) else ["--allow-anonymous"]
    with Path(directory, "serve.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if client.answers():  # Compose asks for several things at once: another got here first
            return
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        Path(directory, _PID).write_text(f"{process.pid}\n")
        with process.stdout:
            said = process.stdout.readline()  # its address, once it accepts connections
    if not said:
        reason = log.read_text(errors="replace").strip()[-500:] or "it said nothing"
        raise RemoteUnavailableError(
            f"`{' '.join(command[2:])}` did not start: {reason}", hint=f"its output is in {log}"
        )


def stop_server() -> int | None:
    """End the server that `local_server` started; return its process id, None where none runs."""
    path = Path(_state_directory(), _PID)
    try:
        process = int(path.read_text())
    except (OSError, ValueError):
        return None
    path.unlink()
    shown = subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(process)], capture_output=True, text=True
    )
    if "modelpack serve --host" not in shown.stdout:  # it has ended, and the number is another's
        return None
    os.kill(process, signal.SIGTERM)
    return process


def _state_directory() -> Path:
    from platformdirs import user_state_path

    return user_state_path("modelpack", ensure_exists=True)
