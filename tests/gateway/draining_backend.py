"""A server for tests of a gateway, in a process: `python draining_backend.py HOST PORT DRAIN`.

It prints a line when it accepts connections, and answers after a while with its own address.
"""

from __future__ import annotations

import asyncio
import json
import sys

from starlette.types import Receive, Scope, Send

from modelpack.http.listener import AppServer

_SECONDS = 0.02


def main() -> None:
    host, port, drain = sys.argv[1:]
    content = json.dumps({"from": host}).encode()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] != "/health":
            await asyncio.sleep(_SECONDS)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    server = AppServer(lambda: app, f"{host}:{port}", name="backend", drain=int(drain))
    server.run(lambda: print("ready", flush=True))


if __name__ == "__main__":
    main()
