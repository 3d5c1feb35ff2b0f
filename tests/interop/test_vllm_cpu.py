"""vLLM for CPUs serves models of the store, in an environment that scripts/make-vllm makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.cli.running import succeed
from tests.gateway.servers import gateway
from tests.peers import free_port, missing, require

pytestmark = pytest.mark.long
#: vLLM imports, loads and warms up for a minute on two cores.
_PATIENCE = 400
PROMPT = "hello"
_LAYERS, _WIDTH, _VOCABULARY = 2, 128, 257


@pytest.fixture(scope="session")
def environment() -> Path:
    """The directory of vLLM's programs."""
    named = os.environ.get("MODELPACK_VLLM")
    if not named:
        missing("vLLM is not installed (see MODELPACK_VLLM)")
    assert named
    return Path(named) / "bin"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights and a tokenizer of bytes."""
    made = tmp_path_factory.mktemp("llama")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": _VOCABULARY,
        "hidden_size": _WIDTH, "intermediate_size": 256, "num_hidden_layers": _LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 256,
        "eos_token_id": 256, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (made / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(5)

    def matrix(*shape: int) -> Any:
        return (random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(_VOCABULARY, _WIDTH) * 8,
        "lm_head.weight": matrix(_VOCABULARY, _WIDTH) * 4,
        "model.norm.weight": np.ones(_WIDTH, np.float32),
    }
    for index in range(_LAYERS):
        layer = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = np.ones(_WIDTH, np.float32)
        for name in "qkvo":
            weights[f"{layer}.self_attn.{name}_proj.weight"] = matrix(_WIDTH, _WIDTH)
        for name in ("gate", "up"):
            weights[f"{layer}.mlp.{name}_proj.weight"] = matrix(256, _WIDTH)
        weights[f"{layer}.mlp.down_proj.weight"] = matrix(_WIDTH, 256)
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"</s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(made / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }  # fmt: skip
    (made / "tokenizer_config.json").write_text(json.dumps(about))
    return made


@pytest.fixture(scope="module")
def expected(files: Path) -> list[int]:
    """The tokens after the prompt, by mlx-lm in float32."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = load(str(files))[:2]
    prompt = mx.array(tokenizer.encode(PROMPT, add_special_tokens=False))
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=8)]


@dataclass
class Node:
    """A process of vLLM over a store, with more of its environment."""

    store: Path
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.store.parent / "vllm.log"


@contextmanager
def nodes(environment: Path, *started: Node) -> Iterator[subprocess.Popen[bytes]]:
    """Run the processes of a server; yield the first, which has the API."""
    own = {
        "PATH": f"{environment}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
    }  # fmt: skip
    running = []
    try:
        for node in started:
            one = {**os.environ, **own, "MODELPACK_STORE": str(node.store), **node.environment}
            with node.log.open("wb") as log:
                running.append(
                    subprocess.Popen(node.command, env=one, stdout=log, stderr=log,
                                     start_new_session=True)
                )  # fmt: skip
        yield running[0]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(60)
            finally:
                process.kill()


