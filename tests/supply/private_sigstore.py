"""A Sigstore of its own: Fulcio, a log of certificates (CT), Rekor and a time-stamp authority.

It issues certificates with signed certificate timestamps, logs signatures with inclusion proofs,
checkpoints and promises as Rekor 1 or, with time stamps instead of promises, as Rekor 2, and gives
the trusted root that clients verify them with. `serving` puts the HTTP interfaces in front of it.
Sources: sigstore/fulcio, docs/certificate-specification.md and oid-info.md; RFC 6962, 2.1 (tree),
3.2 (SCT) and 3.3; RFC 3161; sigstore/rekor, openapi.yaml; sigstore/rekor-tiles, api/proto;
transparency-dev/formats, log/README.md; sigstore/protobuf-specs, sigstore_trustroot.proto and
sigstore_bundle.proto.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import jwt
from asn1crypto import algos, cms, core, tsp
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from modelpack.trust.sigstore import BUNDLE, PAYLOAD_TYPE, Statement, pre_authentication

ISSUER = "https://token.actions.githubusercontent.com"
IDENTITY = "https://github.com/team/model/.github/workflows/release.yml@refs/heads/main"
_FULCIO = "1.3.6.1.4.1.57264.1"
_SCT_LIST = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_ORIGIN = "rekor.invalid - 1"
_P256 = "PKIX_ECDSA_P256_SHA_256"
_SECRET = "the key of the issuer of tokens, thirty-two bytes"


def text(content: bytes) -> str:
    """Return the base64 of `content`."""
    return base64.b64encode(content).decode()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_der(key)).digest()


def _sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    return key.sign(content, ec.ECDSA(hashes.SHA256()))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _usage(*, signs: bool, certifies: bool) -> x509.KeyUsage:
    return x509.KeyUsage(signs, False, False, False, False, certifies, certifies, False, False)


def _leaf(content: bytes) -> bytes:
    return hashlib.sha256(b"\0" + content).digest()


def _root(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + _root(leaves[:split]) + _root(leaves[split:])).digest()


def _path(index: int, leaves: list[bytes]) -> list[bytes]:
    """Return the inclusion proof of a leaf."""
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if index < split:
        return [*_path(index, leaves[:split]), _root(leaves[split:])]
    return [*_path(index - split, leaves[split:]), _root(leaves[:split])]


@dataclass
class PrivateSigstore:
    """The keys of a Sigstore, and the leaves of its log of signatures."""

    fulcio: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    authority: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    certificates: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    rekor: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    times: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    leaves: list[bytes] = field(default_factory=lambda: [_leaf(b"first"), _leaf(b"second")])
    started: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(days=30))

    def __post_init__(self) -> None:
        self.root = self._authority("root", self.authority, None)
        self.intermediate = self._authority("fulcio", self.fulcio, self.root)
        self.clock = self._authority("times", self.times, self.root, stamps=True)

    def _authority(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Certificate | None,
        *,
        stamps: bool = False,
    ) -> x509.Certificate:
        by = issuer.subject if issuer is not None else _name(name)
        builder = (
            x509.CertificateBuilder(by, _name(name), key.public_key(), x509.random_serial_number())
            .not_valid_before(self.started)
            .not_valid_after(self.started + timedelta(days=3650))
            .add_extension(
                x509.BasicConstraints(not stamps, None if stamps else 0 if issuer else 1), True
            )
            .add_extension(_usage(signs=stamps, certifies=not stamps), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public_key()),
                critical=False,
            )
        )
        if issuer is not None:
            oids = x509.ExtendedKeyUsageOID
            usage = x509.ExtendedKeyUsage([oids.TIME_STAMPING if stamps else oids.CODE_SIGNING])
            builder = builder.add_extension(usage, critical=stamps)
        return builder.sign(self.authority, hashes.SHA256())

    def certificate(
        self,
        key: ec.EllipticCurvePublicKey,
        identity: str | list[x509.GeneralName] = IDENTITY,
        issuer: str | None = ISSUER,
        *,
        start: datetime | None = None,
        older_issuer: str | None = None,
        timestamp: str = "good",
    ) -> x509.Certificate:
        """Return a certificate of ten minutes; `timestamp` is "good", "bad" or "none".

        `older_issuer` is the value of the deprecated extension, by default the same issuer.
        """
        names = identity if isinstance(identity, list) else [_san(identity)]
        start = start or datetime.now(UTC) - timedelta(seconds=5)
        builder = (
            x509.CertificateBuilder(
                self.intermediate.subject, x509.Name([]), key, x509.random_serial_number()
            )
            .not_valid_before(start)
            .not_valid_after(start + timedelta(minutes=10))
            .add_extension(_usage(signs=True, certifies=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.fulcio.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
        )
        older = issuer if older_issuer is None else older_issuer
        values = {"1": older, "8": issuer}
        for oid, value in values.items():
            if value is None:
                continue
            raw = value.encode()
            raw = b"\x0c" + bytes([len(raw)]) + raw if oid == "8" else raw
            extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{_FULCIO}.{oid}"), raw)
            builder = builder.add_extension(extension, critical=False)
        logged = builder.sign(self.fulcio, hashes.SHA256())
        if timestamp == "none":
            return logged
        stamp = self._timestamp(logged.tbs_certificate_bytes, start)
        if timestamp == "bad":
            stamp = stamp[:-1] + bytes([stamp[-1] ^ 1])
        listed = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        value = b"\x04" + bytes([len(listed)]) + listed  # an OCTET STRING of less than 128 bytes
        assert len(listed) < 128
        extension = x509.UnrecognizedExtension(_SCT_LIST, value)
        return builder.add_extension(extension, critical=False).sign(self.fulcio, hashes.SHA256())

    def _timestamp(self, precertificate: bytes, at: datetime) -> bytes:
        """Return the signed timestamp of the log of certificates."""
        milliseconds = int(at.timestamp()) * 1000
        entry = _id(self.fulcio) + len(precertificate).to_bytes(3, "big") + precertificate
        signed = struct.pack("!BBQH", 0, 0, milliseconds, 1) + entry + struct.pack("!H", 0)
        signature = _sign(self.certificates, signed)
        head = struct.pack("!B32sQH", 0, _id(self.certificates), milliseconds, 0)
        return head + struct.pack("!BBH", 4, 3, len(signature)) + signature

    def log(self, body: Any, at: datetime | None = None) -> dict[str, Any]:
        """Log an entry of Rekor 1; return it as an entry of a bundle."""
        entry, at = self.log_untimed(body), at or datetime.now(UTC)
        promised = {
            "body": entry["canonicalizedBody"],
            "integratedTime": int(at.timestamp()),
            "logID": _id(self.rekor).hex(),
            "logIndex": int(entry["logIndex"]),
        }
        signature = text(_sign(self.rekor, _canonical(promised)))
        return entry | {
            "integratedTime": str(promised["integratedTime"]),
            "inclusionPromise": {"signedEntryTimestamp": signature},
        }

    def log_untimed(self, body: Any) -> dict[str, Any]:
        """Log an entry of Rekor 2; return it as an entry of a bundle."""
        raw, index, log_id = _canonical(body), len(self.leaves), _id(self.rekor)
        self.leaves.append(_leaf(raw))
        root = _root(self.leaves)
        note = f"{_ORIGIN}\n{len(self.leaves)}\n{text(root)}\n"
        signature = text(log_id[:4] + _sign(self.rekor, note.encode()))
        return {
            "logIndex": str(index),
            "logId": {"keyId": text(log_id)},
            "kindVersion": {"kind": body["kind"], "version": body["apiVersion"]},
            "inclusionProof": {
                "logIndex": str(index),
                "rootHash": text(root),
                "treeSize": str(len(self.leaves)),
                "hashes": [text(one) for one in _path(index, self.leaves)],
                "checkpoint": {
                    "envelope": f"{note}\n\N{EM DASH} {_ORIGIN.split()[0]} {signature}\n"
                },
            },
            "canonicalizedBody": text(raw),
        }

    def stamp(self, imprint: bytes, at: datetime | None = None, nonce: int = 1) -> bytes:
        """Return a time-stamp response for the SHA-256 `imprint` of a signature."""
        at = (at or datetime.now(UTC)).replace(microsecond=0)
        own = asn1_x509.Certificate.load(self.clock.public_bytes(Encoding.DER))
        sha256 = algos.DigestAlgorithm({"algorithm": "sha256"})
        info = tsp.TSTInfo(
            {
                "version": "v1",
                "policy": "1.3.6.1.4.1.57264.2",
                "message_imprint": {"hash_algorithm": sha256, "hashed_message": imprint},
                "serial_number": x509.random_serial_number(),
                "gen_time": at,
                "nonce": nonce,
            }
        ).dump()
        certificate = {"certs": [{"cert_hash": hashlib.sha256(own.dump()).digest()}]}
        attributes = cms.CMSAttributes(
            [
                {"type": "content_type", "values": ["tst_info"]},
                {"type": "message_digest", "values": [hashlib.sha256(info).digest()]},
                {
                    "type": "signing_certificate_v2",
                    "values": [tsp.SigningCertificateV2(certificate)],
                },
            ]
        )
        signer = {
            "version": "v1",
            "sid": {
                "issuer_and_serial_number": {
                    "issuer": own.issuer, "serial_number": own.serial_number,
                }
            },
            "digest_algorithm": sha256,
            "signed_attrs": attributes,
            "signature_algorithm": {"algorithm": "sha256_ecdsa"},
            "signature": _sign(self.times, attributes.dump()),
        }  # fmt: skip
        signed = {
            "version": "v3",
            "digest_algorithms": [sha256],
            "encap_content_info": {
                "content_type": "tst_info",
                "content": core.ParsableOctetString(info),
            },
            "certificates": [own],
            "signer_infos": [signer],
        }
        token = {"content_type": "signed_data", "content": cms.SignedData(signed)}
        status = {"status": "granted"}
        response = tsp.TimeStampResp({"status": status, "time_stamp_token": token})
        dumped: bytes = response.dump()
        return dumped

    def bundle(
        self,
        statement: Statement | bytes,
        at: datetime | None = None,
        *,
        rekor: int = 1,
        **certificate: Any,
    ) -> dict[str, Any]:
        """Return a bundle with the signed statement, logged `at` that time by `rekor` 1 or 2.

        The certificate of its new key is made with the further arguments.
        """
        key = new_key()
        payload = statement if isinstance(statement, bytes) else statement.encode()
        made = self.certificate(key.public_key(), **certificate)
        signature = text(_sign(key, pre_authentication(PAYLOAD_TYPE, payload)))
        envelope = {
            "payload": text(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": signature}],
        }
        pem, der = (text(made.public_bytes(form)) for form in (Encoding.PEM, Encoding.DER))
        material: dict[str, Any] = {"certificate": {"rawBytes": der}}
        if rekor == 1:
            material["tlogEntries"] = [self.log(dsse_entry(envelope, pem), at)]
        else:
            digest = hashlib.sha256(pre_authentication(PAYLOAD_TYPE, payload)).digest()
            verifier = {"keyDetails": _P256, "x509Certificate": {"rawBytes": der}}
            entry = hashed_entry(text(digest), {"content": signature, "verifier": verifier})
            stamp = self.stamp(hashlib.sha256(base64.b64decode(signature)).digest(), at)
            material["tlogEntries"] = [self.log_untimed(entry)]
            material["timestampVerificationData"] = {
                "rfc3161Timestamps": [{"signedTimestamp": text(stamp)}]
            }
        return {
            "mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope,
        }  # fmt: skip

    def trusted_root(self, url: str = "https://sigstore.invalid") -> dict[str, Any]:
        """Return the trusted root of the clients of this Sigstore."""
        period = {"start": self.started.strftime("%Y-%m-%dT%H:%M:%SZ")}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {"rawBytes": text(_der(key)), "keyDetails": _P256, "validFor": period}
            return {
                "baseUrl": url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": public,
                "logId": {"keyId": text(_id(key))},
            }

        def authority(*chain: x509.Certificate) -> dict[str, Any]:
            raw = [{"rawBytes": text(one.public_bytes(Encoding.DER))} for one in chain]
            return {
                "subject": {"organization": "sigstore.invalid", "commonName": "any"},
                "uri": url,
                "certChain": {"certificates": raw},
                "validFor": period,
            }

        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor)],
            "certificateAuthorities": [authority(self.intermediate, self.root)],
            "ctlogs": [log(self.certificates)],
            "timestampAuthorities": [authority(self.clock, self.root)],
        }

    def write_root(self, path: Path) -> Path:
        path.write_text(json.dumps(self.trusted_root()))
        return path


def dsse_entry(envelope: Mapping[str, Any], certificate: str) -> dict[str, Any]:
    """Return the entry of a log for an envelope; `certificate` is the base64 of its PEM."""
    payload = base64.b64decode(envelope["payload"])
    signatures = [
        {"signature": one["sig"], "verifier": certificate} for one in envelope["signatures"]
    ]
    return {
        "apiVersion": "0.0.1",
        "kind": "dsse",
        "spec": {
            "envelopeHash": _sha256(_canonical(envelope)),
            "payloadHash": _sha256(payload),
            "signatures": signatures,
        },
    }


def hashed_entry(digest: str, signature: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of Rekor 2 for the signature of what has this digest, in base64."""
    data = {"algorithm": "SHA2_256", "digest": digest}
    return {
        "apiVersion": "0.0.2",
        "kind": "hashedrekord",
        "spec": {"hashedRekordV002": {"data": data, "signature": dict(signature)}},
    }


