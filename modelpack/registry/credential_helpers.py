"""Credential helpers: programs that keep credentials in a keychain.

The docker-credential-helpers protocol: `docker-credential-NAME get|store|erase`, the server's URL
or a JSON object on stdin, JSON or a message on stdout. Secrets go through pipes, never through
arguments, and no message of ours repeats one.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any, Final

from modelpack.errors import AuthError, ManifestError
from modelpack.gojson import decode_object
from modelpack.registry.credentials import TOKEN_USER, Credential

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_SECONDS: Final = 60.0
_MAX_ANSWER: Final = 1024 * 1024
# A helper that knows nothing of a host says so in words and fails.
_NOT_FOUND: Final = "credentials not found"


class CredentialHelper:
    """The helper `name`, as Docker's config.json calls it; raises `AuthError` for everything."""

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str) or not _NAME.match(name):
            raise AuthError(f"{str(name)[:100]!r} is not the name of a credential helper")
        self.program = f"docker-credential-{name}"

    def get(self, server: str) -> Credential | None:
        """Return what the helper holds for `server`."""
        answer = self._run("get", server, server)
        if answer is None:
            return None
        try:
            value = decode_object(answer, self.program, limit=_MAX_ANSWER)
        except ManifestError as error:
            raise AuthError(str(error)) from None
        username, secret = value.get("Username"), value.get("Secret")
        if not isinstance(username, str) or not isinstance(secret, str):
            raise AuthError(f"{self.program} answered without Username and Secret for {server}")
        if not (username or secret):
            return None
        return Credential.of_pair(username, secret, self.program)

    def store(self, server: str, credential: Credential) -> None:
        """Have the helper keep `credential` for `server`."""
        secret = credential.identity_token or credential.password
        username = TOKEN_USER if credential.identity_token else credential.username
        entry = {"ServerURL": server, "Username": username, "Secret": secret}
        self._run("store", json.dumps(entry), server, secret)

    def erase(self, server: str) -> None:
        """Have the helper forget `server`; it may never have known it."""
        self._run("erase", server, server)

    def _run(self, action: str, sent: str, server: str, secret: str = "") -> bytes | None:
        """Return what the helper says, None where it says that it knows nothing of `server`."""
        try:
            answer = subprocess.run(
                [self.program, action],
                input=sent.encode(),
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise AuthError(
                f"{self.program}, the credential helper for {server}, is not on PATH"
            ) from None
        except OSError as error:
            raise AuthError(f"{self.program} does not start: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise AuthError(f"{self.program} did not answer in {_SECONDS:.0f} s") from None
        if answer.returncode == 0:
            return answer.stdout
        said = answer.stdout.decode(errors="replace").strip()
        if _NOT_FOUND in said:
            return None
        if secret:
            said = said.replace(secret, "…")
        raise AuthError(f"{self.program} failed for {server}: {said[:200] or 'it said nothing'}")
