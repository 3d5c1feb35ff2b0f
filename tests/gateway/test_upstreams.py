"""The upstreams of a gateway and their health."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from modelpack.errors import UsageError
from modelpack_server.gateway.proxy import Upstreams
from tests.gateway.servers import PATIENCE, Upstream, serving, unused_url


def test_probes_find_who_is_well() -> None:
    upstreams_ = Upstream(healthy=False), Upstream()
    with serving(upstreams_[0]) as ill, serving(upstreams_[1]) as well:
        upstreams = Upstreams([ill, well, unused_url()])

        async def probe() -> list[bool]:
            async with httpx.AsyncHTTPTransport(trust_env=False) as transport:
                for upstream in upstreams.all:
                    await upstreams.probe(transport, upstream)
                return [upstream.healthy for upstream in upstreams.all]

        assert asyncio.run(probe()) == [False, True, False]
        chosen = upstreams.choose()
        assert chosen is not None
        assert chosen.name == well
        upstreams_[0].healthy = True
        assert asyncio.run(probe()) == [True, True, False]


def test_who_is_down_is_asked_until_it_is_up() -> None:
    async def watch() -> list[bool]:
        seen: list[bool] = []
        up = asyncio.Event()

        def answer(_: httpx.Request) -> httpx.Response:
            seen.append(upstreams.all[0].healthy)
            if len(seen) == 1:
                raise httpx.ConnectError("refused")
            if len(seen) == 4:
                up.set()
            return httpx.Response(503 if len(seen) == 2 else 200)

        task = asyncio.create_task(upstreams.watch(httpx.MockTransport(answer), 0.001))
        await asyncio.wait_for(up.wait(), PATIENCE)
        task.cancel()
        return seen

    upstreams = Upstreams(["http://127.0.0.1:1"])
    assert asyncio.run(watch()) == [True, False, False, True]
    assert upstreams.all[0].failures == 2


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://x", "http://", "http://h/?q=1", "http://u:pw-secret@h", "//h"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Upstreams([url])
    assert "pw-secret" not in str(caught.value)
