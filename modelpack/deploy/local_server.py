"""The model server of this machine for containers: find it, start it, stop it and call its API.

Containers reach this machine at the address of Docker's bridge; with Docker Desktop, they reach its
loopback addresses as host.docker.internal.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    AuthError,
    ConflictError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UsageError,
)
from modelpack.http.hosts import is_loopback

DESKTOP = "host.docker.internal"
_DOCKER_SECONDS = 20
_SIOCGIFADDR = 0x8915  # netdevice(7)
_GATEWAYS = "{{range .IPAM.Config}}{{.Gateway}} {{end}}"
_INTERFACE = '{{index .Options "com.docker.network.bridge.name"}}'


def container_host() -> str:
    """Return the host name or address of this machine for containers, using the `docker` command.

    Raises `ModelpackError` if the command fails, or if Docker's bridge has no address.
    """
    if _docker("info", "--format", "{{.OperatingSystem}}") == "Docker Desktop":
        return DESKTOP
    found = _docker("network", "inspect", "bridge", "--format", _GATEWAYS)
    for address in found.split():
        with suppress(ValueError):
            return str(ipaddress.IPv4Address(address))
    # An engine that has just created its bridge reports the gateway only after its next start.
    interface = _docker("network", "inspect", "bridge", "--format", _INTERFACE)
    if address := _address_of(interface):
        return address
    raise ModelpackError(
        f"Docker's bridge network has no IPv4 gateway (got {found!r}), and its interface "
        f"{interface!r} has no address",
        hint="set MODELPACK_HOST to the model server's URL, and MODELPACK_ENDPOINT to its address "
        "for containers, like http://HOST:PORT/engines/v1/",
    )


def _address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface; empty without one."""
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
            ["docker", *arguments], capture_output=True, text=True, timeout=_DOCKER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelpackError(
            f"cannot run `docker {arguments[0]}`: {error}",
            hint="set MODELPACK_HOST and MODELPACK_ENDPOINT to avoid docker",
        ) from error
    if done.returncode != 0:
        raise ModelpackError(
            f"`docker {' '.join(arguments[:2])}` failed: {done.stderr.strip()[:300]}",
            hint="check that the Docker engine is running",
        )
    return done.stdout.strip()


_TIMEOUT = (5, 600)  # seconds to connect, and to wait for the next chunk of a response
_PROBE = (1, 5)
_KINDS: dict[int, type[ModelpackError]] = {
    400: UsageError, 401: AuthError, 403: AuthError, 404: NotFoundError, 409: ConflictError,
}  # fmt: skip


class RunnerClient:
    """A client of the model server at `url`, with an optional API key."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._headers = {"Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def is_running(self) -> bool:
        """Return whether a model server responds, even if its models are not loaded yet."""
        import requests

        try:
            status = f"{self.url}/engines/status"
            answer = requests.get(status, headers=self._headers, timeout=_PROBE)
        except requests.RequestException:
            return False
        # A server that requires another key is running too; later requests report the error.
        return answer.status_code in (401, 403) or "Running" in answer.text

    def backends(self) -> Any:
        """Return the status of each backend of the server, by its name."""
        return self._json("GET", "/engines/status")

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the server's store, with all spellings of their names as tags.

        Compose compares tags with the name in its file, and pulls a model if no tag is equal.
        """
        models: list[dict[str, Any]] = self._json("GET", "/models")
        for model in models:
            model["tags"] = list(
                dict.fromkeys(text for tag in model.get("tags") or () for text in _spellings(tag))
            )
        return models

    def pull(self, name: str, report: Callable[[str], None]) -> None:
        """Make the server pull a model; call `report` with each progress message."""
        body = {"from": name}
        with self._request("POST", "/models/create", json=body, stream=True) as response:
            for line in response.iter_lines():
                if not line:
                    continue
                message = json.loads(line)
                if message.get("type") == "error":
                    raise ModelpackError(f"cannot pull {name}: {message.get('message')}")
                report(str(message.get("message", "")))

    def configure(
        self, name: str, *, context_size: int | None = None, runtime_flags: Sequence[str] = ()
    ) -> None:
        """Configure how the server loads a model next; `context_size` is in tokens."""
        body: dict[str, Any] = {"model": name, "runtime_flags": list(runtime_flags)}
        if context_size is not None:
            body["context_size"] = context_size
        self._json("POST", "/pool/configure", json=body)

    def _json(self, method: str, path: str, **arguments: Any) -> Any:
        with self._request(method, path, **arguments) as response:
            return response.json()

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        import requests

        try:
            response = requests.request(
                method, self.url + path, headers=self._headers, timeout=_TIMEOUT, **arguments
            )
        except requests.RequestException as error:
            raise RemoteUnavailableError(
                f"no model server responds at {self.url}",
                hint="start one with `modelpack serve`, or set MODELPACK_HOST",
            ) from error
        if response.ok:
            return response
        raise _KINDS.get(response.status_code, ModelpackError)(
            f"{self.url}{path}: {_message(response.text) or response.status_code}"
        )


