"""A token of SoftHSM with keys, and the URIs of these keys."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.peers import missing, require

TOKEN, PIN = "the team", "13579-a-pin"
KEYS = {
    "p256": ec.SECP256R1(),
    "p384": ec.SECP384R1(),
    "p521": ec.SECP521R1(),
    "k256": ec.SECP256K1(),
}


@dataclass(frozen=True)
class SoftHSM:
    """The token `TOKEN` in a directory, with the keys `KEYS` and `rsa`."""

    directory: Path
    module: Path
    keys: dict[str, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey]

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a program that uses the token, with the PIN."""
        return {
            "SOFTHSM2_CONF": str(self.directory / "softhsm2.conf"),
            "COSIGN_PKCS11_MODULE_PATH": str(self.module),
            "COSIGN_PKCS11_PIN": PIN,
        }

    def uri(self, key: str = "p256", **query: str) -> str:
        more = {"module-path": str(self.module), **query}
        asked = "&".join(f"{name}={value}" for name, value in more.items())
        return f"pkcs11:token=the%20team;object={key}?{asked}"

    def configure(self, *lines: str) -> None:
        """Write the configuration of SoftHSM."""
        (self.directory / "softhsm2.conf").write_text(
            f"directories.tokendir = {self.directory / 'tokens'}\n"
            "objectstore.backend = file\nlog.level = ERROR\n" + "".join(f"{one}\n" for one in lines)
        )


def make_token(directory: Path) -> SoftHSM:
    """Return a new token; skip the test without SoftHSM."""
    program = require("softhsm2-util")
    modules = [
        *Path("/usr/lib").glob("*/softhsm/libsofthsm2.so"),
        *Path("/usr/lib").glob("softhsm/libsofthsm2.so"),
    ]
    if not modules:
        missing("the library of softhsm2 is not installed")
    keys: dict[str, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey] = {
        name: ec.generate_private_key(curve) for name, curve in KEYS.items()
    }
    keys["rsa"] = rsa.generate_private_key(65537, 2048)
    made = SoftHSM(directory, modules[0], keys)
    (directory / "tokens").mkdir(parents=True)
    made.configure()

    def run(*arguments: str) -> None:
        environment = {**os.environ, **made.environment}
        done = subprocess.run(
            [program, "--module", str(made.module), *arguments],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"softhsm2-util: {done.stdout}{done.stderr}")

    for label in (TOKEN, "another"):
        run("--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "a-so-pin")
    for at, (name, key) in enumerate(keys.items(), 1):
        pem = directory / "key.pem"
        pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        run("--import", str(pem), "--token", TOKEN, "--label", name, "--id", f"{at:02x}",
            "--pin", PIN)  # fmt: skip
        pem.unlink()
    return made
