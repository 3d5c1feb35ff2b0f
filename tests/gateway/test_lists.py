"""Lists of models behind a gateway: a key sees the models that it may use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelpack_server.gateway import KeyFile, add_key
from modelpack_server.gateway.lists import MAX_LIST, allowed_only
from tests.gateway.servers import Upstream, answering, gateway, serving

PUBLIC, SECRET = {"id": "ai/public", "object": "model"}, {"id": "corp/secret", "object": "model"}
HASH = "a" * 64
RUNNER = [
    {"id": f"sha256:{HASH}", "tags": ["ai/public:latest", "corp/twin:latest"], "config": {}},
    {"id": f"sha256:{HASH[:-1]}b", "tags": ["corp/secret:latest"]},
    {"id": f"sha256:{HASH[:-1]}c"},
]


@pytest.mark.parametrize(
    ("listed", "shown"),
    [
        ({"object": "list", "data": [PUBLIC, SECRET]}, {"object": "list", "data": [PUBLIC]}),
        ({"data": [SECRET, PUBLIC], "first_id": "corp/secret", "last_id": "ai/public"},
         {"data": [PUBLIC], "first_id": "ai/public", "last_id": "ai/public"}),
        ({"data": [SECRET], "first_id": "corp/secret", "last_id": "corp/secret"},
         {"data": [], "first_id": None, "last_id": None}),
        ({"models": [{"name": "ai/public", "model": "ai/public"},
                     {"name": "ai/public", "model": "corp/secret"}, {"name": 1}, "corp/secret"],
          "note": "corp/secret"},
         {"models": [{"name": "ai/public", "model": "ai/public"}]}),
        # Modelpack's listing of ai/public, and the name that the key may use.
        ({"data": [{"id": "public", "root": f"sha256:{HASH}"}]},
         {"data": [{"id": "ai/public", "root": f"sha256:{HASH}"}]}),
        ({"data": [{"id": f"sha256:{HASH}"}, {"id": HASH}, {"id": HASH[:12]}]}, {"data": []}),
        (RUNNER, [{"id": f"sha256:{HASH}", "tags": ["ai/public:latest"], "config": {}}]),
        ([], []),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_left_out(listed: Any, shown: Any) -> None:
    found = allowed_only(json.dumps(listed).encode(), lambda name: name.startswith("ai/"))
    assert found is not None
    assert json.loads(found) == shown


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 10_000, b"1", b"{}", b'{"data": {"id": "corp/secret"}}', b"\xff"]
)
def test_what_is_no_list_is_not_shown(body: bytes) -> None:
    assert allowed_only(body, lambda _: True) is None


@pytest.mark.parametrize(
    "path", ["/v1/models", "/models", "/engines/v1/models/", "//v1//models", "/api/tags", "/api/ps"]
)
def test_a_gateway_shows_a_key_its_models(tmp_path: Path, path: str) -> None:
    file = tmp_path / "keys.toml"
    keys = {"all": add_key(file, "all"), "narrow": add_key(file, "narrow", models=("ai/*",))}
    upstream = Upstream(answering({"data": [PUBLIC, SECRET]}))
    with (
        serving(upstream) as url,
        gateway(url, protection={"keys": KeyFile(file)}) as served,
    ):
        for key, names in (("all", ["ai/public", "corp/secret"]), ("narrow", ["ai/public"])):
            headers = {"x-api-key": keys[key]}
            reply = served.client.get(served.url + path, headers=headers)
            assert [item["id"] for item in reply.json()["data"]] == names
            if key == "narrow":
                assert reply.headers["content-length"] == str(len(reply.content))
            assert served.client.head(served.url + path, headers=headers).status_code == 200
        headers = {"x-api-key": keys["narrow"]}
        upstream.reply = answering({"error": "no"}, 500)
        assert served.client.get(served.url + path, headers=headers).status_code == 500
        upstream.reply = answering(
            {"data": [PUBLIC, SECRET]}, 206
        )  # a possible response of a cache
        reply = served.client.get(served.url + path, headers=headers | {"range": "bytes=0-"})
        assert [item["id"] for item in reply.json()["data"]] == ["ai/public"]
        upstream.reply = answering({"pad": "corp/secret" * (MAX_LIST // 10)})
        reply = served.client.get(served.url + path, headers=headers)
        assert (reply.status_code, "secret" in reply.text) == (502, False)
