"""Bearer tokens that a token server signed: JSON Web Tokens, as distribution's specification says.

RFC 7519 and RFC 8725: the algorithm goes by the key and never by the token alone, and issuer,
audience and end are checked. PyJWT does the work; it comes with `pip install 'modelpack[tokens]'`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelpack.errors import UsageError
from modelpack.server.access import Needs

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    Key = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

_LEEWAY: Final = 60  # seconds that clocks may differ, as in distribution
_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_MARK: Final = b"-----BEGIN "


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Who signs tokens: `certificates` is a PEM file of certificates or public keys.

    `realm` is the URL that clients are sent to; tokens are for `service` and by `issuer`.
    """

    realm: str
    service: str
    issuer: str
    certificates: Path


class TokenVerifier:
    """Checks tokens against the keys of a token server."""

    def __init__(self, settings: TokenSettings) -> None:
        """Raises `UsageError` for unusable keys, or where PyJWT is missing."""
        try:
            import jwt
            from cryptography.hazmat.primitives import serialization  # noqa: F401
        except ImportError:
            raise UsageError(
                "bearer tokens need PyJWT and cryptography, which are not installed",
                hint="pip install 'modelpack[tokens]'",
            ) from None
        self._jwt = jwt
        self._settings = settings
        self._keys = _read_keys(settings.certificates)

    def allowed(self, token: str) -> Needs | None:
        """Return what `token` allows; None if it is not valid."""
        for key, algorithms in self._keys:
            try:
                claims = self._jwt.decode(
                    token,
                    key,
                    algorithms=list(algorithms),
                    audience=self._settings.service,
                    issuer=self._settings.issuer,
                    leeway=_LEEWAY,
                    options={"require": ["exp", "iss", "aud"]},
                )
            except self._jwt.InvalidSignatureError:
                continue
            except self._jwt.InvalidAlgorithmError:
                continue
            except (self._jwt.PyJWTError, ValueError, TypeError, RecursionError):
                return None
            return _granted(claims)
        return None


def _granted(claims: dict[str, Any]) -> Needs:
    granted = set()
    entries = claims.get("access")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        resource = f"{entry.get('type')}:{entry.get('name')}"
        actions = entry.get("actions")
        for action in actions if isinstance(actions, list) else []:
            granted.add((resource, str(action)))
    return frozenset(granted)


def _read_keys(path: Path) -> list[tuple[Key, tuple[str, ...]]]:
    """Return the keys in a file, each with the algorithms that it may sign by."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = []
    try:
        for part in path.read_bytes().split(_MARK)[1:]:
            pem = _MARK + part
            if part.startswith(b"CERTIFICATE"):
                keys.append(_usable(x509.load_pem_x509_certificate(pem).public_key()))
            else:
                keys.append(_usable(load_pem_public_key(pem)))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(
            f"{path}: holds something else than certificates and public keys that sign tokens"
        ) from None
    if not keys:
        raise UsageError(f"{path}: holds no certificate")
    return keys


def _usable(key: object) -> tuple[Key, tuple[str, ...]]:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, rsa.RSAPublicKey):
        return key, _RSA
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key, ("EdDSA",)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key, (_CURVES[key.curve.name],)
    raise ValueError("no token is signed by such a key")
