"""A Kubernetes of one or more nodes, built from its Go modules, in namespaces of their own.

Needs root, Go, runc, CNI plugins, iptables, kubectl and cgroup v1. The programs take a quarter of
an hour of a processor to build, once for each version.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.node import ADDRESS, BRIDGE, CGROUPS
from tests.interop.go_tool import build_go_tool
from tests.peers import require

HERE = Path(__file__).parent
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet",
            "kube-proxy")  # fmt: skip
CONTAINERD = ("containerd", "containerd-shim-runc-v2", "ctr")
PAUSE = "docker.io/modelpack-test/pause:here"
REGISTRY = f"{ADDRESS}:5000"
_TOKEN = "cluster-admin"
_MEMORY = 12 << 30


class ClusterError(RuntimeError):
    """The cluster does not start, or a command in it failed."""


def build_programs(cache: Path) -> Path:
    """Return the directory of all programs, built where they are not in `cache`."""
    for needed in ("runc", "iptables", "kubectl", "unshare", "nsenter", "ip"):
        require(needed)
    made = {name: build_go_tool(HERE / "kubernetes", cache) for name in PROGRAMS}
    made |= {name: build_go_tool(HERE / "containerd", cache, name) for name in CONTAINERD}
    made |= {name: build_go_tool(HERE / name, cache) for name in ("dns", "pause")}
    key = hashlib.sha256(" ".join(str(made[name]) for name in sorted(made)).encode())
    directory = cache.absolute() / "cluster" / key.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    for name, binary in made.items():
        if not (directory / name).exists():
            os.link(binary, directory / name)
    return directory


class Node:
    """A node: namespaces of its own, with containerd, a kubelet and a kube-proxy.

    Its files are in `directory`; `number` counts from 0.
    """

    def __init__(self, directory: Path, programs: Path, number: int) -> None:
        self.name = f"node-{number}"
        self.address = f"10.10.0.{number + 1}"
        self.subnet = f"10.244.{number}.0/24"
        self.pid = 0
        self.directory = directory / self.name
        self._kubeconfig = directory / "kubeconfig"
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, control_plane: Sequence[list[str]] = ()) -> None:
        """Start its programs, and those of a control plane."""
        self._write(control_plane)
        groups = self._groups()
        command = [
            "unshare", "--mount", "--net", "--pid", "--fork", "--uts", "--ipc", "--cgroup",
            sys.executable, str(HERE / "node.py"), str(self.directory), self.name, self.address,
        ]  # fmt: skip
        environment = {
            "PATH": f"{self._programs}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.directory),
        }  # fmt: skip
        with open(self.directory / "log" / "node.log", "wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment, preexec_fn=lambda: _enter(groups),
            )  # fmt: skip
        until(f"{self.name} starts", (self.directory / "started").exists, 30, self.log)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text().split()[0])

    def stop(self) -> None:
        """End everything in it at once."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # with it, all processes of its namespace
            self.pid = 0
        if self._process is not None:
            self._process.wait(timeout=60)
        for group in self._groups():
            _remove(group)

    def command(self, *command: str) -> list[str]:
        """Return a command that runs `command` in the node's namespaces."""
        return [
            "nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-u", "-i", "-C", "env",
            f"KUBECONFIG={self._kubeconfig}", f"HOME={self.directory.parent}",
            f"PATH={self._programs}:{os.environ['PATH']}", *command,
        ]  # fmt: skip

    def run(self, *command: str, input: str | None = None, check: bool = True) -> str:
        """Run a command in the node's namespaces; return what it printed."""
        return _run(self.command(*command), input, check)

    def import_image(self, archive: Path) -> None:
        """Import an archive of an image."""
        self.run("ctr", "-n", "k8s.io", "images", "import", str(archive))

    def connect(self, other: Node) -> None:
        """Join the networks of two nodes, and route each one's pods to it."""
        enter = ["nsenter", "-t", str(self.pid), "-n", "ip"]  # the process id is that of outside
        _run([*enter, "link", "add", other.name, "type", "veth", "peer", "name", self.name, "netns",
              str(other.pid)])  # fmt: skip
        for here, there in ((self, other), (other, self)):
            here.run("ip", "link", "set", there.name, "master", BRIDGE, "up")
            here.run("ip", "route", "replace", there.subnet, "via", there.address)

    def cut(self, other: Node) -> None:
        """Cut its network off from the other node's."""
        self.run("ip", "link", "set", other.name, "down")

    def volume(self, uid: str, name: str) -> Path:
        """Return the directory of an emptyDir of the pod with this uid."""
        volumes = self.directory / "kubelet" / "pods" / uid / "volumes"
        return volumes / "kubernetes.io~empty-dir" / name

    def log(self) -> str:
        """Return the ends of all logs."""
        logs = sorted((self.directory / "log").glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs)

    def _groups(self) -> list[Path]:
        return [
            Path("/sys/fs/cgroup", name, f"modelpack-cluster-{self.name}")
            for name in (*CGROUPS, "systemd")
        ]

    def _write(self, control_plane: Sequence[list[str]]) -> None:
        """Write the configuration of the node's programs."""
        place, config = self.directory, str(self._kubeconfig)
        for name in ("log", "cni", "registries", "kubelet"):
            (place / name).mkdir(parents=True)
        (place / "resolv.conf").touch()
        _write_json(place / "cni" / "10-pods.conflist", {
            "cniVersion": "1.0.0", "name": "pods", "plugins": [{
                "type": "bridge", "bridge": "pods0", "isGateway": True, "hairpinMode": True,
                "ipam": {"type": "host-local", "dataDir": str(place / "addresses"),
                         "ranges": [[{"subnet": self.subnet}]],
                         "routes": [{"dst": "0.0.0.0/0"}]},
            }],
        })  # fmt: skip
        _write_json(place / "kubelet.json", {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "failCgroupV1": False, "failSwapOn": False, "cgroupDriver": "cgroupfs",
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock", "oomScoreAdj": 0,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"}, "resolvConf": str(place / "resolv.conf"),
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%",
                             "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "clusterDNS": [ADDRESS], "clusterDomain": "cluster.local",
        })  # fmt: skip
        _write_json(place / "proxy.json", {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": "iptables", "clusterCIDR": "10.244.0.0/16", "hostnameOverride": self.name,
            "oomScoreAdj": 0, "clientConnection": {"kubeconfig": config},
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s",
                          "tcpCloseWaitTimeout": "0s"},
        })  # fmt: skip
        registry = place / "registries" / REGISTRY
        registry.mkdir()
        (registry / "hosts.toml").write_text(
            f'server = "http://{REGISTRY}"\n[host."http://{REGISTRY}"]\n'
            'capabilities = ["pull", "resolve"]\n'
        )
        (place / "containerd.toml").write_text(
            _CONTAINERD.format(place=place, cni=_cni_plugins(), runc=require("runc"), pause=PAUSE)
        )
        _write_json(place / "commands.json", [
            *control_plane,
            ["containerd", "-c", str(place / "containerd.toml")],
            ["kubelet", f"--config={place / 'kubelet.json'}", f"--kubeconfig={config}",
             f"--root-dir={place / 'kubelet'}", f"--hostname-override={self.name}",
             f"--node-ip={self.address}"],
            ["kube-proxy", f"--config={place / 'proxy.json'}"],
        ])  # fmt: skip


