"""The `WWW-Authenticate` header: which proof of identity a server wants.

RFC 9110, sections 11.2 to 11.6.1::

    WWW-Authenticate ::= challenge *( "," challenge )
    challenge        ::= scheme [ 1*SP ( token68 | param *( "," param ) ) ]
    param            ::= token "=" ( token | quoted-string )
    token68          ::= 1*( ALPHA | DIGIT | "-" | "." | "_" | "~" | "+" | "/" ) *"="

White space around "," and "=" is allowed, and so are empty list elements. Several headers have been
joined by commas before they come here. A comma separates parameters as well as challenges; what
follows it is a parameter if it is a token and a "=".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 - a grammar, no secret
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=[\s,]|\Z)")
_PARAM = re.compile(rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN})(?=[\s,]|\Z))')
_TOKEN68 = re.compile(r"[ \t]+([A-Za-z0-9._~+/-]+=*)[ \t]*(?=,|\Z)")
_MAX_LENGTH = 16 * 1024


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate; `scheme` and the names of `parameters` are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    token68: str | None = None


def parse_challenges(header: str) -> list[Challenge]:
    """Return the challenges in the order of the header, up to the first that does not parse."""
    header = header[:_MAX_LENGTH]
    challenges: list[Challenge] = []
    position = 0
    while match := _SCHEME.match(header, position):
        scheme, position = match[1].lower(), match.end()
        token68 = _TOKEN68.match(header, position)
        if token68 and not _PARAM.match(header, position):
            # `Negotiate abc` - but `Basic Bearer` would be two schemes without their comma.
            challenges.append(Challenge(scheme, {}, token68[1]))
            position = token68.end()
            continue
        parameters: dict[str, str] = {}
        while match := _PARAM.match(header, position):
            value = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
            parameters.setdefault(match[1].lower(), value)
            position = match.end()
        challenges.append(Challenge(scheme, parameters))
    return challenges
