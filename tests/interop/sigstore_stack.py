"""Sigstore's own services on loopback: Fulcio, a CT log (TesseraCT), Rekor 2 and a time stamper.

The keys and certificates are those of a new `PrivateSigstore`, and so is the trusted root; the
issuer of identity tokens is ours too. Sources: sigstore/fulcio, docs/setup.md; sigstore/rekor-tiles
and sigstore/timestamp-authority, README.md; transparency-dev/tesseract, cmd/tesseract/posix.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool
from tests.peers import free_port, require, wait_for_port
from tests.supply.private_sigstore import STAMPS, PrivateSigstore, new_key

TOOLS = ("fulcio", "tesseract/posix", "rekor-server/posix", "timestamp-server", "cosign")
_PATIENCE = 60
_PASSWORD = "a password"
#: The claims of a job in GitHub's documents, "OpenID Connect reference".
_JOB = {
    "job_workflow_ref": "team/model/.github/workflows/release.yml@refs/heads/main",
    "job_workflow_sha": "0" * 40,
    "workflow_ref": "team/model/.github/workflows/release.yml@refs/heads/main",
    "workflow_sha": "0" * 40,
    "workflow": "release",
    "repository": "team/model",
    "repository_id": "1",
    "repository_owner": "team",
    "repository_owner_id": "2",
    "repository_visibility": "public",
    "ref": "refs/heads/main",
    "sha": "0" * 40,
    "event_name": "push",
    "runner_environment": "github-hosted",
    "run_id": "3",
    "run_attempt": "1",
}
#: The timestamp authority always binds this port, for metrics, and ends where it cannot.
_METRICS = 2112


def sigstore_tool(name: str) -> Path:
    """Return the path of one of `TOOLS`, built from its Go module."""
    require("go")
    return build_go_tool(ROOT / "tests" / "interop" / "sigstore_services", ROOT / ".cache", name)


@dataclass
class Issuer:
    """An issuer of identity tokens at `url`."""

    url: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    def token(self, email: str, verified: bool = True) -> str:
        """Return a token of a user."""
        return self._token(email, {"email": email, "email_verified": verified})

    def _token(self, subject: str, claims: dict[str, Any]) -> str:
        now = int(time.time())
        usual = {"iss": self.url, "sub": subject, "aud": "sigstore", "iat": now, "exp": now + 300}
        return jwt.encode(usual | claims, self.key, "ES256")

    def document(self, path: str) -> dict[str, Any]:
        """Return the response to a GET (OpenID Connect Discovery 1.0, 4; RFC 7517).

        Under /job it is the token of a job of GitHub Actions, for the audience sigstore.
        """
        if path.startswith("/job"):
            return {"value": self._token("repo:team/model:ref:refs/heads/main", _JOB)}
        if path == "/keys":
            return {
                "keys": [jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key(), as_dict=True)]
            }
        return {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/keys",
            "authorization_endpoint": f"{self.url}/none",
            "token_endpoint": f"{self.url}/none",
            "id_token_signing_alg_values_supported": ["ES256"],
        }


@dataclass(frozen=True)
class Stack:
    """The addresses of the services, and the trusted root of their clients.

    `issuer` issues the tokens of users, `jobs` those of jobs of GitHub Actions.
    """

    issuer: Issuer
    jobs: Issuer
    fulcio: str
    rekor: str
    stamps: str
    trusted_root: dict[str, Any]

    def signing_config(self) -> dict[str, Any]:
        def service(url: str, version: int = 1) -> dict[str, Any]:
            started = {"start": "2026-01-01T00:00:00Z"}
            return {
                "url": url, "majorApiVersion": version, "validFor": started,
                "operator": "sigstore.invalid",
            }  # fmt: skip

        return {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": [service(self.fulcio)],
            "oidcUrls": [service(self.issuer.url)],
            "rekorTlogUrls": [service(self.rekor, 2)],
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaUrls": [service(self.stamps)],
            "tsaConfig": {"selector": "ANY"},
        }

    def write(self, directory: Path) -> None:
        """Write `config.json`, the client trust configuration, and its parts for cosign."""
        root, signing = self.trusted_root, self.signing_config()
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": root,
            "signingConfig": signing,
        }
        for name, value in (("config", config), ("root", root), ("signing", signing)):
            (directory / f"{name}.json").write_text(json.dumps(value))


@contextmanager
def issuing() -> Iterator[Issuer]:
    """Serve an issuer of identity tokens within the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            raw = json.dumps(issuer.document(self.path)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        issuer = Issuer(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield issuer
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def running(directory: Path) -> Iterator[Stack]:
    """Run the services within the context; their logs are in `directory`."""
    keys = PrivateSigstore()
    with ExitStack() as stack:
        issuer, jobs = stack.enter_context(issuing()), stack.enter_context(issuing())
        ports = [free_port() for _ in range(8)]
        _write_keys(keys, directory)
        issuers = {
            one.url: {"IssuerURL": one.url, "ClientID": "sigstore", "Type": kind}
            for one, kind in ((issuer, "email"), (jobs, "github-workflow"))
        }
        (directory / "fulcio.json").write_text(json.dumps({"OIDCIssuers": issuers}))

        def start(tool: str, port: int, *arguments: str) -> str:
            log = stack.enter_context((directory / f"{tool.replace('/', '-')}.log").open("wb"))
            command = [sigstore_tool(tool), *arguments]
            process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
            stack.callback(_end, process)
            wait_for_port(port, process, _PATIENCE)
            return f"http://127.0.0.1:{port}"

        ct = start(
            "tesseract/posix", ports[0], f"--http_endpoint=127.0.0.1:{ports[0]}",
            "--origin=ct.invalid", "--private_key=ct.pem", "--roots_pem_file=root.pem",
            "--storage_dir=ct", "--checkpoint_interval=200ms",
        )  # fmt: skip
        fulcio = start(
            "fulcio", ports[1], "serve", "--config-path=fulcio.json",
            "--ca=fileca", "--fileca-cert=fulcio-chain.pem", "--fileca-key=fulcio.pem",
            f"--fileca-key-passwd={_PASSWORD}", "--fileca-watch=false",
            f"--ct-log-url={ct}", "--ct-log-origin=ct.invalid",
            "--host=127.0.0.1", f"--port={ports[1]}",
            "--grpc-host=127.0.0.1", f"--grpc-port={ports[2]}", f"--metrics-port={ports[3]}",
            f"--legacy-unix-domain-socket=@modelpack-{ports[2]}",
        )  # fmt: skip
        rekor = start(
            "rekor-server/posix", ports[4], "serve", "--hostname=sigstore.invalid",
            f"--http-port={ports[4]}", f"--grpc-port={ports[5]}",
            f"--http-metrics-port={ports[6]}", "--storage-dir=rekor",
            "--signer-filepath=rekor.pem", "--checkpoint-interval=200ms",
        )  # fmt: skip
        stack.enter_context(_alone(_METRICS))
        stamps = start(
            "timestamp-server", ports[7], "serve", "--host=127.0.0.1", f"--port={ports[7]}",
            "--timestamp-signer=file", "--file-signer-key-path=times.pem",
            "--certificate-chain-path=times-chain.pem", "--disable-ntp-monitoring",
        )  # fmt: skip
        yield Stack(issuer, jobs, fulcio, rekor, f"{stamps}{STAMPS}", keys.trusted_root())


@contextmanager
def _alone(port: int) -> Iterator[None]:
    """Wait until no other test on this machine needs a port, by a socket name for all to see."""
    deadline = time.monotonic() + _PATIENCE
    with socket.socket(socket.AF_UNIX) as lock:
        while True:
            try:
                lock.bind(f"\0modelpack-port-{port}")
            except OSError:
                assert time.monotonic() < deadline, f"another test keeps port {port}"
                time.sleep(0.1)
            else:
                break
        yield


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # Some wait a minute or more for idle connections.
    process.wait(timeout=20)


def _write_keys(keys: PrivateSigstore, directory: Path) -> None:
    plain, password = NoEncryption(), BestAvailableEncryption(_PASSWORD.encode())
    for name, key, encryption in (
        ("ct", keys.certificates, plain),
        ("fulcio", keys.fulcio, password),
        ("rekor", keys.rekor, plain),
        ("times", keys.times, plain),
    ):
        # TesseraCT reads no PKCS #8, Fulcio no other that is encrypted.
        form = PrivateFormat.PKCS8 if encryption is password else PrivateFormat.TraditionalOpenSSL
        (directory / f"{name}.pem").write_bytes(key.private_bytes(Encoding.PEM, form, encryption))
    root, fulcio, clock = (
        one.public_bytes(Encoding.PEM) for one in (keys.root, keys.intermediate, keys.clock)
    )
    (directory / "root.pem").write_bytes(root)
    (directory / "fulcio-chain.pem").write_bytes(fulcio + root)
    (directory / "times-chain.pem").write_bytes(clock + root)
