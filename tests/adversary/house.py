"""A `modelpack serve` process with three models and three API keys, under a memory limit."""

from __future__ import annotations

import hashlib
import http.client
import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import modelpack
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from tests.engine.serving.test_api import wait_until_ready
from tests.engine.serving.tiny import write_tiny

PUBLIC, OTHER, SECRET = "ai/public", "ai/other", "corp/secret"
MEMORY_LIMIT = 2 * 1024**3  # bytes of address space; MLX maps 0.9 GiB of it at the start
_PATIENCE = 60.0  # seconds; only a failure takes that long


@dataclass(frozen=True)
class House:
    """The server: its address, its process id, and the digest of each model.

    The key `admin` may do everything, `alice` may use `ai/public*`, and `bob` `ai/other*`.
    """

    url: str
    pid: int
    digests: Mapping[str, str]

    def client(self, key: str | None, *, timeout: float = _PATIENCE) -> httpx.Client:
        """Return a client that authenticates with a key, or without one."""
        headers = {} if key is None else {"Authorization": f"Bearer {secret_of(key)}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def get_exactly(self, path: str, key: str | None) -> tuple[int, str]:
        """Return the status and the text of a GET whose path no client library rewrites."""
        connection = http.client.HTTPConnection(httpx.URL(self.url).netloc.decode(), timeout=60)
        headers = {} if key is None else {"Authorization": f"Bearer {secret_of(key)}"}
        try:
            connection.putrequest("GET", path, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    @property
    def resident(self) -> int:
        """The memory that the process occupies, in bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()


def secret_of(key: str) -> str:
    """Return the API key of a name."""
    return f"mp_{key}_0123456789abcdef"


def _key_file() -> str:
    def table(name: str, *lines: str) -> str:
        digest = hashlib.sha256(secret_of(name).encode()).hexdigest()
        return "\n".join([f"[keys.{name}]", f'sha256 = "{digest}"', *lines, ""])

    return "\n".join(
        [
            table("admin"),
            table("alice", f'models = ["{PUBLIC}*"]'),
            table("bob", f'models = ["{OTHER}*"]'),
        ]
    )


def package(store: LayoutStore, directory: Path) -> dict[str, str]:
    """Package three tiny models, different in their defaults alone; return their digests."""
    digests = {}
    for number, name in enumerate((PUBLIC, OTHER, SECRET)):
        files = write_tiny(directory / f"files-{number}", max_new_tokens=100 + number)
        made = modelpack.package(name, PackageRequest(safetensors_dir=files), store=store)
        digests[name] = str(made.digest)
    return digests


@contextmanager
def house(directory: Path, *arguments: str) -> Iterator[House]:
    """Run the server in a process of its own, and stop it."""
    store = LayoutStore(directory / "store")
    digests = package(store, directory)
    keys = directory / "keys.toml"
    keys.write_text(_key_file())
    keys.chmod(0o600)
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpack", "serve", PUBLIC, "--port", "0", "--device", "cpu",
         "--store", str(store.root), "--keys", str(keys), "--kv-cache-bytes", "4000000",
         *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT)),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http"), process.wait(_PATIENCE)
        wait_until_ready(url)
        yield House(url, process.pid, digests)
        assert process.poll() is None, f"the server ended: {process.returncode}"
    finally:
        process.kill()
        process.communicate()


def chat(model: str = PUBLIC, **fields: Any) -> dict[str, Any]:
    """Return the body of a short chat request."""
    messages = [{"role": "user", "content": "hello"}]
    return {"model": model, "messages": messages, "max_tokens": 2, **fields}


def encoded(body: Any) -> bytes:
    """Return a body as JSON bytes."""
    return json.dumps(body).encode()