@contextmanager
def server(environment: Path, store: Path, command: Sequence[str]) -> Iterator[str]:
    """Run a server over a store; yield its address once it is ready."""
    port = free_port()
    node = Node(store, [*command, "--host", "127.0.0.1", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"

    def is_healthy() -> bool:
        try:
            return requests.get(f"{url}/health", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    with nodes(environment, node) as process:
        _wait(process, node.log, is_healthy)
        yield url


def _wait(process: subprocess.Popen[bytes], log: Path, is_ready: Callable[[], bool]) -> None:
    """Return when a process is ready; fail if it ends before, or takes too long."""
    deadline = time.monotonic() + _PATIENCE
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"it did not start:\n{log.read_text()[-4000:]}", pytrace=False)
        time.sleep(0.2)


def completion(name: str) -> dict[str, Any]:
    """Return the body of a request for eight tokens."""
    return {
        "model": name, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip


def tokens(url: str, name: str) -> list[int]:
    answer = requests.post(f"{url}/v1/completions", json=completion(name), timeout=_PATIENCE)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    found: list[int] = choice["token_ids"]
    return found


@contextmanager
def published(files: Path, directory: Path, **more: Any) -> Iterator[tuple[str, str]]:
    """Package the files and push them to a registry; yield the model's name, by tag and digest."""
    with registry() as source:
        repository = f"{source.host}/team/tiny"
        request = modelpack.PackageRequest(safetensors_dir=files, **more)
        store = LayoutStore(directory / "first")
        made = modelpack.package(f"{repository}:v1", request, store=store, push=True)
        yield f"{repository}:v1", f"{repository}@{made.digest}"


_OPTIONS = ("--max-model-len", "256", "--enforce-eager", "--dtype", "float32")


def test_vllm_pulls_a_model_by_its_digest(
    environment: Path, files: Path, expected: list[int], tmp_path: Path
) -> None:
    """Docker's format, from our registry, also as a draft model; weights are read in place."""
    with published(files, tmp_path) as (_, pinned):
        store = tmp_path / "store"
        draft = {"method": "draft_model", "model": f"modelpack://{pinned}",
                 "num_speculative_tokens": 2}  # fmt: skip
        command = ["vllm", "serve", f"modelpack://{pinned}", *_OPTIONS, "--speculative-config",
                   json.dumps(draft)]  # fmt: skip
        with server(environment, store, command) as url:
            assert tokens(url, f"modelpack://{pinned}") == expected
            metrics = requests.get(f"{url}/metrics", timeout=30).text
    accepted = re.findall(
        r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} (\S+)$", metrics, re.M
    )
    assert sum(map(float, accepted)) > 0
    [weights] = [path for path in store.rglob("*.safetensors") if path.is_file()]
    assert weights.stat().st_nlink > 1, "the weights are a copy"


def test_modelpack_serves_a_signed_model_by_vllm(
    environment: Path,
    files: Path,
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CNCF's format, a required key, two workers; asked by our commands and through a gateway."""
    monkeypatch.setenv("COSIGN_PASSWORD", "")
    store = tmp_path / "store"
    key = tmp_path / "team"
    succeed("keygen", str(key))
    with published(files, tmp_path, format="cncf") as (name, _):
        command = [
            "modelpack", "serve", name, "--backend", "vllm", "--verify-key", f"{key}.pub",
            "--max-model-len", "256", "--tensor-parallel-size", "2",
            "--runtime-flags", "--enforce-eager --dtype float32",
        ]  # fmt: skip
        own = {**os.environ, "PATH": f"{environment}:{os.environ['PATH']}",
               "MODELPACK_STORE": str(store)}  # fmt: skip
        refused = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 5, refused.stderr
        assert "is not signed" in refused.stderr
        succeed("sign", name, "--key", f"{key}.key")
        with server(environment, store, command) as url:
            assert tokens(url, name) == expected
            with gateway(url) as served:
                assert tokens(served.url, name) == expected
            header, row = succeed("ps", "--url", url).out.splitlines()
            assert header.split()[0] == "MODEL"
            assert row.split() == [name, "loaded", "256"]
            asked = subprocess.run(
                [sys.executable, "-m", "modelpack", "run", name, PROMPT, "--url", url,
                 "--max-tokens", "8"],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
            )  # fmt: skip
            assert asked.returncode == 0, asked.stderr
            assert asked.stdout.strip()


@dataclass
class Network:
    """A network namespace with an address on the link to the other one."""

    holder: subprocess.Popen[bytes]
    address: str

    def command(self, *words: str) -> list[str]:
        """Return a command that runs `words` in this namespace."""
        return [str(require("nsenter")), "-t", str(self.holder.pid), "-n", *words]

    def run(self, *words: str, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(self.command(*words), env=env, capture_output=True, text=True,
                              timeout=_PATIENCE)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def two_networks() -> Iterator[tuple[Network, Network]]:
    """Two namespaces that reach each other, and nothing else."""
    if os.geteuid() != 0:
        missing("network namespaces need root")
    ip, made = str(require("ip")), []
    here = os.readlink("/proc/self/ns/net")
    try:
        for number in (1, 2):
            holder = subprocess.Popen([require("unshare"), "--net", "sleep", "infinity"])
            made.append(Network(holder, f"10.77.0.{number}"))
            while os.readlink(f"/proc/{holder.pid}/ns/net") == here:
                assert holder.poll() is None, "unshare failed"
                time.sleep(0.01)
        one, two = made
        one.run(ip, "link", "add", "node0", "type", "veth", "peer", "name", "node0", "netns",
                str(two.holder.pid))  # fmt: skip
        for network in made:
            network.run(ip, "address", "add", f"{network.address}/24", "dev", "node0")
            for device in ("lo", "node0"):
                network.run(ip, "link", "set", device, "up")
        yield one, two
    finally:
        for network in made:
            network.holder.kill()
            network.holder.wait()


def test_two_nodes_with_a_network_and_a_store_each(
    environment: Path, files: Path, expected: list[int], tmp_path: Path
) -> None:
    """Tensor parallelism over nodes that share a link and a registry, and pull by digest."""
    modelpack = str(Path(sys.executable).with_name("modelpack"))
    store = str(tmp_path / "published")
    mirrors = tmp_path / "registries.toml"
    with two_networks() as (one, two):
        registry = f"{one.address}:5000"
        mirrors.write_text(
            '[[registry]]\nprefix = "registry.example"\n'
            f'[[registry.mirror]]\nlocation = "http://{registry}"\n'
        )
        source = Node(
            tmp_path / "registry" / "store",
            one.command(modelpack, "registry", "serve", "--host", one.address, "--port", "5000",
                        "--allow-anonymous"),
        )  # fmt: skip
        started = []
        for rank, network in enumerate((one, two)):
            own = {"VLLM_HOST_IP": network.address, "GLOO_SOCKET_IFNAME": "node0",
                   "MODELPACK_MIRRORS": str(mirrors)}  # fmt: skip
            started.append(Node(tmp_path / f"node-{rank}" / "store", [], own))
        for node in (source, *started):
            node.store.parent.mkdir()
        with nodes(environment, source) as process:
            _wait(process, source.log, lambda: registry in source.log.read_text())
            digest = one.run(
                modelpack, "--store", store, "package", "--safetensors-dir", str(files),
                f"{registry}/team/tiny:v1", "--push", "--plain-http", "--quiet",
            ).strip()  # fmt: skip
            model = f"modelpack://registry.example/team/tiny@{digest}"
            command = [
                str(environment / "vllm"), "serve", model, *_OPTIONS, "--tensor-parallel-size", "2",
                "--nnodes", "2", "--master-addr", one.address, "--node-rank",
            ]  # fmt: skip
            started[0].command = one.command(*command, "0", "--host", "127.0.0.1")
            started[1].command = two.command(*command, "1", "--headless")

            def ask(path: str, *options: str) -> str:
                curl = (str(require("curl")), "-s", "-m", "60", *options)
                done = subprocess.run(one.command(*curl, f"http://127.0.0.1:8000{path}"),
                                      capture_output=True, text=True)  # fmt: skip
                return done.stdout

            with nodes(environment, *started) as server:
                status = ("-o", "/dev/null", "-w", "%{http_code}")
                _wait(server, started[0].log, lambda: ask("/health", *status) == "200")
                told = ask("/v1/completions", "-H", "Content-Type: application/json", "-d",
                           json.dumps(completion(model)))  # fmt: skip
    [choice] = json.loads(told)["choices"]
    assert choice["token_ids"] == expected
    for node in started:
        [weights] = [path for path in node.store.rglob("*.safetensors") if path.is_file()]
        assert weights.stat().st_nlink > 1, "the weights are a copy"
