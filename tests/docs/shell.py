"""Run the blocks of a page in order, in one shell, on a network of its own.

The shell is in new namespaces: no network but loopback, where ports 443 and 5000 are free and
names such as registry.example lead to servers of the test; a /etc/hosts that says so; an empty
/var/lib; and processes that end with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block
from tests.docs.world import World
from tests.peers import missing, require

_UNSHARE = (
    "--map-root-user",
    "--net",
    "--mount",
    "--pid",
    "--mount-proc",
    "--fork",
    "--kill-child",
)
_SECONDS = 500

_START = """\
set -euo pipefail
mount --bind {root}/hosts /etc/hosts
# Returns once the program says where it listens; its output goes to the file of that name.
in_background() {{
    local said=$1; shift
    mkfifo "$said.pipe"
    "$@" > "$said.pipe" &
    exec 9< "$said.pipe"
    IFS= read -r -t 240 line <&9 || {{ echo "it said nothing for four minutes" >&2; return 1; }}
    echo "$line"
    cat <&9 > "$said" & exec 9<&-
}}
mount -t tmpfs tmpfs /var/lib
in_background {root}/network {python} -m tests.docs.network {settings} > /dev/null
export HF_ENDPOINT=$line
cd {here}
git init -q
"""


def can_isolate() -> bool:
    """Whether this machine lets us have namespaces, as Linux does for most users."""
    command = [str(require("unshare")), *_UNSHARE, "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(blocks: Sequence[Block], world: World) -> str:
    """Run the blocks; return what they print. Fails the test with the block that fails."""
    if not sys.platform.startswith("linux") or not can_isolate():
        missing("namespaces of Linux cannot be made here")
    (world.root / "hosts").write_text(world.hosts)
    script = [
        _START.format(
            root=world.root, here=world.here, python=sys.executable, settings=world.write_settings()
        )
    ]
    for i, block in enumerate(blocks):
        code = world.root / f"block-{i}.{block.language}"
        code.write_text(block.code + "\n")
        script.append(f"echo '@@ {block.place}' >&2\n{_line(block, code)}")
    (world.root / "script").write_text("\n".join(script))
    done = subprocess.run(
        [require("unshare"), *_UNSHARE, "bash", world.root / "script"],
        env=_environment(world),
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        place, _, said = done.stderr.rpartition("@@ ")[2].partition("\n")
        pytest.fail(
            f"{place} ends with {done.returncode}\n{said}\nstdout: {done.stdout[-2000:]}",
            pytrace=False,
        )
    return done.stdout


def _line(block: Block, code: Path) -> str:
    if block.file:
        return f"cp {code} {block.file}"
    if block.language == "python":
        return f"python {code}"
    if block.server:
        return f"in_background {code}.out bash -euo pipefail {code}"
    if block.exit_code:
        return (
            f"code=0; bash -euo pipefail {code} || code=$?\n"
            f'[ $code = {block.exit_code} ] || {{ echo "exit code $code" >&2; exit 1; }}'
        )
    return f". {code}"


def _environment(world: World) -> dict[str, str]:
    programs = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    return {
        **world.environment,
        "PATH": programs,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'engine'}",
        **{name: os.environ[name] for name in ("MODELPACK_CACHE",) if name in os.environ},
    }