class Cluster:
    """A running cluster, whose first node has the control plane; its files are in `directory`."""

    def __init__(self, directory: Path, programs: Path) -> None:
        self.directory = directory
        self.nodes = [Node(directory, programs, 0)]
        self._programs = programs
        self._images: list[Path] = []

    def start(self, seconds: float = 120) -> None:
        """Start it; return when its node is ready."""
        self.nodes[0].start(self._control_plane())
        self._until_ready(self.nodes[0], seconds)

    def join(self, seconds: float = 120) -> Node:
        """Start another node, with the images of the others; return it when it is ready."""
        node = Node(self.directory, self._programs, len(self.nodes))
        self.nodes.append(node)
        node.start()
        self.nodes[0].connect(node)
        self._until_ready(node, seconds)
        for archive in self._images:
            node.import_image(archive)
        return node

    def leave(self) -> None:
        """Stop the node that joined last, and remove it from the cluster."""
        node = self.nodes.pop()
        node.stop()
        remove_tree(node.directory)
        self.kubectl("delete", "node", node.name, "--ignore-not-found")

    def stop(self) -> None:
        """End everything in it."""
        for node in reversed(self.nodes):
            node.stop()

    def command(self, *command: str) -> list[str]:
        """Return a command that runs `command` in the first node's namespaces."""
        return self.nodes[0].command(*command)

    def run(self, *command: str, input: str | None = None, check: bool = True) -> str:
        """Run a command in the first node's namespaces; return what it printed."""
        return self.nodes[0].run(*command, input=input, check=check)

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:
        """Run kubectl; return what it printed."""
        return self.run("kubectl", *arguments, input=input, check=check)

    def get(self, *arguments: str) -> Any:
        """Return objects as JSON."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def import_image(self, archive: Path) -> None:
        """Import an archive of an image into all nodes, also those that join later."""
        self._images.append(archive)
        for node in self.nodes:
            node.import_image(archive)

    @contextmanager
    def serving(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a server in the first node's network, beside the pods."""
        with open(self.directory / "beside.log", "ab") as log:
            process = subprocess.Popen(
                self.command(*command), stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)

    def is_ready(self, node: Node) -> bool:
        """Return whether the control plane counts the node as ready."""
        path = '{.status.conditions[?(@.type=="Ready")].status}'
        told = self.kubectl("get", "node", node.name, "-o", f"jsonpath={path}", check=False)
        return told == "True"

    def _until_ready(self, node: Node, seconds: float) -> None:
        def is_ready() -> bool:
            account = self.kubectl("get", "serviceaccount", "default", "-o", "name", check=False)
            return bool(account) and self.is_ready(node)

        until(f"{node.name} is ready", is_ready, seconds, node.log)

    def _control_plane(self) -> list[list[str]]:
        """Write the configuration of the control plane; return its commands."""
        place = self.directory
        for name in ("certs", "etcd"):
            (place / name).mkdir(parents=True)
        key = place / "service-accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        front = place / "front-proxy"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
             "/CN=front-proxy", "-out", f"{front}.crt", "-keyout", f"{front}.key"],
            check=True, capture_output=True,
        )  # fmt: skip
        (place / "tokens.csv").write_text(f'{_TOKEN},admin,admin,"system:masters"\n')
        _write_json(place / "kubeconfig", {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {
                "server": f"https://{ADDRESS}:6443", "insecure-skip-tls-verify": True}}],
            "users": [{"name": "admin", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
        })  # fmt: skip
        config = str(place / "kubeconfig")
        (place / "Corefile").write_text(
            f"cluster.local {{\n bind {ADDRESS}\n errors\n"
            f" kubernetes cluster.local {{\n  kubeconfig {config}\n }}\n}}\n"
        )
        return [
            ["etcd", "--data-dir", str(place / "etcd"), "--unsafe-no-fsync"],
            ["kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", f"--bind-address={ADDRESS}",
             f"--advertise-address={ADDRESS}", f"--cert-dir={place / 'certs'}",
             f"--token-auth-file={place / 'tokens.csv'}", "--authorization-mode=RBAC",
             "--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged",
             "--service-account-issuer=https://kubernetes.default.svc",
             f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
             "--kubelet-preferred-address-types=InternalIP",
             # By this certificate, servers of further APIs trust the names of its users.
             f"--requestheader-client-ca-file={front}.crt",
             f"--proxy-client-cert-file={front}.crt", f"--proxy-client-key-file={front}.key",
             "--requestheader-username-headers=X-Remote-User",
             "--requestheader-group-headers=X-Remote-Group"],
            ["kube-controller-manager", f"--kubeconfig={config}", "--leader-elect=false",
             f"--service-account-private-key-file={key}",
             # Its own certificate and that of the authority, which pods are given.
             f"--root-ca-file={place / 'certs' / 'apiserver.crt'}",
             "--use-service-account-credentials=false",
             "--horizontal-pod-autoscaler-sync-period=5s"],
            ["kube-scheduler", f"--kubeconfig={config}", "--leader-elect=false"],
            ["dns", "-conf", str(place / "Corefile")],
        ]  # fmt: skip


