"""A server whose responses a test defines: correct, wrong, late, or missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


def chunk(text: str = "", *, finish: str | None = None, **fields: Any) -> bytes:
    """Return an event of a stream."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **fields}).encode() + b"\n\n"


def usage(prompt: int, completion: int) -> bytes:
    """Return the event with the token counts."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion,
              "prompt_tokens_details": {"cached_tokens": 3}}  # fmt: skip
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
GOOD = (chunk("a "), chunk("b "), chunk("c", finish="length"), usage(17, 5), DONE)


class Misbehaving:
    """A server that returns `statuses` and `streams` in turn; `asked` are the request bodies."""

    def __init__(self, *streams: tuple[bytes, ...], models: object = ("m",)) -> None:
        self.streams = list(streams) or [GOOD]
        self.statuses: list[tuple[int, object]] = []
        self.refuses: set[str] = set()
        self.key = ""
        self.models = models
        self.asked: list[dict[str, Any]] = []

    def next_stream(self) -> tuple[bytes, ...]:
        return self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]


def _handler(server: Misbehaving) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Print no log."""

        def _json(self, status: int, body: object) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                if isinstance(server.models, tuple):
                    self._json(200, {"data": [{"id": name} for name in server.models]})
                else:
                    self._json(200, server.models)
            elif self.path == "/version":
                self._json(200, {"version": "9.8"})
            else:
                self._json(404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self._json(401, {"error": {"message": "no key"}})
                return
            if server.refuses & set(body):
                self._json(400, {"error": {"message": "unknown field"}})
                return
            if body["model"] not in server.models:  # type: ignore[operator]
                self._json(404, {"error": {"message": "never heard of it"}})
                return
            server.asked.append(body)
            if server.statuses:
                status, answer = server.statuses.pop(0)
                self._json(status, answer)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for event in server.next_stream():
                self.wfile.write(event)
                self.wfile.flush()

    return Handler


@contextmanager
def running(server: Misbehaving) -> Iterator[str]:
    """Serve on a free port; yield the address."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
