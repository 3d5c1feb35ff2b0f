"""Real peer programs: found, or visibly missing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Set by CI: a peer that is missing is then a failure, not a skip.
REQUIRED = bool(os.environ.get("MODELPACK_REQUIRE_PEERS"))


def missing(reason: str) -> None:
    """Skip the test, or fail it where peers are required."""
    if REQUIRED:
        pytest.fail(f"{reason}, and MODELPACK_REQUIRE_PEERS is set", pytrace=False)
    pytest.skip(reason)


def require(program: str) -> Path:
    """Return the path of a peer program; skip (or fail, see `missing`) without it."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        missing(f"{program} is not installed")
    assert found is not None
    return Path(found)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """Return once something accepts connections at `port`; fail if `process` ends first."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"{process.args!r} does not listen on {port}", pytrace=False)
            time.sleep(0.02)
        else:
            return


_REGISTRY_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:{port}", secret: test, tls: {tls}}}
{extra}
"""


@contextmanager
def docker_registry(root: Path, extra: str = "", tls: str = "{}") -> Iterator[str]:
    """Run Debian's docker-registry over `root`; yield its host:port.

    `extra` is more YAML, `tls` what its `http.tls` says.
    """
    program = require("docker-registry")
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = root / "config.yml"
    settings = {"root": root / "data", "port": port, "extra": extra, "tls": tls}
    config.write_text(_REGISTRY_CONFIG.format(**settings))
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", config], stdout=log, stderr=log)
        try:
            wait_for_port(port, process)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=20)
