"""A stand-in for vLLM, without a GPU: `python3 -c SOURCE serve DIRECTORY [vLLM's options]`.

It is healthy once all nodes of its group are there. `/about` has the ranks of the others, and the
digests of the files of the model. A node that is not the first says its rank to the first.
"""

import hashlib
import http.server
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
DIRECTORY = Path(sys.argv[2])
OPTIONS = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=False))
OTHERS = int(OPTIONS.get("--nnodes", "1")) - 1
JOINED: set[int] = set()


class Handler(http.server.BaseHTTPRequestHandler):
    """The API, and the place where other nodes join."""

    def do_GET(self) -> None:
        if self.path.startswith("/join/"):
            JOINED.add(int(self.path.rpartition("/")[2]))
        is_whole = len(JOINED) == OTHERS
        self.send_response(200 if is_whole or self.path != "/health" else 503)
        self.end_headers()
        if self.path == "/about":
            self.wfile.write(json.dumps(about()).encode())

    def log_message(self, *_: object) -> None:
        pass


def about() -> dict[str, object]:
    files = [path for path in DIRECTORY.rglob("*") if path.is_file()]
    return {
        "joined": sorted(JOINED),
        "read_only": bool(os.statvfs(DIRECTORY).f_flag & os.ST_RDONLY),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def join(url: str) -> None:
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return


if "--headless" in sys.argv:
    join(f"http://{OPTIONS['--master-addr']}:8000/join/{OPTIONS['--node-rank']}")
    signal.pause()
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