def _sha256(content: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}


def _san(identity: str) -> x509.GeneralName:
    kind = x509.UniformResourceIdentifier if ":" in identity else x509.RFC822Name
    return kind(identity)


CERTIFICATES, ENTRIES = "/api/v2/signingCert", "/api/v1/log/entries"
ENTRIES_2, STAMPS = "/api/v2/log/entries", "/api/v1/timestamp"


def token(identity: str = IDENTITY, issuer: str = ISSUER, **claims: Any) -> str:
    """Return a token that the served Fulcio accepts; `claims` replace the usual ones."""
    now = int(datetime.now(UTC).timestamp())
    values = {"iss": issuer, "sub": identity, "aud": "sigstore"}
    claims = {"email": identity, "email_verified": True, **claims}
    times = {"iat": now, "nbf": now - 60, "exp": now + 300}
    return jwt.encode({**values, **times, **claims}, _SECRET)


@dataclass
class Served:
    """The HTTP interfaces of a Sigstore at `url`; `fails` answers requests to a path by a status.

    Requests to the paths in `silent` get no response before the server ends.
    `rekor` is the version of Rekor in the configuration of clients; 2 comes with time stamps.
    `requests` are the paths of all requests.
    """

    sigstore: PrivateSigstore
    url: str
    rekor: int = 1
    requests: list[str] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    over: Event = field(default_factory=Event)

    def signing_config(self) -> dict[str, Any]:
        start = self.sigstore.started.strftime("%Y-%m-%dT%H:%M:%SZ")
        service = {
            "url": self.url,
            "majorApiVersion": 1,
            "validFor": {"start": start},
            "operator": "sigstore.invalid",
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": [service],
            "oidcUrls": [service],
            "rekorTlogUrls": [{**service, "majorApiVersion": self.rekor}],
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaUrls": [{**service, "url": f"{self.url}{STAMPS}"}] if self.rekor == 2 else [],
            "tsaConfig": {"selector": "ANY"},
        }

    def write_config(self, path: Path) -> Path:
        """Write the client trust configuration of this instance."""
        value = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.sigstore.trusted_root(self.url),
            "signingConfig": self.signing_config(),
        }
        path.write_text(json.dumps(value))
        return path

    def certify(self, body: Any, bearer: str) -> tuple[int, Any]:
        """Answer a request for a certificate (POST /api/v2/signingCert)."""
        try:
            claims = jwt.decode(bearer, _SECRET, algorithms=["HS256"], audience="sigstore")
        except jwt.InvalidTokenError as error:
            return 401, {"code": 16, "message": f"the token is not accepted: {error}"}
        if "certificateSigningRequest" in body:
            pem = base64.b64decode(body["certificateSigningRequest"])
            key = x509.load_pem_x509_csr(pem).public_key()
        else:
            pem = body["publicKeyRequest"]["publicKey"]["content"].encode()
            key = load_pem_public_key(pem)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        made = self.sigstore.certificate(key, claims["sub"], claims["iss"])
        chain = (made, self.sigstore.intermediate, self.sigstore.root)
        pems = [one.public_bytes(Encoding.PEM).decode() for one in chain]
        return 200, {"signedCertificateEmbeddedSct": {"chain": {"certificates": pems}}}

    def add(self, body: Any) -> tuple[int, Any]:
        """Answer a new entry of the log (POST /api/v1/log/entries)."""
        if body.get("kind") != "dsse":
            return 400, {"code": 400, "message": f"unsupported entry: {body.get('kind')}"}
        content = body["spec"]["proposedContent"]
        entry = dsse_entry(json.loads(content["envelope"]), content["verifiers"][0])
        logged = self.sigstore.log(entry)
        proof, raw = logged["inclusionProof"], base64.b64decode(logged["canonicalizedBody"])
        tree = {
            "checkpoint": proof["checkpoint"]["envelope"],
            "hashes": [base64.b64decode(one).hex() for one in proof["hashes"]],
            "logIndex": int(proof["logIndex"]),
            "rootHash": base64.b64decode(proof["rootHash"]).hex(),
            "treeSize": int(proof["treeSize"]),
        }
        value = {
            "body": text(raw),
            "integratedTime": int(logged["integratedTime"]),
            "logID": base64.b64decode(logged["logId"]["keyId"]).hex(),
            "logIndex": int(logged["logIndex"]),
            "verification": {
                "inclusionProof": tree,
                "signedEntryTimestamp": logged["inclusionPromise"]["signedEntryTimestamp"],
            },
        }
        return 201, {_leaf(raw).hex(): value}

    def add_hashed(self, body: Any) -> tuple[int, Any]:
        """Answer a new entry of Rekor 2 (POST /api/v2/log/entries)."""
        wanted = body["hashedRekordRequestV002"]
        return 201, self.sigstore.log_untimed(hashed_entry(wanted["digest"], wanted["signature"]))

    def stamp(self, query: bytes) -> bytes:
        """Answer a request for a time stamp (RFC 3161, 3.4)."""
        asked = tsp.TimeStampReq.load(query).native
        imprint: bytes = asked["message_imprint"]["hashed_message"]
        return self.sigstore.stamp(imprint, nonce=asked["nonce"])


