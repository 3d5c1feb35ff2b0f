"""The upstreams of a gateway and their health."""

from __future__ import annotations

import asyncio
import inspect
import socket

import httpx
import pytest
import uvicorn

from modelpack.errors import UsageError
from modelpack.http import listener
from modelpack_server.gateway.app import KEEPALIVE, KEPT_SECONDS, upstream_transport
from modelpack_server.gateway.upstreams import Upstreams, addresses_of
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


def test_an_upstream_that_drains_is_left_until_a_probe_succeeds() -> None:
    """It still responds to requests, which does not make it healthy."""
    statuses = [503, 200]
    upstreams = Upstreams(["http://127.0.0.1:1", "http://127.0.0.1:2"])
    first, second = upstreams.all
    transport = httpx.MockTransport(lambda _: httpx.Response(statuses.pop(0)))
    asyncio.run(upstreams.probe(transport, first))
    upstreams.answered(first)
    assert {each.name for each in (upstreams.choose() for _ in range(4)) if each} == {second.name}
    asyncio.run(upstreams.probe(transport, first))
    assert first.healthy
    upstreams.failed(first, "ConnectError")
    upstreams.answered(first)
    assert first.healthy, "it can be reached again"


def test_one_late_probe_does_not_move_prompts() -> None:
    """A busy server may be slow once; one that is slow twice in a row is down."""
    late, answer = httpx.ReadTimeout("late"), httpx.Response(200)
    results: list[httpx.Response | Exception] = [late, answer, late, late, answer, late]

    def respond(_: httpx.Request) -> httpx.Response:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    async def probe() -> list[bool]:
        seen = []
        while results:
            await upstreams.probe(httpx.MockTransport(respond), upstreams.all[0])
            seen.append(upstreams.all[0].healthy)
        return seen

    upstreams = Upstreams(["http://127.0.0.1:1"])
    assert asyncio.run(probe()) == [True, True, True, False, True, True]
    assert upstreams.all[0].failures == 1


def test_a_late_upstream_is_soon_probed_again() -> None:
    async def watch() -> None:
        twice = asyncio.Event()
        probes = 0

        def respond(_: httpx.Request) -> httpx.Response:
            nonlocal probes
            probes += 1
            if probes == 2:
                twice.set()
            raise httpx.ReadTimeout("late")

        upstreams = Upstreams(["http://127.0.0.1:1"])
        task = asyncio.create_task(upstreams.watch(httpx.MockTransport(respond), 3600))
        await asyncio.wait_for(twice.wait(), PATIENCE)
        task.cancel()

    asyncio.run(watch())


def test_a_machine_that_dies_ends_the_requests_to_it() -> None:
    """A server that is silent for long is asked by TCP whether it is there."""

    async def options(url: str) -> list[int]:
        async with upstream_transport() as transport:
            response = await transport.handle_async_request(httpx.Request("GET", url))
            connection = response.extensions["network_stream"].get_extra_info("socket")
            found = [connection.getsockopt(level, option) for level, option, _ in KEEPALIVE]
            await response.aclose()
        return found

    with serving(Upstream()) as url:
        found = asyncio.run(options(f"{url}/health"))
    assert found == [value for _, _, value in KEEPALIVE]
    on, idle, interval, count, *unacknowledged = found
    assert on
    assert idle + interval * count <= 30
    assert all(milliseconds <= 30_000 for milliseconds in unacknowledged)


