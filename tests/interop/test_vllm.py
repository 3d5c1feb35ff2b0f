"""vLLM itself over a model of the store. Where it is installed: pytest -m vllm tests/interop.

Left out by its marker, not skipped: vLLM needs versions of its own of much that we test with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

import modelpack
from modelpack.store.layout import LayoutStore
from tests.peers import free_port, wait_for_port

pytestmark = pytest.mark.vllm
#: vLLM loads and compiles for minutes.
_PATIENCE = 600


@pytest.fixture
def store(tmp_path: Path) -> LayoutStore:
    """A store with team/tiny: a llama of random weights that transformers reads."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    files = tmp_path / "files"
    transformers.LlamaForCausalLM(config).save_pretrained(files)
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"</s>": 256}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    made.save_pretrained(files)
    found = LayoutStore(tmp_path / "store")
    modelpack.package("team/tiny", modelpack.PackageRequest(safetensors_dir=files), store=found)
    return found


@contextmanager
def running(store: LayoutStore, *command: str) -> Iterator[str]:
    """Run a server over the store; yield its address."""
    port = free_port()
    process = subprocess.Popen(
        [*command, "--port", str(port)], env={**os.environ, "MODELPACK_STORE": str(store.root)}
    )
    try:
        wait_for_port(port, process, _PATIENCE)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def completes(url: str, name: str) -> bool:
    body = {"model": name, "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=_PATIENCE)
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["usage"]["completion_tokens"] == 4)


def test_modelpack_serve_with_vllm(store: LayoutStore) -> None:
    command = (sys.executable, "-m", "modelpack", "serve", "team/tiny", "--backend", "vllm",
               "--max-model-len", "256", "--gpu-memory-utilization", "0.3")  # fmt: skip
    with running(store, *command) as url:
        assert completes(url, "team/tiny")


def test_vllm_serve_of_a_modelpack_name(store: LayoutStore) -> None:
    command = ("vllm", "serve", "modelpack://team/tiny", "--max-model-len", "256",
               "--gpu-memory-utilization", "0.3", "--host", "127.0.0.1")  # fmt: skip
    with running(store, *command) as url:
        assert completes(url, "modelpack://team/tiny")
