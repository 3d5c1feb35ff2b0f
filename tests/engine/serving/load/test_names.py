"""Hostile names of models in paths, queries and bodies, with a real store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import pytest

from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.serving.load.served import Served, alone, document_of
from tests.engine.serving.load.test_bodies import JSON, Asking

pytestmark = pytest.mark.long

NAMES = [
    "\ud800", "a\x00b", "../..", "a//b", "a:", "a@sha256:", "sha256:" + "0" * 64, "x" * 5000,
    "a b", "%zz", "[1:2]:5/a", "127.0.0.1:99999/a", "http://x/y", "--help", "a\r\nX: y",
    "a?b=c#d", "a/" * 200 + "b",
]  # fmt: skip
#: Where bodies have names, in the words of all families.
FIELDS = ("model", "name", "from", "source", "destination", "target", "backend", "preset")
REST = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "query": "x",
        "documents": ["x"], "text_1": "x", "text_2": "x", "max_tokens": 5, "stream": False,
        "context_size": 5}  # fmt: skip


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = StoreCatalogue(LayoutStore(tmp_path / "models"), EngineConfig(device="cpu"))
    with ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0") as server:
        alone(monkeypatch)
        port = int(server.url.rpartition(":")[2])
        served = Served(port, document_of(port))
        with Asking(served) as asking:
            for name in NAMES:
                _say(asking, name)
    faults = [fault for fault in asking.faults if "no such host" not in repr(fault)]
    assert not faults, "\n".join(repr(fault)[:300] for fault in faults)
    assert {status for _, _, status in asking.seen} >= {200, 400, 404}


def _say(asking: Asking, name: str) -> None:
    """Use a name in every parameter and field for names in the document."""
    coded = name.encode("utf-8", "surrogatepass")
    body = json.dumps(REST | dict.fromkeys(FIELDS, name) | {"models": [name]}).encode()
    for method, path in asking.served.operations():
        operation = asking.served.document["paths"][path][method.lower()]
        queries = [given["name"] for given in operation.get("parameters", ())
                   if given["in"] == "query" and given["name"] != "follow"]  # fmt: skip
        query = "&".join(f"{field}={quote(coded, safe='')}" for field in queries)
        for safe in ("", "/:@") if "{" in path else ("",):
            target = re.sub(r"\{[^}]*\}", quote(coded, safe=safe).replace("\\", ""), path)
            sent = body if "requestBody" in operation else None
            asking.ask(method, f"{target}?{query}", sent, JSON if sent else {}, name=name[:20])
