"""Check the store, the registry and the ports of this machine, for `modelpack doctor`."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from modelpack.errors import AuthError, ModelpackError
from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore, default_store_root

_LITTLE_ROOM = 5 * 10**9
_CONNECT_SECONDS = 5.0


class Verdict(StrEnum):
    """What came of a check."""

    OK = "ok"
    WARNING = "warning"  # some commands will not work, or not as they could
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `details` is for programs; `hint` says what to do."""

    name: str
    verdict: Verdict
    message: str
    hint: str | None = None
    details: dict[str, Any] | None = None


def check_store(root: str | None = None) -> Check:
    """Look at the store: whether it opens, can be written to, and has room; None is the default."""
    where = Path(root).expanduser() if root else default_store_root()
    if not where.exists():
        above = next(path for path in where.parents if path.exists())
        if not os.access(above, os.W_OK):
            return Check(
                "store", Verdict.FAILED, f"{where} does not exist, and {above} is not writable",
                hint="name another: --store DIR, or MODELPACK_STORE",
            )  # fmt: skip
        return Check("store", Verdict.OK, f"{where} will be made at the first use")
    try:
        store = LayoutStore(where, create=False)
        models = len(store.models())
    except ModelpackError as error:
        return Check("store", Verdict.FAILED, str(error), hint=error.hint)
    disk = os.statvfs(where)
    free = disk.f_bavail * disk.f_frsize
    details = {"path": str(where), "models": models, "free": free}
    said = f"{where}: {models} model{'' if models == 1 else 's'}, {free / 1e9:.1f} GB free"
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        return Check(
            "store", Verdict.WARNING, f"{said}; it cannot be written to: {error.strerror}",
            hint="models can be read and served, not pulled or packaged", details=details,
        )  # fmt: skip
    if free < _LITTLE_ROOM:
        hint = "`modelpack gc` frees what no model uses"
        return Check("store", Verdict.WARNING, f"{said}, which is little", hint, details)
    return Check("store", Verdict.OK, said, details=details)


def check_registry(host: str, remote: RemoteOptions | None = None) -> Check:
    """Ask the registry at `host` whether it is one, once, and for five seconds at most."""
    from modelpack.registry import Registry, RetryPolicy, Timeouts, TlsOptions

    remote = remote or RemoteOptions()
    name = f"registry {host}"
    try:
        with Registry(
            host,
            plain_http=remote.plain_http,
            timeouts=Timeouts(connect=_CONNECT_SECONDS, idle=_CONNECT_SECONDS),
            retry=RetryPolicy(tries=1),
            tls=remote.tls or TlsOptions(),
        ) as registry:
            registry.ping()
    except AuthError:
        return Check(
            name, Verdict.WARNING, "answers, and wants other credentials",
            hint=f"modelpack login {host}; public models may be readable without",
        )  # fmt: skip
    except ModelpackError as error:
        return Check(name, Verdict.WARNING, str(error), hint=error.hint)
    return Check(name, Verdict.OK, "answers")


def check_port(port: int, purpose: str, host: str = "127.0.0.1") -> Check:
    """Look whether a server could listen at `host`:`port`, which is for `purpose`."""
    name = f"port {port}"
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            why = error.strerror or str(error)
            return Check(name, Verdict.WARNING, f"cannot be listened on: {why} ({purpose})")
        return Check(
            name, Verdict.WARNING, f"is in use ({purpose})",
            hint="if that is not the server you want there: choose another with --port",
        )  # fmt: skip
    return Check(name, Verdict.OK, f"is free ({purpose})")


def worst(checks: Sequence[Check]) -> Verdict:
    """Return the worst verdict."""
    order = list(Verdict)
    return max((check.verdict for check in checks), key=order.index, default=Verdict.OK)
