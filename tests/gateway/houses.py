"""A protected application with keys of all kinds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from modelpack_server.gateway import KeyFile, add_key
from modelpack_server.gateway.limits import Limits
from tests.gateway.servers import (
    CHAT,
    Served,
    Upstream,
    protected,
)

BODY = {"model": "ai/smollm2:latest", "messages": [{"role": "user", "content": "top-secret"}]}
MESSAGES, OLLAMA = "/anthropic/v1/messages", "/api/chat"


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class House:
    """A protected application with keys."""

    served: Served
    app: Upstream
    file: Path
    clock: Clock
    secrets: dict[str, str]

    def post(self, key: str, path: str = CHAT, body: Any = BODY, **headers: str) -> httpx.Response:
        """Send a request with a key."""
        headers = {"authorization": f"Bearer {self.secrets[key]}"} | headers
        return self.served.client.post(path, json=body, headers=headers)


@contextmanager
def open_house(tmp_path: Path) -> Iterator[House]:
    file = tmp_path / "keys.toml"
    secrets = {
        "free": add_key(file, "free"),
        "narrow": add_key(file, "narrow", models=("ai/smollm2*",)),
        "slow": add_key(file, "slow", limits=Limits(requests_per_minute=2)),
        "terse": add_key(file, "terse", limits=Limits(tokens_per_minute=600)),
        "single": add_key(file, "single", limits=Limits(concurrency=1)),
    }
    with file.open("a") as more:
        more.write("[keys.shared]\nsha256 = '" + "0" * 64 + "'\n")
    app, clock = Upstream(), Clock()
    with protected(app, keys=KeyFile(file), max_body=10_000, clock=clock) as served:
        yield House(served, app, file, clock, secrets)


def told(response: httpx.Response) -> tuple[str | None, str]:
    """The type and the message of an error of any API family."""
    body = response.json()
    if isinstance(body["error"], str):
        return None, body["error"]
    if body.get("type") == "error":
        assert body["request_id"] == response.headers["request-id"]
        return body["error"]["type"], body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["type"], body["error"]["message"]
