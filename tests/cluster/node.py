"""PID 1 of a node's own namespaces: its mounts, its network and its programs.

    python node.py DIRECTORY NAME ADDRESS

`cluster.Node` starts it by `unshare`. Nothing outside of the namespaces is changed: mounts are
private, and the kernel's settings that the kubelet would change are hidden by files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

#: The address of the first node.
ADDRESS = "10.10.0.1"
BRIDGE = "nodes0"
CGROUPS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
#: What the kubelet sets for the whole machine, unless it has the value already.
SETTINGS = {
    "vm/overcommit_memory": 1, "vm/panic_on_oom": 0, "kernel/panic": 10, "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000, "kernel/keys/root_maxbytes": 25000000,
}  # fmt: skip


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def mount(kind: str, at: str, *options: str) -> None:
    Path(at).mkdir(parents=True, exist_ok=True)
    run("mount", "-t", kind, *options, kind, at)


def prepare(directory: Path, name: str, address: str) -> None:
    run("mount", "--make-rprivate", "/")
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("tmpfs", "/sys/fs/cgroup")
    for controller in CGROUPS:
        mount("cgroup", f"/sys/fs/cgroup/{controller}", "-o", controller)
    mount("cgroup", "/sys/fs/cgroup/systemd", "-o", "none,name=systemd")
    for place in ("/run", "/var/log", "/var/lib/cni", "/var/lib/kubelet"):
        mount("tmpfs", place)
    Path("/run/lock").mkdir()
    for setting, value in SETTINGS.items():
        if Path("/proc/sys", setting).exists():
            shown = directory / setting.replace("/", ".")
            shown.write_text(f"{value}\n")
            run("mount", "--bind", str(shown), f"/proc/sys/{setting}")
    run("mount", "--make-rshared", "/")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{address}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    run("ip", "route", "add", "default", "dev", BRIDGE)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    run("hostname", name)


def start(directory: Path, command: list[str]) -> int:
    """Start a program of the node; return its process id."""
    with open(directory / "log" / f"{Path(command[0]).name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT).pid


def main() -> None:
    directory, name, address = Path(sys.argv[1]), *sys.argv[2:]
    # The end of PID 1 ends everything in its namespace.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    prepare(directory, name, address)
    commands: list[list[str]] = json.loads((directory / "commands.json").read_text())
    running = {start(directory, command): command for command in commands}
    (directory / "started").touch()
    while True:
        ended, _ = os.wait()  # also the orphans of containers
        if ended in running:  # as the kubelet does before containerd has its socket
            time.sleep(0.5)
            command = running.pop(ended)
            running[start(directory, command)] = command


if __name__ == "__main__":
    main()
