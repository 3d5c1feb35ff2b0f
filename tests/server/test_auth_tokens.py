"""Bearer tokens: their signatures and permissions."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from modelpack.errors import AuthError, UsageError
from modelpack.registry import Credential
from modelpack.registry_server import RegistryServer
from modelpack.registry_server.auth import BearerTokens, TokenSettings
from modelpack.storage import Outcome
from tests.registry.auth_servers import (
    ISSUER,
    SERVICE,
    Pair,
    TokenServer,
    make_pair,
    token_server,
)
from tests.registry.sources import Content, read_all
from tests.server.test_auth import ADA, client_of, serving


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("signer"), "signer")


@pytest.fixture
def tokened(tmp_path: Path, signer: Pair) -> Iterator[tuple[RegistryServer, TokenServer]]:
    with token_server(signer) as tokens:
        settings = TokenSettings(f"{tokens.url}/token", SERVICE, ISSUER, signer.certificate)
        with serving(tmp_path, BearerTokens(settings)) as server:
            yield server, tokens


def test_tokens(tokened: tuple[RegistryServer, TokenServer]) -> None:
    server, _ = tokened
    with client_of(server, ADA, name="team/model") as client:
        assert client.write(b"weights") is Outcome.WRITTEN
        other = client.registry.repository("team/other")
        assert other.mount_blob(Content(b"weights").descriptor, client.repository)
        client.repository.delete_blob(Content(b"weights").descriptor.digest)
        client.write(b"weights")
    with client_of(server, None, name="team/model") as stranger:
        assert read_all(stranger.repository, Content(b"weights").descriptor) == b"weights"
        with pytest.raises(AuthError, match="none are stored for it"):
            stranger.write(b"other")
    with (
        client_of(server, Credential(identity_token="identity-token-of-ada")) as client,
    ):
        assert client.write(b"more") is Outcome.WRITTEN


def ask(server: RegistryServer, token: str, path: str, method: str = "GET") -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.request(method, server.url + path, headers=headers, timeout=10)


def test_what_a_token_allows(tokened: tuple[RegistryServer, TokenServer]) -> None:
    server, tokens = tokened
    pull = tokens.token(["repository:ai/smol:pull"], known=False)
    for path, status in (
        ("/v2/", 200),
        ("/v2/ai/smol/manifests/v1", 404),
        ("/v2/smol/manifests/v1", 404),  # an alias of the same repository
        ("/v2/docker.io/ai/smol/manifests/v1", 404),
        ("/v2/ai/other/manifests/v1", 401),
        ("/v2/other/manifests/v1", 401),
        ("/v2/ai/smol/blobs/uploads/0", 401),
        ("/v2/_catalog", 401),
        ("/metrics", 200),
    ):
        assert ask(server, pull, path).status_code == status, path
    refused = ask(server, pull, "/v2/smol/blobs/uploads/?mount=x&from=team/secret", "POST")
    assert refused.status_code == 401
    said = refused.headers["WWW-Authenticate"]
    assert 'error="insufficient_scope"' in said
    assert 'scope="repository:ai/smol:pull,push repository:team/secret:pull"' in said
    assert ask(server, pull, "/v2/ai/smol/manifests/v1", "DELETE").status_code == 401
    catalog = tokens.token(["registry:catalog:*"], known=True)
    assert ask(server, catalog, "/v2/_catalog").status_code == 200


def test_tokens_that_are_none(
    tokened: tuple[RegistryServer, TokenServer], signer: Pair, tmp_path: Path
) -> None:
    server, tokens = tokened
    good = tokens.token([], known=True)
    assert ask(server, good, "/v2/").status_code == 200
    claims = jwt.decode(good, options={"verify_signature": False})
    public = signer.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    stranger = make_pair(tmp_path, "stranger")

    def made(key: Any = signer.private, algorithm: str = "RS256", **changed: Any) -> str:
        kept = {k: v for k, v in (claims | changed).items() if v is not None}
        return jwt.encode(kept, key, algorithm=algorithm, headers={"x5c": stranger.x5c})

    assert ask(server, made(), "/v2/").status_code == 200
    head, payload, signature = good.split(".")
    bad = [
        "",
        "x",
        "a.b.c",
        f"{head}.{payload}.",
        f"{head}.{payload}.{signature[:-4]}AAAA",
        made(stranger.private),
        made(ec.generate_private_key(ec.SECP256R1()), "ES256"),
        made(None, "none"),
        _signed_by_public_key(claims, public),
        made(exp=int(time.time()) - 61),
        made(nbf=int(time.time()) + 300),
        made(exp=None),
        made(iss="others"),
        made(iss=None),
        made(aud="others"),
        made(aud=None),
    ]
    for token in bad:
        answer = ask(server, token, "/v2/")
        assert answer.status_code == 401, token
        assert f'service="{SERVICE}"' in answer.headers["WWW-Authenticate"]


def _signed_by_public_key(claims: dict[str, Any], public: bytes) -> str:
    """Return a token signed by an HMAC with the public key as its secret."""

    def encoded(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    head = encoded(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    signed = f"{head}.{encoded(json.dumps(claims).encode())}"
    return f"{signed}.{encoded(hmac.new(public, signed.encode(), hashlib.sha256).digest())}"


def test_other_keys(tmp_path: Path, signer: Pair) -> None:
    private = ec.generate_private_key(ec.SECP384R1())
    pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(signer.certificate.read_bytes() + pem)
    guard = BearerTokens(TokenSettings("https://t.example/", SERVICE, ISSUER, bundle))
    claims = {"iss": ISSUER, "aud": SERVICE, "exp": int(time.time()) + 60}
    with serving(tmp_path, guard) as server:
        for key, algorithm in ((private, "ES384"), (signer.private, "PS256")):
            token = jwt.encode(claims, key, algorithm=algorithm)
            assert ask(server, token, "/v2/").status_code == 200
    for content in (b"", b"text", signer.key.read_bytes()):
        bundle.write_bytes(content)
        with pytest.raises(UsageError, match="contains"):
            BearerTokens(TokenSettings("https://t.example/", SERVICE, ISSUER, bundle))
