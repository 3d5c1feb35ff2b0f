"""The gateway and the model server over https."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest

from modelpack.http.listener import AppServer
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.gateway.app import GatewayServer, GatewaySettings
from modelpack_server.gateway.protection import Protection
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.cli.running import modelpack
from tests.gateway.servers import unused_url
from tests.registry.auth_servers import Pair, make_pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(params=["gateway", "model server"])
def server(request: pytest.FixtureRequest, authority: Pair, tmp_path: Path) -> AppServer:
    pair = make_pair(tmp_path, "server", authority)
    tls = (pair.certificate, pair.key)
    if request.param == "gateway":
        settings = GatewaySettings((unused_url(),), Protection(), probe_interval=3600.0)
        return GatewayServer(settings, grace=1, tls=tls)
    catalogue = StoreCatalogue(LayoutStore(tmp_path / "store"), EngineConfig(device="cpu"))
    return ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0", grace=1, tls=tls)


def test_https_by_a_certificate(server: AppServer, authority: Pair) -> None:
    trusted = ssl.create_default_context(cafile=str(authority.certificate))
    with server:
        assert server.url.startswith("https://127.0.0.1:")
        with httpx.Client(verify=trusted, trust_env=False) as client:
            assert client.get(f"{server.url}/health").status_code in (200, 503)
        with (
            httpx.Client(trust_env=False) as stranger,
            pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            stranger.get(f"{server.url}/health")


@pytest.mark.parametrize("command", [["serve"], ["gateway", "--upstream", "http://127.0.0.1:1"]])
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--tls-key", __file__], "requires --tls-cert"),
        (["--tls-cert", __file__], "not a certificate and its key"),
    ],
)
def test_files_that_do_not_serve(
    command: list[str], options: list[str], problem: str, tmp_path: Path
) -> None:
    store = ["--store", tmp_path / "store"] if command == ["serve"] else []
    done = modelpack(*command, "--port", "0", *options, *store)
    assert done.code == 2
    assert problem in done.err
