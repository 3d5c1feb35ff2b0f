"""A docker-registry image for a real Docker engine, made without pulling anything.

The image holds Debian's docker-registry binary, the libraries that it is linked with, and a
configuration; `docker import` turns that file tree into an image.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from pathlib import Path

from tests.peers import missing, require

IMAGE = "modelpack-test/docker-registry:debian"
PORT = 5000

_CONFIG = b"""\
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: /var/lib/registry}, delete: {enabled: true}}
http: {addr: ":5000", secret: test}
"""


def require_engine() -> None:
    """Skip, or fail where peers are required, unless a Docker engine answers."""
    docker = require("docker")
    answer = subprocess.run([docker, "info"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        missing(f"no Docker engine answers: {answer.stderr.strip()[:200]}")


def import_registry_image() -> str:
    """Make the image; return its name."""
    binary = require("docker-registry")
    linked = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
    libraries = [Path(found) for found in re.findall(r"(/\S+) \(0x", linked)]
    tree = io.BytesIO()
    with tarfile.open(fileobj=tree, mode="w", dereference=True) as tar:
        tar.add(binary, "bin/docker-registry")
        for library in libraries:
            tar.add(library, str(library).lstrip("/"))
        for name, content in (("etc/registry.yml", _CONFIG), ("tmp/.keep", b"")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    subprocess.run(
        ["docker", "import", "--change", 'ENTRYPOINT ["/bin/docker-registry"]',
         "--change", 'CMD ["serve", "/etc/registry.yml"]', "--change", f"EXPOSE {PORT}",
         "-", IMAGE],
        input=tree.getvalue(), capture_output=True, check=True,
    )  # fmt: skip
    return IMAGE
