"""A registry and small real models, for tests of programs that use models.

    with modelpack.testing.registry() as registry:
        modelpack.push("ai/smol:v1", f"{registry.host}/ai/smol:v1")

`modelpack.testing.weights` fetches small real models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from modelpack.registry_server import RegistryServer, RequestRecord

__all__ = ["registry"]

# Seconds to wait for open connections at the end, so that a test with a hanging connection ends.
_GRACE = 2


@contextmanager
def registry(
    root: Path | None = None,
    *,
    read_only: bool = False,
    allowed_hosts: Sequence[str] = (),
    on_request: Callable[[RequestRecord], None] | None = None,
) -> Iterator[RegistryServer]:
    """Serve a registry on a free loopback port within the context.

    Its store is at `root`, or in a temporary directory that is removed at the end. `on_request` is
    called for each request, in the server's thread.
    """
    with ExitStack() as stack:
        if root is None:
            root = Path(stack.enter_context(TemporaryDirectory(prefix="modelpack-registry-")))
        server = RegistryServer(
            root,
            address="127.0.0.1:0",
            read_only=read_only,
            allowed_hosts=allowed_hosts,
            grace=_GRACE,
            on_request=on_request,
        )
        yield stack.enter_context(server)