@contextmanager
def serving(sigstore: PrivateSigstore, rekor: int = 1) -> Iterator[Served]:
    """Serve Fulcio, Rekor 1 or 2 and the tokens of a CI job on loopback within the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # GET of the token of a job of GitHub Actions
            served.requests.append(self.path)
            if self.path == "/.well-known/openid-configuration":  # asked for, and not used
                names = ("authorization_endpoint", "token_endpoint")
                self._reply(200, dict.fromkeys(names, f"{served.url}/none"))
                return
            self._reply(200, {"value": token()})

        def do_POST(self) -> None:
            served.requests.append(self.path)
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path in served.silent:
                served.over.wait()
                self.close_connection = True
                return
            if self.path in served.fails:
                message = f"it fails: {self.headers.get('Authorization')}"
                self._reply(served.fails[self.path], {"code": 1, "message": message})
                return
            if self.path == STAMPS:
                self._send(200, served.stamp(raw), {"Content-Type": "application/timestamp-reply"})
                return
            body = json.loads(raw)
            if self.path == CERTIFICATES:
                bearer = self.headers["Authorization"].removeprefix("Bearer ")
                self._reply(*served.certify(body, bearer))
            elif self.path == ENTRIES_2:
                self._reply(*served.add_hashed(body))
            elif self.path == ENTRIES:
                status, value = served.add(body)
                self._reply(status, value, {"ETag": next(iter(value))})  # the entry's name
            else:
                self._reply(404, {"code": 404, "message": self.path})

        def _reply(self, status: int, value: Any, headers: Mapping[str, str] = {}) -> None:
            raw = json.dumps(value).encode()
            self._send(status, raw, {"Content-Type": "application/json", **headers})

        def _send(self, status: int, raw: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, header in headers.items():
                self.send_header(name, header)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Served(sigstore, f"http://127.0.0.1:{server.server_port}", rekor)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            served.over.set()
            server.shutdown()
            thread.join()
