"""How long to wait for a registry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds; there is none for a whole transfer, which takes as long as it takes.

    `connect` is for a connection, `idle` for any wait in which nothing comes or goes, `commit` for
    the answer after an upload's last byte (registries may copy the blob in their storage first).
    A download that is slower than `minimum_speed` bytes a second, over `idle`, is a broken one.
    `reply` is for headers, and for all that is not a blob (manifests, tokens, lists, errors): each
    has to be complete so many seconds after its first byte.
    """

    connect: float = 10.0
    idle: float = 60.0
    commit: float = 600.0
    minimum_speed: float = 100.0
    reply: float = 300.0
