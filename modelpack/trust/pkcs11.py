"""Keys in a hardware security module: sign and read public keys by PKCS #11.

A key is named by a URI such as `pkcs11:token=team;object=release?module-path=/usr/lib/module.so`.
The private key stays in the token, which signs digests that are computed here.
Sources: RFC 7512 (URIs); PKCS #11 3.0, 6.3 (ECDSA: signatures are r and s, points are DER octets).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from modelpack.errors import (
    FormatError,
    ModelpackError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from modelpack.trust.keys import (
    PasswordNeededError,
    PrivateKey,
    PublicKey,
    need_cryptography,
    read_file,
    read_public_key,
    supported,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurve,
        EllipticCurvePublicKey,
        EllipticCurveSignatureAlgorithm,
    )

SCHEME: Final = "pkcs11:"
#: The environment variables of cosign.
MODULE: Final = "COSIGN_PKCS11_MODULE_PATH"
PIN: Final = "COSIGN_PKCS11_PIN"  # the name of a variable
#: The attributes that select a token, each with that of the library's tokens.
_TOKEN: Final = {
    "token": "label",
    "serial": "serial",
    "manufacturer": "manufacturer_id",
    "model": "model",
}
_PATH: Final = frozenset((*_TOKEN, "slot-id", "object", "id", "type"))
_QUERY: Final = frozenset(("module-path", "pin-source"))
_ATTRIBUTE: Final = re.compile(
    r"([a-z0-9-]+)=((?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=/?&|]|%[0-9A-Fa-f]{2})*)"
)
_EXAMPLE: Final = "write it as pkcs11:token=NAME;object=NAME?module-path=FILE"


@dataclass(frozen=True, slots=True)
class KeyURI:
    """The URI of a key: attributes of its token and the label or id of the key."""

    token: Mapping[str, str]
    slot: int | None
    label: str | None
    id: bytes | None
    module: Path | None
    pin_file: Path | None
    name: str

    @classmethod
    def parse(cls, text: str) -> KeyURI:
        """Return the parts of a URI; raise `UsageError`."""
        if "pin-value" in unquote(text).lower():  # anywhere, since errors show the URI
            raise UsageError(
                "a PIN in a URI can be read by other processes",
                hint=f"set {PIN}, or give pin-source=file:/PATH",
            )
        body, _, after = text.removeprefix(SCHEME).partition("?")
        name = f"{SCHEME}{body}"
        path, query = _attributes(body, ";", name), _attributes(after, "&", name)
        for given, known in ((path, _PATH), (query, _QUERY)):
            if unknown := sorted(given.keys() - known):
                raise UsageError(f"{name}: the attribute {unknown[0]} is not supported")
        if "object" not in path and "id" not in path:
            raise UsageError(f"{name}: has neither object nor id, which name a key", hint=_EXAMPLE)
        if path.get("type", "private") not in ("private", "public"):
            raise UsageError(f"{name}: has the type {path['type']}, expected private or public")
        slot = path.get("slot-id")
        if slot is not None and re.fullmatch(r"[0-9]{1,20}", slot) is None:
            raise UsageError(f"{name}: slot-id is not a number")
        if "%00" in after:
            raise UsageError(f"{name}: a path contains a null character")
        module, pin = query.get("module-path"), query.get("pin-source")
        return cls(
            {key: unquote(path[key]) for key in _TOKEN if key in path},
            int(slot) if slot is not None else None,
            unquote(path["object"]) if "object" in path else None,
            unquote_to_bytes(path["id"]) if "id" in path else None,
            Path(unquote(module)) if module is not None else None,
            _file(pin, name) if pin is not None else None,
            name,
        )

    def read_pin(self) -> str | None:
        """Return the PIN in the file of `pin-source` or in the environment, None without one."""
        if self.pin_file is None:
            return os.environ.get(PIN)
        try:
            return read_file(self.pin_file).decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise FormatError("is not a PIN: not UTF-8", path=str(self.pin_file)) from None


def _attributes(text: str, separator: str, name: str) -> dict[str, str]:
    """Return the attributes in a part of a URI, with values that are still encoded."""
    found: dict[str, str] = {}
    for one in text.split(separator) if text else ():
        match = _ATTRIBUTE.fullmatch(one)
        if match is None:
            raise UsageError(f"{name}: is not a PKCS #11 URI", hint=_EXAMPLE)
        if match[1] in found:
            raise UsageError(f"{name}: has the attribute {match[1]} twice")
        found[match[1]] = match[2]
    return found


def _file(text: str, name: str) -> Path:
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    path = unquote(parts.path)  # after the split: %23 and %3F belong to the path
    if parts.scheme not in ("", "file") or parts.netloc or parts.query or path[:1] != "/":
        raise UsageError(f"{name}: pin-source is not a file", hint="write pin-source=file:/PATH")
    return Path(path)


def read_token_key(uri: str, pin: str | None = None) -> PrivateKey:
    """Return the key that `uri` names, after a login with `pin`; it signs in the token.

    Without `pin` it is read from the URI's `pin-source` or the environment. Raises `UsageError`
    for an invalid URI, `PasswordNeededError` without a PIN, `NotFoundError` if there is no such
    token or key or several, `UnsupportedError` for other kinds of keys, and `ModelpackError` if the
    token refuses.
    """
    where = KeyURI.parse(uri)
    key = _TokenKey(where, pin if pin is not None else where.read_pin())
    with key.session() as session:
        private = _key_in(session, where, "PRIVATE_KEY")
        key.point = _public_key_in(session, where)
        _require_signing(session, private, where)
    return PrivateKey(key, where.name)


def public_key_of(key: str) -> PublicKey:
    """Return the public key in a PEM file, or in a token if `key` is a URI of the scheme."""
    return read_token_public_key(key) if key.startswith(SCHEME) else read_public_key(key)


def read_token_public_key(uri: str) -> PublicKey:
    """Return the public key that `uri` names; the errors are those of `read_token_key`.

    Tokens show public keys without a login. If a PIN is known it is used, since some do not.
    """
    where = KeyURI.parse(uri)
    with _session(where, where.read_pin(), needs_login=False) as session:
        return PublicKey(_public_key_in(session, where), where.name)


class _TokenKey:
    """The part of cryptography's private keys that signing needs, for a key in a token.

    Each signature has a session of its own: a session does not survive a fork, or a token that was
    removed and is back.
    """

    __slots__ = ("_pin", "_where", "point")

    def __init__(self, where: KeyURI, pin: str | None) -> None:
        self._where, self._pin = where, pin
        self.point: EllipticCurvePublicKey

    def session(self) -> Any:
        return _session(self._where, self._pin, needs_login=True)

    @property
    def curve(self) -> EllipticCurve:
        return self.point.curve

    def public_key(self) -> EllipticCurvePublicKey:
        return self.point

    def sign(self, data: bytes, signature_algorithm: EllipticCurveSignatureAlgorithm) -> bytes:
        """Return the ASN.1 signature over `data`."""
        from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
        from cryptography.hazmat.primitives.hashes import Hash, HashAlgorithm
        from pkcs11 import Mechanism

        algorithm = signature_algorithm.algorithm
        assert isinstance(algorithm, HashAlgorithm)
        hasher = Hash(algorithm)
        hasher.update(data)
        with self.session() as session:
            key = _key_in(session, self._where, "PRIVATE_KEY")
            raw = bytes(key.sign(hasher.finalize(), mechanism=Mechanism.ECDSA))
        half = len(raw) // 2
        return encode_dss_signature(
            int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big")
        )


@contextmanager
def _session(where: KeyURI, pin: str | None, *, needs_login: bool) -> Iterator[Any]:
    """Open a session with the token of a key; translate the library's errors."""
    need_cryptography()
    try:
        import pkcs11
    except ImportError:
        raise ModelpackError(
            "keys in tokens need the package python-pkcs11, which is not installed",
            hint="run pip install 'modelpack[pkcs11]'",
        ) from None
    path = where.module or os.environ.get(MODULE)
    if path is None:
        raise UsageError(
            f"{where.name}: the library of the token is not known",
            hint=f"give module-path=FILE in the URI, or set {MODULE}",
        )
    try:
        library = pkcs11.lib(str(path))
    except pkcs11.PKCS11Error as error:
        raise ModelpackError(
            f"{path} is not a PKCS #11 library: {error or type(error).__name__}",
            hint="give module-path=FILE in the URI",
        ) from None
    try:
        token = _token_in(library, where)
        locked = pkcs11.TokenFlag.LOGIN_REQUIRED in token.flags
        if locked and needs_login and pin is None:
            raise PasswordNeededError(
                f"{where.name} needs a PIN, but none was given",
                hint=f"set {PIN}, or give pin-source=file:/PATH in the URI",
            )
        with token.open(user_pin=pin if locked else None) as session:
            yield session
    except pkcs11.PKCS11Error as error:
        reason, hint = _reason(error)
        raise ModelpackError(f"{where.name}: {reason}", hint=hint) from None


