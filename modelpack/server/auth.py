"""Who may use the registry: by user and password, or by tokens; all others are answered 401."""

from __future__ import annotations

import base64
import binascii
from typing import Final, Protocol

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from modelpack.server.access import Needs, spelled
from modelpack.server.errors import ApiError, Code
from modelpack.server.htpasswd import PasswordFile
from modelpack.server.tokens import TokenSettings, TokenVerifier

#: Passwords that are compared at a time: each takes a processor for a while.
_AT_A_TIME: Final = 2
_MAX_HEADER: Final = 32 * 1024


class Guard(Protocol):
    """Decides about requests."""

    async def check(self, request: Request, needs: Needs) -> None:
        """Raise `ApiError` (401) unless the request proves that it may have what it needs."""
        ...


class Passwords:
    """Lets the users of a password file do everything (RFC 7617)."""

    def __init__(self, file: PasswordFile) -> None:
        self._file = file
        self._limiter: CapacityLimiter | None = None

    async def check(self, request: Request, needs: Needs) -> None:
        """Raise the challenge unless user and password are right."""
        pair = _decoded(_proof(request, "basic"))
        if pair is not None:
            # Those who guess passwords have to wait for each other, not those who know one.
            if await run_in_threadpool(self._file.remembers, *pair):
                return
            if self._limiter is None:
                self._limiter = CapacityLimiter(_AT_A_TIME)
            right = await anyio.to_thread.run_sync(self._file.check, *pair, limiter=self._limiter)
            if right:
                return
        message = "wrong user or password" if pair else "this registry wants a user and password"
        raise _unauthorized(message, 'Basic realm="modelpack", charset="UTF-8"')


class BearerTokens:
    """Lets holders of a token do what it says (RFC 6750)."""

    def __init__(self, settings: TokenSettings) -> None:
        self._verifier = TokenVerifier(settings)
        self._challenge = f'Bearer realm="{settings.realm}",service="{settings.service}"'

    async def check(self, request: Request, needs: Needs) -> None:
        """Raise the challenge, with the scope that is missing, unless the token has it."""
        proof = _proof(request, "bearer")
        allowed = self._verifier.allowed(proof) if proof else None
        if allowed is not None and needs <= allowed:
            return
        challenge = self._challenge + (f',scope="{spelled(needs)}"' if needs else "")
        if allowed is not None:
            raise _unauthorized("the token allows less", f'{challenge},error="insufficient_scope"')
        if proof:
            raise _unauthorized("the token is not valid", f'{challenge},error="invalid_token"')
        raise _unauthorized("this registry wants a token", challenge)


def _proof(request: Request, wanted: str) -> str:
    header = request.headers.get("authorization", "")[:_MAX_HEADER]
    scheme, _, proof = header.partition(" ")
    return proof.strip() if scheme.lower() == wanted else ""


def _decoded(proof: str) -> tuple[str, str] | None:
    try:
        text = base64.b64decode(proof, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    username, colon, password = text.partition(":")
    return (username, password) if colon else None


def _unauthorized(message: str, challenge: str) -> ApiError:
    # The scope comes from a path, whose characters a header may not all have.
    clean = challenge.encode("ascii", "replace").decode()
    clean = "".join(c if c.isprintable() else "?" for c in clean)
    return ApiError(401, Code.UNAUTHORIZED, message, headers={"WWW-Authenticate": clean})
