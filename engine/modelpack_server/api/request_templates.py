"""The check of chat templates in requests: they are code, so only admins may send them.

A template that is the model's own, or empty, changes nothing and always passes.
"""

from __future__ import annotations

from fastapi import Request

from modelpack.errors import DeniedError
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.forwarding import is_direct


def check_request_template(request: Request, *, allowed: bool) -> None:
    """Raise `DeniedError` unless the sender of `request` may send a chat template.

    `allowed` is the server's option; the sender needs a key for all models, or no key where the
    server asks for none and the sender is on this machine.
    """
    if not allowed:
        raise DeniedError(
            "the request has a chat template of its own, which this server refuses",
            hint="leave `template` out, or start the server with --allow-request-templates",
        )
    caller = caller_of(request.scope)
    if caller.is_restricted or (caller.owner is None and not is_direct(request.scope)):
        raise DeniedError(
            "the request has a chat template of its own, which only admins may send",
            hint="leave `template` out, or use a key that is not limited to some models",
        )
