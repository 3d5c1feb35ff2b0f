"""vLLM for CPUs serves models of the store, in an environment that scripts/make-vllm makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from tests.peers import free_port, missing

pytestmark = pytest.mark.long
#: vLLM imports, loads and warms up for a minute on two cores.
_PATIENCE = 400
_PROMPT = "hello"
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
    prompt = mx.array(tokenizer.encode(_PROMPT, add_special_tokens=False))
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=8)]


@contextmanager
def server(
    environment: Path, store: Path, command: Sequence[str], *nodes: tuple[Path, Sequence[str]]
) -> Iterator[str]:
    """Run a server over a store, and more nodes over theirs; yield its address once it is ready."""
    port = free_port()
    started = []
    own = {
        "PATH": f"{environment}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
    }  # fmt: skip
    try:
        for of, more in ((store, [*command, "--host", "127.0.0.1", "--port", str(port)]), *nodes):
            one = {**os.environ, **own, "MODELPACK_STORE": str(of)}
            with (of.parent / f"vllm-{len(started)}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(more, env=one, stdout=log, stderr=log, start_new_session=True)
                )
        _wait_until_healthy(port, started[0], store.parent / "vllm-0.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(60)
            finally:
                process.kill()


def _wait_until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except requests.ConnectionError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"vLLM did not start:\n{log.read_text()[-4000:]}", pytrace=False)
        time.sleep(0.2)


def tokens(url: str, name: str) -> list[int]:
    body = {
        "model": name, "prompt": _PROMPT, "max_tokens": 8, "ignore_eos": True, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=_PATIENCE)
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
    """Docker's format, from our registry; the weights are read in place."""
    with published(files, tmp_path) as (_, pinned):
        store = tmp_path / "store"
        command = ["vllm", "serve", f"modelpack://{pinned}", *_OPTIONS]
        with server(environment, store, command) as url:
            assert tokens(url, f"modelpack://{pinned}") == expected
    [weights] = [path for path in store.rglob("*.safetensors") if path.is_file()]
    assert weights.stat().st_nlink > 1, "the weights are a copy"


def test_modelpack_serves_a_signed_model_by_vllm(
    environment: Path,
    files: Path,
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CNCF's format, under a policy, and asked by our commands."""
    monkeypatch.setenv("COSIGN_PASSWORD", "")
    store = tmp_path / "store"
    key = tmp_path / "team"
    succeed("keygen", str(key))
    with published(files, tmp_path, format="cncf") as (name, _):
        command = [
            "modelpack", "serve", name, "--backend", "vllm", "--verify-key", f"{key}.pub",
            "--max-model-len", "256", "--runtime-flags", "--enforce-eager --dtype float32",
        ]  # fmt: skip
        own = {**os.environ, "PATH": f"{environment}:{os.environ['PATH']}",
               "MODELPACK_STORE": str(store)}  # fmt: skip
        refused = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 5, refused.stderr
        assert "is not signed" in refused.stderr
        succeed("sign", name, "--key", f"{key}.key")
        with server(environment, store, command) as url:
            assert tokens(url, name) == expected
            header, row = succeed("ps", "--url", url).out.splitlines()
            assert header.split()[0] == "MODEL"
            assert row.split() == [name, "loaded", "256"]
            asked = subprocess.run(
                [sys.executable, "-m", "modelpack", "run", name, _PROMPT, "--url", url,
                 "--max-tokens", "8"],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
            )  # fmt: skip
            assert asked.returncode == 0, asked.stderr
            assert asked.stdout.strip()


def test_two_nodes_with_a_store_each(
    environment: Path, files: Path, expected: list[int], tmp_path: Path
) -> None:
    """Tensor parallelism over processes that share nothing but the registry and loopback."""
    with published(files, tmp_path) as (_, pinned):
        model = f"modelpack://{pinned}"
        command = [
            "vllm", "serve", model, *_OPTIONS, "--tensor-parallel-size", "2", "--nnodes", "2",
            "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank",
        ]  # fmt: skip
        one, two = (tmp_path / node / "store" for node in ("one", "two"))
        for store in (one, two):
            store.parent.mkdir()
        second = (two, [*command, "1", "--headless"])
        with server(environment, one, [*command, "0"], second) as url:
            assert tokens(url, model) == expected
    for store in (one, two):
        assert [path for path in store.rglob("*.safetensors") if path.is_file()]
