"""A server with a directory for files and batches, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from openai.types import Batch, FileObject

from modelpack_server.api.app import ModelServer
from modelpack_server.gateway import Protection, protect
from modelpack_server.pool.pool import ModelPool
from tests.engine.families.served import PLAIN, EnginesCatalogue, TurnsEngine
from tests.scenarios.processes import wait_until

CHAT = "/v1/chat/completions"
FINAL = ("completed", "failed", "expired", "cancelled")


def chat(text: str, **more: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": PLAIN, "messages": [{"role": "user", "content": text}]} | more


def row(name: str, body: Any = None, **more: Any) -> dict[str, Any]:
    """Return a line of an input file."""
    body = chat(name) if body is None else body
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body} | more


def jsonl(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in rows)


@dataclass
class Desk:
    """A client of the server, and the engine of its only model."""

    client: openai.OpenAI
    url: str
    engine: TurnsEngine

    def upload(self, content: bytes, purpose: Any = "batch", **more: Any) -> FileObject:
        return self.client.files.create(file=("in.jsonl", content), purpose=purpose, **more)

    def begin(self, rows: Sequence[Any] | bytes, endpoint: Any = CHAT, **more: Any) -> Batch:
        """Upload an input file and create its batch."""
        content = rows if isinstance(rows, bytes) else jsonl(rows)
        return self.client.batches.create(
            input_file_id=self.upload(content).id,
            endpoint=endpoint,
            completion_window="24h",
            **more,
        )

    def until(self, batch: Batch, *statuses: str) -> Batch:
        """Return the batch once it has one of `statuses`."""
        found = [batch]

        def reached() -> bool:
            found.append(self.client.batches.retrieve(batch.id))
            return found[-1].status in statuses

        wait_until(reached, f"the batch to be {' or '.join(statuses)}")
        return found[-1]

    def ended(self, batch: Batch) -> Batch:
        return self.until(batch, *FINAL)

    def rows(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        """Return the lines of a file by custom_id."""
        if file_id is None:
            return {}
        lines = self.client.files.content(file_id).text.splitlines()
        rows = [json.loads(line) for line in lines]
        assert len({each["custom_id"] for each in rows}) == len(rows), "a line is there twice"
        return {each["custom_id"]: each for each in rows}

    def hold(self) -> None:
        """Make the engine hold its replies back after their first piece."""
        self.engine.wait = asyncio.Event()

    def release(self) -> None:
        self.engine.release()
        self.engine.wait = None

    def running(self) -> int:
        return len(self.engine._tasks)

    def prompts(self) -> list[str]:
        """Return the user's texts of all requests."""
        texts = [self.engine.tokenizer.decode(list(r.prompt_token_ids), skip_special_tokens=False)
                 for r in self.engine.requests]  # fmt: skip
        return [text.split("user: ")[1].split("\n")[0] for text in texts]


@contextmanager
def desk(
    state: Path | None, *, protection: Protection | None = None, key: str = "none",
    engine: TurnsEngine | None = None,
) -> Iterator[Desk]:  # fmt: skip
    """Serve one scripted model."""
    if engine is None:
        engine = TurnsEngine()
        engine.turns = []
    catalogue = EnginesCatalogue({PLAIN: engine})
    settings = protection or Protection()
    with ExitStack() as opened:
        server = opened.enter_context(
            ModelServer(
                lambda: ModelPool(catalogue, memory=10_000, grace=0.0),
                address="127.0.0.1:0",
                state=state,
                wrap=lambda app: protect(app, settings, resolves=True),
            )
        )
        yield Desk(opened.enter_context(client_of(server.url, key)), server.url, engine)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