def _message(text: str) -> str:
    """Return the message of an error: JSON of the OpenAI API, or plain text as from Docker."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()


def _spellings(tag: str) -> tuple[str, ...]:
    try:
        reference = Reference.parse(tag)
    except ModelpackError:
        return (tag,)
    short = reference.familiar
    full = f"{short}:{reference.tag}" if reference.tag and ":" not in short else short
    return tag, str(reference), short, full


#: The default port of `modelpack serve`, and of Docker Model Runner.
PORT = 12434
#: The path of the OpenAI API for clients of Docker Model Runner.
_API = "/engines/v1/"
_PID = "serve.pid"


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A model server: a client for this machine, and the URL of its OpenAI API for containers."""

    client: RunnerClient
    endpoint: str


def local_server(environment: Mapping[str, str] = os.environ) -> LocalServer:
    """Return the model server for the containers of Compose; start one if none is running.

    Environment variables: `MODELPACK_HOST` is the URL of a running server, so that none is started.
    `MODELPACK_API_KEY` is its API key. `MODELPACK_ENDPOINT` is its URL for containers, if that
    cannot be determined. Raises `RemoteUnavailableError` if no server responds at `MODELPACK_HOST`,
    if a new server does not start, or if containers cannot reach the server.
    """
    key = environment.get("MODELPACK_API_KEY")
    given = environment.get("MODELPACK_HOST")
    endpoint = environment.get("MODELPACK_ENDPOINT")
    if given:
        client = RunnerClient(given, key)
        if not client.is_running():
            raise RemoteUnavailableError(
                f"no model server responds at {client.url} (MODELPACK_HOST)",
                hint="start it with `modelpack serve`, or unset MODELPACK_HOST",
            )
        return LocalServer(client, endpoint or _endpoint_of(client.url))
    address = container_host()
    host = "127.0.0.1" if address == DESKTOP else address
    client = RunnerClient(f"http://{host}:{PORT}", key)
    if not client.is_running():
        _start(host, client)
    return LocalServer(client, endpoint or f"http://{address}:{PORT}{_API}")


def _endpoint_of(url: str) -> str:
    """Return the URL for containers of the API of the server at `url`."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    if not is_loopback(host):
        return f"{url}{_API}"
    if container_host() == DESKTOP:
        return f"{parts.scheme}://{DESKTOP}:{port}{_API}"
    raise RemoteUnavailableError(
        f"containers cannot reach {url}: it is a loopback address of this machine",
        hint=f"run `modelpack serve --host {container_host()} --keys FILE`, at the address of "
        "Docker's bridge, and set MODELPACK_HOST to it; or set MODELPACK_ENDPOINT",
    )


def _start(host: str, client: RunnerClient) -> None:
    """Start a server at `host` that keeps running after this process exits."""
    directory = _state_directory()
    log = directory / "serve.log"
    command = [sys.executable, "-m", "modelpack", "serve", "--host", host, "--port", str(PORT)]
    # Containers have no API key, so anyone on the bridge can use the server, as with Docker's own.
    command += ["--allow-host", DESKTOP] if is_loopback(host) else ["--allow-anonymous"]
    with Path(directory, "serve.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if client.is_running():  # another process of Compose has started the server meanwhile
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
            address = process.stdout.readline()  # printed when it accepts connections
    if not address:
        reason = log.read_text(errors="replace").strip()[-500:] or "no output"
        raise RemoteUnavailableError(
            f"`{' '.join(command[2:])}` did not start: {reason}", hint=f"see its output in {log}"
        )


def stop_server() -> int | None:
    """Stop the server that `local_server` started; return its process id, or None without one."""
    path = Path(_state_directory(), _PID)
    try:
        process = int(path.read_text())
    except (OSError, ValueError):
        return None
    path.unlink()
    shown = subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(process)], capture_output=True, text=True
    )
    if "modelpack serve --host" not in shown.stdout:  # the server has exited
        return None
    os.kill(process, signal.SIGTERM)
    return process


def _state_directory() -> Path:
    from platformdirs import user_state_path

    return user_state_path("modelpack", ensure_exists=True)