def _token_in(library: Any, where: KeyURI) -> Any:
    from pkcs11 import TokenFlag

    found = [
        token
        for slot in library.get_slots(token_present=True)
        for token in (slot.get_token(),)
        if TokenFlag.TOKEN_INITIALIZED in token.flags
        and where.slot in (None, slot.slot_id)
        and all(_text(getattr(token, _TOKEN[key])) == value for key, value in where.token.items())
    ]
    if len(found) != 1:
        raise NotFoundError(
            f"{where.name}: {'several tokens match' if found else 'no such token'}",
            hint="list tokens with `pkcs11-tool --list-slots` or `p11tool --list-tokens`",
        )
    return found[0]


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace").rstrip() if isinstance(value, bytes) else value.rstrip()


def _key_in(session: Any, where: KeyURI, kind: str) -> Any:
    """Return the key of a URI: the object of the class `kind`."""
    from pkcs11 import Attribute, ObjectClass

    wanted: dict[Any, Any] = {Attribute.CLASS: ObjectClass[kind]}
    if where.label is not None:
        wanted[Attribute.LABEL] = where.label
    if where.id is not None:
        wanted[Attribute.ID] = where.id
    found = list(session.get_objects(wanted))
    if len(found) != 1:
        what = kind.lower().replace("_", " ")
        raise NotFoundError(
            f"{where.name}: {f'several {what}s match' if found else f'no such {what}'}",
            hint="list keys with `pkcs11-tool --login --list-objects`",
        )
    return found[0]


