"""Background responses count towards the limits of their key until they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from modelpack_server.gateway import KeyFile, Protection, add_key
from modelpack_server.gateway.limits import Limits
from modelpack_server.gateway.traces import Trace
from tests.engine.serving.test_owners import PairingCatalogue, model_server
from tests.scenarios.processes import wait_until

BODY = {"model": "tiny", "input": "hello", "max_output_tokens": 3, "ignore_eos": True}


def test_a_running_response_is_a_request_of_its_key(tmp_path: Path) -> None:
    file, catalogue, traces = tmp_path / "keys.toml", PairingCatalogue(), list[Trace]()
    key = add_key(file, "single", limits=Limits(concurrency=2))
    protection = Protection(keys=KeyFile(file), report=traces.append)
    with (
        model_server(catalogue, protection) as url,
        httpx.Client(
            base_url=f"{url}/v1", headers={"authorization": f"Bearer {key}"}, timeout=60
        ) as client,
    ):

        def post(**fields: Any) -> httpx.Response:
            return client.post("/responses", json=BODY | fields)

        def finished(name: str) -> bool:
            found: str = client.get(f"/responses/{name}").json()["status"]
            return found not in ("queued", "in_progress")

        assert post().status_code == 200
        catalogue.going.clear()
        try:
            name = post(background=True).json()["id"]
            with client.stream(
                "POST", "/responses", json=BODY | {"background": True, "stream": True}
            ) as stream:
                next(stream.iter_lines())  # and leave: it runs on
            refused = client.get(f"/responses/{name}")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "concurrency_exceeded"
        finally:
            catalogue.going.set()
        wait_until(lambda: len(posts(traces)) == 3, "the traces of the responses")
        assert finished(name)
        client.get(f"/responses/{name}")
        client.post(f"/responses/{name}/cancel")
        wait_until(lambda: len(traces) == 7, "the traces of all requests")
    for trace in posts(traces):
        assert trace.prompt_tokens
        assert trace.completion_tokens == 3
    for trace in traces:
        if trace.path != "/v1/responses":
            assert trace.prompt_tokens is None
            assert trace.completion_tokens is None


def posts(traces: list[Trace]) -> list[Trace]:
    return [trace for trace in traces if trace.path == "/v1/responses"]