_CONTAINERD = """\
version = 3
root = '{place}/containerd'
state = '/run/containerd'
disabled_plugins = ['io.containerd.nri.v1.nri']
[grpc]
  address = '/run/containerd/containerd.sock'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{pause}'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '{place}/registries'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{cni}']
  conf_dir = '{place}/cni'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = '{runc}'
  SystemdCgroup = false
"""


def until(what: str, done: Callable[[], bool], seconds: float, log: Callable[[], str]) -> None:
    """Return when `done` returns True; raise `ClusterError` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(f"not within {seconds:g} s: {what}\n{log()}")
        time.sleep(0.2)


def program_image(name: str, program: Path, archive: Path, path: str = "program") -> None:
    """Write an OCI archive of an image with nothing but a static program, which it runs."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(program, path)
    config = {
        "architecture": "amd64", "os": "linux", "config": {"Entrypoint": [f"/{path}"]},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer.getvalue())]},
    }  # fmt: skip
    media = "application/vnd.oci.image"
    blobs = [json.dumps(config).encode(), layer.getvalue()]
    parts = [
        {"mediaType": f"{media}.{kind}", "digest": _digest(blob), "size": len(blob)}
        for kind, blob in zip(("config.v1+json", "layer.v1.tar"), blobs, strict=True)
    ]
    manifest = {
        "schemaVersion": 2, "mediaType": f"{media}.manifest.v1+json",
        "config": parts[0], "layers": parts[1:],
    }  # fmt: skip
    blobs.append(json.dumps(manifest).encode())
    entry = {
        "mediaType": manifest["mediaType"], "digest": _digest(blobs[-1]), "size": len(blobs[-1]),
        "annotations": {"io.containerd.image.name": name},
    }  # fmt: skip
    files = {f"blobs/sha256/{_digest(blob)[7:]}": blob for blob in blobs}
    files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with tarfile.open(archive, "w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def _cni_plugins() -> Path:
    for place in (Path("/usr/lib/cni"), Path("/opt/cni/bin")):
        if (place / "bridge").exists():
            return place
    raise ClusterError("the CNI plugins are not installed: Debian's containernetworking-plugins")


def _run(command: Sequence[str], input: str | None = None, check: bool = True) -> str:
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def _enter(groups: Iterable[Path]) -> None:
    """Move this process into cgroups of its own, before its namespaces are made."""
    for group in groups:
        group.mkdir(exist_ok=True)
        if "/cpuset/" in str(group):
            for name in ("cpuset.cpus", "cpuset.mems"):
                (group / name).write_text((group.parent / name).read_text())
            (group / "cgroup.clone_children").write_text("1")
        if "/memory/" in str(group):
            (group / "memory.limit_in_bytes").write_text(str(_MEMORY))
        (group / "cgroup.procs").write_text(str(os.getpid()))


def _remove(group: Path) -> None:
    """Remove a cgroup and those below it, which have no processes any more."""
    if group.is_dir():
        for child in group.iterdir():
            if child.is_dir():
                _remove(child)
        for _ in range(50):
            try:
                group.rmdir()
            except OSError:
                time.sleep(0.1)
            else:
                return


def remove_tree(directory: Path) -> None:
    """Remove the cluster's files, of which some are another user's."""
    shutil.rmtree(directory, ignore_errors=True)