def _public_key_in(session: Any, where: KeyURI) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.serialization import load_der_public_key
    from pkcs11 import KeyType
    from pkcs11.util.ec import encode_ec_public_key

    key = _key_in(session, where, "PUBLIC_KEY")
    if key.key_type is not KeyType.EC:
        raise UnsupportedError(f"is of type {key.key_type.name}, expected ECDSA", path=where.name)
    try:
        loaded = load_der_public_key(encode_ec_public_key(key))
    except ValueError:
        raise FormatError("is not a public key for signatures", path=where.name) from None
    checked: EllipticCurvePublicKey = supported(loaded, where.name)
    return checked


def _require_signing(session: Any, key: Any, where: KeyURI) -> None:
    from pkcs11 import Attribute, Mechanism

    if Mechanism.ECDSA not in session.token.slot.get_mechanisms():
        raise UnsupportedError("is in a token that does not sign with ECDSA", path=where.name)
    if not key[Attribute.SIGN]:
        raise UnsupportedError("may not sign (CKA_SIGN is false)", path=where.name)


def _reason(error: Exception) -> tuple[str, str | None]:
    """Return why a token refused, and what the user can do."""
    kind = type(error).__name__
    known: dict[str, tuple[str, str | None]] = {
        "PinIncorrect": ("the PIN is wrong", "a token locks after a few wrong PINs"),
        "PinLenRange": ("the PIN is wrong: it is too short or too long", None),
        "PinInvalid": ("the PIN is wrong: it has invalid characters", None),
        "PinLocked": ("the PIN is locked", "unlock it with the token's SO PIN"),
        "PinExpired": ("the PIN has expired", "change it with the token's own tool"),
        "UserPinNotInitialized": ("the token has no user PIN", "set one with the token's own tool"),
        "DeviceRemoved": ("the token was removed", None),
        "TokenNotPresent": ("the token was removed", None),
    }
    return known.get(kind, (f"the token refused: {error or kind}", None))
