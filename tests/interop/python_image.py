"""A base image with Python, made of the one that runs the tests: nothing is pulled."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.peers import require

IMAGE = "modelpack-test/python:here"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
#: What compiled packages are linked with, though Python is not.
_LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libdl.so.2",
              "librt.so.1")  # fmt: skip


def import_python_image() -> str:
    """Make the image; return its name."""
    interpreter = Path(sys.base_prefix, "bin", f"python3.{sys.version_info[1]}").resolve()
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    shell = require("sh")
    modules = sorted((library / "lib-dynload").glob("*.so"))
    tree = io.BytesIO()
    with tarfile.open(fileobj=tree, mode="w", dereference=True) as tar:
        tar.add(interpreter, str(interpreter)[1:])
        tar.add(shell, "bin/sh")
        tar.add(library, str(library)[1:], filter=_wanted)
        for linked in _linked([interpreter, shell, *modules]):
            tar.add(linked, linked[1:])
        wheels = Path("/usr/share/python-wheels")  # Debian's ensurepip takes pip from there
        if wheels.is_dir():
            tar.add(wheels, str(wheels)[1:])
        if Path(_CERTIFICATES).is_file():
            tar.add(_CERTIFICATES, _CERTIFICATES[1:])
        for name in ("usr/local/bin/python", "usr/local/bin/python3"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, str(interpreter)
            tar.addfile(link)
        # Where the interpreter is below /root, all users have to come by there.
        for name, mode in (("tmp", 0o1777), ("root", 0o755), ("var/tmp", 0o1777)):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            tar.addfile(folder)
    changes = ["ENV PATH=/usr/local/bin:/usr/bin:/bin", "ENV LANG=C.UTF-8",
               f"ENV SSL_CERT_FILE={_CERTIFICATES}", f"ENV PIP_CERT={_CERTIFICATES}"]  # fmt: skip
    command = ["docker", "import", *(word for change in changes for word in ("--change", change))]
    subprocess.run([*command, "-", IMAGE], input=tree.getvalue(), capture_output=True, check=True)
    return IMAGE


def _wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    parts = Path(entry.name).parts
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "idlelib", "tkinter"}
    return None if left_out & set(parts) else entry


def _linked(programs: Iterable[Path]) -> list[str]:
    found = set()
    for program in programs:
        told = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        found |= set(re.findall(r"(/\S+) \(0x", told))
    cache = subprocess.run(
        [require("ldconfig"), "-p"], capture_output=True, text=True, check=True
    ).stdout
    for name in _LIBRARIES:
        if place := re.search(rf"^\s{re.escape(name)} \(.*x86-64.*\) => (\S+)$", cache, re.M):
            found.add(place[1])
    return sorted(found)
