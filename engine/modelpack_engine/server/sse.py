"""Server-sent events: one `data:` line of JSON each, `[DONE]` at the end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from modelpack.errors import ModelpackError
from modelpack_engine.server.problems import error_body

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """Return one event."""
    return (
        b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


class EventStream(StreamingResponse):
    """A response of events. A failure after the first byte becomes an error event."""

    def __init__(self, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(
            _framed(events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )


async def _framed(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for value in events:
            yield event(value)
    except ModelpackError as error:
        yield event(error_body(str(error)))
        return
    yield DONE
