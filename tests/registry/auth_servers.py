"""Certificates and a token server by distribution's specification, made for each run."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

# "ada" with the password "correct horse", by bcrypt.
HTPASSWD = "ada:$2y$04$BImCW5aL/t/pAbzZodxIQeST1kR4kJQcWPFSTRnk9SH218whYzifW\n"
USER, PASSWORD = "ada", "correct horse"
SERVICE, ISSUER = "models.example", "tests"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key: PEM files, and the key to sign with."""

    certificate: Path
    key: Path
    private: rsa.RSAPrivateKey

    @property
    def x5c(self) -> list[str]:
        """The certificate in the form of a token's header."""
        loaded = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        return [base64.b64encode(loaded.public_bytes(serialization.Encoding.DER)).decode()]


def make_pair(folder: Path, name: str, issuer: Pair | None = None, host: str = "") -> Pair:
    """Make a certificate for 127.0.0.1 and `host`: an authority, or one signed by `issuer`."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, signed_by = private, subject
    if issuer is not None:
        parent = x509.load_pem_x509_certificate(issuer.certificate.read_bytes())
        signer, signed_by = issuer.private, parent.subject
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.DNSName(host or "models.invalid"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    key_id = x509.SubjectKeyIdentifier.from_public_key
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(_usage(authority=issuer is None), critical=True)
        .add_extension(key_id(private.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key", private)
    pair.certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    pair.key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pair


def _usage(*, authority: bool) -> x509.KeyUsage:
    """Return the extensions that RFC 5280 requires; Python 3.13 and later insist on them."""
    return x509.KeyUsage(
        digital_signature=True, key_encipherment=not authority, key_cert_sign=authority,
        crl_sign=authority, content_commitment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


@dataclass
class TokenServer:
    """A token server: tokens for ada by password or identity token, pull tokens for everybody.

    Tokens state `expires_in`, and expire `dies_after` seconds after they were made, less the
    `leeway` that registries allow for clocks.
    """

    signer: Pair
    url: str = ""
    expires_in: int = 300
    dies_after: float = 300.0
    leeway: float = 60.0
    identity_token: str = "identity-token-of-ada"
    requests: list[dict[str, list[str]]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def registry_config(self) -> str:
        """Return the part of docker-registry's configuration for this server."""
        settings = {
            "realm": f"{self.url}/token",
            "service": SERVICE,
            "issuer": ISSUER,
            "rootcertbundle": str(self.signer.certificate),
        }
        return f"auth: {json.dumps({'token': settings})}"

    def token(self, scopes: list[str], known: bool) -> str:
        """Return a signed token for those `scopes` that the client may have."""
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":", 2)
            allowed = [a for a in actions.split(",") if known or a == "pull"]
            access.append({"type": kind, "name": name, "actions": allowed})
        now = time.time()
        claims = {
            "iss": ISSUER,
            "sub": USER if known else "",
            "aud": SERVICE,
            "exp": int(now + self.dies_after - self.leeway),
            "nbf": int(now - 600),
            "iat": int(now - 600),
            "jti": str(uuid.uuid4()),
            "access": access,
        }
        headers = {"x5c": self.signer.x5c}
        made = jwt.encode(claims, self.signer.private, algorithm="RS256", headers=headers)
        self.tokens.append(made)
        return made

    def answer(self, method: str, target: str, authorization: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON for one request."""
        query = parse_qs(urlsplit(target).query)
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        known = authorization == f"Basic {pair}"
        scopes = query.get("scope", [])
        if method == "POST":
            query = parse_qs(body.decode())
            known = query.get("refresh_token") == [self.identity_token]
            scopes = query.get("scope", [""])[0].split()
        self.requests.append(query)
        if query.get("service") != [SERVICE] or ((authorization or method == "POST") and not known):
            return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}
        token = self.token(scopes, known)
        key = "access_token" if method == "POST" else "token"
        return 200, {key: token, "expires_in": self.expires_in}


@contextmanager
def token_server(signer: Pair, tls: Pair | None = None, **options: Any) -> Iterator[TokenServer]:
    """Run a token server, over https where `tls` is its certificate."""
    server = TokenServer(signer, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            authorization = self.headers.get("Authorization", "")
            status, value = server.answer(
                self.command, self.path, authorization, self.rfile.read(length)
            )
            raw = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        scheme = "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.certificate, tls.key)
            listening.socket = context.wrap_socket(listening.socket, server_side=True)
            scheme = "https"
        server.url = f"{scheme}://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