class Names:
    """Addresses by name, as a DNS server has them."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: list[str] | OSError = list(addresses)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        if isinstance(self.addresses, OSError):
            raise self.addresses
        return self.addresses


async def looked_up(upstreams: Upstreams) -> list[str]:
    await upstreams.look_up()
    return [upstream.name for upstream in upstreams.all]


def chosen(upstreams: Upstreams) -> set[str]:
    """Return the names that twenty prompts get."""
    found = (upstreams.choose(prefix=str(i).encode()) for i in range(20))
    return {upstream.name for upstream in found if upstream}


def test_each_address_of_a_name_is_an_upstream() -> None:
    names = Names("10.0.0.2", "10.0.0.1", "10.0.0.2", "::1")
    upstreams = Upstreams(["http://127.0.0.1:1", "dns+http://servers:8000/api"], lookup=names)
    assert [upstream.name for upstream in upstreams.all] == ["http://127.0.0.1:1"]
    assert asyncio.run(looked_up(upstreams)) == [
        "http://127.0.0.1:1", "http://10.0.0.1:8000/api", "http://10.0.0.2:8000/api",
        "http://[::1]:8000/api",
    ]  # fmt: skip
    assert names.asked == [("servers", 8000)]
    fixed, found, *_ = upstreams.all
    assert upstreams.home is fixed
    assert (fixed.healthy, found.healthy) == (True, False), "it was not probed"


def test_an_address_that_is_given_twice_is_one_upstream() -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    fixed = "http://10.0.0.1:80/", "http://10.0.0.1"
    upstreams = Upstreams([*fixed, "dns+http://servers", "dns+http://others"], lookup=names)
    [home] = upstreams.all
    assert asyncio.run(looked_up(upstreams)) == ["http://10.0.0.1", "http://10.0.0.2"]
    assert upstreams.all[0] is upstreams.home is home


def test_addresses_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    upstreams = Upstreams(["dns+http://servers"], policy="prefix", lookup=names)
    assert upstreams.home is None
    assert upstreams.choose() is None
    asyncio.run(looked_up(upstreams))
    assert names.asked == [("servers", 80)]
    one, two = upstreams.all
    upstreams.answered(one)
    upstreams.answered(two)
    with two.busy():  # a request under way keeps it
        names.addresses = ["10.0.0.3", "10.0.0.1"]
        assert asyncio.run(looked_up(upstreams)) == ["http://10.0.0.1", "http://10.0.0.3"]
        assert two.running == 1
    assert "upstream http://10.0.0.2 is gone from servers" in caplog.text
    assert upstreams.all[0] is one, "it keeps its state"
    assert chosen(upstreams) == {"http://10.0.0.1"}, "3 was not probed"
    upstreams.answered(upstreams.all[1])
    assert chosen(upstreams) == {"http://10.0.0.1", "http://10.0.0.3"}
    names.addresses = []
    assert asyncio.run(looked_up(upstreams)) == []
    assert upstreams.choose(prefix=b"x") is None


def test_a_change_of_addresses_is_soon_followed_by_a_lookup() -> None:
    """Pods become ready one after the other; a gateway that knows one of them asks again."""

    class Growing(Names):
        async def __call__(self, host: str, port: int) -> list[str]:
            await super().__call__(host, port)
            if len(self.asked) > 1:
                found.set()
            return [f"10.0.0.{number + 1}" for number in range(min(2, len(self.asked)))]

    async def watch() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(200))
        task = asyncio.create_task(upstreams.watch(transport, 3600))
        await asyncio.wait_for(found.wait(), PATIENCE)
        task.cancel()

    found = asyncio.Event()
    upstreams = Upstreams(["dns+http://servers"], lookup=Growing())
    asyncio.run(watch())


def test_a_failing_lookup_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    names = Names("10.0.0.1")
    upstreams = Upstreams(["dns+http://servers"], lookup=names)
    asyncio.run(looked_up(upstreams))
    names.addresses = OSError("no DNS server answers")
    for _ in range(3):
        assert asyncio.run(looked_up(upstreams)) == ["http://10.0.0.1"]
    assert caplog.text.count("cannot look up servers: no DNS server answers") == 1
    names.addresses = ["10.0.0.2"]
    assert asyncio.run(looked_up(upstreams)) == ["http://10.0.0.2"]


def test_the_systems_resolver() -> None:
    assert "127.0.0.1" in asyncio.run(addresses_of("localhost", 80))
    with pytest.raises(socket.gaierror):
        asyncio.run(addresses_of("no-such-name.invalid", 80))


@pytest.mark.parametrize(
    "url",
    ["dns+https://servers", "dns+servers", "dns+", "dns+dns+http://h", "dns+http://u:pw-secret@h",
     f"dns+http://{'x' * 64}", "dns+http://a b", "dns+http://[::1]", "dns+http://-a"],
)  # fmt: skip
def test_names_that_are_none(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Upstreams([url])
    assert "pw-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://x", "http://", "http://h/?q=1", "http://u:pw-secret@h", "//h"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Upstreams([url])
    assert "pw-secret" not in str(caught.value)


def test_a_gateway_closes_idle_connections_long_before_servers_do() -> None:
    """A request that a gateway sends while the server closes the connection is a 502."""
    kept = uvicorn.Config(Upstream(), log_config=None).timeout_keep_alive
    assert "timeout_keep_alive" not in inspect.getsource(listener), "ours keep uvicorn's default"
    assert kept / 2 >= KEPT_SECONDS
